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

from bench import internals, results
from bench.counting import Operation, count
from bench.internals import Mode
from bench.models import DTYPES, MODELS, SHAPES, from_shapes
from bench.peers import PEERS, Weights, methods, prepare

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
    if task == "value":
        return _sweep(weights, Mode.VALUE, with_value=True)
    if task == "add_grad":
        return _sweep(weights, Mode.ACCUMULATE, with_value=True)
    if task == "prox":
        return _sweep(weights, Mode.PROX, with_value=False)
    # Between the sweeps, autograd's own: the gradient of the loss with respect to itself.
    forward, after = _sweep(weights, Mode.VALUE, with_value=True), _sweep(weights, Mode.ACCUMULATE, with_value=False)
    return [*forward, Operation("ones_like", 1, 0, 4), *after]


def _sweep(weights: Weights, mode: Mode, with_value: bool) -> list[Operation]:
    operations, partials = [], 0
    reads_grads, writes = mode == Mode.ACCUMULATE, mode != Mode.VALUE
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
