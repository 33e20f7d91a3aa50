"""Launches and bytes of the operators that PyTorch dispatches, autograd's own included."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By how their names begin: what moves no memory, overwrites without reading, and fills new tensors.
FREE = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "item")
WRITES_ONLY = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")
FILLS = ("ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "scalar_tensor", "arange")
# Of PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh: what fits the arguments of one launch, by the number of
# lists, and the elements per block.
MOST_TENSORS = (110, 64, 48, 36, 30)
MOST_BLOCKS = 320
CHUNK = 65536


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
        aliases = [returned.alias_info for returned in func._schema.returns]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        is_view = bool(aliases) and not writes and None not in aliases
        if not is_view and not func._schema.name.removeprefix("aten::").startswith(FREE):
            self.operations.append(_account(func._schema, args, kwargs or {}, result))
        return result


def count(call: Callable[[], object]) -> list[Operation]:
    """The operations of one call."""
    with Count() as counted:
        call()
    return counted.operations


def _account(schema: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Operation:
    name = schema.name.removeprefix("aten::")
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    read = written = 0
    for argument in schema.arguments:
        n_bytes = _size(given.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += n_bytes * changed
        # The tensor behind out= is written only.
        read += n_bytes * (not changed or not (argument.kwarg_only or name.startswith(WRITES_ONLY)))
    changes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    if not changes:
        written = _size(result)
    if name.startswith(FILLS):
        read = 0
    lists = [value for value in given.values() if isinstance(value, list | tuple) and _tensors(value)]
    launches = 1
    if lists and name.startswith(("_foreach", "_fused")):
        # A multi-tensor operator that returns new tensors hands those to its kernel, too.
        launches = multi_tensor_launches(_tensors(lists[0]), len(lists) + (not changes and name != "_foreach_norm"))
    # The norm clears its partial sums first and adds them up in the end.
    return Operation(name, launches + 2 * (name == "_foreach_norm"), read, written)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _size(value: Any) -> int:
    """The bytes that lie behind a tensor or a list of them."""
    n_bytes = 0
    for tensor in _tensors(value):
        spans = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0]
        n_bytes += Size(spans).numel() * tensor.element_size()
    return n_bytes


def multi_tensor_launches(tensors: Iterable[Tensor], depth: int) -> int:
    """How many launches PyTorch's multi_tensor_apply cuts `depth` lists like `tensors` into on a CUDA device."""
    launches = in_launch = blocks = 0
    for tensor in tensors:
        chunks = -(-tensor.numel() // CHUNK)
        in_launch += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == MOST_BLOCKS or (last and in_launch == MOST_TENSORS[depth - 1]):
                launches += 1
                # A tensor that is not finished is handed to the next launch again.
                blocks, in_launch = 0, int(not last)
    return launches + (blocks > 0)
