"""The scene generator: its labels are exact, its scenes repeat, its files appear whole or not."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from expedit_d2.data import collage
from expedit_d2.data.collage import (
    CLASSES,
    THING_CLASSES,
    make_scene,
    photographs,
    silhouettes,
    stage,
    write,
    write_collage,
)
from expedit_d2.data.collage import scene as render

NUM_THINGS = len(THING_CLASSES)
SIZE = (96, 128)
COUNTS = {"train": 2, "val": 2}

# Of make_scene("val", 0): segment names, mean colour, mean depth in metres.
KNOWN_NAMES = ["triangle", "disk", "cross", "cross", "disk", "disk", "square", "gravel", "brick"]
KNOWN_COLOR = [160.65, 151.87, 147.46]
KNOWN_DEPTH = 11.366


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("val", index) for index in range(12)]


def interior(mask):
    """The pixels of a mask whose eight neighbours belong to it, too."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    shifts = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.logical_and.reduce(shifts)


def equal(a, b):
    return all(
        np.array_equal(getattr(a, k), getattr(b, k))
        for k in ("image", "panoptic", "semantic", "depth")
    )


# ---------------------------------------------------------------------------------- one scene


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (96, 160), (200, 120)])
def test_arrays_have_the_asked_size_and_type(size):
    scene = make_scene("train", 1, size)
    assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
    assert scene.panoptic.shape == size and scene.panoptic.dtype == np.int32
    assert scene.semantic.shape == size and scene.semantic.dtype == np.uint8
    assert scene.depth.shape == size and scene.depth.dtype == np.float32
    assert scene.instances()


def test_segments_partition_the_image_and_agree_with_the_semantic_map(scenes):
    for scene in scenes:
        ids = [segment["id"] for segment in scene.segments]
        assert len(set(ids)) == len(ids)
        assert set(ids) == set(np.unique(scene.panoptic).tolist())
        for segment in scene.segments:
            mask = scene.panoptic == segment["id"]
            assert np.unique(scene.semantic[mask]).tolist() == [segment["category_id"]]
            assert segment["isthing"] == (segment["category_id"] < NUM_THINGS)


def test_every_scene_has_three_to_eight_visible_things_and_all_classes_occur(scenes):
    seen = set()
    for scene in scenes:
        things = scene.instances()
        assert 3 <= len(things) <= 8
        assert all(mask.sum() >= silhouettes.MIN_VISIBLE_PIXELS for _, mask in things)
        seen.update(np.unique(scene.semantic).tolist())
    assert seen == set(range(len(CLASSES)))


def test_ground_depth_is_a_plane_and_things_are_flat(scenes):
    for scene in scenes:
        for _, mask in scene.instances():
            assert np.ptp(scene.depth[mask]) == 0
        ground = np.isin(scene.semantic, [CLASSES.index("grass"), CLASSES.index("gravel")])
        ground &= scene.depth < 13  # nearer than any backdrop
        rows, cols = np.nonzero(ground)
        assert rows.size > 1000
        # A plane seen by a pinhole camera has an inverse depth linear in the pixel position.
        inverse = 1 / scene.depth[ground].astype(np.float64)
        plane = np.stack([rows, cols, np.ones_like(rows)], axis=1)
        fit, *_ = np.linalg.lstsq(plane, inverse, rcond=None)
        assert np.abs(plane @ fit - inverse).max() < 1e-5
        slope = 1 / (stage.FOCAL * 256 * stage.CAMERA_HEIGHT)
        assert fit[0] == pytest.approx(slope, rel=1e-3)


def test_apparent_size_falls_with_depth():
    sizes, depths = [], []
    for index in range(12):
        scene = make_scene("train", index)
        for category, mask in scene.instances():
            if THING_CLASSES[category] == "disk":
                sizes.append(mask.sum() ** 0.5)
                depths.append(scene.depth[mask][0])
    assert len(sizes) >= 8
    assert np.corrcoef(np.log(sizes), np.log(depths))[0, 1] < -0.7


def test_image_and_labels_agree_pixel_by_pixel(monkeypatch):
    """Paints each thing in a colour that names it and the rest black, then reads the colours."""

    def fill(rng, split, thing, light):
        return np.broadcast_to(
            np.float32([(thing.category + 1) / 10, thing.depth / 100, 1]), (*thing.u.shape, 3)
        )

    monkeypatch.setattr(render, "fill_thing", fill)
    monkeypatch.setattr(render, "_expose", lambda rng, color, *args, **kwargs: color)
    monkeypatch.setattr(stage, "_paint_ground", lambda *args: 0)
    monkeypatch.setattr(stage, "_paint_wall", lambda *args: 0)
    monkeypatch.setattr(stage, "_paint_sky", lambda *args: 0)
    checked = 0
    for index in range(8):
        scene = make_scene("val", index)
        things = scene.instances()
        for category, mask in things:
            inner = interior(mask)
            if not inner.any():
                continue
            expected = [(category + 1) / 10, scene.depth[mask][0] / 100, 1]
            np.testing.assert_allclose(
                scene.image[inner], np.broadcast_to(expected, (inner.sum(), 3)), rtol=1e-5
            )
        is_thing = scene.semantic < NUM_THINGS
        coverage = scene.image[..., 2]  # of all things together, soft at their edges
        assert (coverage[is_thing] > 0.5).all()
        assert (coverage[interior(~is_thing)] <= 0.5).all()
        assert (coverage[interior(~is_thing)] == 0).mean() > 0.999
        checked += sum(interior(mask).sum() for _, mask in things)
    assert checked > 10000


def test_a_thing_that_is_too_well_hidden_is_not_painted():
    def square(depth, radius):
        return silhouettes.Thing(1, 32.0, 32.0, radius, 0.0, depth, None, (64, 64))

    near, hidden, large = square(2.0, 12.0), square(3.0, 11.0), square(4.0, 20.0)
    kept = silhouettes.keep_visible([large, near, hidden], (64, 64))
    assert [thing.depth for thing in kept] == [2.0, 4.0]
    tiny = square(1.0, 3.0)  # about 25 pixels
    assert silhouettes.keep_visible([tiny], (64, 64)) == []


@pytest.mark.parametrize("category", range(NUM_THINGS))
@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_lowest_point_is_where_the_silhouette_ends(category, angle):
    thing = silhouettes.Thing(category, 60.0, 60.0, 40.0, angle, 2.0, None, (128, 128))
    rows = np.flatnonzero(thing.mask.any(axis=1)) + thing.window[0].start
    reach = silhouettes.lowest_point(THING_CLASSES[category], angle) * thing.radius
    assert rows[-1] + 1 == pytest.approx(60 + reach, abs=2.5)  # sharp tips cover no whole pixel


def test_scenes_repeat_in_any_order_and_leave_global_random_state_alone():
    state = np.random.get_state()[1].copy()
    first, second = make_scene("train", 5, SIZE), make_scene("train", 6, SIZE)
    assert equal(second, make_scene("train", 6, SIZE))
    assert equal(first, make_scene("train", 5, SIZE))
    assert not equal(first, second)
    assert not equal(first, make_scene("val", 5, SIZE))
    assert np.array_equal(state, np.random.get_state()[1])


def test_scene_of_this_version_is_the_known_one():
    """When this fails the generator has changed: raise ``VERSION`` and write new numbers."""
    assert collage.VERSION == 2
    scene = make_scene("val", 0)
    names = [CLASSES[segment["category_id"]] for segment in scene.segments]
    assert names == KNOWN_NAMES
    np.testing.assert_allclose(scene.image.mean(axis=(0, 1)), KNOWN_COLOR, atol=0.5)
    assert scene.depth.mean() == pytest.approx(KNOWN_DEPTH, abs=0.01)


def test_splits_share_no_piece_of_a_photograph():
    columns = np.tile(np.arange(100.0)[None, :, None], (4, 1, 3))
    train = set(np.unique(photographs._split_part(columns, "train")))
    val = set(np.unique(photographs._split_part(columns, "val")))
    assert not train & val and train | val == set(range(100))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("test", 0), "split must be one of"),
        (("val", -1), "index must not be negative"),
        (("val", 0, (63, 256)), "size must be at least 64"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(*arguments)


def test_photographs_that_are_missing_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        photographs._photo_path("nothing.png")
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="scikit-image"):
        photographs._photo_path("camera.png")


# ------------------------------------------------------------------------------------ on disk


def test_files_hold_the_scenes(tmp_path):
    folder = write_collage(tmp_path, COUNTS, SIZE)
    assert folder == tmp_path / "collage-v2-2+2-96x128"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    for split in ("train", "val"):
        instances = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        for index in range(2):
            scene, name = make_scene(split, index, SIZE), f"{index:06d}.png"
            read = {
                kind: np.asarray(Image.open(folder / f"{kind}{split}" / name)).astype(np.int64)
                for kind in ("", "panoptic_", "semantic_", "depth_")
            }
            assert np.array_equal(read[""], scene.image)
            assert np.array_equal(read["panoptic_"] @ [1, 256, 65536], scene.panoptic)
            assert np.array_equal(read["semantic_"], scene.semantic)
            assert np.abs(read["depth_"] / 1000 - scene.depth).max() <= 0.00051
            annotations = [a for a in instances["annotations"] if a["image_id"] == index]
            assert [a["area"] for a in annotations] == [m.sum() for _, m in scene.instances()]
            assert [a["category_id"] - 1 for a in annotations] == [c for c, _ in scene.instances()]
            for annotation, (_, mask) in zip(annotations, scene.instances(), strict=True):
                code = mask_util.frPyObjects(annotation["segmentation"], *SIZE)
                assert np.array_equal(mask_util.decode(code), mask)
                x, y, w, h = annotation["bbox"]
                assert mask[y : y + h, x : x + w].sum() == annotation["area"]
                assert mask[y].any() and mask[y + h - 1].any()
                assert mask[:, x].any() and mask[:, x + w - 1].any()


def test_chosen_scenes_are_those_of_the_whole_set(tmp_path):
    some = write_collage(tmp_path, {"train": 1, "val": (3, 1)}, SIZE, splits=["val"])
    whole = write_collage(tmp_path, {"train": 1, "val": 4}, SIZE, splits=["val"])
    assert some.name == "collage-v2-1+3,1-96x128" and whole.name == "collage-v2-1+4-96x128"
    for kind in ("", "panoptic_", "semantic_", "depth_"):
        files = sorted((some / f"{kind}val").iterdir())
        assert [file.name for file in files] == ["000000.png", "000001.png"]
        for file, scene in zip(files, (3, 1), strict=True):  # numbered in the order given
            expected = whole / f"{kind}val" / f"{scene:06d}.png"
            assert file.read_bytes() == expected.read_bytes()
    annotations = json.loads((some / "annotations/instances_val.json").read_text())["annotations"]
    assert {one["image_id"] for one in annotations} == {0, 1}
    # One scene does not share its folder with that many.
    assert collage.collage_folder(tmp_path, {"train": 1, "val": (4,)}, SIZE) != whole


@pytest.mark.parametrize("wrong", [0, (), (1, 1), (-1,)])
def test_scenes_that_cannot_be_chosen(tmp_path, wrong):
    with pytest.raises(ValueError, match="counts must give a positive number, or different"):
        write_collage(tmp_path, {"train": 1, "val": wrong}, SIZE)


def test_a_complete_set_is_not_written_again(tmp_path, monkeypatch):
    folder = write_collage(tmp_path, COUNTS, SIZE)
    monkeypatch.setattr(write, "make_scene", None)
    assert write_collage(tmp_path, COUNTS, SIZE) == folder


def test_a_split_is_written_without_the_other(tmp_path):
    folder = write_collage(tmp_path, COUNTS, SIZE, splits=["val"])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["annotations", "depth_val", "info.json", "panoptic_val", "semantic_val", "val"]
    (folder / "depth_train").mkdir()  # of a run that was interrupted while moving its files
    write_collage(tmp_path, COUNTS, SIZE)
    both = write_collage(tmp_path / "both", COUNTS, SIZE)
    for path in both.rglob("*.*"):
        assert (folder / path.relative_to(both)).read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) in ([folder, both.parent], [both.parent, folder])


def test_an_interrupted_run_leaves_whole_splits_only(tmp_path, monkeypatch):
    def fail(split, index, size):
        if split == "val":
            raise KeyboardInterrupt
        return make_scene(split, index, size)

    monkeypatch.setattr(write, "make_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        write_collage(tmp_path, COUNTS, SIZE)
    (folder,) = tmp_path.iterdir()
    assert not list(folder.rglob("*val*"))
    monkeypatch.undo()
    assert len(list(write_collage(tmp_path, COUNTS, SIZE).rglob("*.png"))) == 4 * 4


def test_writers_at_the_same_time_leave_one_whole_set(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(write_collage, tmp_path, COUNTS, SIZE) for _ in range(3)]
        folders = {job.result() for job in jobs}
    assert list(tmp_path.iterdir()) == list(folders)
    (folder,) = folders
    assert (folder / "info.json").is_file() and len(list(folder.rglob("*.png"))) == 4 * 4


def test_a_foreign_folder_is_left_alone(tmp_path):
    folder = collage.collage_folder(tmp_path, COUNTS, SIZE)
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not a collage data set"):
        write_collage(tmp_path, COUNTS, SIZE)
    assert (folder / "mine.txt").read_text() == "keep"


def test_folder_follows_the_environment_and_names_what_is_unusual(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert collage.collage_folder() == tmp_path / "collage-v2"
    assert collage.collage_folder(size=(96, 128)) == tmp_path / "collage-v2-96x128"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert str(collage.collage_folder()) == "datasets/collage-v2"
    with pytest.raises(ValueError, match="counts must give"):
        collage.collage_folder(counts={"train": 3})


def test_rendering_needs_no_detectron2():
    code = "import sys, expedit_d2.data as d; d.make_scene; assert 'detectron2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
