"""Questions that only private names of PyTorch answer; those of the autograd engine are in autograd/engine.py."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    _TensorGuards: Any = torch._C._dynamo.guards.TensorGuards
except AttributeError:  # nothing is then found again: slower, and the same numbers
    _TensorGuards = None


def snapshot(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells of as many tensors whether kind, dtype, device, shape, strides and requires_grad are still those of these.

    It keeps none of them alive.
    """
    if _TensorGuards is None:
        return lambda *others: False
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore[no-any-return]


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_transformed() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or make_fx is active."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._get_dispatch_mode(_PROXY) is not None and not torch.compiler.is_compiling()


# Asked once, while tracing; torch.compiler.assume_constant_result would say so too, but imports the compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_under_a_mode() -> bool:
    """Whether a TorchDispatchMode or a torch.func transform is active, which must not meet kept tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
