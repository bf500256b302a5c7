"""Agreement with the plain model's instances."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from expedit_d2.evaluation import InstanceAgreement
from expedit_d2.evaluation.agreement import match_quality


def instances(boxes, classes, scores, masks=True):
    found = Instances((20, 20))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    found.pred_classes = torch.tensor(classes, dtype=torch.long)
    found.scores = torch.tensor(scores)
    if masks:
        planes = torch.zeros(len(boxes), 20, 20, dtype=torch.bool)
        for plane, (x0, y0, x1, y1) in zip(planes, boxes, strict=True):
            plane[y0:y1, x0:x1] = True
        found.pred_masks = planes
    return found


def agreement(plain, other):
    reference = InstanceAgreement()
    reference.process([{"image_id": 1}], [{"instances": plain}])
    assert reference.evaluate() == {"agreement": {"PQ": 100.0}}
    evaluator = InstanceAgreement().compare_with(reference)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": other}])
    return evaluator.evaluate()["agreement"]["PQ"]


BOXES = [[0, 0, 10, 10], [10, 10, 20, 20]]


@pytest.mark.parametrize("masks", [True, False])
def test_same_output_is_100_in_any_order(masks):
    plain = instances(BOXES, [0, 1], [0.9, 0.8], masks)
    other = instances(BOXES[::-1], [1, 0], [0.7, 0.6], masks)
    assert agreement(plain, other) == pytest.approx(100.0)


@pytest.mark.parametrize("masks", [True, False])
def test_half_shifted_box_counts_its_overlap(masks):
    plain = instances(BOXES, [0, 1], [0.9, 0.8], masks)
    other = instances([[0, 2, 10, 10], BOXES[1]], [0, 1], [0.9, 0.8], masks)
    assert agreement(plain, other) == pytest.approx(100 * (0.8 + 1.0) / 2)


def test_lost_and_additional_instances_count_half_each():
    plain = instances(BOXES, [0, 1], [0.9, 0.8])
    assert agreement(plain, instances(BOXES[:1], [0], [0.9])) == pytest.approx(100 / 1.5)
    assert agreement(instances(BOXES[:1], [0], [0.9]), plain) == pytest.approx(100 / 1.5)


def test_another_class_is_no_match():
    plain = instances(BOXES[:1], [0], [0.9])
    assert agreement(plain, instances(BOXES[:1], [1], [0.9])) == 0.0


def test_unsure_instances_do_not_count():
    plain = instances(BOXES, [0, 1], [0.9, 0.3])
    assert agreement(plain, instances(BOXES[:1], [0], [0.9])) == pytest.approx(100.0)


def test_nothing_found_by_either_is_agreement():
    assert agreement(instances([], [], []), instances([], [], [])) == 100.0


def test_matching_is_one_to_one():
    iou = np.array([[0.9, 0.6], [0.8, 0.0]])
    # 0.9 is taken first; what is left for the second row is below 0.5.
    assert match_quality(iou) == (pytest.approx(0.9), 1, 1, 1)
    assert iou[0, 0] == 0.9  # the argument is left alone
