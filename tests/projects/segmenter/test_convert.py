"""Official checkpoints: their names and shapes, conversion, and what is said of those that fail."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from expedit_d2.engine import load_weights
from expedit_d2.projects import load_cfg
from expedit_d2.projects.Segmenter.convert import config_of, convert_checkpoint, match_weights
from support.repository import load_tool
from support.segmenter import (
    CLASSES,
    CONFIGS,
    SIDE,
    VARIANT,
    images,
    predict,
    tiny_model,
    write_official,
)


def official(model) -> dict[str, torch.Tensor]:
    """The weights as an official checkpoint has them: with the classifier of the ViT."""
    head = {"encoder.head.weight": torch.randn(1000, 64), "encoder.head.bias": torch.randn(1000)}
    return model.state_dict() | head


def changed(**net) -> dict:
    return VARIANT | {"net_kwargs": VARIANT["net_kwargs"] | net}


# --- names and shapes ------------------------------------------------------------------------


def official_shapes(dim, depth, patch, tokens, classes, extra=1) -> dict[str, tuple[int, ...]]:
    """Every weight of an official Seg-Mask model but the ViT's classifier."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def block(name: str) -> dict[str, tuple[int, ...]]:
        return {
            **norm(f"{name}.norm1", dim),
            **linear(f"{name}.attn.qkv", 3 * dim, dim),
            **linear(f"{name}.attn.proj", dim, dim),
            **norm(f"{name}.norm2", dim),
            **linear(f"{name}.mlp.fc1", 4 * dim, dim),
            **linear(f"{name}.mlp.fc2", dim, 4 * dim),
        }

    shapes = {
        "encoder.cls_token": (1, 1, dim),
        "encoder.pos_embed": (1, extra + tokens, dim),
        "encoder.patch_embed.proj.weight": (dim, 3, patch, patch),
        "encoder.patch_embed.proj.bias": (dim,),
        **norm("encoder.norm", dim),
        "decoder.cls_emb": (1, classes, dim),
        "decoder.proj_patch": (dim, dim),
        "decoder.proj_classes": (dim, dim),
        **linear("decoder.proj_dec", dim, dim),
        **norm("decoder.decoder_norm", dim),
        **norm("decoder.mask_norm", classes),
    }
    if extra == 2:
        shapes["encoder.dist_token"] = (1, 1, dim)
    for i in range(depth):
        shapes |= block(f"encoder.blocks.{i}")
    for i in range(2):
        shapes |= block(f"decoder.blocks.{i}")
    return shapes


def shapes_of(cfg) -> dict[str, tuple[int, ...]]:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "tokens", "classes"),
    [("ade20k", 40 * 40, 150), ("cityscapes", 48 * 48, 19), ("pascal_context", 30 * 30, 60)],
)
def test_vit_large_has_the_official_weights(name, tokens, classes):
    cfg = load_cfg(CONFIGS / name / "segmenter_vit_l_mask.yaml")
    assert shapes_of(cfg) == official_shapes(1024, 24, 16, tokens, classes)


def test_deit_has_the_official_weights():
    cfg = load_cfg(CONFIGS / "ade20k" / "segmenter_vit_b_mask.yaml")
    cfg.MODEL.TIMM.NAME = "deit_base_distilled_patch16_384"
    assert shapes_of(cfg) == official_shapes(768, 12, 16, 32 * 32, 150, extra=2)


def test_linear_decoder_has_the_official_weights():
    cfg = load_cfg(CONFIGS / "ade20k" / "segmenter_vit_s_linear.yaml")
    decoder = {n: s for n, s in shapes_of(cfg).items() if n.startswith("decoder.")}
    assert decoder == {"decoder.head.weight": (150, 384), "decoder.head.bias": (150,)}


# --- conversion ------------------------------------------------------------------------------


def test_converted_model_is_the_same(tmp_path):
    model = tiny_model()
    weights = official(model) | {"decoder.strange": torch.zeros(2)}
    source, target = write_official(tmp_path / "run", weights), tmp_path / "tiny.pth"
    report = convert_checkpoint(source, target)
    assert set(report.mapped) == set(model.state_dict())
    assert report.classifier == ("encoder.head.weight", "encoder.head.bias")
    assert report.unknown == ("decoder.strange",)
    assert (report.missing, report.misshapen) == ((), ())
    assert "left out, not in the model: decoder.strange" in str(report)

    cfg = load_cfg(tmp_path / "tiny.yaml", ["MODEL.DEVICE", "cpu"])
    again = build_model(cfg).eval()
    load_weights(again, cfg.MODEL.WEIGHTS)
    x = images()
    assert torch.equal(predict(again, x), predict(model, x))
    assert list(cfg.DATASETS.TEST) == ["ade20k_sem_seg_val"]
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT) == (48, "RGB")
    assert (again.window_size, again.window_stride) == (SIDE, 24)
    assert again.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert again.decoder.blocks[0].attn.proj_drop.p == 0.2
    assert again.encoder.norm.eps == 1e-5


def test_settings_of_a_linear_model():
    variant = {"net_kwargs": changed(decoder={"name": "linear"}, image_size=384)["net_kwargs"]}
    config = config_of(variant)
    assert config.MODEL.SEGMENTER.DECODER == "linear"
    assert config.MODEL.SEGMENTER.WINDOW_STRIDE == 384
    assert config.DATASETS.TEST == []
    patch8 = config_of(changed(backbone="vit_base_patch8_384"))
    assert patch8.MODEL.TIMM.NAME == "vit_base_patch8_224"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"inference_kwargs": None}, "inference_kwargs must be a mapping, got None"),
        ({"inference_kwargs": {"im_size": None}}, "im_size must be a positive .* got None"),
        ({"inference_kwargs": {"window_size": "a"}}, "window_size must be a positive .* got 'a'"),
        ({"dataset_kwargs": 3}, "dataset_kwargs must be a mapping, got 3"),
    ],
)
def test_sections_that_do_not_fit(section, message):
    with pytest.raises(ValueError, match=message):
        config_of(VARIANT | section)


@pytest.mark.parametrize(
    ("name", "side"), [("ade20k", 640), ("cityscapes", 1024), ("pascal_context", 520)]
)
def test_images_are_resized_as_in_our_configs(name, side):
    """Which are the official data settings: longest side 4, 2 and 8 times the shortest."""
    theirs = load_cfg(CONFIGS / name / "segmenter_vit_l_mask.yaml").INPUT
    sizes = {"dataset_kwargs": {"dataset": name}, "inference_kwargs": {"im_size": side}}
    ours = config_of(VARIANT | sizes).INPUT
    assert (ours.MIN_SIZE_TEST, ours.MAX_SIZE_TEST) == (side, theirs.MAX_SIZE_TEST)
    assert theirs.MIN_SIZE_TEST == side


def test_report_of_what_does_not_fit():
    model = tiny_model()
    weights = official(model)
    del weights["encoder.norm.bias"]
    weights["decoder.cls_emb"] = torch.zeros(1, 9, 64)
    report = match_weights(weights, model)
    mapped = len(model.state_dict()) - 2
    assert f"{mapped} weights taken over, 2 left out, 1 missing, 1 of another shape" in str(report)
    assert report.missing == ("encoder.norm.bias",)
    assert report.misshapen == (("decoder.cls_emb", (1, 9, 64), (1, CLASSES, 64)),)
    assert len(report.mapped) == mapped


def test_weights_that_do_not_fit_are_not_written(tmp_path):
    weights = official(tiny_model())
    del weights["encoder.norm.bias"]
    weights["decoder.cls_emb"] = torch.zeros(1, 9, 64)
    source = write_official(tmp_path, weights)
    shapes = r"decoder.cls_emb is \(1, 9, 64\) in the checkpoint and \(1, 7, 64\) .*, and 1 more"
    with pytest.raises(ValueError, match=shapes):
        convert_checkpoint(source, tmp_path / "out.pth")
    weights = official(tiny_model())
    del weights["encoder.norm.bias"]
    source = write_official(tmp_path, weights)
    with pytest.raises(ValueError, match="encoder.norm.bias is missing in the checkpoint$"):
        convert_checkpoint(source, tmp_path / "out.pth")
    weights = official(tiny_model()) | {"encoder.blocks.6.norm1.bias": torch.zeros(64)}
    source = write_official(tmp_path, weights)
    with pytest.raises(ValueError, match="encoder.blocks.6.norm1.bias is not in the model"):
        convert_checkpoint(source, tmp_path / "out.pth")
    weights = official(tiny_model())
    weights["decoder.cls_emb"][0, 0, 0] = float("inf")
    source = write_official(tmp_path, weights)
    with pytest.raises(ValueError, match="decoder.cls_emb is not finite"):
        convert_checkpoint(source, tmp_path / "out.pth")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("name", ["out.pth", "out.yaml"])
def test_nothing_is_overwritten(tmp_path, name):
    source = write_official(tmp_path, official(tiny_model()))
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=name):
        convert_checkpoint(source, tmp_path / "out.pth")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"n_heads": 4}, "n_heads is 4, but timm's test_vit has 2"),
        ({"n_layers": 12}, "n_layers is 12, but timm's test_vit has 6"),
        ({"backbone": "test_vid"}, "test_vit"),
        ({"image_size": (32, 64)}, "image_size must be a square"),
        ({"normalization": "none"}, r"normalization must be one of \['deit', 'vit'\]"),
        ({"decoder": {"name": "deeplab_dec"}}, "linear or mask_transformer, got 'deeplab_dec'"),
        ({"decoder": "linear"}, "the decoder's name must be linear or .*, got None"),
        ({"decoder": {"name": ["linear"]}}, "the decoder's name must be .*, got \\['linear'\\]"),
        ({"image_size": None}, "image_size must be a square, in pixels, got None"),
        ({"image_size": "32"}, "image_size must be a square, in pixels, got '32'"),
        ({"patch_size": None}, "patch_size must be a positive whole number, got None"),
        ({"n_cls": 0}, "n_cls must be a positive whole number, got 0"),
        ({"backbone": None}, "backbone must be a model of timm, got None"),
        ({"drop_path_rate": None}, r"drop_path_rate must be a number in \[0, 1\), got None"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, net, message):
    source = write_official(tmp_path, {}, changed(**net))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out.pth")


def test_files_that_are_something_else(tmp_path):
    target = tmp_path / "out.pth"
    with pytest.raises(FileNotFoundError, match="variant.yml"):
        convert_checkpoint(tmp_path / "checkpoint.pth", target)
    source = write_official(tmp_path, {})
    (tmp_path / "variant.yml").write_text("a: 1")
    with pytest.raises(ValueError, match="not a variant.yml of Segmenter"):
        convert_checkpoint(source, target)
    (tmp_path / "variant.yml").write_text("net_kwargs:")
    with pytest.raises(ValueError, match="not a variant.yml of Segmenter.*not a mapping"):
        convert_checkpoint(source, target)
    write_official(tmp_path, {}, {"net_kwargs": {"backbone": "test_vit"}})
    with pytest.raises(ValueError, match="net_kwargs lacks decoder, image_size"):
        convert_checkpoint(source, target)
    write_official(tmp_path, {})
    torch.save({"weights": {}}, source)
    with pytest.raises(ValueError, match="must contain tensors by name.*but 'weights' is a dict"):
        convert_checkpoint(source, target)
    source.write_text("text")
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
        convert_checkpoint(source, target)
    source.unlink()
    with pytest.raises(FileNotFoundError, match="the checkpoint: there is no file"):
        convert_checkpoint(source, target)
    assert not target.exists()


def test_objects_are_not_unpickled(tmp_path):
    source = write_official(tmp_path, {})
    torch.save({"model": {}, "args": nn.Linear(1, 1)}, source)
    with pytest.raises(ValueError, match="contains torch.nn.modules.linear.Linear, and loading"):
        convert_checkpoint(source, tmp_path / "out.pth")


def test_other_size_than_in_the_variant_is_named(tmp_path):
    """The table of positions follows image_size; a checkpoint of another one is refused."""
    source = write_official(
        tmp_path, official(tiny_model()), changed(image_size=(2 * SIDE, 2 * SIDE))
    )
    with pytest.raises(ValueError, match=r"encoder.pos_embed is \(1, 65, 64\) .* \(1, 257, 64\)"):
        convert_checkpoint(source, tmp_path / "out.pth")


def test_targets_that_cannot_be_written(tmp_path):
    source = write_official(tmp_path, official(tiny_model()))
    with pytest.raises(ValueError, match="must not end in .yaml, the suffix of the config"):
        convert_checkpoint(source, tmp_path / "out.yaml")
    with pytest.raises(FileNotFoundError, match="there is no folder '.*none' to write to"):
        convert_checkpoint(source, tmp_path / "none" / "out.pth")


def test_tool(tmp_path, capsys):
    tool = load_tool("convert_segmenter")
    arguments = [str(write_official(tmp_path, official(tiny_model()))), str(tmp_path / "out.pth")]
    tool.run(arguments)
    assert "left out, classifier of the pretrained ViT: encoder.head" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="convert_segmenter.py: .*already exists"):
        tool.run(arguments)
