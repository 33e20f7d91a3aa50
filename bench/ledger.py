"""Launches and bytes of every method on every model, counted without a GPU: `python -m bench.ledger`.

The rivals run on tensors without data, and every operator that PyTorch dispatches is noted, autograd's own included.
fastreg's launches follow from its plan. From both comes a prediction, given a bandwidth and the cost of a launch: each
launch takes what its bytes take, but no less than a launch. Compiled peers are missing: what they launch is known only
when they run.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench import results
from bench.counting import Operation, count
from bench.models import DTYPES, MODELS, from_shapes, shapes_of
from bench.peers import PEERS, methods, prepare
from fastreg.plan import Mode, Part, plan_for

TASKS = ("value", "backward", "add_grad", "prox")
# Passes over the weights, reads and writes, that no method can do without.
FLOOR_PASSES = {"value": 1, "backward": 3, "add_grad": 3, "prox": 2}


class Row(NamedTuple):
    """What one method does on one model."""

    model: str
    task: str
    method: str
    launches: int
    read: int  # bytes
    written: int  # bytes
    passes: float  # bytes moved by the bytes of the weights
    distance: float  # bytes moved by those of the floor
    operations: tuple[Operation, ...]

    def seconds(self, bandwidth: float, launch: float) -> float:
        """Predicted, for bytes per second and seconds per launch."""
        moved = [((o.read + o.written) / max(o.launches, 1), o.launches) for o in self.operations]
        return sum(max(n_bytes / bandwidth, launch) * launches for n_bytes, launches in moved)


def rows(models: Sequence[str], dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """Every method on every model."""
    for model in models:
        weights = from_shapes(shapes_of(model), dtype, "meta")
        for task in TASKS:
            for method in methods(task):
                if method in PEERS:
                    yield row(model, task, method, weights)


def row(model: str, task: str, method: str, weights: Sequence[nn.Parameter]) -> Row:
    """One method's account on `weights`, which may be on the meta device."""
    operations = fastreg_operations(task, weights) if method == "fastreg" else _rival_operations(task, method, weights)
    read, written = sum(o.read for o in operations), sum(o.written for o in operations)
    n_bytes = sum(w.numel() * w.element_size() for w in weights)
    passes = (read + written) / n_bytes
    launches = sum(o.launches for o in operations)
    return Row(model, task, method, launches, read, written, passes, passes / FLOOR_PASSES[task], tuple(operations))


def fastreg_operations(task: str, weights: Sequence[nn.Parameter]) -> list[Operation]:
    """The kernels that fastreg launches on a GPU, with their tables."""
    if task == "value":
        return _sweep(weights, Mode.VALUE, reduce=True)
    if task == "backward":
        forward, after = _sweep(weights, Mode.VALUE, reduce=True), _sweep(weights, Mode.ACCUMULATE, reduce=False)
        # Autograd's own: the gradient of the loss with respect to itself.
        return [*forward, Operation("ones_like", 1, 0, 4), *after]
    if task == "add_grad":
        return _sweep(weights, Mode.ACCUMULATE, reduce=True)
    return _sweep(weights, Mode.PROX, reduce=False)


def _sweep(weights: Sequence[nn.Parameter], mode: Mode, reduce: bool) -> list[Operation]:
    plan = plan_for(weights, [0] * len(weights))
    operations = []
    n_chunks = 0
    for parts in plan.shards.values():
        for part in parts:
            operations.append(_sweep_kernel(part, mode, reduce))
            n_chunks += part.tables.chunk_tensor.numel()
    if reduce:
        # Two programs read all partial sums: one for the value, one for the sums of the one strength group.
        operations.append(Operation("_finish_kernel", 1, 2 * 16 * n_chunks, 3 * 4 + 16))
    return operations


def _sweep_kernel(part: Part, mode: Mode, reduce: bool) -> Operation:
    n_bytes = sum(part.numels) * torch.empty((), dtype=part.dtype).element_size()
    n_chunks = part.tables.chunk_tensor.numel()
    grads_read = mode == Mode.ACCUMULATE
    # Per chunk: its tensor's number, that tensor's row, and the gradient's address.
    tables = n_chunks * (4 + 32 + 8 * grads_read)
    read = n_bytes * (1 + grads_read) + tables
    written = n_bytes * (mode != Mode.VALUE) + 16 * n_chunks * reduce
    return Operation("_sweep_kernel", 1, read, written)


def _rival_operations(task: str, method: str, weights: Sequence[nn.Parameter]) -> list[Operation]:
    for w in weights:
        w.grad = torch.zeros_like(w)
    return count(prepare(method, weights, 1e-5, 1e-4)[task])


def table(found: Sequence[Row], bandwidth: float | None, launch: float | None, measured: dict[str, float]) -> list[str]:
    """Markdown, a row per method; predictions where both figures are given, measurements where there are some."""
    header = ["model", "task", "method", "launches", "read, MB", "written, MB", "passes", "x floor"]
    predicts = bandwidth is not None and launch is not None
    header += ["predicted, µs"] * predicts + ["measured, µs"] * bool(measured)
    lines = [_line(header), _line(["---"] * 3 + ["---:"] * (len(header) - 3))]
    for each in found:
        cells = [each.model, each.task, each.method, f"{each.launches:,}", _mb(each.read), _mb(each.written)]
        cells += [f"{each.passes:.2f}", f"{each.distance:.2f}"]
        if bandwidth is not None and launch is not None:
            cells.append(f"{each.seconds(bandwidth, launch) * 1e6:,.0f}")
        if measured:
            time = measured.get(_key(each.model, each.task, each.method))
            cells.append("not measured yet" if time is None else f"{time * 1e6:,.0f}")
        lines.append(_line(cells))
    return lines


def gpu_measurements(folder: Path, dtype: str) -> tuple[dict[str, float], str | None]:
    """The medians of the first GPU's results in `folder`, in seconds, and that GPU's name."""
    for result in results.read(folder):
        cases = [
            c for c in result["cases"] if c["dtype"] == dtype and c["status"] == "measured" and c["question"] in TASKS
        ]
        if result["environment"]["device_type"] == "cuda" and cases:
            found = {_key(c["label"], c["task"], c["method"]): c["seconds"]["p50"] for c in cases}
            return found, result["environment"]["device"]
    return {}, None


def _key(*names: str) -> str:
    return "/".join(names)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--bandwidth", type=float, help="GB/s that the device copies at, for predictions")
    parser.add_argument("--launch-us", type=float, help="microseconds per launch, for predictions")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="a folder with GPU measurements")
    parser.add_argument("--out", type=Path, help="a file for the table, which is printed otherwise")
    options = parser.parse_args(arguments)
    if (options.bandwidth is None) != (options.launch_us is None):
        parser.error("a prediction needs both --bandwidth and --launch-us")
    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    launch = None if options.launch_us is None else options.launch_us * 1e-6
    measured, device = gpu_measurements(options.results, options.dtype)
    found = list(rows(options.models.split(","), DTYPES[options.dtype]))
    lines = table(found, bandwidth, launch, measured)
    if device is not None:
        lines += ["", f"Measured on {device}."]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
