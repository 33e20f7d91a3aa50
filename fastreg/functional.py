"""The public functions: the elastic-net penalty of a whole model, as a loss term, in place, and as a proximal step."""

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
    """Return the elastic-net penalty of all weights, to add to a loss.

    For a weight w with strengths l1 and l2, those of its group or of the call:

        penalty    l1 * Σ|w| + l2 * Σw²
        gradient   l1 * sign(w) + 2 * l2 * w                  sign(0) = 0, also for -0.0
        prox_lr    sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2)

    `elastic_prox_` applies prox_lr. There is no factor ½: l2 multiplies the sum of squares, so l2 acts like
    weight_decay=2 * l2 in torch.optim.SGD. `ElasticNet.from_alpha` takes the parameters of scikit-learn.

    With `flat = torch.cat([p.flatten() for p in params])`, the value equals
    `l1 * flat.abs().sum() + l2 * flat.square().sum()`. The forward pass reads the weights once and does
    not copy them. The backward pass reads them once more.

    Args:
        params: An nn.Module, a tensor, an iterable of tensors or of (name, tensor) pairs, or a list of group dicts as
            optimizers take them: `{"params": ..., "l1": ..., "l2": ...}`. A group without a strength uses the call's.
            Weights may be float64, float32, bfloat16 or float16, mixed, and of any shape and strides. Tied weights
            count once. Frozen weights (requires_grad=False) do not count. If `params` has only plain tensors without
            gradients, all of them count, and the value is not differentiable in them.
        l1, l2: Floats, or 0-dim floating-point tensors on the weights' device, which may require gradients. The value
            of a tensor is read on the device and not checked, because a check would wait for the device.
        include, exclude: Which parameters count: a regular expression searched in the name, a callable
            (name, param) -> bool, or a module class or a tuple of them, for the parameters that such modules own.
            exclude takes precedence. `bias_and_norm` is a callable for `exclude`. Names are those of your own model,
            without the prefixes of torch.compile, DataParallel and DDP.
        return_terms: Return the `Penalty` (total, l1, l2) instead of the total alone.
        reduce: For DTensor weights: sum the value over the ranks that hold the shards, in one all-reduce of two numbers
            per mesh and strength group. With False, each rank gets its own terms, which sum to the penalty over the
            ranks of the mesh. The gradient is the same.
        impl: "triton" or "torch" forces an implementation. None chooses Triton for CUDA and ROCm tensors if it is
            installed, else PyTorch.

    Returns:
        A 0-dim tensor, float32 (float64 if any weight is float64), on the first weight's device. With return_terms, a
            `Penalty` of three such tensors.

    Raises:
        ValueError: A strength is negative, NaN, infinite, not 0-dim or on another device. Nothing is selected, or
            `include` matches nothing. A weight is in two groups. A group key looks misspelled.
        TypeError: A weight is integer, complex, sparse, quantized or on the meta device. An argument has the wrong
            type.
        RuntimeError: impl="triton" cannot run here. A weight has no memory: its storage was freed, or it is a
            placeholder of DeepSpeed's ZeRO-3. Later, in backward: a weight was changed after this call.

    Warns:
        UserWarning: `exclude` matches nothing. Two weights share memory, so that their common elements count twice.
            `params` has detached tensors, which get no gradient, or do not count beside parameters.

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
    """Add the penalty's gradient, l1 * sign(w) + 2 * l2 * w, to .grad and return the penalty.

    This is the cheapest penalty outside an optimizer. It reads the weights once, reads and writes .grad once, and needs
    no backward pass. Call it after backward and before optimizer.step(). Under GradScaler, call it after
    `scaler.unscale_(optimizer)`. `ElasticNet.attach` needs no such calls. A .grad that is None is created. The call
    does not wait for the device.

    Args:
        params, include, exclude, reduce, impl: As in `elastic_penalty`.
        l1, l2: As in `elastic_penalty`. Their own gradients are not computed.

    Returns:
        The `Penalty` of the current weights, without a graph.

    Raises:
        ValueError: As in `elastic_penalty`, or a .grad has another shape than its weight.
        TypeError: As in `elastic_penalty`, or a .grad has another dtype or device than its weight.
        RuntimeError: impl="triton" cannot run here, or a .grad cannot be changed in place.

    Errors leave weights and gradients unchanged.

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
    """Apply the proximal step of the penalty to the weights in place. It leaves exact zeros.

        w = sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2)

    This is the closed form of Parikh and Boyd, Proximal Algorithms (2014), section 6.5.3. Call it after
    optimizer.step() and do not add the penalty to the loss. With plain SGD this is the proximal gradient method (ISTA;
    Beck and Teboulle, 2009). Backward through a graph that was recorded before the call raises RuntimeError.

    Args:
        params, l1, l2, include, exclude, impl: As in `elastic_penalty`.
        lr: The step size, usually the optimizer's learning rate: a float, or a 0-dim tensor on the weights' device.

    Raises:
        ValueError: As in `elastic_penalty`, or `lr` is negative, NaN or infinite, or a weight is expanded, so that its
            elements share memory, or two weights share memory.
        TypeError: As in `elastic_penalty`.
        RuntimeError: impl="triton" cannot run here, or a weight cannot be changed in place.

    Errors leave the weights unchanged.

    Examples:
        >>> optimizer.step()
        >>> fastreg.elastic_prox_(model, l1=1e-5, lr=optimizer.param_groups[0]["lr"])
    """
    work = select(params, checked(ElasticNetPenalty, l1, l2), include, exclude, impl)
    with torch.no_grad():
        apply_prox(work, check_strength(lr, "lr"))
