"""What is not public in other packages is still there, and is what `compat` takes it for."""

from __future__ import annotations

import json
import pkgutil

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from expedit_d2 import compat
from support.vits import images, timm_vit


@pytest.mark.parametrize("owner,method", compat.OVERRIDDEN.items())
def test_methods_that_are_overridden_are_called_by_that_name(owner, method):
    assert callable(getattr(pkgutil.resolve_name(owner), method, None)), (
        f"{owner}.{method} has moved: what overrides it is never called"
    )


def test_tensors_count_changes_in_place():
    x = torch.zeros(2)
    before = compat.version_of(x)
    x += 1
    assert compat.version_of(x) == before + 1


def test_operators_have_a_schema_that_tells_views():
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(compat.schema_of(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(4).view(2, 2)
    assert [schema.name for schema in seen] == ["aten::zeros", "aten::view"]
    assert [schema.returns[0].alias_info is not None for schema in seen] == [False, True]


def test_the_cpu_runs_its_own_attention_kernel():
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4).unbind())
    assert compat.cpu_attention() in seen


def test_trees_are_flattened_and_put_together_again():
    tree = {"a": [torch.zeros(1), torch.ones(2)], "b": torch.ones(3)}
    leaves, structure = compat.tree_flatten(tree)
    assert isinstance(structure, compat.TreeSpec) and len(leaves) == 3
    assert compat.tree_unflatten(leaves, structure)["a"][1] is leaves[1]


def test_memory_is_known_again_until_it_is_gone():
    x = torch.zeros(3)
    memory = compat.StorageWeakRef(x.untyped_storage())
    assert memory == compat.StorageWeakRef(x[1:].untyped_storage()) and not memory.expired()
    del x
    assert memory.expired()


def test_timm_adds_positions_in_a_method_of_its_own():
    vit, x = timm_vit(), images()
    tokens = compat.positioned(vit, vit.patch_embed(x))
    assert tokens.shape == (2, vit.num_prefix_tokens + 96, 32)
    for block in vit.blocks:
        tokens = block(tokens)
    assert torch.equal(vit.norm(tokens), vit.forward_features(x))


def test_transformers_says_which_attention_it_has():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.ViTModel._from_config(config, attn_implementation="eager")
    assert compat.attention_of(model.config) == "eager"


def test_a_transformers_model_shows_what_it_records_and_how_it_checkpoints():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model, seen = transformers.ViTModel(config), []
    layer = model.layers[0]
    layer.register_forward_hook(lambda *_: seen.append(set(compat.recorded_outputs())))
    for recorded in (True, False):
        model(torch.zeros(1, 3, 8, 8), output_hidden_states=recorded)
    assert seen == [{"hidden_states"}, set()] and not compat.recorded_outputs()
    model.gradient_checkpointing_enable()
    assert compat.checkpointing_of(layer)(torch.square, torch.full((1,), 3.0)).item() == 9


@pytest.mark.parametrize("labelled", [True, False])
def test_an_evaluator_shows_its_ground_truth(tmp_path, labelled):
    content = {"images": [{"id": 1, "height": 4, "width": 4}], "categories": [{"id": 1}]}
    if labelled:
        content["annotations"] = []
    (tmp_path / "labels.json").write_text(json.dumps(content))
    name = str(tmp_path)
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).json_file = str(tmp_path / "labels.json")
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path), use_fast_impl=False)
    truth, tasks, evaluated = compat.coco_ground_truth(evaluator)
    assert list(truth.imgs) == [1] and tasks == ("bbox",) and evaluated == labelled
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
