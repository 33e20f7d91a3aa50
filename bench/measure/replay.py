"""Sweeps replayed in CUDA graphs, next to the calls themselves and to what the bytes they move would take.

    python -m bench.measure.replay [--models gpt2] [--dtype float32] [--results FOLDER] [--device cpu]

On a CPU, where nothing can be captured, a replay is another call.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from bench.measure.harness import Call, Harness, command_line, compared, quantiles
from bench.measure.models import DTYPES, MODELS, SHAPES, from_shapes, n_weights
from bench.measure.peers import L1, L2, Weights, prepare, restore, zero_grads
from bench.report import results
from bench.report.results import Case
from bench.static import codegen, roofline
from bench.static.gpu_specs import GPUS
from bench.static.ledger import fastreg_operations

# The tasks, and what the roofline calls them.
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
    saved, n = [w.detach().clone() for w in weights], n_weights(SHAPES[model])
    zero_grads(weights)
    tasks = prepare("fastreg", weights, L1, L2)
    calls: dict[tuple[str, str], Call] = {}
    for task in ROOFLINE_MODES:
        tasks[task]()
        calls |= {(task, "called"): tasks[task], (task, "replayed"): captured(tasks[task], harness.device)}

    copies: list[float] = []

    @contextmanager
    def restored(key: tuple[str, str]) -> Iterator[None]:
        if key == next(iter(calls)):  # once a round: other work on the machine changes it
            copies.append(harness.copy_bandwidth())
        restore(weights, saved)  # after a few proximal steps all would be zeros
        yield

    times, cases = harness.take_turns(calls, harness.floor(n), rounds, restored), []
    copy = quantiles(copies)["p50"]
    for (task, how), pairs in times.items():
        dtype = str(harness.dtype).removeprefix("torch.")
        case: Case = {"question": "replay", "task": task, "label": model, "method": f"fastreg {how}", "dtype": dtype}
        case |= {"n_weights": n, "n_tensors": len(weights), **compared(pairs), "copy_bytes_per_second": copy}
        predicted = predicted_seconds(task, weights, copy, share_of_bandwidth(device, task, dtype))
        cases.append({**case, "predicted_seconds": predicted, "of_predicted": case["seconds"]["p50"] / predicted})
    return cases


def table(cases: Sequence[Case]) -> list[str]:
    """Times in multiples of the floor and of what was predicted."""
    rows = [[c["label"], c["task"], c["method"], f"{c['ratio']['p50']:.2f}", f"{c['of_predicted']:.2f}"] for c in cases]
    return results.table(["model", "task", "method", "x floor", "x predicted"], rows, text_columns=3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--models", default="mnist_mlp,resnet50,gpt2", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args(arguments)
    harness, facts, cases = Harness(options.device, DTYPES[options.dtype]), results.environment(options.device), []
    for model in options.models.split(","):
        cases += measure(model, harness, options.rounds, facts["device"])
        results.store(options.results, f"replay-{results.file_name(facts, options.dtype)}", facts, cases)
    print("\n".join(table(cases)))


if __name__ == "__main__":
    main()
