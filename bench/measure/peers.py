"""Every way to regularise a model that is compared, and a check of what it computes, before any clock starts.

A peer is a function of weights, l1 and l2 that returns what it can do by task, as callables without arguments:

    penalty     returns the penalty as a graph; from it follow
        value       returns the penalty, without a graph
        backward    adds the penalty's gradient to .grad, through autograd
    add_grad    adds the gradient without autograd, and returns the penalty
    gradient    the same without the penalty
    prox        shrinks the weights in place, by a step of LR
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastreg

# What every method is measured and checked with. Large enough that a method which forgets a term or does not shrink
# fails its check even in bfloat16; costs do not depend on them.
L1, L2, LR = 0.5, 5.0, 1e-2

Weights = Sequence[nn.Parameter]
Tasks = dict[str, Callable[[], Any]]


def ours(weights: Weights, l1: float, l2: float, impl: Literal["triton", "torch"] | None = None) -> Tasks:
    reg = fastreg.ElasticNet(list(weights), l1, l2, impl=impl)
    return {"penalty": reg, "add_grad": lambda: reg.add_grad_().total, "prox": lambda: reg.prox_(LR)}


def cat(weights: Weights, l1: float, l2: float) -> Tasks:
    """The article's form: all parameters in one vector, and two sums over it."""

    def penalty() -> Tensor:
        everything = torch.cat([w.view(-1) for w in weights])
        return l1 * everything.abs().sum() + l2 * everything.square().sum()

    return {"penalty": penalty}


def loop(weights: Weights, l1: float, l2: float) -> Tasks:
    def penalty() -> Tensor:
        return l1 * sum(w.abs().sum() for w in weights) + l2 * sum(w.square().sum() for w in weights)

    @torch.no_grad()
    def add_grad() -> Tensor:
        for w in weights:
            w.grad.add_(w.sign(), alpha=l1).add_(w, alpha=2 * l2)
        return penalty()

    @torch.no_grad()
    def prox() -> None:
        for w in weights:
            w.copy_(w.sign() * (w.abs() - LR * l1).clamp_(min=0) / (1 + 2 * LR * l2))

    return {"penalty": penalty, "add_grad": add_grad, "prox": prox}


def foreach(weights: Weights, l1: float, l2: float) -> Tasks:
    """The strongest hand-written rival in eager PyTorch: multi-tensor operators, inside a custom Function."""

    @torch.no_grad()
    def gradient() -> None:
        grads = [w.grad for w in weights]
        torch._foreach_add_(grads, torch._foreach_sign(weights), alpha=l1)
        torch._foreach_add_(grads, weights, alpha=2 * l2)

    def penalty() -> Tensor:
        return _ForeachPenalty.apply(l1, l2, *weights)

    value = torch.no_grad()(lambda: _foreach_value(weights, l1, l2))

    def add_grad() -> Tensor:
        gradient()
        return value()

    @torch.no_grad()
    def prox() -> None:
        # What is left of a weight is what a clamp to the threshold takes away.
        clamped = torch._foreach_clamp_max(weights, LR * l1)
        torch._foreach_clamp_min_(clamped, -LR * l1)
        torch._foreach_sub_(weights, clamped)
        torch._foreach_div_(weights, 1 + 2 * LR * l2)

    return {"penalty": penalty, "value": value, "add_grad": add_grad, "gradient": gradient, "prox": prox}


class _ForeachPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, l1: float, l2: float, *weights: Tensor) -> Tensor:
        ctx.weights, ctx.strengths = weights, (l1, l2)
        return _foreach_value(weights, l1, l2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        l1, l2 = ctx.strengths
        grads = torch._foreach_sign(ctx.weights)
        torch._foreach_mul_(grads, l1)
        torch._foreach_add_(grads, ctx.weights, alpha=2 * l2)
        torch._foreach_mul_(grads, upstream)
        return None, None, *grads


def _foreach_value(weights: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    # Norms of half-precision weights are asked for in float32: in their own dtype they overflow.
    l1_norms = torch.stack(torch._foreach_norm(weights, 1, dtype=torch.float32))
    l2_norms = torch.stack(torch._foreach_norm(weights, 2, dtype=torch.float32))
    return l1 * l1_norms.sum() + l2 * l2_norms.square().sum()


PEERS = {"fastreg": ours, "torch.cat": cat, "loop": loop, "foreach": foreach}
COMPILED = {"loop compiled": "loop", "foreach compiled": "foreach"}


def prepare(name: str, weights: Weights, l1: float, l2: float) -> Tasks:
    """The tasks of the peer called `name`; those of a compiled peer are compiled at their first call."""
    tasks = PEERS[COMPILED.get(name, name)](weights, l1, l2)
    tasks.setdefault("value", torch.no_grad()(tasks["penalty"]))
    if name in COMPILED:
        tasks = {task: torch.compile(call, fullgraph=True) for task, call in tasks.items()}
    penalty = tasks["penalty"]
    # The backward pass starts outside of what is compiled, as it does in training.
    tasks["backward"] = lambda: penalty().backward()
    return tasks


def methods(task: str, compiled: bool = True) -> list[str]:
    """The names of the peers that can do `task`, compiled forms last."""
    eager = [name for name in PEERS if task in prepare(name, [nn.Parameter(torch.ones(1))], 1.0, 1.0)]
    return eager + [name for name, base in COMPILED.items() if compiled and base in eager]


# How far a method may be from the truth and still be timed: a lossy method passes, as users run them today, a wrong one
# does not. fastreg's own promises are a thousand times closer, and the error found is recorded beside every figure.
# Errors of tensors are root mean squares, relative to the gradient's or to the change that a proximal step makes.
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {
    "value": {F32: 1e-3, BF16: 2e-2, F16: 2e-3},
    "gradient": {F32: 1e-6, BF16: 1e-2, F16: 1e-3},
    "shrunk weight": {F32: 1e-5, BF16: 2e-2, F16: 3e-3},
}
PIECE = 1 << 26


class Found(NamedTuple):
    errors: dict[str, float]
    reason: str | None  # why it is not to be timed, if so


def check(task: str, call: Callable[[], Any], weights: Weights) -> Found:
    """Runs `call` once and compares; weights are as before afterwards, gradients zero.

    Beside the peers' tasks there is "decay", a step of gradient descent on the l2 term alone.
    """
    saved = [w.detach().clone() for w in weights]
    zero_grads(weights)
    try:
        errors = _errors(task, call(), weights, saved)
    except Exception as error:  # a rival that cannot run is a result, too
        text = str(error).strip().splitlines() or [""]
        return Found({}, f"raised {type(error).__name__}: {text[0][:200]}")
    finally:
        restore(weights, saved)
        zero_grads(weights)
    for what, found in errors.items():
        allowed = TOLERANCES[what][weights[0].dtype]
        if not found <= allowed:
            return Found(errors, f"{what} off by {found:.2g} (relative), allowed {allowed:.0e}")
    return Found(errors, None)


@torch.no_grad()
def _errors(task: str, value: Any, weights: Weights, saved: Sequence[Tensor]) -> dict[str, float]:
    """In float64, where the weights are: on a GPU the CPU would take longer for this than all timing."""
    values, ratios = [], []
    what = "shrunk weight" if task in ("prox", "decay") else "gradient"
    for w, before in zip(weights, saved, strict=True):
        off, size = [], []
        for new, old, grad in _pieces(w, before, w.grad):
            values.append(L1 * old.abs().sum() + L2 * old.square().sum())
            gradient = L1 * old.sign() + 2 * L2 * old
            error, reference = grad - gradient, gradient
            if task == "prox":
                shrunk = old.sign() * (old.abs() - LR * L1).clamp(min=0) / (1 + 2 * LR * L2)
                error, reference = new - shrunk, old - shrunk
            elif task == "decay":
                error, reference = new - (1 - 2 * LR * L2) * old, 2 * LR * L2 * old
            off.append(error.square().sum())
            size.append(reference.square().sum())
        ratios.append(torch.stack([sum(off), sum(size)]))
    found = {}
    if task != "value":
        error, reference = torch.stack(ratios).sqrt().T
        # The reference is 0 for biases at first, which have to come out exactly; a NaN stays one.
        ratio = torch.where((error == 0) & (reference == 0), 0.0, error / reference)
        found[what] = float(ratio.max())
    if task in ("value", "add_grad"):
        truth = math.fsum(torch.stack(values).tolist())
        error = abs(float(value) - truth) / truth
        found["value"] = error if math.isfinite(error) else math.inf  # a NaN is as wrong as can be
    return found


def _pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same elements of each, in float64, PIECE at a time: a thousand million would not fit."""
    flat = [tensor.detach().reshape(-1).split(PIECE) for tensor in tensors]
    return ([piece.double() for piece in pieces] for pieces in zip(*flat, strict=True))


@torch.no_grad()
def restore(weights: Weights, values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(weights), list(values))


def zero_grads(weights: Weights) -> None:
    """Zeroes every .grad in place, or creates it."""
    for w in weights:
        w.grad = torch.zeros_like(w) if w.grad is None else w.grad.zero_()
