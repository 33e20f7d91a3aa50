"""The only place where the benchmarks reach into fastreg's private modules."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastreg import plan, recall
from fastreg.plan import BLOCK, Mode, Part, plan_for
from fastreg.strengths import UNSCALED, Scale, Strength, Strengths
from fastreg.sweep import sweep

try:
    from fastreg.kernels import launch
except ImportError:  # there is no Triton for this machine
    launch = None  # type: ignore[assignment]

__all__ = ["BLOCK", "UNSCALED", "Mode", "Scale", "Strength"]


def one_sweep(weights: Sequence[Tensor], mode: Mode, l1: float, l2: float, impl: str, **keywords: Any) -> Any:
    """One sweep over weights of one strength group; returns what it measured, or None with reduce=False."""
    return sweep(weights, [0] * len(weights), mode, Strengths(l1, l2), impl=impl, **keywords)


def launch_kernels(
    weights: Sequence[Tensor], groups: Sequence[int], mode: Mode, strength: Strength, scale: Scale, with_value: bool
) -> object:
    """The Triton launches of one sweep, on whatever device the weights are; they are their own gradients."""
    found = plan_for(weights, groups)
    (parts,) = found.shards.values()
    grads = weights if mode in (Mode.GRADIENT, Mode.RESCALE, Mode.ACCUMULATE) else None
    value_dtype = found.value_dtype if with_value else None
    return launch.sweep(parts, mode, weights, grads, Strengths(strength, strength), scale, found.n_groups, value_dtype)


def parts_of(weights: Sequence[Tensor]) -> list[Part]:
    """The weights by device and dtype; fastreg launches one kernel for each part."""
    return [part for parts in plan_for(weights, [0] * len(weights)).shards.values() for part in parts]


def n_bytes(part: Part) -> int:
    """Bytes of the weights in a part."""
    return sum(part.numels) * part.dtype.itemsize


def n_chunks(part: Part) -> int:
    """Programs of the kernel that sweeps a part."""
    return part.tables.chunk_tensor.numel()


def kernel_settings() -> dict[str, int]:
    """What the library launches its kernels with."""
    return {"BLOCK": plan.BLOCK, "NUM_WARPS": launch.NUM_WARPS, "MOST_CHUNKS": plan.MOST_CHUNKS}


@contextmanager
def settings(**chosen: int) -> Iterator[None]:
    """Other values of BLOCK, NUM_WARPS, MOST_CHUNKS or CPU_BLOCK; the library's own are back afterwards."""
    own = [
        (module, name, getattr(module, name)) for module in (plan, launch) for name in chosen if hasattr(module, name)
    ]
    try:
        for module, name, _ in own:
            setattr(module, name, chosen[name])
        recall.forget()
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)
        recall.forget()
