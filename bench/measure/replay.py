"""Sweeps replayed in CUDA graphs, next to the calls themselves and to what the bytes they move would take.

    python -m bench.measure.replay [--models gpt2] [--dtype float32] [--results FOLDER] [--device cpu]

On a CPU, where nothing can be captured, a replay is another call.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import models
from bench.measure.harness import Call, Harness, quantiles
from bench.measure.models import DTYPES, SHAPES, from_shapes, n_weights
from bench.measure.peers import L1, L2, Weights, prepare, restore
from bench.report import results
from bench.report.results import Case
from bench.static import codegen, roofline
from bench.static.gpu_specs import GPUS
from bench.static.ledger import fastreg_operations

TASKS = ("value", "add_grad", "prox")
# As the roofline calls them.
ROOFLINE_MODES = {"value": "value", "add_grad": "accumulate", "prox": "prox"}
ROOFLINE_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def captured(call: Call, device: torch.device) -> Call:
    """A replay of `call`, which has been made before."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def predicted_seconds(task: str, weights: Weights, bytes_per_second: float, share: float = 1.0) -> float:
    """By the bytes that the ledger counts, at that share of the speed of a copy."""
    return sum(o.read + o.written for o in fastreg_operations(task, weights)) / (bytes_per_second * share)


def share_of_bandwidth(device: str, task: str, dtype: str) -> float:
    """What the roofline leaves of the bandwidth of a device by that name; 1 of one that is not in its table."""
    matching = [name for name in GPUS if re.search(rf"\b{re.split(r' (?:SXM|[0-9]+G)$', name)[0]}\b", device)]
    if not matching or codegen.missing_tool() is not None:
        return 1.0
    gpu = GPUS[matching[-1]]
    return roofline.bound(gpu, roofline.sweep(ROOFLINE_MODES[task], ROOFLINE_DTYPES[dtype], gpu.target)).share


def measure(model: str, harness: Harness, rounds: int, device: str = "") -> list[Case]:
    weights = from_shapes(SHAPES[model], harness.dtype, harness.device)
    saved = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)
    tasks = prepare("fastreg", weights, L1, L2)
    calls: dict[tuple[str, str], Call] = {}
    for task in TASKS:
        tasks[task]()
        calls[task, "called"] = tasks[task]
        calls[task, "replayed"] = captured(tasks[task], harness.device)
    floor, seconds = harness.floor(n_weights(SHAPES[model])), {key: [] for key in calls}
    references: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    copies = []
    for _ in range(rounds):
        copies.append(harness.copy_bandwidth())
        for key, call in calls.items():
            restore(weights, saved)  # after a few proximal steps all would be zeros
            references[key].append(harness.seconds(floor))
            seconds[key].append(harness.seconds(call))
    copy = quantiles(copies)["p50"]
    cases = []
    for (task, how), times in seconds.items():
        ratio = [time / reference for time, reference in zip(times, references[task, how], strict=True)]
        case: Case = {"question": "replay", "task": task, "label": model, "method": f"fastreg {how}"}
        case |= {"n_weights": n_weights(SHAPES[model]), "n_tensors": len(weights), "rounds": rounds}
        share = share_of_bandwidth(device, task, str(harness.dtype).removeprefix("torch."))
        predicted = predicted_seconds(task, weights, copy, share)
        case |= {"seconds": quantiles(times), "ratio": quantiles(ratio), "copy_bytes_per_second": copy}
        cases.append({**case, "predicted_seconds": predicted, "of_predicted": quantiles(times)["p50"] / predicted})
    return cases


def table(cases: Sequence[Case]) -> list[str]:
    """Times in multiples of the floor and of what was predicted."""
    rows = [[c["label"], c["task"], c["method"], f"{c['ratio']['p50']:.2f}", f"{c['of_predicted']:.2f}"] for c in cases]
    return results.table(["model", "task", "method", "x floor", "x predicted"], rows, text_columns=3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a folder for the results file; without it none is written")
    parser.add_argument("--models", default="mnist_mlp,resnet50,gpt2", help=f"of {', '.join(models.MODELS)}")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    harness, facts, cases = Harness(device, DTYPES[options.dtype]), results.environment(device), []
    for model in options.models.split(","):
        cases += [{**case, "dtype": options.dtype} for case in measure(model, harness, options.rounds, facts["device"])]
        if options.results is not None:  # at once: a run that is cut short leaves what it found
            results.write(options.results / f"replay-{results.file_name(facts, options.dtype)}.json", facts, cases)
    print("\n".join(table(cases)))


if __name__ == "__main__":
    main()
