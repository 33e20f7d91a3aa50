"""Launches and bytes of every method on every model, counted without a GPU: `python -m bench.static.ledger`.

The rivals run on tensors without data, and every operator that PyTorch dispatches is noted, autograd's own included.
fastreg's launches follow from its plan. Compiled peers are missing: what they launch is known only when they run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.internals import launch_sizes
from bench.measure.models import MODELS, SHAPES, from_shapes
from bench.measure.peers import L1, L2, Weights, methods, prepare, zero_grads
from bench.report import results

# Passes over the weights, reads and writes, that no method can do without.
FLOOR_PASSES = {"value": 1, "backward": 3, "add_grad": 3, "prox": 2}
# fastreg's sweeps: the numbers that each reads and writes per weight, and whether it returns the value.
SWEEPS = {
    "value": [(1, 0, True)],
    "backward": [(1, 0, True), (2, 1, False)],
    "add_grad": [(2, 1, True)],
    "prox": [(1, 1, False)],
}
# By how their names begin: what moves no memory, overwrites without reading, and fills new tensors.
FREE = ("profiler::", "prim::", "empty", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "item")
WRITES_ONLY = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")
FILLS = ("ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "scalar_tensor", "arange")
# Of PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh: what fits the arguments of one launch, by the number of
# lists, and the elements per block.
MOST_TENSORS = (110, 64, 48, 36, 30)
MOST_BLOCKS = 320
CHUNK = 65536


class Operation(NamedTuple):
    name: str
    launches: int  # kernels that a CUDA device needs for it
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
        changed = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if name.startswith("_fused") and not (kwargs or {}).get("grad_scale"):
            changed.discard("grads")  # written only to unscale them
        aliases = [returned.alias_info for returned in schema.returns]
        is_view = bool(aliases) and not changed and None not in aliases
        if is_view or name.startswith(FREE):
            return result
        given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | (kwargs or {})
        # The tensor behind out= is written only.
        unread = {a.name for a in schema.arguments if a.kwarg_only or name.startswith(WRITES_ONLY)} & changed
        read = 0 if name.startswith(FILLS) else sum(_size(given[key]) for key in given if key not in unread)
        written = sum(_size(given[key]) for key in changed if key in given) if changed else _size(result)
        lists = [_tensors(value) for value in given.values() if isinstance(value, list | tuple) and _tensors(value)]
        launches = 1
        if lists and name.startswith(("_foreach", "_fused")):
            # A multi-tensor operator that returns new tensors hands those to its kernel, too.
            returns_new = not changed and name != "_foreach_norm"
            launches = multi_tensor_launches(lists[0], len(lists) + returns_new)
        if name == "_foreach_norm":  # clears its partial sums first and adds them up in the end
            launches += 2
        self.operations.append(Operation(name, launches, read, written))
        return result


def count(call: Callable[[], object]) -> list[Operation]:
    with Count() as counted:
        call()
    return counted.operations


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _size(value: Any) -> int:
    """The bytes that lie behind a tensor or a list of them."""
    n_bytes = 0
    for tensor in _tensors(value):
        spans = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0]
        n_bytes += torch.Size(spans).numel() * tensor.element_size()
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


class Row(NamedTuple):
    model: str
    task: str
    method: str
    launches: int
    read: int  # bytes
    written: int  # bytes
    passes: float  # bytes moved by the bytes of the weights


def rows(models: Sequence[str]) -> list[Row]:
    """Every method on every model, in float32."""
    asked = [(task, method) for task in FLOOR_PASSES for method in methods(task, compiled=False)]
    weights = {model: from_shapes(SHAPES[model], torch.float32, "meta") for model in models}
    return [row(model, *each, weights[model]) for model in models for each in asked]


def row(model: str, task: str, method: str, weights: Weights) -> Row:
    """One method's account on `weights`, which may be on the meta device."""
    if method == "fastreg":
        operations = fastreg_operations(task, weights)
    else:
        zero_grads(weights)
        operations = count(prepare(method, weights, L1, L2)[task])
    _, launches, read, written = zip(*operations, strict=True)
    passes = (sum(read) + sum(written)) / sum(w.numel() * w.element_size() for w in weights)
    return Row(model, task, method, sum(launches), sum(read), sum(written), passes)


def fastreg_operations(task: str, weights: Weights) -> list[Operation]:
    """The kernels that fastreg launches on a GPU, with their tables."""
    # Autograd's own: the gradient of the loss with respect to itself.
    operations = [Operation("ones_like", 1, 0, 4)] if task == "backward" else []
    for n_read, n_written, with_value in SWEEPS[task]:
        # Per chunk: its row, and where its gradient is.
        operations += _sweep(weights, n_read, n_written, with_value, 32 + 8 * (n_read > 1), 0)
    return operations


def step_operations(weights: Weights, n_read: int, n_written: int, with_value: bool = False) -> list[Operation]:
    """The kernels of a step of Adam, or of a proximal step after one, by the numbers it reads and writes per weight."""
    # Per chunk: its row, where its gradient and its states are, its settings, and its count of steps.
    return _sweep(weights, n_read, n_written, with_value, 32 + 8 + 32 + 88 + 4, 4)


def _sweep(
    weights: Weights, n_read: int, n_written: int, with_value: bool, read_by_chunk: int, written_by_chunk: int
) -> list[Operation]:
    operations, partials = [], 0
    for n_bytes, n_chunks in launch_sizes(weights):
        written = n_written * n_bytes + n_chunks * (written_by_chunk + 16 * with_value)
        operations.append(Operation("_sweep_kernel", 1, n_read * n_bytes + n_chunks * read_by_chunk, written))
        partials += 16 * n_chunks
    # Two programs read all partial sums: one for the value, one for the sums of the one strength group.
    return [*operations, Operation("_finish_kernel", 1, 2 * partials, 3 * 4 + 16)] if with_value else operations


def table(found: Sequence[Row]) -> list[str]:
    names = ["model", "task", "method", "launches", "read, MB", "written, MB", "passes", "x floor"]
    cells = []
    for r in found:
        multiple = r.passes / FLOOR_PASSES[r.task]
        moved = f"{r.read / 1e6:,.1f}", f"{r.written / 1e6:,.1f}"
        cells.append([*r[:3], f"{r.launches:,}", *moved, f"{r.passes:.2f}", f"{multiple:.2f}"])
    return results.table(names, cells, text_columns=3)


if __name__ == "__main__":
    print("\n".join(table(rows(MODELS))))
