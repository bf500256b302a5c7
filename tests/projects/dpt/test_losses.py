"""Losses of depth, against loops."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from expedit_d2.projects.DPT.modeling.losses import (
    gradient_loss,
    normalized,
    silog_loss,
    trimmed_loss,
)
from support.dpt import tiny_cfg
from support.tensors import error


def test_silog_is_its_formula_and_ignores_a_scale():
    target = torch.rand(5, 7) * 9 + 1
    prediction = target * torch.rand(5, 7).exp()
    valid = torch.rand(5, 7) > 0.3
    d = [
        (prediction[i, j].log() - target[i, j].log()).item()
        for i in range(5)
        for j in range(7)
        if valid[i, j]
    ]
    mean, square = sum(d) / len(d), sum(x * x for x in d) / len(d)
    expected = (square - 0.5 * mean**2) ** 0.5
    assert silog_loss(prediction, target, valid).item() == pytest.approx(expected, rel=1e-5)
    assert silog_loss(3 * target, target, valid, variance=1.0).item() < 1e-3
    nothing = torch.zeros_like(valid)
    assert silog_loss(prediction.requires_grad_(), target, nothing).item() == 0.0


def test_affine_invariant_loss():
    x = torch.rand(9, 11)
    valid = torch.rand(9, 11) > 0.2
    values = sorted(x[valid].tolist())
    median = values[(len(values) - 1) // 2]
    deviation = sum(abs(v - median) for v in values) / len(values)
    assert error(normalized(x, valid), (x - median) / deviation) < 1e-5
    residual = normalized(3 * x + 7, valid) - normalized(x, valid)
    assert trimmed_loss(residual, valid).item() < 1e-5
    assert gradient_loss(residual, valid).item() < 1e-3
    residual = torch.randn(9, 11)
    largest = sorted(residual[valid].abs().tolist())[: int(0.8 * valid.sum())]
    expected = sum(largest) / (2 * valid.sum().item())
    assert trimmed_loss(residual, valid).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_loss_is_its_loops():
    residual, valid = torch.randn(9, 11), torch.rand(9, 11) > 0.2
    expected = 0.0
    for step in (1, 2, 4, 8):
        r, v = residual[::step, ::step], valid[::step, ::step]
        total = 0.0
        for i in range(r.shape[0]):
            for j in range(r.shape[1]):
                for down, right in ((1, 0), (0, 1)):
                    if i + down < r.shape[0] and j + right < r.shape[1]:
                        if v[i, j] and v[i + down, j + right]:
                            total += abs(r[i + down, j + right] - r[i, j]).item()
        expected += total / max(1, v.sum().item())
    assert gradient_loss(residual, valid).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("output", ["metric", "inverse"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_few_steps_lower_the_loss(output, frozen):
    cfg = tiny_cfg(OUTPUT=output, ACTIVATION="sigmoid", INVERT=output == "metric")
    cfg.MODEL.DPT.SHIFT = 0.05
    cfg.MODEL.TIMM.FREEZE = frozen
    model = build_model(cfg).train()
    depth = torch.linspace(1, 9, 48)[:, None].expand(48, 48).clone()
    depth[:, :5] = 0  # unknown
    image = torch.rand(3, 48, 48) * 50 + depth * 20
    inputs = [{"image": image, "depth": depth}, {"image": image.flip(2), "depth": depth.flip(1)}]
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    totals = []
    for _ in range(8):
        losses = model(inputs)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    # Every parameter is used: what is not would stop distributed training.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert totals[-1] < 0.9 * totals[0]
    same = [torch.equal(before[n], p) for n, p in model.backbone.named_parameters()]
    assert all(same) if frozen else not any(same)
    inputs[0]["depth"] = torch.zeros(48, 48)
    assert all(torch.isfinite(loss) for loss in model(inputs).values())
