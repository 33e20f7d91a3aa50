"""What a call costs the host before any sweep: every eager method on 1 to 2000 tensors of 8 weights each.

    python -m bench.measure.host [--results bench/results] [--counts 1,6,148,600,2000] [--rounds N] [--device cpu]

All calls take turns in one run. On a CPU every method does its arithmetic, and fastreg takes part once more, on the
Triton path with launches that do nothing. With a GPU the same is asked of CUDA tensors before: seconds until a call
returns, after waiting for the device.
"""

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastreg
from bench.measure import internals
from bench.measure.harness import Call, command_line, quantiles
from bench.measure.models import from_shapes
from bench.measure.peers import L1, L2, Weights, check, methods, ours, prepare, restore
from bench.report import results
from bench.report.results import Case

Key = tuple[str, str]  # task and method
Times = dict[Key, list[float]]
Clock = Callable[[], float]

NUMEL = 8
WARM_UP = 5  # rounds
STUBBED = "fastreg, launches stubbed"
NOTHING, EMPTY, ONE_ADD = "nothing", "empty Function", "one _foreach_add_"
# Tasks that stand alone, with a .grad that exists. The others are counted as what they add to a pass: "adds", a penalty
# of a list; "kept", an ElasticNet of a module; "one-liner", `elastic_penalty(module)`.
ALONE = ("add_grad", "prox")
# The columns of each table: a task, and what it is divided by; None is the same method.
TABLES: list[dict[str, list[tuple[str, str | None]]]] = [
    {"adds": [("adds", "foreach"), ("adds", "torch.cat"), ("adds", EMPTY)], "one-liner": [("kept", None)]},
    {"add_grad": [("add_grad", ONE_ADD)], "prox": [("add_grad", ONE_ADD)]},
]


class Loss(torch.autograd.Function):
    """A loss of all weights; its backward pass makes each a new gradient."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch._foreach_neg(ctx.weights))


class Empty(Loss):
    """What autograd asks for a Function of all weights, whatever it does."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.weights)


def candidates(weights: Weights) -> dict[Key, Call]:
    """All calls. Those that compute something are checked first."""
    peers = {method: prepare(method, weights, L1, L2) for method in methods("penalty", compiled=False)}
    for method, tasks in peers.items():
        for task in ("backward", *ALONE):
            if task in tasks and (reason := check(task, tasks[task], weights).reason):
                raise RuntimeError(f"{method}, {task}: {reason}")
    impls: dict[str, Any] = {"fastreg": None}
    if weights[0].device.type == "cpu" and internals.launch is not None:
        impls[STUBBED], peers[STUBBED] = "triton", ours(weights, L1, L2, "triton")

    def passes(penalty: Call | None) -> Call:
        """A forward and backward pass, with a penalty or without."""

        def call() -> None:
            loss = Loss.apply(*weights)
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()

        return call

    found = {("adds", NOTHING): passes(None), ("adds", EMPTY): passes(lambda: Empty.apply(*weights))}
    found |= {("adds", method): passes(tasks["penalty"]) for method, tasks in peers.items()}
    model = nn.ModuleList(nn.ParameterList(weights[i : i + 2]) for i in range(0, len(weights), 2))
    for method, impl in impls.items():
        once = functools.partial(fastreg.elastic_penalty, model, L1, L2, impl=impl)
        found |= {("kept", method): passes(fastreg.ElasticNet(model, L1, L2, impl=impl))}
        found |= {("one-liner", method): passes(once)}
    one_add = torch.no_grad()(lambda: torch._foreach_add_([w.grad for w in weights], weights, alpha=1e-3))
    found |= {("add_grad", ONE_ADD): one_add}
    return found | {(task, method): tasks[task] for task in ALONE for method, tasks in peers.items() if task in tasks}


def take_turns(calls: Mapping[Key, Call], before: Callable[[Key], object], rounds: int, clock: Clock) -> Times:
    """Seconds of each call in each round, without what `before` does."""
    times: Times = {key: [] for key in calls}
    # What ran before a short call changes its time: in a fixed order an empty Function can seem to cost nothing.
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + WARM_UP):
            shuffle(order)
            for key in order:
                before(key)
                call, start = calls[key], clock()
                call()
                seconds = clock() - start
                times[key] += [seconds] if number >= WARM_UP else []
    finally:
        gc.enable()
    return times


def measure(n: int, device: torch.device, rounds: int | None = None, clock: Clock = time.perf_counter) -> list[Case]:
    """Every call on `n` tensors."""
    rounds = rounds or (400 if n <= 200 else 200 if n <= 1000 else 100)
    weights = from_shapes([[NUMEL]] * n, torch.float32, device)
    saved, grads = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]

    def before(key: Key) -> None:
        restore(weights, saved)
        for w, grad in zip(weights, grads, strict=True):
            w.grad = grad if key[0] in ALONE else None
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with internals.stubbed_launches() if device.type == "cpu" else nullcontext():
        times = {key: quantiles(each) for key, each in take_turns(candidates(weights), before, rounds, clock).items()}
    cases = []
    for (task, method), seconds in times.items():
        case: Case = {"question": "host", "task": task, "label": str(n), "method": method, "dtype": "float32"}
        case |= {"device_type": device.type, "n_weights": NUMEL * n, "n_tensors": n, "status": "measured"}
        counted = seconds["p50"] - (0.0 if task in ALONE else times["adds", NOTHING]["p50"])
        cases.append({**case, "rounds": rounds, "seconds": seconds, "host_seconds": counted})
    return cases


def tables(cases: Sequence[Case]) -> list[str]:
    """Microseconds, and ratios: what is added to a pass, and what stands alone."""
    found = {(c["device_type"], c["n_tensors"], c["task"], c["method"]): c["host_seconds"] for c in cases}
    lines = []
    for columns in TABLES:
        names, rows = ["on", "tensors", "method"], []
        for task, others in columns.items():
            names += [f"{task}, µs", *(f"x {method or other}" for other, method in others)]
        for on, n, _, method in (key for key in found if key[2] == next(iter(columns)) and key[3] != NOTHING):
            rows.append([on, f"{n:,}", method])
            for task, others in columns.items():
                cost = found.get((on, n, task, method), math.nan)
                costs = [found.get((on, n, other, beside or method), math.nan) for other, beside in others]
                ratios = [cost / each if each > 0 else math.nan for each in costs]
                cells = [f"{cost * 1e6:,.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
                rows[-1] += ["-" if cell == "nan" else cell for cell in cells]
        lines += [*results.table(names, rows, text_columns=3), ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=None)  # 400, and fewer of many tensors
    parser.add_argument("--counts", default="1,6,148,600,2000", help="comma-separated numbers of tensors")
    options = parser.parse_args(arguments)
    facts, cases = results.environment(options.device), []
    for device in dict.fromkeys((options.device, torch.device("cpu"))):
        for n in map(int, options.counts.split(",")):
            cases += measure(n, device, options.rounds)
            results.store(options.results, f"host-{results.device_name(facts)}", facts, cases)
    print("\n".join(tables(cases)))


if __name__ == "__main__":
    main()
