"""No result comes back for code, data or weights that have changed since."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import Comparison
from expedit_d2.comparison import workload as workload_module
from expedit_d2.comparison.origin import code_digest, data_digest
from expedit_d2.data import register_by_path
from expedit_d2.data.content import file_digest
from expedit_d2.files.shipped import CODE
from support.detector import LAZY
from support.repository import VITDET, load_tool

pytestmark = pytest.mark.slow

# --- code --------------------------------------------------------------------------------------

PLACES = [
    "expedit_d2/analysis/flops.py",
    "expedit_d2/evaluation/agreement.py",
    "expedit_d2/methods/merge.py",
    "expedit_d2/hook/passes.py",
    "projects/Segmenter/modeling/inference.py",
    "projects/Mask2Former/modeling/head.py",
    "projects/DPT/data/mapper.py",
    "projects/DPT/evaluation.py",
]


@pytest.fixture(scope="module")
def copied_code(tmp_path_factory):
    """The code of both packages, to be changed."""
    folder = tmp_path_factory.mktemp("code")
    for package in CODE:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("*.html"))
    return folder


def patch_code(monkeypatch, copied_code):
    monkeypatch.setattr(workload_module, "CODE", tuple(copied_code / path.name for path in CODE))


@pytest.mark.parametrize("place", PLACES)
def test_changed_code_is_other_code(copied_code, tiny_opts, monkeypatch, place):
    patch_code(monkeypatch, copied_code)
    before = load_workload(VITDET, tiny_opts).fingerprint
    assert load_workload(VITDET, tiny_opts).fingerprint == before
    file = copied_code / place
    file.write_text(file.read_text() + "\n# changed\n")
    assert load_workload(VITDET, tiny_opts).fingerprint != before


def test_every_python_file_counts(copied_code):
    digests = {code_digest([copied_code])}
    files = sorted(copied_code.rglob("*.py"))[::12]
    for file in files:
        file.write_text(file.read_text() + "\n# changed\n")
        digests.add(code_digest([copied_code]))
    files[0].rename(files[0].with_name("renamed.py"))
    digests.add(code_digest([copied_code]))
    assert len(digests) == len(files) + 2


def test_a_model_of_ones_own_counts_and_so_does_a_lazy_config(tiny_data, tmp_path, monkeypatch):
    """The module that defines the backbone, a helper beside it, and the config's own text."""
    from detectron2.config import LazyConfig, instantiate

    package = tmp_path / "my_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("SCALE = 1\n")
    (package / "vit.py").write_text(
        "from detectron2.modeling.backbone.vit import ViT\n\n\nclass MyViT(ViT):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config, weights = tmp_path / "mine.py", tmp_path / "mine.pth"
    text = LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(tmp_path))
    config.write_text(
        text + "\nfrom my_models.vit import MyViT\nmodel.backbone.net._target_ = MyViT\n"
    )
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    opts = [f"train.init_checkpoint={weights}", "train.device=cpu"]
    found = [load_workload(config, opts).fingerprint, load_workload(config, opts).fingerprint]
    assert found[0] == found[1]
    for file in (package / "vit.py", package / "helper.py", config):
        file.write_text(file.read_text() + "\n# changed\n")
        found.append(load_workload(config, opts).fingerprint)
    assert len(set(found[1:])) == 4


# --- data --------------------------------------------------------------------------------------


def write_pair(folder: Path, number: int, low: int, label: int) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(low, low + 100, (64, 64, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.bmp")
    labels = np.full((64, 64), label, np.uint8)
    labels[:20] = 1
    Image.fromarray(labels).save(folder / "labels" / f"{number}.png", compress_level=0)


def same_place_and_time(file: Path, content: bytes) -> None:
    """Other content of the same size; the time stays, as an archive may have it."""
    state = file.stat()
    assert len(content) == state.st_size and content != file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def other_images(folder: Path) -> None:
    file = folder / "images" / "0.bmp"
    same_place_and_time(file, (folder / "images" / "1.bmp").read_bytes())


def permuted_labels(folder: Path) -> None:
    one, two = ((folder / "labels" / f"{n}.png") for n in (0, 1))
    contents = one.read_bytes(), two.read_bytes()
    same_place_and_time(one, contents[1])
    same_place_and_time(two, contents[0])


def other_classes(folder: Path) -> None:
    (folder / "labels" / "classes.txt").write_text("a\nb\nd\n")


def one_more(folder: Path) -> None:
    write_pair(folder, 9, 50, 2)


@pytest.mark.parametrize("change", [other_images, permuted_labels, other_classes, one_more])
def test_changed_label_folders_are_other_data(tmp_path, change):
    for number in range(3):
        write_pair(tmp_path, number, 50, 2 * (number % 2))
    (tmp_path / "labels" / "classes.txt").write_text("a\nb\nc\n")
    name = str(tmp_path / "labels")

    def digest():
        register_by_path([name])
        try:
            return data_digest(DatasetCatalog.get(name), [MetadataCatalog.get(name).as_dict()])
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    before = digest()
    assert digest() == before
    change(tmp_path)
    assert digest() != before


@pytest.fixture
def compared(confident_opts, tiny_data, tmp_path):
    """Run the tool on the tiny detector: its plain row, and how many results it took over."""

    def run(opts=(), *options):
        output = tmp_path / "compared"
        quick = ["--timed", "0", "--pictures", "0", "--output", str(output)]
        options = ["--config-file", VITDET, "--setting", "alpha=1 ratio=0.5", *quick, *options]
        lines = output / "results.jsonl"
        before = len(lines.read_text().splitlines()) if lines.is_file() else 0
        load_tool("compare").run([*options, "--", *confident_opts, *opts])
        measured = len(lines.read_text().splitlines()) - before
        return Comparison.from_json((output / "vitdet.json").read_text()).plain, measured

    return run


def found_instances(opts, folder: Path) -> dict:
    """What the tiny detector itself finds, as COCO annotations, so that its AP is not 0."""
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": str(i)} for i in range(6)]
    workload = load_workload(VITDET, opts)
    folder.mkdir()
    for number, (item,) in enumerate(workload.images()):
        name = Path(item["file_name"]).name
        shutil.copy(item["file_name"], folder / name)
        content["images"].append({"id": number, "file_name": name, "height": 64, "width": 64})
        with torch.no_grad():
            found = workload.model([item])[0]["instances"]
        for box, label in zip(found.pred_boxes.tensor.tolist(), found.pred_classes, strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "area": w * h}
            annotation |= {"category_id": int(label), "bbox": [x, y, w, h], "iscrowd": 0}
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            content["annotations"].append(annotation)
    return content


def forget(name: str) -> None:
    """As a new process would find it."""
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_half_of_the_annotations_gone(compared, confident_opts, tmp_path):
    file, images = tmp_path / "coco.json", tmp_path / "images"
    name = f"{file}@{images}"
    opts = ["DATASETS.TEST", f"('{name}',)"]
    content = found_instances(confident_opts, images)
    file.write_text(json.dumps(content))
    whole, measured = compared(opts)
    assert measured == 2 and whole.metrics["box AP"] > 50
    assert compared(opts) == (whole, 0)
    forget(name)
    content["annotations"] = content["annotations"][::2]
    file.write_text(json.dumps(content))
    half, measured = compared(opts)
    assert measured == 2 and 0 < half.metrics["box AP"] < whole.metrics["box AP"]
    forget(name)


def test_other_images_of_the_same_names_and_sizes(compared, tmp_path):
    folder = tmp_path / "photos"
    for number in range(2):
        write_pair(folder, number, 50, 0)
    options = ((), "--images", str(folder / "images"))
    first, measured = compared(*options)
    assert measured == 2 and compared(*options)[1] == 0
    other_images(folder)
    assert compared(*options)[1] == 2


def test_the_same_images_elsewhere_are_found_again_where_they_are(compared, tmp_path):
    """A relative path that leads elsewhere, as ``DETECTRON2_DATASETS`` may, is another one."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, low in ((one, 10), (two, 100)):
        write_pair(folder, 0, low, 0)
    link = tmp_path / "here"
    link.symlink_to(one)
    assert compared((), "--images", str(link / "images"))[1] == 2
    link.unlink()
    link.symlink_to(two)
    assert compared((), "--images", str(link / "images"))[1] == 2
    link.unlink()
    link.symlink_to(one)
    assert compared((), "--images", str(link / "images"))[1] == 0


def test_data_sets_elsewhere(tmp_path, monkeypatch):
    """Records with relative paths, as Detectron2's own have without ``DETECTRON2_DATASETS``."""
    digests = []
    for name, low in (("a", 10), ("b", 100), ("a", 10)):
        write_pair(tmp_path / name, 0, low, 0)
        monkeypatch.chdir(tmp_path / name)
        digests.append(data_digest([{"file_name": "images/0.bmp"}], [{}]))
    assert digests[0] == digests[2] != digests[1]


def test_labels_that_only_metadata_name_count(tmp_path):
    file, folder = tmp_path / "panoptic.json", tmp_path / "gt"
    folder.mkdir()
    file.write_text("1")
    (folder / "a_instanceIds.png").write_bytes(b"1")
    meta = [{"json_file": str(file), "gt_dir": str(folder)}]
    found = [data_digest([], meta)]
    for changed in (file, folder / "a_instanceIds.png"):
        changed.write_bytes(b"2")
        found.append(data_digest([], meta))
    assert len(set(found)) == 3


# --- the cache of a panoptic file's things -----------------------------------------------------


def panoptic_png(file: Path, ids: tuple[int, int]) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :, 0], pixels[4:, :, 0] = ids
    Image.fromarray(pixels).save(file, compress_level=0)


def test_the_cache_of_things_follows_every_png(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    pngs = tmp_path / "p"
    pngs.mkdir()
    annotations, images = [], []
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 8, "width": 8})
        segments = [
            {"id": i, "category_id": i, "iscrowd": 0, "area": 32, "bbox": [0, 0, 8, 4]}
            for i in (1, 2)
        ]
        png = f"{number}.png"
        annotations.append({"image_id": number, "file_name": png, "segments_info": segments})
        panoptic_png(pngs / png, (1, 2) if number else (2, 1))
    categories = [{"id": i, "name": str(i), "isthing": 1} for i in (1, 2)]
    file = tmp_path / "p.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    register_by_path([str(file)])
    path = MetadataCatalog.get(str(file)).json_file
    before = PathManager.get_local_path(path)
    assert PathManager.get_local_path(path) == before
    folder_time = pngs.stat().st_mtime_ns
    contents = [(pngs / f"{n}.png").read_bytes() for n in (0, 1)]
    same_place_and_time(pngs / "0.png", contents[1])
    assert pngs.stat().st_mtime_ns == folder_time  # the folder says nothing of it
    after = PathManager.get_local_path(path)
    assert after != before
    boxes = [json.loads(Path(p).read_text())["annotations"][0]["bbox"] for p in (before, after)]
    assert boxes[0] != boxes[1]
    forget(str(file))


def test_digest_of_a_file_is_of_its_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 3_000_000)
    two.write_bytes(b"a" * 3_000_000)
    assert file_digest(one) == file_digest(two)
    two.write_bytes(b"a" * 2_999_999 + b"b")
    assert file_digest(one) != file_digest(two)
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")
