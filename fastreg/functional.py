"""The public functions: the elastic-net penalty of a whole model, as a loss term, in place, and as a proximal step.

For weights w_t with strengths l1 and l2 (a group's own, or the call's) the penalty, its gradient and its proximal
operator are

    penalty     l1 * Σ_t Σ|w_t|  +  l2 * Σ_t Σ w_t²
    gradient    l1 * sign(w)  +  2 * l2 * w                               with sign(±0) = 0
    prox_lr     sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2)

There is no factor ½: l2 multiplies the plain sum of squares, as in Keras. So l2 acts as weight_decay = 2 * l2 does in
torch.optim.SGD, and scikit-learn's ElasticNet(alpha, l1_ratio) has l1 = alpha * l1_ratio and
l2 = alpha * (1 - l1_ratio) / 2.
The proximal operator is the closed form in Parikh and Boyd, Proximal Algorithms (2014), section 6.5.3.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from fastreg.autograd.function import compute_penalty
from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.strengths import check_strength, checked
from fastreg.core.types import Want
from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.selection.filters import Filter
from fastreg.selection.params import Params
from fastreg.selection.selection import select
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.prox import apply_prox


# fmt: off
@overload
def elastic_penalty(params: Params, l1: Strength = ..., l2: Strength = ..., *, include: Filter = ...,
                    exclude: Filter = ..., return_terms: Literal[False] = ..., reduce: bool = ...,
                    impl: Impl = ...) -> Tensor: ...
@overload
def elastic_penalty(params: Params, l1: Strength = ..., l2: Strength = ..., *, include: Filter = ...,
                    exclude: Filter = ..., return_terms: Literal[True], reduce: bool = ...,
                    impl: Impl = ...) -> Penalty: ...
@overload
def elastic_penalty(params: Params, l1: Strength = ..., l2: Strength = ..., *, include: Filter = ...,
                    exclude: Filter = ..., return_terms: bool, reduce: bool = ...,
                    impl: Impl = ...) -> Tensor | Penalty: ...
# fmt: on
def elastic_penalty(
    params: Params,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    include: Filter = None,
    exclude: Filter = None,
    return_terms: bool = False,
    reduce: bool = True,
    impl: Impl = None,
) -> Tensor | Penalty:
    """The L1 + L2 penalty of all weights, l1 * Σ|w| + l2 * Σw², to add to a loss.

    The same number as `l1 * torch.cat([p.flatten() for p in params]).abs().sum() + l2 * (the same).square().sum()`,
    from one pass over the weights and without copying them; the backward pass makes another one. Formulas and
    conventions: the docstring of fastreg.functional.

    Args:
        params: an nn.Module, a tensor, an iterable of tensors or of (name, tensor) pairs, or a list of group dicts as
            optimizers take them, `{"params": <any of these>, "l1": ..., "l2": ...}`; a strength that a group leaves out
            is the call's. Weights are float64, float32, bfloat16 or float16, mixed as you like, of any shape and
            strides. Tied weights count once; frozen ones (requires_grad=False) not at all, unless everything passed is
            a plain tensor without gradients: then all count, and the value is not differentiable in them.
        l1, l2: floats, or 0-dim floating-point tensors on the weights' device, which are read there and may require
            gradients themselves. A tensor's value is not checked: that would mean waiting for the device.
        include, exclude: which parameters count: a regular expression searched in the name, a callable
            (name, param) -> bool, or a module class or tuple of them, for the parameters that such modules own.
            exclude wins. `bias_and_norm` is a ready callable for `exclude`. Names are those of your own model, without
            what torch.compile, DataParallel and DDP put before them.
        return_terms: return the `Penalty` (total, l1, l2) instead of the total alone.
        reduce: for DTensor weights: sum over the ranks that hold the shards, one all-reduce of two numbers per mesh and
            strength group. With False every rank gets its own terms, whose sum over the ranks of the mesh is the
            penalty: to be summed together with other metrics. The gradient is the same either way.
        impl: "triton" or "torch" to force an implementation; None takes Triton for CUDA and ROCm tensors where it is
            installed, else PyTorch.

    Returns:
        A 0-dim tensor, float32 (float64 if any weight is), on the first weight's device; or a `Penalty` of three.

    Raises:
        ValueError: a negative, NaN or infinite strength, a strength that is not 0-dim or on another device, nothing
            selected, an `include` that matches nothing, a weight in two groups, a group key that looks misspelt.
        TypeError: integer, complex, sparse, quantized or meta weights, arguments of another kind.
        RuntimeError: impl="triton" where it cannot run; later, from backward, weights that were changed since.

    Warns:
        UserWarning: an `exclude` that matches nothing.

    Examples:
        >>> loss = criterion(model(x), y) + fastreg.elastic_penalty(model, l1=1e-5, l2=1e-4)
    """
    work = select(params, checked(ElasticNetPenalty, l1, l2), include, exclude, impl, reduce)
    return compute_penalty(work, Want.TERMS if return_terms else Want.TOTAL)  # type: ignore[no-any-return]


def add_elastic_grad_(
    params: Params,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    include: Filter = None,
    exclude: Filter = None,
    reduce: bool = True,
    impl: Impl = None,
) -> Penalty:
    """Adds the penalty's gradient, l1 * sign(w) + 2 * l2 * w, to .grad, and returns the penalty, in one pass.

    The cheapest penalty outside an optimizer: it reads the weights once, reads and writes .grad once, and needs no
    backward pass. Call it after backward and before optimizer.step(); `ElasticNet.attach` does so by itself. A .grad
    that is None is created. Nothing waits for the device.

    Args: as `elastic_penalty`. Gradients with respect to l1 and l2 are not formed.

    Returns: the `Penalty` of the weights as they are, without a graph.

    Raises: as `elastic_penalty`, and TypeError for a .grad of another dtype or device than its weight, ValueError for
    one of another shape. Any error leaves weights and gradients as they were.

    Examples:
        >>> criterion(model(x), y).backward()
        >>> penalty = fastreg.add_elastic_grad_(model, l1=1e-5, l2=1e-4)
        >>> optimizer.step()
    """
    work = select(params, checked(ElasticNetPenalty, l1, l2), include, exclude, impl, reduce)
    with torch.no_grad():
        return work.penalty.result(add_gradient(work))  # type: ignore[no-any-return]


def elastic_prox_(
    params: Params,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    lr: Strength,
    include: Filter = None,
    exclude: Filter = None,
    impl: Impl = None,
) -> None:
    """Applies the proximal step of the penalty to the weights in place: w = prox_lr(w), with exact zeros.

    prox_lr(w) = sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2). Call it after optimizer.step() instead of adding
    the penalty to the loss: with plain SGD that is the proximal gradient method (ISTA; Beck and Teboulle, 2009).

    Takes the arguments of `elastic_penalty`, and `lr`.

    Args:
        lr: the step size, that of the optimizer as a rule: a float, or a 0-dim tensor on the weights' device.

    Raises: as `elastic_penalty`, and ValueError for a negative, NaN or infinite lr and for an expanded weight, whose
    elements share memory. Any error leaves the weights as they were. A graph recorded before this call refuses to run
    backward after it.

    Examples:
        >>> optimizer.step()
        >>> fastreg.elastic_prox_(model, l1=1e-5, lr=optimizer.param_groups[0]["lr"])
    """
    work = select(params, checked(ElasticNetPenalty, l1, l2), include, exclude, impl)
    with torch.no_grad():
        apply_prox(work, check_strength(lr, "lr"))
