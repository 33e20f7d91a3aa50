"""The only place where the benchmarks reach into fastreg's private modules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastreg.blocks import plan
from fastreg.core.layout import Layout, forget_layouts
from fastreg.core.penalty import Scale, Strength
from fastreg.core.types import (
    COUNTING,
    STATES,
    STEPS,
    AdamSettings,
    ElementwiseProxSettings,
    Mode,
    Request,
    SGDSettings,
    StepInputs,
    Want,
    Work,
)
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.sweep.local import local_sweep

try:
    from fastreg import kernels
    from fastreg.kernels import launch, tables
except ImportError:  # there is no Triton for this machine
    kernels = launch = tables = None  # type: ignore[assignment]

SETTINGS = {
    Mode.SGD: SGDSettings,
    Mode.MOMENTUM: SGDSettings,
    Mode.ADAM: AdamSettings,
    Mode.AMSGRAD: AdamSettings,
    Mode.ELEMENTWISE_PROX: ElementwiseProxSettings,
}

__all__ = ["STEPS", "Mode", "Scale", "Strength", "Want"]


def one_sweep(weights: Sequence[Tensor], mode: Mode, l1: float, l2: float, impl: str, **keywords: Any) -> Any:
    """One sweep over weights of one strength group; returns its value if `want` asks for one."""
    names = [str(i) for i in range(len(weights))]
    work = Work(names, weights, [0] * len(weights), 1, ElasticNetPenalty((l1, l2)), impl)
    with torch.no_grad():
        return local_sweep(work, Request(mode, **keywords))


def launch_kernels(weights: Sequence[Tensor], mode: Mode, strength: Strength, scale: Scale, with_value: bool) -> object:
    """The Triton launches of one sweep on any device. Weights are their own gradients, the last of several a group."""
    n_groups = 1 + int(len(weights) > 1)
    groups: list[int | range] = [0] * (len(weights) - 1) + [n_groups - 1]
    layout = Layout(weights, groups)
    (parts,) = layout.parts.values()
    step = None
    if mode in STATES:
        states = dict.fromkeys(STATES[mode], weights)
        counts = [torch.zeros((), device=weights[0].device)] * len(weights) if mode in COUNTING else None
        step = StepInputs([SETTINGS[mode](1.0)] * n_groups, states, counts)
    grads = weights if mode not in (Mode.VALUE, Mode.PROX, Mode.ELEMENTWISE_PROX) else None
    work = Work([], weights, groups, n_groups, ElasticNetPenalty((strength, strength)), "triton", layout=layout)
    want = Want.TERMS if with_value else Want.NOTHING
    return launch.kernel_sweep(parts, work, Request(mode, want, grads, scale, step))


def launch_sizes(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Bytes of weights, and programs, of each launch that one sweep makes: one per device and dtype."""
    parts = [part for parts in Layout(weights, [0] * len(weights)).parts.values() for part in parts]
    chunks = [part.prepared(tables.PointerTables).of_weights().n_chunks for part in parts]
    return [(sum(part.numels) * part.dtype.itemsize, n) for part, n in zip(parts, chunks, strict=True)]


def kernel_settings() -> dict[str, int]:
    """What the library launches its kernels with."""
    return {"BLOCK": tables.BLOCK, "NUM_WARPS": launch.NUM_WARPS, "MOST_CHUNKS": tables.MOST_CHUNKS}


@contextmanager
def settings(**chosen: int) -> Iterator[None]:
    """Other values of BLOCK, NUM_WARPS, MOST_CHUNKS or CPU_BLOCK; the library's own are back afterwards."""
    with ExitStack() as stack:
        stack.callback(forget_layouts)  # the last that happens
        for place in (plan, launch, tables):
            if there := {name: value for name, value in chosen.items() if hasattr(place, name)}:
                stack.enter_context(mock.patch.multiple(place, **there))
        forget_layouts()
        yield


class NoKernel:
    """Launches that do nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: None


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """With impl="triton" CPU tensors are accepted and nothing is launched, on any device; without Triton no change."""
    if launch is None:
        yield
        return
    no_kernel = NoKernel()
    try:
        with (
            mock.patch.object(kernels, "INTERPRETED", True),
            mock.patch.multiple(launch, _sweep_kernel=no_kernel, _finish_kernel=no_kernel),
        ):
            yield
    finally:
        forget_layouts()
