"""Weights that break implementations: special values, awkward sizes and awkward strides."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.helpers import Path

# Elements that a Triton program reads at a time: fastreg.kernels.tables.BLOCK, which needs Triton.
BLOCK = 2048
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
L1, L2, LR = 0.3, 0.7, 0.5
NAN, INF = float("nan"), float("inf")


def leaf(tensor: Tensor) -> Tensor:
    """A leaf with the very storage and strides of `tensor`."""
    return tensor.detach().requires_grad_()


def _randn(*shape: int) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: torch.randn(shape, device=device).to(dtype)


def _special(dtype: torch.dtype, device: str) -> Tensor:
    info = torch.finfo(dtype)
    subnormal = info.tiny * info.eps
    values = [0.0, -0.0, 1.0, -1.0, info.tiny, -info.tiny, subnormal, -subnormal, info.max / 8, -info.max / 8]
    # Squares of float64's largest values overflow in any implementation; its own tests cover that.
    return torch.tensor(values if dtype != torch.float64 else values[:-2], dtype=torch.float64, device=device).to(dtype)


def _channels_last(dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(8, 3, 5, 5, device=device).to(dtype).to(memory_format=torch.channels_last)


def _misaligned(dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(3 * BLOCK + 8, device=device).to(dtype)[1:-2]


def _every_other(dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(6, 10, device=device).to(dtype)[:, ::2]


def _expanded(dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(1, 4, device=device).to(dtype).expand(3, 4)


def _surrounded_by_nan(dtype: torch.dtype, device: str) -> Tensor:
    memory = torch.full((2 * BLOCK + 64,), float("nan"), device=device, dtype=dtype)
    inside = memory[32 : 32 + BLOCK + 5]
    return inside.copy_(torch.randn(BLOCK + 5, device=device))


CASES: dict[str, Callable[[torch.dtype, str], Tensor]] = {
    "empty": _randn(0),
    "empty_rows": _randn(0, 3),
    "scalar": _randn(),
    "one": _randn(1),
    "block-1": _randn(BLOCK - 1),
    "block": _randn(BLOCK),
    "block+1": _randn(BLOCK + 1),
    "blocks": _randn(3, BLOCK),
    "matrix": _randn(37, 53),
    "transposed": lambda dtype, device: torch.randn(7, 11, device=device).to(dtype).t(),
    "channels_last": _channels_last,
    "misaligned": _misaligned,
    "every_other": _every_other,
    "expanded": _expanded,
    "special_values": _special,
    "zeros": lambda dtype, device: torch.zeros(9, dtype=dtype, device=device),
    "surrounded_by_nan": _surrounded_by_nan,
}


def make(case: str, dtype: torch.dtype, path: Path) -> Tensor:
    """The weight of a case, as a leaf."""
    w = CASES[case](dtype, path[1])
    if path == ("triton", "cpu") and dtype == torch.bfloat16 and case == "special_values":
        w[w.abs() < torch.finfo(dtype).tiny] = 0.0  # the interpreter reads bfloat16 subnormals as zero; a GPU does not
    return leaf(w)


def _among_others(w: Tensor) -> Tensor:
    start = 16 // w.element_size() + 1  # off every boundary that a vector store needs
    # Not among NaN, to which one can add without a trace.
    buffer = torch.full((start + w.numel() + 40,), 7.0, dtype=w.dtype, device=w.device)
    return buffer[start : start + w.numel()].view(w.shape).copy_(torch.randn(w.shape))


# What .grad is before a call.
GRADS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda w: None,
    "like the weight": lambda w: torch.randn_like(w).copy_(torch.randn(w.shape)),
    "other strides": lambda w: torch.randn(*w.shape, 2).to(w)[..., 0],
    "among others": _among_others,
}


def mixed_model(device: str) -> nn.Module:
    """All four dtypes, a tied weight, a frozen one, an empty one, channels_last, and a one-element parameter."""
    model = nn.Module()
    model.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.half = nn.Linear(33, 7, dtype=torch.float16)
    model.brain = nn.Linear(65, 9, dtype=torch.bfloat16)
    model.double = nn.Linear(5, 3, dtype=torch.float64)
    model.embedding = nn.Embedding(50, 41)
    model.head = nn.Linear(41, 50)
    model.head.weight = model.embedding.weight
    model.frozen = nn.Linear(5, 5).requires_grad_(False)
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.temperature = nn.Parameter(torch.tensor(-2.0))
    return model.to(device)
