"""Pictures: cluster borders, predictions, differences; the drawing tool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageDraw

from expedit_d2.api import expedite, is_expedited
from expedit_d2.methods import METHOD_REGISTRY, build_method
from expedit_d2.operators import cluster_tokens
from expedit_d2.predictions import PREDICTIONS
from expedit_d2.predictions.drawing import _inside
from expedit_d2.predictions.panoptic import match_segments
from expedit_d2.projects import load_cfg, load_model
from expedit_d2.settings import Settings
from expedit_d2.tokens import Tokens
from expedit_d2.visualize import (
    cluster_labels,
    draw_clusters,
    draw_difference,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    record_reductions,
    save_panels,
    side_by_side,
)
from expedit_d2.visualize.clusters import Reduction
from support.repository import SEGMENTER, VITDET, load_tool

GREY = np.full((32, 48, 3), 90, np.uint8)
COLORS = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
METADATA = Metadata(
    thing_classes=["disk", "ring"],
    stuff_classes=["disk", "ring", "sky"],
    stuff_colors=COLORS,
    thing_colors=COLORS[:2],
)
SCALE = 11  # 48 to 528 pixels


def reduce_once(features: torch.Tensor, settings: Settings, index: int = 0, window=None):
    """One reduction of a map (B, H, W, C), with the tokens themselves as keys."""
    method = build_method(settings, window, index)
    size = tuple(features.shape[1:3])
    return Reduction(method, *method.reduce(Tokens(features, size, size), lambda x: x))


def test_labels_are_the_nearest_cluster_by_explicit_search():
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, 9, 4)
    settings = Settings(alpha=1, grid=(3, 4), iterations=2, temperature=0.5, neighbor_window=3)
    labels = cluster_labels([reduce_once(tokens, settings)])
    clusters = cluster_tokens(tokens, (3, 4), 2, 0.5, settings.window).features[0]
    for i in range(6):
        for j in range(9):
            home = (i * 3 // 6, j * 4 // 9)
            near = {
                r * 4 + c: float((tokens[0, i, j] - clusters[r, c]).square().sum())
                for r in range(3)
                for c in range(4)
                if abs(r - home[0]) <= 1 and abs(c - home[1]) <= 1
            }
            assert labels[0, i, j] == min(near, key=near.get)


def test_labels_by_window_are_those_of_each_window():
    torch.manual_seed(0)
    tokens = torch.randn(2, 8, 10, 4)  # the last windows are padded
    settings = Settings(alpha=1, grid=(2, 2), scope="window", iterations=2)
    labels = cluster_labels([reduce_once(tokens, settings, window=4)])
    assert labels.shape == (2, 8, 10)
    alone = Settings(alpha=1, grid=(2, 2), iterations=2)
    for row in (0, 4):
        for col in (0, 4):
            window = cluster_labels([reduce_once(tokens[:, row : row + 4, col : col + 4], alone)])
            # The map of clusters is 4 x 6: that of window (r, c) starts at row 2 r, column 2 c.
            place = (window // 2 + row // 2) * 6 + window % 2 + col // 2
            assert torch.equal(labels[:, row : row + 4, col : col + 4], place)
    edge = labels[:, :, 8:]
    assert (edge % 6 >= 4).all()


def test_labels_of_several_merges_are_followed_one_by_one():
    torch.manual_seed(0)
    settings = Settings(alpha=(1, 3, 4), keep=0.3, method="merge")
    tokens = Tokens(torch.randn(2, 6, 5, 8), (6, 5), (6, 5))
    reductions = []
    for index in range(3):
        method = build_method(settings, None, index)
        tokens, record = method.reduce(tokens, lambda x: x)
        reductions.append(Reduction(method, tokens, record))
    labels = cluster_labels(reductions)
    for image in range(2):
        for place in range(30):
            cluster = place
            for _, _, record in reductions:
                cluster = int(record.index[image, cluster])
            assert labels[image, place // 5, place % 5] == cluster
    assert labels.max() + 1 == tokens.features.shape[1] == 9


def test_pooled_labels_are_the_cells():
    labels = cluster_labels(
        [reduce_once(torch.randn(1, 4, 6, 3), Settings(1, (2, 3), method="pool"))]
    )
    assert labels[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


@pytest.fixture(scope="module")
def segmenter():
    cfg = load_cfg(SEGMENTER, ["MODEL.DEVICE", "cpu"])
    return load_model(cfg), cfg.INPUT.FORMAT


@pytest.mark.parametrize("method", sorted(METHOD_REGISTRY))
def test_every_method_is_drawn(segmenter, method):
    model, color_format = segmenter
    torch.manual_seed(0)
    item = {"image": torch.randint(0, 256, (3, 256, 300), dtype=torch.uint8)}
    tokens = {"keep": 0.4} if METHOD_REGISTRY[method].unstructured else {"ratio": 0.6}
    settings = Settings(alpha=(2, 5), method=method, **tokens)
    (row,) = side_by_side(model, settings, item, METADATA, color_format)
    assert [title.split(":")[0] for title in row] == [
        "image",
        "clusters",
        "semantic, plain",
        f"semantic, {method}",
        "differ",
    ]
    assert not is_expedited(model)
    # The window sees the 256 columns at the left, drawn at twice their size.
    seen = np.asarray(item["image"].permute(1, 2, 0))[..., :256, :]
    seen = seen[..., ::-1] if color_format == "BGR" else seen
    seen = seen.repeat(2, 0).repeat(2, 1)
    clusters = row["clusters"]
    border = (clusters == (255, 230, 0)).all(-1)
    assert 0 < border.mean() < 0.5
    assert (clusters == seen).all(-1)[~border].all()


def test_reductions_are_recorded_inside_only(segmenter):
    model, _ = segmenter
    item = {"image": torch.zeros(3, 256, 256)}
    with torch.no_grad(), expedite(model, (1, 2), keep=0.5, method="merge") as handle:
        with record_reductions(handle.blocks) as reductions:
            model([item])
        model([item])
    assert [r.method for r in reductions] == list(handle.blocks.methods.values())


def test_boundaries_lie_where_labels_change():
    image = np.zeros((4, 8, 3), np.uint8)
    drawn = draw_clusters(image, np.array([[0, 1]]))
    assert drawn[:, 4].any(-1).all() and not drawn[:, [0, 1, 2, 3, 5, 6, 7]].any()
    assert not image.any()


def instances(boxes, classes, scores, masks=True) -> Instances:
    found = Instances((32, 48))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.pred_classes, found.scores = torch.tensor(classes), torch.tensor(scores)
    if masks:
        found.pred_masks = torch.zeros(len(boxes), 32, 48)
        for plane, (x0, y0, x1, y1) in zip(found.pred_masks, boxes, strict=True):
            plane[y0:y1, x0:x1] = 1
    return found


def panoptic(labels: np.ndarray, classes: dict[int, int]) -> tuple[torch.Tensor, list[dict]]:
    segments = [{"id": i, "category_id": c, "isthing": c < 2} for i, c in classes.items()]
    return torch.as_tensor(labels), segments


def halves(split: int) -> np.ndarray:
    labels = np.ones((32, 48), np.int32)
    labels[:, split:] = 2
    return labels


def leading_color(drawn: np.ndarray, row: int, col: int) -> int:
    """The strongest channel in the middle of an enlarged pixel."""
    return int(drawn[row * SCALE + 3, col * SCALE + 3].argmax())


def test_panoptic_segments_have_the_colors_of_their_classes():
    drawn = draw_panoptic(GREY, panoptic(halves(24), {1: 2, 2: 0}), METADATA)
    assert drawn.shape == (32 * SCALE, 48 * SCALE, 3)
    assert (leading_color(drawn, 3, 3), leading_color(drawn, 3, 40)) == (2, 0)
    assert (drawn[5, 24 * SCALE] == 255).all()  # the border
    assert GREY.max() == 90


def test_pixels_of_no_segment_stay_bare():
    labels = halves(24)
    labels[labels == 2] = 0
    drawn = draw_panoptic(GREY, panoptic(labels, {1: 0}), METADATA)
    assert (drawn[:, 25 * SCALE :] == 90).all()
    nothing = draw_panoptic(GREY, panoptic(labels * 0, {}), METADATA)
    assert (nothing == 90).all()


def test_semantic_labels_have_the_colors_of_their_classes():
    scores = torch.zeros(3, 32, 48)
    scores[1, :, :24] = 1
    scores[2, :, 24:] = 1
    drawn = draw_semantic(GREY, scores, METADATA)
    assert (leading_color(drawn, 3, 3), leading_color(drawn, 3, 40)) == (1, 2)


def test_names_are_moved_into_the_picture():
    size = (100, 60)
    assert _inside((50, 30), (40, 20, 60, 40), size) == (50, 30)
    assert _inside((2, 3), (-8, -7, 12, 13), size) == (10, 10)
    assert _inside((98, 59), (88, 49, 108, 69), size) == (90, 50)


@pytest.mark.parametrize("masks", [True, False])
def test_only_confident_instances_are_drawn(masks):
    found = instances([[2, 2, 20, 20], [30, 2, 44, 20]], [0, 1], [0.9, 0.1], masks)
    drawn = draw_instances(GREY, found, METADATA)
    assert (drawn[:, : 24 * SCALE] != 90).any() and (drawn[:, 24 * SCALE :] == 90).all()
    if masks:
        assert leading_color(drawn, 10, 10) == 0


def test_difference_is_red_where_it_is():
    different = np.zeros((32, 48), bool)
    different[5, 7] = True
    drawn = draw_difference(GREY, different)
    red = drawn[..., 0] > drawn[..., 1]
    assert red.sum() == SCALE * SCALE and red[5 * SCALE, 7 * SCALE]


def test_equal_outputs_do_not_differ():
    outputs = {
        "instances": instances([[2, 2, 20, 20]], [0], [0.9]),
        "panoptic_seg": panoptic(halves(24), {1: 2, 2: 0}),
        "sem_seg": torch.rand(3, 32, 48),
        "depth": torch.rand(32, 48),
        "features": torch.rand(5, 4, 6),
        "feature_directions": torch.rand(5, 4, 6),
    }
    assert set(outputs) == set(PREDICTIONS)
    for key, kind in PREDICTIONS.items():
        assert not kind.differ(outputs[key], outputs[key]).any()


def test_panoptic_difference_is_where_segments_are_not_the_same():
    """Numbers of segments mean nothing; another class makes another segment."""
    differ = PREDICTIONS["panoptic_seg"].differ
    plain = panoptic(halves(24), {1: 2, 2: 0})
    other = panoptic(3 - halves(26), {2: 2, 1: 0})  # numbers swapped, two columns changed
    assert match_segments(other, plain) == {1: 2, 2: 1}
    expected = np.zeros((32, 48), bool)
    expected[:, 24:26] = True
    assert np.array_equal(differ(plain, other), expected)
    changed = panoptic(halves(24), {1: 2, 2: 1})
    assert np.array_equal(differ(plain, changed), halves(24) == 2)
    lost = panoptic(halves(24) % 2, {1: 2})
    assert np.array_equal(differ(plain, lost), halves(24) == 2)


def test_instance_difference_is_where_the_topmost_class_changes():
    differ = PREDICTIONS["instances"].differ
    one = instances([[0, 0, 10, 10], [5, 0, 15, 10]], [0, 1], [0.9, 0.8])
    other = instances([[5, 0, 15, 10], [0, 0, 10, 10]], [1, 0], [0.95, 0.8])
    expected = np.zeros((32, 48), bool)
    expected[:10, 5:10] = True
    assert np.array_equal(differ(one, other), expected)


def test_semantic_difference_is_where_the_best_class_changes():
    scores, other = torch.rand(2, 3, 32, 48)
    expected = scores.argmax(0) != other.argmax(0)
    assert np.array_equal(PREDICTIONS["sem_seg"].differ(scores, other), expected.numpy())


def test_depth_difference_is_more_than_five_percent():
    depth = torch.full((32, 48), 2.0)
    other = depth.clone()
    other[:, :10] *= 1.04
    other[:, 20:30] *= 1.06
    other[:, 30:40] /= 1.06
    other[:, 40:] = 0
    expected = np.zeros((32, 48), bool)
    expected[:, 20:] = True
    assert np.array_equal(PREDICTIONS["depth"].differ(depth, other), expected)


def test_depth_is_drawn_in_colors_at_the_size_of_other_drawings():
    ramp = torch.arange(48.0).expand(32, 48)
    drawn = PREDICTIONS["depth"].draw(GREY, ramp, METADATA)
    assert drawn.shape == draw_semantic(GREY, torch.rand(3, 32, 48), METADATA).shape
    assert drawn.dtype == np.uint8
    assert (drawn[:, : 4 * SCALE] != drawn[:, -4 * SCALE :]).any(-1).all()


def test_panels_are_written(tmp_path):
    path = tmp_path / "new" / "panels.png"
    save_panels([{"image": GREY, "plain": GREY}, {"image": GREY}], path)
    with Image.open(path) as picture:
        assert picture.width > picture.height > 100


def test_tool_draws_images_of_any_size(tiny_opts, tmp_path, capsys):
    draw = load_tool("draw")
    photos = []
    for name, size in (("a/x.jpg", (90, 70)), ("b/x.jpg", (64, 130))):
        photos.append(tmp_path / name)
        photos[-1].parent.mkdir()
        Image.effect_noise(size, 80).convert("RGB").save(photos[-1])
    output = tmp_path / "pictures"
    setting = ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"]
    common = ["--config-file", VITDET, "--output", str(output)]
    draw.run([*common, "--images", *map(str, photos), "--", *tiny_opts, *setting])
    assert sorted(p.name for p in output.iterdir()) == ["000_x.png", "001_x.png"]
    assert "2 pictures" in capsys.readouterr().out
    draw.run([*common, "--count", "1", "--", *tiny_opts, *setting])
    assert len(list(output.iterdir())) == 3
    with pytest.raises(SystemExit, match="there are no images at 'none.jpg'"):
        draw.run([*common, "--images", "none.jpg", "--", *tiny_opts, *setting])
    with pytest.raises(SystemExit, match="neither MODEL.EXPEDIT.ALPHA nor BUDGET"):
        draw.run([*common, "--", *tiny_opts])


def test_names_of_instances_lie_in_the_picture_and_cover_no_other(monkeypatch):
    """Five instances nearly on top of each other, and one in a corner."""
    written = []
    original = ImageDraw.ImageDraw.text

    def text(self, place, name, **style):
        outline = {key: style[key] for key in ("anchor", "font_size", "stroke_width")}
        written.append((name, self.textbbox(place, name, **outline)))
        return original(self, place, name, **style)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    found = Instances((96, 128))
    corners = [[40 + i, 40 + i, 80, 80] for i in range(5)] + [[120, 90, 128, 96]]
    found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
    found.scores = torch.linspace(0.9, 0.6, 6)
    found.pred_classes = torch.arange(6)
    image = np.full((96, 128, 3), 128, np.uint8)
    metadata = Metadata(thing_classes=[f"a long name {i}" for i in range(6)])
    drawn = draw_instances(image, found, metadata)
    assert [name.rpartition(" ")[0] for name, _ in written] == metadata.thing_classes
    for number, (_, box) in enumerate(written):
        assert box[0] >= 0 and box[1] >= 0
        assert box[2] <= drawn.shape[1] and box[3] <= drawn.shape[0]
        assert box[3] - box[1] >= 12  # pixels of 512
        for _, other in written[:number]:
            apart = box[0] >= other[2] or other[0] >= box[2]
            assert apart or box[1] >= other[3] or other[1] >= box[3]
