"""What a backward pass costs: memory, sweeps, operators and launches, and nothing that waits for the device."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastreg.blocks import plan
from fastreg.core.layout import forget_layouts
from fastreg.core.types import Mode
from tests.support.helpers import Path
from tests.support.ways import WAYS, Scene, grid, spy_on_sweeps


def many(n_tensors: int, n_elements: int = 512) -> Callable[[str], list[Tensor]]:
    return lambda device: [grid(n_elements, device=device, seed=i).requires_grad_() for i in range(n_tensors)]


def with_gradients(scene: Scene) -> Scene:
    for w in scene.weights:
        w.grad = torch.zeros_like(w)
    return scene


class Operators(TorchDispatchMode):
    """Records the operators that run, and the most elements that one of them allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.names.append(str(func))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.numel())
                self.total += t.numel()
        return result


@pytest.mark.parametrize("way", WAYS)
def test_the_direct_way_needs_no_memory_of_the_models_size(
    path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that even this small model is many blocks for the PyTorch path.
    block = 256
    monkeypatch.setattr(plan, "CPU_BLOCK", block)
    monkeypatch.setattr(plan, "DEVICE_BLOCK", block)
    forget_layouts()
    scene = with_gradients(Scene(way, path, many(8)))

    with Operators() as operators:
        (2 * scene.penalty()).backward()

    forget_layouts()
    n_elements = sum(w.numel() for w in scene.weights)
    # The ordinary way shows that the measurement sees a buffer where there is one.
    assert operators.largest <= block if way == "direct" else operators.total >= n_elements


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_sweeps(path: Path, upstream: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient come from one pass where autograd has to see the gradient."""
    modes = spy_on_sweeps(monkeypatch)
    sweeps = {}
    for way in WAYS:
        scene = Scene(way, path)
        penalty = upstream * scene.penalty()
        forward = modes.copy()
        penalty.backward()
        sweeps[way] = forward, modes[len(forward) :]
        modes.clear()
    assert sweeps["direct"] == ([Mode.VALUE], [Mode.ACCUMULATE])
    # RESCALE reads one number and stops where the upstream gradient is 1.
    assert sweeps["ordinary"] == ([Mode.GRADIENT], [Mode.RESCALE])


def test_of_fixed_weights_only_the_value_is_formed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = spy_on_sweeps(monkeypatch)
    scene = Scene("ordinary", path)
    learnable = torch.tensor(0.5, device=scene.device, requires_grad=True)
    # Anomaly mode looks at all gradients there are, and of fixed weights there are none.
    with torch.autograd.set_detect_anomaly(True):
        scene.penalty([w.detach() for w in scene.weights], l1=learnable).backward()
    assert modes == [Mode.VALUE]
    assert learnable.grad is not None


def test_operators_and_launches_do_not_grow_with_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path[0] != "triton":
        pytest.skip("the PyTorch path cuts tensors into blocks")
    from fastreg.kernels import launch

    launches: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name
            self.kernel = getattr(launch, name)

        def __getitem__(self, grid: Any) -> Any:
            def run(**keywords: Any) -> Any:
                launches.append(self.name)
                return self.kernel[grid](**keywords)

            return run

    for name in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, name, Counted(name))

    def cost(n_tensors: int) -> list[str]:
        scene = with_gradients(Scene("direct", path, many(n_tensors, n_elements=5)))
        scene.penalty().backward()  # builds the tables
        launches.clear()
        with Operators() as operators:
            penalty = scene.penalty()
            penalty.backward()
        assert launches == ["_sweep_kernel", "_finish_kernel", "_sweep_kernel"]
        return operators.names

    assert cost(3) == cost(30)


class NothingIsRead(TorchDispatchMode):
    """Fails on operators that bring a device's number to the host."""

    FORBIDDEN = ("_local_scalar_dense", "equal.default", "is_nonzero", "nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strengths_on_device", [True, False])
def test_the_direct_way_reads_nothing_on_the_host(path: Path, strengths_on_device: bool) -> None:
    if path == ("torch", "cpu"):
        pytest.skip("there the numbers are in host memory")
    scene = with_gradients(Scene("direct", path))
    l1, l2 = torch.tensor([0.5, 0.25], device=scene.device).unbind() if strengths_on_device else (0.5, 0.25)
    factor = torch.tensor(3.0, device=scene.device)

    def step() -> None:
        total, l1_term, _ = scene.terms(l1=l1, l2=l2)
        (total + l1_term).backward(factor)

    step()  # kernels compile and tables travel once
    # The interpreter, which stands in for a GPU, does read memory: it looks on from outside.
    with NothingIsRead():
        if scene.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            if scene.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_a_value_that_is_kept_keeps_no_weights_after_backward(path: Path) -> None:
    """A logged value must not hold on to weights computed for one step, as saved tensors would not."""
    scene = Scene("direct", path, many(2))
    computed = 2 * scene.weights[0]
    reference = weakref.ref(computed)
    penalty = scene.penalty([computed, scene.weights[1]])
    del computed
    penalty.backward()
    gc.collect()
    assert reference() is None
