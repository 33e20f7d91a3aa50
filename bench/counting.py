"""Launches and bytes of the operators that PyTorch dispatches, autograd's own included."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operation(NamedTuple):
    """An operator that ran; `launches` is how many kernels a CUDA device needs for it."""

    name: str
    launches: int
    read: int  # bytes
    written: int


class Count(TorchDispatchMode):
    """Notes every operator that moves memory. Views and allocations are free.

    An operand is read once, a result written once, an operand changed in place both; an expanded dimension counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        if not name.startswith(_FREE) and not _is_view(schema):
            self.operations.append(_account(name, schema, args, kwargs or {}, result))
        return result


def count(call: Callable[[], object]) -> list[Operation]:
    """The operations of one call."""
    with Count() as counted:
        call()
    return counted.operations


def size(tensor: Tensor) -> int:
    """The bytes that lie behind `tensor`."""
    spans = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0]
    return torch.Size(spans).numel() * tensor.element_size()


_FREE = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "item")
_WRITES_ONLY = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")
_FILLS = ("ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "scalar_tensor", "arange")


def _is_view(schema: Any) -> bool:
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return bool(schema.returns) and not writes and all(r.alias_info is not None for r in schema.returns)


def _account(name: str, schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Operation:
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    changed, plain = [], []
    for argument in schema.arguments:
        tensors = _tensors(given.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (changed if is_written else plain).append((argument, tensors))
    written = sum(size(t) for _, tensors in changed for t in tensors)
    read = sum(size(t) for _, tensors in plain for t in tensors)
    if not name.startswith(_WRITES_ONLY):
        read += sum(size(t) for argument, tensors in changed for t in tensors if not argument.kwarg_only)
    if not changed:
        written = sum(size(t) for t in _tensors(result))
    if name.startswith(_FILLS):
        read = 0
    lists = [value for value in given.values() if isinstance(value, list | tuple) and _tensors(value)]
    multi = name.startswith(("_foreach", "_fused"))
    # A multi-tensor operator that returns new tensors hands those to its kernel, too.
    depth = len(lists) + (not changed and name != "_foreach_norm")
    launches = multi_tensor_launches(_tensors(lists[0]), depth) if multi and lists else 1
    # The norm clears its partial sums first and adds them up in the end.
    return Operation(name, launches + 2 * (name == "_foreach_norm"), read, written)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, list | tuple) else []


# Of PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh: what fits the arguments of one launch, by the number of
# lists, and the elements per block.
_MOST_TENSORS = (110, 64, 48, 36, 30)
_MOST_BLOCKS = 320
_CHUNK = 65536


def multi_tensor_launches(tensors: Iterable[Tensor], depth: int) -> int:
    """How many launches PyTorch's multi_tensor_apply cuts the lists into on a CUDA device."""
    launches = in_launch = blocks = 0
    for tensor in tensors:
        chunks = -(-tensor.numel() // _CHUNK)
        in_launch += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _MOST_BLOCKS or (last and in_launch == _MOST_TENSORS[depth - 1]):
                launches += 1
                # A tensor that is not finished is handed to the next launch again.
                blocks, in_launch = 0, int(not last)
    return launches + (blocks > 0)
