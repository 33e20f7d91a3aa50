"""One step of AdamW with a penalty, inside the optimizer or beside it, next to torch.optim's fused step without any.

    python -m bench.measure.update [--results bench/results] [--models resnet50,gpt2] [--rounds N] [--device cpu]

Gradients are there already. All methods take turns in one run, each checked before: what it does to the weights, or
for a penalty whose gradient goes through the moments to the first of these, against float64. On a CPU the last rows are
how long a step of 148 tensors keeps the host, where fastreg's launches and PyTorch's arithmetic do nothing.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg
from bench.measure import internals
from bench.measure.harness import Call, Harness, quantiles
from bench.measure.models import DTYPES, SHAPES, from_shapes, n_weights
from bench.measure.peers import L1, L2, Weights, prepare, zero_grads
from bench.report import results
from bench.report.results import Case, table
from bench.static import ledger

LR, BETAS, EPS = 1e-5, (0.9, 0.999), 1e-8
ALONE = "torch fused, no penalty"
HOST = "host, 148 tensors"
HOST_TENSORS, HOST_NUMEL = 148, 16
# Of weights after a step that moves each by about LR, and of first moments; both relative, root mean square.
TOLERANCE = 1e-3


def torch_step(weights: Weights, **form: bool) -> Call:
    return torch.optim.AdamW(weights, LR, BETAS, EPS, weight_decay=0.0, **form).step


def beside(peer: str, **form: bool) -> Callable[[Weights], Call]:
    """`peer` adds its gradient, through autograd if it knows no other way, and then torch.optim makes its step."""

    def method(weights: Weights) -> Call:
        tasks = prepare(peer, weights, L1, L2)
        add, step = tasks.get("add_grad", tasks["backward"]), torch_step(weights, **form)

        def call() -> None:
            add()
            step()

        return call

    return method


def gradient_only(weights: Weights) -> Call:
    """The least that foreach operators can do, without a value of the penalty."""
    step = torch_step(weights, fused=True)

    @torch.no_grad()
    def call() -> None:
        grads = [w.grad for w in weights]
        torch._foreach_add_(grads, torch._foreach_sign(weights), alpha=L1)
        torch._foreach_add_(grads, weights, alpha=2 * L2)
        step()

    return call


def attached(mode: Any) -> Callable[[Weights], Call]:
    def method(weights: Weights) -> Call:
        optimizer = torch.optim.AdamW(weights, LR, BETAS, EPS, weight_decay=0.0, fused=True)
        fastreg.ElasticNet(weights, L1, L2).attach(optimizer, mode)
        return optimizer.step

    return method


def inside(prox: bool = False, track: bool = False, impl: Any = None) -> Callable[[Weights], Call]:
    def method(weights: Weights) -> Call:
        optimizer = fastreg.optim.AdamW(
            weights, LR, BETAS, EPS, weight_decay=0.0, l1=L1, l2=L2, prox=prox, track=track, impl=impl
        )
        return optimizer.step

    return method


METHODS: dict[str, Callable[[Weights], Call]] = {
    ALONE: lambda weights: torch_step(weights, fused=True),
    "fastreg.optim": inside(),
    "fastreg.optim, prox": inside(prox=True),
    "fastreg.optim, prox, tracked": inside(prox=True, track=True),
    "torch fused, fastreg attached": attached("grad"),
    "torch fused, fastreg attached, prox": attached("prox"),
    "torch fused, foreach gradient": gradient_only,
    "torch fused, foreach": beside("foreach", fused=True),
    "torch fused, loop": beside("loop", fused=True),
    "torch fused, torch.cat": beside("torch.cat", fused=True),
    "torch foreach, foreach": beside("foreach", foreach=True),
}


def prepared(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    weights = from_shapes(shapes, dtype, device)
    for w in weights:
        w.grad = torch.randn_like(w)
    return weights


@torch.no_grad()
def error(method: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> float:
    """How far the first step is from one in float64: the gradient's share of the first moment, or the shrunk weight."""
    weights = prepared(shapes, dtype, device)
    before = [w.detach().double() for w in weights]
    grads = [w.grad.double() for w in weights if w.grad is not None]
    is_prox = "prox" in method
    step = METHODS[method](weights)
    optimizer: Any = getattr(step, "__self__", None)
    with torch.enable_grad():
        step()
    off = size = 0.0
    for w, old, grad in zip(weights, before, grads, strict=True):
        l1, l2 = (0.0, 0.0) if method == ALONE else (L1, L2)
        if is_prox:
            denominator = grad.abs() + EPS
            moved = old - LR * grad / denominator
            t = LR / denominator
            shrunk = moved.sign() * (moved.abs() - t * l1).clamp(min=0) / (1 + 2 * t * l2)
            reach = LR * max(2.0, (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5)  # as fastreg.optim documents it
            right = torch.where(grad == 0, moved, shrunk.clamp(moved - reach, moved + reach))
            found, reference = w.double() - right, right - old
        else:
            full = grad + l1 * old.sign() + 2 * l2 * old
            if optimizer is not None:  # the moment shows how large the gradient was, the weight only its sign
                full, found = (1 - BETAS[0]) * full, optimizer.state[w]["exp_avg"].double()
                found, reference = found - full, full
            else:
                right = old - LR * full / (full.abs() + EPS)
                found, reference = w.double() - right, right - old
        off, size = off + float(found.square().sum()), size + float(reference.square().sum())
    return float((off / size) ** 0.5)


@contextmanager
def no_arithmetic() -> Iterator[None]:
    """torch.optim's fused step reads its arguments and does nothing; fastreg's launches do nothing."""
    fused, skipped = torch._fused_adamw_, torch.ones(())

    def read_arguments(*lists: Any, **numbers: Any) -> None:
        fused(*lists, **{**numbers, "found_inf": skipped})

    counted: Any = lambda *lists, **numbers: None  # noqa: E731  on a GPU one launch counts the steps, here a loop
    with (
        internals.stubbed_launches(),
        mock.patch.object(torch, "_fused_adamw_", read_arguments),
        mock.patch.object(torch, "_foreach_add_", counted),
    ):
        yield


Times = dict[str, list[tuple[float, float]]]


def take_turns(calls: dict[str, Call], harness: Harness, rounds: int, repeats: int = 1) -> Times:
    """Seconds of each call in each round, and of ALONE right before it; each `repeats` times in a row."""

    def repeated(call: Call) -> Call:
        def run() -> None:
            for _ in range(repeats):
                call()

        return run

    times: Times = {name: [] for name in calls}
    gc.collect()
    for number in range(rounds + 2):
        for name, call in calls.items():
            before, seconds = (harness.seconds(repeated(each)) / repeats for each in (calls[ALONE], call))
            times[name] += [(seconds, before)] if number >= 2 else []
    return times


def cases_of(label: str, dtype: str, times: Times, errors: dict[str, float]) -> list[Case]:
    """What each method took, also in multiples of ALONE right before it."""
    found = []
    for method, pairs in times.items():
        seconds = [one for one, _ in pairs]
        ratios = [one / other for one, other in pairs]
        case: Case = {"question": "update", "task": "update", "label": label, "method": method, "dtype": dtype}
        case |= {"rounds": len(seconds), "seconds": quantiles(seconds), "ratio": quantiles(ratios)}
        found.append({**case, "status": "measured", "errors": {"step": errors.get(method, 0.0)}})
    return found


def measure(model: str, dtype: str, device: torch.device, rounds: int) -> list[Case]:
    shapes = SHAPES[model]
    small = [shape for shape in shapes if torch.Size(shape).numel() < 1 << 20][:20]
    errors = {method: error(method, small, DTYPES[dtype], device) for method in METHODS}
    if wrong := {method: each for method, each in errors.items() if not each <= TOLERANCE}:
        raise RuntimeError(f"not timed, as steps are wrong: {wrong}")
    harness = Harness(device, DTYPES[dtype])
    weights = prepared(shapes, DTYPES[dtype], device)  # the same for all, which only have states of their own
    calls = {name: method(weights) for name, method in METHODS.items()}
    return cases_of(model, dtype, take_turns(calls, harness, rounds), errors)


def measure_host(rounds: int) -> list[Case]:
    shapes = [[HOST_NUMEL]] * HOST_TENSORS
    cpu = torch.device("cpu")
    methods = {ALONE: METHODS[ALONE], "fastreg.optim": inside(impl="triton")}
    methods["fastreg.optim, prox, tracked"] = inside(True, True, impl="triton")
    with no_arithmetic():
        calls = {name: method(prepared(shapes, torch.float32, cpu)) for name, method in methods.items()}
        return cases_of(HOST, "float32", take_turns(calls, Harness(cpu, torch.float32), rounds, repeats=20), {})


FORMS = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}


def counted(model: str) -> dict[str, list[ledger.Operation]]:
    """What a step launches and moves on a GPU, in float32: PyTorch's operators on fake tensors, and fastreg's plan."""
    found: dict[str, list[ledger.Operation]] = {}
    with FakeTensorMode():
        weights = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES[model]]
        for w in weights:
            w.grad = torch.empty_like(w)
        for form, options in FORMS.items():
            for peer in ("none", "foreach", "loop"):
                call = torch_step(weights, **options) if peer == "none" else beside(peer, **options)(weights)
                call()  # makes the states
                found[f"{form}, {'no penalty' if peer == 'none' else peer}"] = ledger.count(call)
    meta = from_shapes(SHAPES[model], torch.float32, "meta")
    fused = found[ALONE]
    zero_grads(meta)
    found["torch fused, torch.cat"] = [*ledger.count(prepare("torch.cat", meta, L1, L2)["backward"]), *fused]
    found["torch fused, fastreg attached"] = [*ledger.fastreg_operations("add_grad", meta), *fused]
    found["torch fused, fastreg attached, prox"] = [*fused, *ledger.step_operations(meta, 2, 1, with_value=True)]
    found["fastreg.optim, prox or not"] = ledger.step_operations(meta, 4, 3)
    found["fastreg.optim, tracked"] = ledger.step_operations(meta, 4, 3, with_value=True)
    return found


def counted_table(model: str) -> list[str]:
    n = n_weights(SHAPES[model])
    rows = []
    for method, operations in counted(model).items():
        moved = sum(o.read + o.written for o in operations)
        rows.append([method, f"{sum(o.launches for o in operations):,}", f"{moved / n:.2f}", f"{moved / (28 * n):.2f}"])
    return table([model, "launches", "bytes a weight", "x 28 bytes"], rows)


def tables(cases: Sequence[Case]) -> list[str]:
    labels = list(dict.fromkeys(case["label"] for case in cases))
    found = {(case["label"], case["method"]): case for case in cases}
    rows = []
    for method in dict.fromkeys(case["method"] for case in cases):
        own = [found.get((label, method)) for label in labels]
        rows.append([method, *("-" if case is None else f"{case['ratio']['p50']:.2f}" for case in own)])
    return table([f"x {ALONE}", *labels], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a folder for the results file")
    parser.add_argument("--models", default="resnet50,gpt2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = results.environment(device)
    cases = []
    for model in options.models.split(","):
        cases += measure(model, options.dtype, device, options.rounds)
    if device.type == "cpu" and internals.launch is not None:
        cases += measure_host(3 * options.rounds)
    print("\n".join(tables(cases)))
    if options.results:
        results.write(options.results / f"update-{results.file_name(facts, options.dtype)}.json", facts, cases)


if __name__ == "__main__":
    main()
