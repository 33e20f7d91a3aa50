"""Launches and bytes of every method on every model, counted without a GPU: `python -m bench.ledger`.

The rivals run on tensors without data, and every operator that PyTorch dispatches is noted, autograd's own included.
fastreg's launches follow from its plan. From both comes a prediction, given a bandwidth and the cost of a launch: each
launch takes what its bytes take, but no less than a launch. Compiled peers are missing: what they launch is known only
when they run.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import internals, results
from bench.internals import Mode
from bench.models import DTYPES, MODELS, SHAPES, from_shapes
from bench.peers import PEERS, Weights, methods, prepare

# Passes over the weights, reads and writes, that no method can do without.
FLOOR_PASSES = {"value": 1, "backward": 3, "add_grad": 3, "prox": 2}
# fastreg's sweeps, and whether each returns the value.
SWEEPS = {
    "value": [(Mode.VALUE, True)],
    "backward": [(Mode.VALUE, True), (Mode.ACCUMULATE, False)],
    "add_grad": [(Mode.ACCUMULATE, True)],
    "prox": [(Mode.PROX, False)],
}
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
    """What one method does on one model."""

    model: str
    task: str
    method: str
    launches: int
    read: int  # bytes
    written: int  # bytes
    passes: float  # bytes moved by the bytes of the weights
    operations: tuple[Operation, ...]

    def seconds(self, bandwidth: float, launch: float) -> float:
        """Predicted, for bytes per second and seconds per launch."""
        moved = [((o.read + o.written) / max(o.launches, 1), o.launches) for o in self.operations]
        return sum(max(n_bytes / bandwidth, launch) * launches for n_bytes, launches in moved)


def rows(models: Sequence[str], dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """Every method on every model."""
    for model in models:
        weights = from_shapes(SHAPES[model], dtype, "meta")
        for task in FLOOR_PASSES:
            for method in methods(task):
                if method in PEERS:
                    yield row(model, task, method, weights)


def row(model: str, task: str, method: str, weights: Weights) -> Row:
    """One method's account on `weights`, which may be on the meta device."""
    if method == "fastreg":
        operations = fastreg_operations(task, weights)
    else:
        for w in weights:
            w.grad = torch.zeros_like(w)
        operations = count(prepare(method, weights, 1e-5, 1e-4)[task])
    launches, read, written = (sum(column) for column in list(zip(*operations, strict=True))[1:])
    passes = (read + written) / sum(w.numel() * w.element_size() for w in weights)
    return Row(model, task, method, launches, read, written, passes, tuple(operations))


def fastreg_operations(task: str, weights: Weights) -> list[Operation]:
    """The kernels that fastreg launches on a GPU, with their tables."""
    # Autograd's own: the gradient of the loss with respect to itself.
    operations = [Operation("ones_like", 1, 0, 4)] if task == "backward" else []
    for mode, with_value in SWEEPS[task]:
        partials, reads_grads, writes = 0, mode == Mode.ACCUMULATE, mode != Mode.VALUE
        for part in internals.parts_of(weights):
            n_bytes, n_chunks = internals.n_bytes(part), internals.n_chunks(part)
            # Per chunk: its tensor's number, that tensor's row, and the gradient's address.
            read = n_bytes * (1 + reads_grads) + n_chunks * (4 + 32 + 8 * reads_grads)
            operations.append(Operation("_sweep_kernel", 1, read, n_bytes * writes + 16 * n_chunks * with_value))
            partials += 16 * n_chunks
        if with_value:
            # Two programs read all partial sums: one for the value, one for the sums of the one strength group.
            operations.append(Operation("_finish_kernel", 1, 2 * partials, 3 * 4 + 16))
    return operations


def table(found: Sequence[Row], speed: tuple[float, float] | None, measured: dict[tuple[str, ...], float]) -> list[str]:
    """Markdown, a row per method; predictions if bandwidth and launch are given, measurements where there are some."""
    header = ["model", "task", "method", "launches", "read, MB", "written, MB", "passes", "x floor"]
    header += ["predicted, µs"] * bool(speed) + ["measured, µs"] * bool(measured)
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for each in found:
        cells = [*each[:3], f"{each.launches:,}", f"{each.read / 1e6:,.1f}", f"{each.written / 1e6:,.1f}"]
        cells += [f"{each.passes:.2f}", f"{each.passes / FLOOR_PASSES[each.task]:.2f}"]
        if speed:
            cells.append(f"{each.seconds(*speed) * 1e6:,.0f}")
        if measured:
            seconds = measured.get(each[:3])
            cells.append("not measured yet" if seconds is None else f"{seconds * 1e6:,.0f}")
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def gpu_measurements(folder: Path, dtype: str) -> tuple[dict[tuple[str, ...], float], str | None]:
    """The medians of the first GPU's results in `folder`, in seconds by model, task and method; and its name."""
    for result in results.read(folder):
        cases = [c for c in result["cases"] if c["dtype"] == dtype and c["status"] == "measured"]
        found = {(c["label"], c["task"], c["method"]): c["seconds"]["p50"] for c in cases if c["label"] in SHAPES}
        if result["environment"]["device_type"] == "cuda" and found:
            return found, result["environment"]["device"]
    return {}, None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--bandwidth", type=float, help="GB/s that the device copies at, for predictions")
    parser.add_argument("--launch-us", type=float, help="microseconds per launch, for predictions")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="a folder with GPU measurements")
    options = parser.parse_args(arguments)
    if (options.bandwidth is None) != (options.launch_us is None):
        parser.error("a prediction needs both --bandwidth and --launch-us")
    speed = None if options.bandwidth is None else (options.bandwidth * 1e9, options.launch_us * 1e-6)
    measured, device = gpu_measurements(options.results, options.dtype)
    found = list(rows(options.models.split(","), DTYPES[options.dtype]))
    print("\n".join(table(found, speed, measured)))
    if device is not None:
        print(f"\nMeasured on {device}.")


if __name__ == "__main__":
    main()
