"""segment-anything's image encoder, expedited: alone, in a ``Sam``, in its predictor."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite, fuse_attention
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from support.tensors import IDENTITY, constant_cells, error, perturbed

sam_modeling = pytest.importorskip(
    "segment_anything.modeling", reason="segment-anything is not installed: pip install .[sam]"
)
PATCH = 4
SIDE = 10  # tokens along the sides of the model's own map


def encoder(**changes) -> nn.Module:
    settings = {
        "img_size": SIDE * PATCH,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "out_chans": 16,
        "use_rel_pos": True,
        "window_size": 7,
        "global_attn_indexes": (1, 3),
    }
    return perturbed(sam_modeling.ImageEncoderViT(**(settings | changes)), relative=0.5)


def sam(**changes) -> nn.Module:
    return perturbed(
        sam_modeling.Sam(
            image_encoder=encoder(**changes),
            prompt_encoder=sam_modeling.PromptEncoder(
                embed_dim=16,
                image_embedding_size=(SIDE, SIDE),
                input_image_size=(SIDE * PATCH, SIDE * PATCH),
                mask_in_chans=4,
            ),
            mask_decoder=sam_modeling.MaskDecoder(
                num_multimask_outputs=3,
                transformer=sam_modeling.TwoWayTransformer(
                    depth=2, embedding_dim=16, mlp_dim=32, num_heads=2
                ),
                transformer_dim=16,
                iou_head_hidden_dim=16,
            ),
        ),
        relative=0.5,
    )


def images(size: tuple[int, int] = (SIDE, SIDE), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# --- nothing is lost where there is nothing to lose ------------------------------------------


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("scope", ["map", "window"])
@pytest.mark.parametrize("method", ["expedit", "hard"])
@pytest.mark.parametrize("alpha", [0, 1, 3, (0, 2)])
def test_one_cluster_a_token_is_the_plain_model(alpha, method, scope, positions):
    model, x = encoder(), images(batch=3)  # windows of 7 pad a map of 10
    expected = run(model, x)
    grid = (SIDE, SIDE) if scope == "map" else (7, 7)
    settings = {"method": method, "grid": grid, "scope": scope, "positions": positions}
    if method == "expedit":
        settings |= IDENTITY
    with expedite(model, alpha, **settings):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("method", ["merge", "tome", "density"])
@pytest.mark.parametrize("alpha", [0, 2, (0, 1, 2, 3)])
def test_keeping_all_tokens_is_the_plain_model(alpha, method):
    # ToMe merges equally many tokens in every window.
    model, x = encoder(window_size=5 if method == "tome" else 7), images(batch=3)
    expected = run(model, x)
    with expedite(model, alpha, method=method, keep=1.0):
        assert error(run(model, x), expected) < 1e-5


def test_pooling_to_the_whole_map_is_the_plain_model():
    model, x = encoder(), images()
    expected = run(model, x)
    with expedite(model, 1, method="pool", grid=(SIDE, SIDE)):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qkv_bias": False},
        {"window_size": 0, "global_attn_indexes": (0, 1, 2, 3)},
        {"global_attn_indexes": ()},
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{"grid": (SIDE, SIDE), **IDENTITY}, {"keep": 1.0}], ids=str)
def test_other_architectures(changes, settings):
    model, x = encoder(**changes), images()
    expected = run(model, x)
    with expedite(model, 1, method="merge" if "keep" in settings else "expedit", **settings):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("size", [(5, 6), (14, 7), (3, 17)])
def test_other_sizes(size):
    """A table of absolute positions fixes the size; relative positions are stretched."""
    model, x = encoder(use_abs_pos=False), images(size)
    expected = run(model, x)
    with expedite(model, 1, grid=size, **IDENTITY):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, 1, method="merge", keep=1.0):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("method", ["expedit", "hard"])
@pytest.mark.parametrize(
    "window,grid,scope", [(5, (4, 4), "map"), (5, (2, 2), "window"), (0, (4, 3), "map")]
)
def test_equal_tokens_cluster_without_loss(window, grid, scope, method):
    """Cells have unequal numbers of tokens: exact only if attention knows how many."""
    model = encoder(use_abs_pos=False, window_size=window)
    for block in model.blocks:
        block.attn.rel_pos_h.data.zero_()
        block.attn.rel_pos_w.data.zero_()
    x = constant_cells((SIDE, SIDE), (4, 4) if scope == "window" else grid)
    expected = run(model, x)
    settings = {"method": method, "grid": grid, "scope": scope}
    if method == "expedit":
        settings |= {"temperature": 1e4, "neighbors": 1}
    with expedite(model, 0, **settings):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, 0, size_aware=False, **settings):
        assert error(run(model, x), expected) > 1e-3


def test_equal_tokens_merge_without_loss():
    model = encoder(use_abs_pos=False, use_rel_pos=False, window_size=5)
    x = constant_cells((SIDE, SIDE), (5, 5))
    expected = run(model, x)
    with expedite(model, 0, method="merge", keep=0.5):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, 0, method="merge", keep=0.5, size_aware=False):
        assert error(run(model, x), expected) > 1e-3


# --- it is the model's own code until tokens are reduced, and again afterwards -----------------


@pytest.mark.parametrize("settings", [{"grid": (4, 4)}, {"method": "merge", "keep": 0.5}], ids=str)
def test_blocks_before_alpha_are_the_models_own(settings):
    model, x, seen = encoder(), images(), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    run(model, x)
    with expedite(model, 2, **settings):
        run(model, x)
    plain, expedited = seen
    assert torch.equal(expedited, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.5},
        {"budget": 0.7, "method": "expedit"},
        {"alpha": 1, "grid": (3, 3), "scope": "window", "fused_attention": True},
        {"alpha": 1, "method": "merge", "keep": 0.5},
    ],
    ids=str,
)
def test_remove_restores_everything(settings):
    model, x = sam(), images()
    vit = model.image_encoder
    expected, keys, modules = run(vit, x), list(model.state_dict()), list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    with expedite(model, **settings):
        assert list(model.state_dict()) == keys
        assert error(run(vit, x), expected) > 1e-4
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module) == before
    assert torch.equal(run(vit, x), expected)


# --- in use ----------------------------------------------------------------------------------


def test_in_a_sam():
    """Masks from prompts; clusters that are tokens lose nothing, fewer do."""
    model = sam()
    batch = [
        {
            "image": torch.rand(3, SIDE * PATCH, SIDE * PATCH) * 255,
            "original_size": (SIDE * PATCH, SIDE * PATCH),
            "point_coords": torch.tensor([[[9.0, 12.0]]]),
            "point_labels": torch.tensor([[1]]),
        }
        for _ in range(2)
    ]
    plain = model(batch, multimask_output=True)
    assert find_transformer(model).owner is model.image_encoder
    with expedite(model, (0, 2), method="merge", keep=1.0):
        same = model(batch, multimask_output=True)
    with expedite(model, budget=0.5):
        fewer = model(batch, multimask_output=True)
    for a, b, c in zip(plain, same, fewer, strict=True):
        assert error(b["low_res_logits"], a["low_res_logits"]) < 1e-4
        assert error(c["low_res_logits"], a["low_res_logits"]) > 1e-3
        assert c["masks"].shape == a["masks"].shape == (1, 3, SIDE * PATCH, SIDE * PATCH)


def test_in_the_predictor_and_the_mask_generator():
    from segment_anything import SamAutomaticMaskGenerator, SamPredictor

    model = sam()
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    thresholds = {"pred_iou_thresh": -1e9, "stability_score_thresh": 0.0}
    with expedite(model, budget=0.5):
        predictor = SamPredictor(model)
        predictor.set_image(picture)
        masks, scores, _ = predictor.predict(np.array([[10, 20]]), np.array([1]))
        found = SamAutomaticMaskGenerator(model, points_per_side=2, **thresholds).generate(picture)
    assert masks.shape == (3, 30, 50) and np.isfinite(scores).all()
    assert isinstance(found, list)


def wide(**changes) -> nn.Module:
    """A plain encoder of some width: the operators are a small part, as in use."""
    sizes = {"img_size": 256, "patch_size": 16, "embed_dim": 192, "depth": 8, "num_heads": 3}
    return encoder(**sizes, mlp_ratio=4.0, **changes)


def share_of_flops(model: nn.Module, **settings) -> float:
    x = torch.randn(1, 3, 256, 256)
    plain = count_flops(model, x)
    with expedite(model, **settings):
        return count_flops(model, x).blocks / plain.blocks


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "merge", "tome", "expedit", "pool", "hard"])
def test_the_budget_is_met(method):
    share = share_of_flops(wide(window_size=0), budget=0.5, method=method)
    assert 0.46 < share < 0.54


@pytest.mark.slow
def test_the_budget_is_met_in_windows():
    model = wide(window_size=8, global_attn_indexes=(3, 7))
    assert 0.46 < share_of_flops(model, budget=0.5) < 0.54


def test_fused_attention_is_the_models_own():
    model, x = encoder(), images()
    expected = run(model, x)
    with fuse_attention(model):
        assert "forward" in vars(model.blocks[0].attn)
        assert error(run(model, x), expected) < 1e-5
    assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize(
    "settings",
    [{"grid": (5, 5)}, {"grid": (4, 4), "scope": "window"}, {"method": "merge", "keep": 0.5}],
    ids=str,
)
def test_bfloat16_stays_near(settings):
    model, x = encoder(), images()
    with expedite(model, 1, **settings):
        expected = run(model, x)
        model.to(torch.bfloat16)
        actual = run(model, x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16 and torch.isfinite(actual).all()
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.2


def test_images_of_a_batch_do_not_meet():
    model, x = encoder(), images(batch=3)
    for settings in ({"grid": (4, 5)}, {"method": "merge", "keep": 0.5}):
        with expedite(model, 1, **settings):
            together = run(model, x)
            alone = torch.cat([run(model, image[None]) for image in x])
        assert error(together, alone) < 1e-5


def test_gradients_reach_everything():
    model, x = encoder(), images()
    with expedite(model, 1, method="merge", keep=0.5):
        (model(x) * torch.randn(2, 16, SIDE, SIDE)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_copies_and_pickles():
    model, x = encoder(), images()
    with expedite(model, 1, method="merge", keep=0.5):
        expected = run(model, x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(run(copied, x), expected)
    assert torch.equal(run(pickled, x), expected)


@pytest.mark.slow
def test_compiles_without_a_break():
    torch._dynamo.reset()
    model, x = encoder(depth=3), images()
    for settings in ({"grid": (4, 4)}, {"method": "merge", "keep": 0.5}):
        with expedite(model, 1, **settings):
            expected = run(model, x)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert error(run(compiled, x), expected) < 1e-5
        torch._dynamo.reset()
