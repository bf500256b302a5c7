"""Models of other libraries by name: their features are the library's own, and are compared."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam
from segment_anything.modeling.transformer import TwoWayTransformer
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from expedit_d2.api import apply
from expedit_d2.cli import tune
from expedit_d2.cli.main import main
from expedit_d2.cli.options import height_width
from expedit_d2.evaluation import Agreement
from expedit_d2.export import onnx_session
from expedit_d2.libraries import FeatureModel, load_feature_model
from expedit_d2.settings import Settings, parse_setting


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth noise, (height, width) pixels, so that resizing has little to decide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def features(model: FeatureModel, images: list[Image.Image], folder) -> torch.Tensor:
    """Of images that have the model's size already, (B, C, h, w)."""
    inputs = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        inputs.append(model.prepare({"file_name": str(folder / f"{number}.png")}))
    with torch.no_grad():
        return torch.stack([output["features"] for output in model(inputs)])


@pytest.fixture
def hf_folder(tmp_path):
    """A tiny DINOv2 with its image processor, as save_pretrained leaves them."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    processor = BitImageProcessor(
        crop_size={"height": 56, "width": 56}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_transformers(hf_folder, tmp_path):
    size = (56, 84)
    model = load_feature_model(f"hf:{hf_folder}", size)
    images = [photo(size, seed) for seed in (0, 1)]
    processor = BitImageProcessor.from_pretrained(hf_folder, do_resize=False, do_center_crop=False)
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(hf_folder).eval()(pixels).last_hidden_state
    expected = tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 6)
    torch.testing.assert_close(features(model, images, tmp_path), expected, atol=1e-5, rtol=1e-5)
    assert load_feature_model(f"hf:{hf_folder}").size == (56, 56)


def test_positions_of_transformers_vit_follow_the_size(tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    model = load_feature_model(f"hf:{tmp_path / 'vit'}", (48, 40))
    assert features(model, [photo((48, 40))], tmp_path).shape == (1, 32, 6, 5)


def test_timm(tmp_path):
    torch.manual_seed(0)
    model = load_feature_model("timm:test_vit", (64, 96), random_weights=True)
    image = photo((64, 96))
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", img_size=(64, 96), num_classes=0).eval()
    config = timm.data.resolve_model_data_config(plain)
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = plain.forward_intermediates(
            ((pixels - mean) / std)[None], indices=1, norm=True, intermediates_only=True
        )[-1]
    torch.testing.assert_close(features(model, [image], tmp_path), expected)


def test_torchvision(tmp_path):
    torch.manual_seed(0)
    model = load_feature_model("torchvision:vit_b_16", (64, 64), random_weights=True)
    plain = get_model("vit_b_16", image_size=64)
    plain.load_state_dict(model.model.state_dict())
    image = photo((64, 64))
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    inner = create_feature_extractor(plain.eval(), ["encoder.ln"])
    with torch.no_grad():
        tokens = inner(pixels[None])["encoder.ln"][:, 1:]
    expected = tokens.transpose(1, 2).reshape(1, 768, 4, 4)
    torch.testing.assert_close(features(model, [image], tmp_path), expected)


@pytest.fixture
def sam_file(tmp_path):
    """The checkpoint of a tiny Sam, and the Sam."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128,
        embed_dim=32,
        depth=4,
        num_heads=2,
        mlp_ratio=3.0,
        out_chans=16,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1, 3),
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )
    prompts = PromptEncoder(16, (8, 8), (128, 128), 16)
    transformer = TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=16)
    sam = Sam(encoder, prompts, MaskDecoder(transformer_dim=16, transformer=transformer))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth", sam.eval()


def test_segment_anything(sam_file, tmp_path):
    file, sam = sam_file
    model = load_feature_model(f"sam:{file}")
    assert model.size == (128, 128)
    image = photo((128, 128))
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1).float()
    with torch.no_grad():
        expected = sam.image_encoder(sam.preprocess(pixels)[None])
    torch.testing.assert_close(features(model, [image], tmp_path), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "size", "random_weights", "words"),
    [
        ("dinov2", None, False, "hf: and a name"),
        ("tf:resnet", None, False, "hf: and a name"),
        ("timm:vit_smal_patch16_224", None, True, "did you mean"),
        ("timm:test_vit", (60, 64), True, "multiple of the patch size"),
        ("timm:resnet18", None, True, "not a supported ViT"),
        ("torchvision:vit_b_61", None, True, "did you mean vit_b_16"),
        ("torchvision:vit_b_16", (64, 96), True, "square"),
        ("sam:vit_x", None, True, "one of ['vit_b'"),
    ],
)
def test_what_is_wrong_is_one_sentence(source, size, random_weights, words):
    with pytest.raises(ValueError) as error:
        load_feature_model(source, size, random_weights)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (f"hf:{tmp_path}", f"sam:{tmp_path / 'none.pth'}"):
        with pytest.raises(OSError) as error:
            load_feature_model(source)
        assert "\n" not in str(error.value)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a checkpoint of segment-anything"):
        load_feature_model(f"sam:{tmp_path / 'other.pth'}")


# --- agreement -----------------------------------------------------------------------------------


def agreement(plain: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    reference = Agreement()
    reference.process([{"image_id": 0}], [{"features": plain, "feature_directions": plain}])
    mine = Agreement(reference)
    mine.process([{"image_id": 0}], [{"features": other, "feature_directions": other}])
    return mine.evaluate()["agreement"]


def test_agreement_of_features_by_hand():
    """Orthogonal tokens in three rows of four; two of the others point at another place."""
    plain = torch.eye(12).reshape(12, 3, 4)
    other = 3 * plain.clone()
    other[:, 1, 1] = 4 * plain[:, 2, 2] + 3 * plain[:, 1, 1]  # next to it, in a corner
    other[:, 0, 3] = 4 * plain[:, 1, 0] + 3 * plain[:, 0, 3]  # next to it in memory only
    found = agreement(plain, other)
    assert found["nearest neighbour"] == pytest.approx(100 * 11 / 12)
    assert found["cosine"] == pytest.approx(100 * (10 + 2 * 0.6) / 12, abs=0.05)


def test_features_agree_with_themselves_also_where_all_are_alike():
    for plain in (torch.randn(16, 5, 7), torch.ones(16, 5, 7)):
        assert agreement(plain, plain) == {
            "nearest neighbour": 100,
            "cosine": pytest.approx(100, abs=1e-4),
        }


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_compare_and_tune(hf_folder, tmp_path, capsys, monkeypatch):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(2):
        photo((80, 100), number).save(photos / f"{number}.jpg")
    quick = ["--images", str(photos), "--size", "84x112", "--timed", "1", "--batch", "2"]
    model = ["--model", f"hf:{hf_folder}", "--output", str(output)]
    main(["compare", *model, *quick, "--setting", "alpha=1 grid=3,4", "--setting", "h: budget=0.5"])
    (file,) = output.glob("*.json")
    saved = json.loads(file.read_text())
    plain, grid, half = saved["rows"]
    assert plain["agreement"] == {
        "nearest neighbour": 100,
        "cosine": pytest.approx(100, abs=1e-4),
    }
    for row in (grid, half):
        assert 0 < row["agreement"]["cosine"] < 100
        assert row["latency"]["median"] > 0
    blocks = [
        sum(row["flops"][k] for k in ("before", "after", "clustering", "reconstruction"))
        for row in (plain, half)
    ]
    assert blocks[1] < 0.6 * blocks[0]
    assert "is at their own place" in (capsys.readouterr().out)
    assert {path.suffix for path in output.glob("hf*")} == {".json", ".md", ".csv", ".html"}
    monkeypatch.setattr(tune, "candidates", lambda spec: {"half": Settings(budget=0.5)})
    main(["tune", *model[:2], "--output", str(tmp_path / "t"), *quick, "--agreement", "1"])
    assert "Use it with `expedite`" in capsys.readouterr().out


@pytest.mark.slow
def test_draw(hf_folder, tmp_path):
    for number in range(2):
        photo((80, 100), number).save(tmp_path / f"{number}.jpg")
    model = ["--model", f"hf:{hf_folder}", "--images", *map(str, sorted(tmp_path.glob("*.jpg")))]
    pictures = []
    for setting in ([], ["--setting", "alpha=1 grid=3,3"]):
        output = tmp_path / f"out{len(setting)}"
        main(["draw", *model, *setting, "--output", str(output)])
        files = sorted(output.glob("*.png"))
        assert [path.name for path in files] == ["000_0.png", "001_1.png"]
        pictures.append(np.asarray(Image.open(files[0])))
        # Two rows, one for each kind of agreement, with five panels each.
        height, width, _ = pictures[-1].shape
        assert 1.5 < width / height < 3.5
    merged, clustered = pictures
    assert merged.shape != clustered.shape or (merged != clustered).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "options", "setting"),
    [
        ("hf", ["--size", "56x84"], ""),
        ("hf", [], "alpha=1 keep=0.5"),
        ("timm", ["--size", "64x96", "--random-weights"], "alpha=1 ratio=0.6"),
        ("torchvision", ["--size", "64x64", "--random-weights"], "alpha=1 keep=0.5"),
        ("sam", [], "alpha=1 keep=0.5"),
    ],
)
def test_export(library, options, setting, request, tmp_path):
    """The file gives what the library's model gives, expedited by hand."""
    source = {"timm": "test_vit", "torchvision": "vit_b_16"}.get(library)
    if library == "hf":
        source = request.getfixturevalue("hf_folder")
    elif library == "sam":
        source = request.getfixturevalue("sam_file")[0]
    file, name = tmp_path / "model.onnx", f"{library}:{source}"
    given = ["--setting", setting] if setting else []
    main(["export", "--model", name, *options, *given, "--output", str(file)])

    torch.manual_seed(0)
    size = height_width(options[1]) if options else None
    model = load_feature_model(name, size, "--random-weights" in options)
    image = torch.rand(3, *model.size) * 255
    if setting:
        apply(model, parse_setting(setting)[1])
    with torch.no_grad():
        expected = model([{"image": image}])[0]["features"]
    ((found,),) = onnx_session(file)(image[None])
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("draw", ["--setting", "budget=0.5"], "--setting needs --model"),
        ("draw", ["--size", "64x64"], "--size needs --model"),
        ("export", ["--random-weights", "--output", "x.onnx"], "--random-weights needs"),
        ("export", ["--setting", "keep=0.5", "--output", "x.onnx"], "--setting needs --model"),
    ],
)
def test_options_of_models_that_a_config_has_itself(command, options, words, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--config-file", "configs/embedded/small_segmenter.yaml", *options])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("draw", [], "one of the arguments --model --config-file is required"),
        ("draw", ["--model", "timm:test_vit", "--setting", "budget=2"], "BUDGET must be"),
        ("draw", ["--model", "timm:test_vit", "MODEL.WEIGHTS", "x"], "--model has no config"),
        (
            "export",
            ["--model", "timm:test_vit", "--output", "x.onnx", "--benchmark", "2"],
            "--benchmark compares with Expedit",
        ),
    ],
)
def test_models_that_cannot_be_drawn_or_exported(command, options, words, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, *options])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "64x64"], "needs --model"),
        (["--random-weights"], "needs --model"),
        (
            ["--model", "timm:test_vit", "--random-weights", "MODEL.WEIGHTS", "x"],
            "--model has no config",
        ),
        (["--model", "timm:test_vit", "--config-file", "x.yaml"], "not allowed with"),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["compare", "--setting", "budget=0.5", "--output", str(tmp_path), *options])
    assert error.value.code == 2
    assert words in capsys.readouterr().err
