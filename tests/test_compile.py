"""One graph: no breaks for torch.compile, nothing that would make a GPU wait for the host."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from expedit_d2 import expedite, fuse_attention
from expedit_d2.adapters.timm_vit import PrefixLayout
from expedit_d2.attention import MasksAsChannels
from support.every_method import MODELS, PAIRS, SIZE, outputs, settings_for
from support.tensors import distance
from support.vits import images

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiles(model: nn.Module) -> None:
    x = images(SIZE)
    with torch.no_grad():
        expected = outputs(model, x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(outputs(compiled, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind,method", PAIRS)
def test_expedited_models_compile_to_one_graph(kind, method):
    model = MODELS[kind]()
    with expedite(model, **settings_for(kind, method), fused_attention=True):
        assert_compiles(model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind,method", [("swin", "merge"), ("timm_vit", "expedit")])
def test_compiled_kernels_compute_the_same(kind, method):
    """PyTorch 2.11 compiles some sums and indices of maxima to wrong ones."""
    model, x = MODELS[kind](), images(SIZE)
    with expedite(model, **settings_for(kind, method), fused_attention=True), torch.no_grad():
        expected = outputs(model, x)
        compiled = torch.compile(model, fullgraph=True)
        assert distance(outputs(compiled, x), expected) < 1e-4


#: Models that take images of any size, and settings.
SIZES = [
    (kind, settings)
    for kind in ("timm_vit", "detectron2_vit")
    for settings in ({"budget": 0.5}, {"alpha": 1, "ratio": 0.6})
]


@pytest.mark.parametrize("kind,settings", SIZES, ids=str)
@pytest.mark.slow
def test_a_size_is_compiled_once(kind, settings):
    """No break in a graph, and no shape or guard in it that depends on what is in an image."""
    model = MODELS[kind](depth=2)
    counter = CompileCounterWithBackend("aot_eager")
    with expedite(model, outputs=(1,), **settings), torch.no_grad():
        # The sizes are known to the graph: with CUDA graphs they have to be.
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
        for turn in range(3):
            for size in ((24, 32), (32, 40)):
                x = torch.randn(2, 3, *size) * 10**turn
                expected = outputs(model, x)
                torch.testing.assert_close(outputs(compiled, x), expected, rtol=1e-3, atol=1e-3)
            assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["detectron2_vit", "swin"])
def test_fused_plain_models_compile_to_one_graph(kind):
    model = MODELS[kind]()
    with fuse_attention(model):
        assert_compiles(model)


class _NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device: values read back, and Python numbers copied to it."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten._unique2,
        torch.ops.aten.lift_fresh,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.FORBIDDEN, function
        for index in args[1] if function.overloadpacket is torch.ops.aten.index else ():
            assert index is None or index.dtype != torch.bool, "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind,method", PAIRS)
def test_nothing_waits_for_the_device(kind, method, batch):
    model = MODELS[kind]()
    settings = settings_for(kind, method) | {"fused_attention": True}
    with expedite(model, **settings), torch.no_grad():
        x = images(SIZE, batch)
        outputs(model, x)  # what a model computes once and keeps
        with _NoWaiting():
            outputs(model, x)


def test_waiting_would_be_noticed():
    x = images(SIZE)
    for waits in (
        lambda: x.sum().item(),
        lambda: x.new_tensor([1.0, 2.0]),
        lambda: x[x > 0],
        lambda: (x > 0).nonzero(),
        lambda: bool(x.any()),
    ):
        with pytest.raises(AssertionError), _NoWaiting():
            waits()


@pytest.mark.parametrize("kind", ["timm_vit", "timm_eva"])
def test_sizes_as_channels_compile_to_one_graph(monkeypatch, kind):
    """As on a GPU; see `MasksAsChannels`."""
    monkeypatch.setattr(PrefixLayout, "_masks", staticmethod(lambda x: MasksAsChannels()))
    model = MODELS[kind]()
    with expedite(model, alpha=1, grid=(4, 5), iterations=2):
        assert_compiles(model)
