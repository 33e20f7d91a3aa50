"""One step of AdamW with a penalty, inside the optimizer or beside it, next to torch.optim's fused step without any.

    python -m bench.measure.update [--results bench/results] [--models resnet50,gpt2] [--rounds N] [--device cpu]

Gradients are there already. All methods take turns in one run, each checked before: what it does to the weights, or
for a penalty whose gradient goes through the moments to the first of these, against float64. On a CPU the last rows are
how long a step of 148 tensors keeps the host, where fastreg's launches and PyTorch's arithmetic do nothing.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg
from bench.measure import internals
from bench.measure.harness import Call, Harness, Pairs, command_line, compared
from bench.measure.models import DTYPES, SHAPES, Shapes, from_shapes, n_weights
from bench.measure.peers import L1, L2, Weights, prepare, zero_grads
from bench.report import results
from bench.report.results import Case, pivot, table
from bench.static import ledger

LR, BETAS, EPS = 1e-5, (0.9, 0.999), 1e-8
ALONE = "torch fused, no penalty"
HOST = "host, 148 tensors"
HOST_TENSORS, HOST_NUMEL = 148, 16
# Of weights after a step that moves each by about LR, and of first moments; both relative, root mean square.
TOLERANCE = 1e-3


class Step:
    """A step of an optimizer, after `add`, if there is something to add to the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, add: Call | None = None) -> None:
        self.optimizer, self.add = optimizer, add

    def __call__(self) -> None:
        if self.add is not None:
            self.add()
        self.optimizer.step()


Method = Callable[[Weights], Step]


def adamw(weights: Weights, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    return kind(weights, LR, BETAS, EPS, weight_decay=0.0, **options)


def beside(peer: str | None, task: str = "add_grad", **form: bool) -> Method:
    """`peer` adds its gradient, through autograd if it knows no other way, and then torch.optim makes its step."""

    def method(weights: Weights) -> Step:
        if peer is None:
            return Step(adamw(weights, **form))
        tasks = prepare(peer, weights, L1, L2)
        return Step(adamw(weights, **form), tasks.get(task, tasks["backward"]))

    return method


def attached(mode: Any) -> Method:
    def method(weights: Weights) -> Step:
        optimizer = adamw(weights, fused=True)
        fastreg.ElasticNet(weights, L1, L2).attach(optimizer, mode)
        return Step(optimizer)

    return method


def inside(**options: Any) -> Method:
    return lambda weights: Step(adamw(weights, fastreg.optim.AdamW, l1=L1, l2=L2, **options))


METHODS: dict[str, Method] = {
    ALONE: beside(None, fused=True),
    "fastreg.optim": inside(),
    "fastreg.optim, prox": inside(prox=True),
    "fastreg.optim, prox, tracked": inside(prox=True, track=True),
    "torch fused, fastreg attached": attached("grad"),
    "torch fused, fastreg attached, prox": attached("prox"),
    # The least that foreach operators can do, without a value of the penalty.
    "torch fused, foreach gradient": beside("foreach", "gradient", fused=True),
    "torch fused, foreach": beside("foreach", fused=True),
    "torch fused, loop": beside("loop", fused=True),
    "torch fused, torch.cat": beside("torch.cat", fused=True),
    "torch foreach, foreach": beside("foreach", foreach=True),
}


def prepared(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    weights = from_shapes(shapes, dtype, device)
    for w in weights:
        w.grad = torch.randn_like(w)
    return weights


def error(method: str, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> float:
    """How far the first step is from one in float64: the gradient's share of the first moment, or the shrunk weight."""
    weights = prepared(shapes, dtype, device)
    before = [(w.detach().double(), w.grad.double()) for w in weights if w.grad is not None]
    step = METHODS[method](weights)
    step()
    l1, l2 = (0.0, 0.0) if method == ALONE else (L1, L2)
    off = size = 0.0
    for w, (old, grad) in zip(weights, before, strict=True):
        if "prox" in method:
            t = LR / (grad.abs() + EPS)
            moved = old - t * grad
            shrunk = moved.sign() * (moved.abs() - t * l1).clamp(min=0) / (1 + 2 * t * l2)
            reach = LR * max(2.0, (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5)  # as fastreg.optim documents it
            right = torch.where(grad == 0, moved, shrunk.clamp(moved - reach, moved + reach))
            found, reference = w.detach().double() - right, right - old
        else:  # the moment shows how large the gradient was, the weight only its sign
            reference = (1 - BETAS[0]) * (grad + l1 * old.sign() + 2 * l2 * old)
            found = step.optimizer.state[w]["exp_avg"].double() - reference
        off, size = off + float(found.square().sum()), size + float(reference.square().sum())
    return float((off / size) ** 0.5)


@contextmanager
def no_arithmetic() -> Iterator[None]:
    """torch.optim's fused step reads its arguments and does nothing; fastreg's launches do nothing."""
    fused, skipped = torch._fused_adamw_, torch.ones(())

    def read_arguments(*lists: Any, **numbers: Any) -> None:
        fused(*lists, **{**numbers, "found_inf": skipped})

    def count_nothing(*lists: Any, **numbers: Any) -> None:
        """On a GPU one launch counts the steps, here a loop."""

    with (
        internals.stubbed_launches(),
        mock.patch.object(torch, "_fused_adamw_", read_arguments),
        mock.patch.object(torch, "_foreach_add_", count_nothing),
    ):
        yield


def cases_of(label: str, dtype: str, times: dict[str, Pairs], errors: dict[str, float]) -> list[Case]:
    """What each method took, also in multiples of ALONE right before it."""
    case: Case = {"question": "update", "task": "update", "label": label, "dtype": dtype, "status": "measured"}
    return [
        {**case, "method": method, **compared(pairs), "errors": {"step": errors.get(method, 0.0)}}
        for method, pairs in times.items()
    ]


def measure(model: str, dtype: str, device: torch.device, rounds: int) -> list[Case]:
    shapes = SHAPES[model]
    small = [shape for shape in shapes if torch.Size(shape).numel() < 1 << 20][:20]
    errors = {method: error(method, small, DTYPES[dtype], device) for method in METHODS}
    if wrong := {method: each for method, each in errors.items() if not each <= TOLERANCE}:
        raise RuntimeError(f"not timed, as steps are wrong: {wrong}")
    weights = prepared(shapes, DTYPES[dtype], device)  # the same for all, which only have states of their own
    steps = {name: method(weights) for name, method in METHODS.items()}
    gc.collect()
    times = Harness(device, DTYPES[dtype]).take_turns(steps, steps[ALONE], rounds, warm_up=2)
    return cases_of(model, dtype, times, errors)


def measure_host(rounds: int, repeats: int = 20) -> list[Case]:
    shapes, cpu = [[HOST_NUMEL]] * HOST_TENSORS, torch.device("cpu")
    methods = {ALONE: METHODS[ALONE], "fastreg.optim": inside(impl="triton")}
    methods["fastreg.optim, prox, tracked"] = inside(prox=True, track=True, impl="triton")

    def repeated(step: Step) -> Call:
        return lambda: [step() for _ in range(repeats)]

    with no_arithmetic():
        steps = {name: repeated(method(prepared(shapes, torch.float32, cpu))) for name, method in methods.items()}
        gc.collect()
        times = Harness(cpu, torch.float32).take_turns(steps, steps[ALONE], rounds, warm_up=2)
    each = {name: [(own / repeats, alone / repeats) for own, alone in pairs] for name, pairs in times.items()}
    return cases_of(HOST, "float32", each, {})


FORMS = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}


def counted(model: str) -> dict[str, list[ledger.Operation]]:
    """What a step launches and moves on a GPU, in float32: PyTorch's operators on fake tensors, and fastreg's plan."""
    found: dict[str, list[ledger.Operation]] = {}
    with FakeTensorMode():
        weights = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES[model]]
        zero_grads(weights)
        for form, options in FORMS.items():
            for peer in (None, "foreach", "loop"):
                step = beside(peer, **options)(weights)
                step()  # makes the states
                found[f"{form}, {peer or 'no penalty'}"] = ledger.count(step)
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
    return pivot(cases, f"x {ALONE}", row="method", column="label")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--models", default="resnet50,gpt2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args(arguments)
    facts, cases = results.environment(options.device), []
    for model in options.models.split(","):
        cases += measure(model, options.dtype, options.device, options.rounds)
    if options.device.type == "cpu" and internals.launch is not None:
        cases += measure_host(3 * options.rounds)
    print("\n".join(tables(cases)))
    results.store(options.results, f"update-{results.file_name(facts, options.dtype)}", facts, cases)


if __name__ == "__main__":
    main()
