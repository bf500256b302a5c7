"""Pictures: cluster borders, predictions, differences; the drawing tool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, load_tool
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from expedit_d2.evaluation.agreement import match_segments
from expedit_d2.operators import cluster_tokens
from expedit_d2.settings import Settings
from expedit_d2.visualize import (
    cluster_labels,
    draw_clusters,
    draw_difference,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    save_panels,
)
from expedit_d2.visualize.predictions import DRAWN

GREY = np.full((32, 48, 3), 90, np.uint8)
COLORS = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
METADATA = Metadata(
    thing_classes=["disk", "ring"],
    stuff_classes=["disk", "ring", "sky"],
    stuff_colors=COLORS,
    thing_colors=COLORS[:2],
)
SCALE = 11  # 48 to 528 pixels


def test_labels_are_the_nearest_cluster_by_explicit_search():
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, 9, 4)
    settings = Settings(alpha=1, grid=(3, 4), iterations=2, temperature=0.5, window=3)
    labels = cluster_labels(tokens, settings)
    clusters = cluster_tokens(tokens, (3, 4), 2, 0.5, 3).features[0]
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
    tokens = torch.randn(1, 8, 12, 4)
    settings = Settings(alpha=1, grid=(2, 2), scope="window", iterations=2)
    labels = cluster_labels(tokens, settings, attention_window=(4, 4))
    alone = Settings(alpha=1, grid=(2, 2), iterations=2)
    for index, (row, col) in enumerate((r, c) for r in (0, 4) for c in (0, 4, 8)):
        window = cluster_labels(tokens[:, row : row + 4, col : col + 4], alone)
        assert torch.equal(labels[:, row : row + 4, col : col + 4], window + 4 * index)


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
    }
    assert set(outputs) == set(DRAWN)
    for key, (_, differ) in DRAWN.items():
        assert not differ(outputs[key], outputs[key]).any()


def test_panoptic_difference_is_where_segments_are_not_the_same():
    """Numbers of segments mean nothing; another class makes another segment."""
    differ = DRAWN["panoptic_seg"][1]
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
    differ = DRAWN["instances"][1]
    one = instances([[0, 0, 10, 10], [5, 0, 15, 10]], [0, 1], [0.9, 0.8])
    other = instances([[5, 0, 15, 10], [0, 0, 10, 10]], [1, 0], [0.95, 0.8])
    expected = np.zeros((32, 48), bool)
    expected[:10, 5:10] = True
    assert np.array_equal(differ(one, other), expected)


def test_semantic_difference_is_where_the_best_class_changes():
    scores, other = torch.rand(2, 3, 32, 48)
    expected = scores.argmax(0) != other.argmax(0)
    assert np.array_equal(DRAWN["sem_seg"][1](scores, other), expected.numpy())


def test_depth_difference_is_more_than_five_percent():
    depth = torch.full((32, 48), 2.0)
    other = depth.clone()
    other[:, :10] *= 1.04
    other[:, 20:30] *= 1.06
    other[:, 30:40] /= 1.06
    other[:, 40:] = 0
    expected = np.zeros((32, 48), bool)
    expected[:, 20:] = True
    assert np.array_equal(DRAWN["depth"][1](depth, other), expected)


def test_depth_is_drawn_in_colors_at_the_size_of_other_drawings():
    ramp = torch.arange(48.0).expand(32, 48)
    drawn = DRAWN["depth"][0](GREY, ramp, METADATA)
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
    common = ["--config-file", EMBEDDED, "--output", str(output)]
    draw.run([*common, "--images", *map(str, photos), "--", *tiny_opts, *setting])
    assert sorted(p.name for p in output.iterdir()) == ["000_x.png", "001_x.png"]
    assert "2 pictures" in capsys.readouterr().out
    draw.run([*common, "--count", "1", "--", *tiny_opts, *setting])
    assert len(list(output.iterdir())) == 3
    with pytest.raises(SystemExit, match="--images: there is no file 'none.jpg'"):
        draw.run([*common, "--images", "none.jpg", "--", *tiny_opts, *setting])
    with pytest.raises(SystemExit, match="MODEL.EXPEDIT.ALPHA is not set"):
        draw.run([*common, "--", *tiny_opts])
