"""Whole steps of optimizers with the penalty in them, element by element.

Imports nothing but Triton. `fastreg.formulas.steps` states the steps; here they are in float32 or float64, with the
numbers that are the same for all elements formed once per program, in float64.
"""

import triton
import triton.language as tl

from fastreg.kernels.penalty import _prox, _signed

# Columns of the settings, as `fastreg.core.types.Settings` has them.
LR, WEIGHT_DECAY, IS_DECOUPLED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GRAD_L1, GRAD_L2, PROX_L1, PROX_L2 = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
FIRST, SECOND, THIRD, STEP = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
REACH = tl.constexpr(11)
SETTINGS_COLUMNS = tl.constexpr(12)


@triton.constexpr_function
def _is_step(mode):
    """Whether `mode` is a whole step of an optimizer."""
    return mode in ("sgd", "momentum", "adam", "amsgrad")


@triton.constexpr_function
def _has_grad(mode):
    """Whether there are gradients beside the weights."""
    return mode in ("gradient", "rescale", "accumulate", "sgd", "momentum", "adam", "amsgrad")


@triton.constexpr_function
def _has_state(mode, number):
    """Whether `mode` has the momentum buffer or first moment (1), the second moment (2), the largest of those (3)."""
    return number in {"momentum": (1,), "adam": (1, 2), "amsgrad": (1, 2, 3), "adam_prox": (2,)}.get(mode, ())


@triton.constexpr_function
def _epsilon(dtype):
    """The distance from 1 to the next number of `dtype`."""
    return 2.0**-dtype.fp_mantissa_width


@triton.jit
def _quotient(a, b, DTYPE: tl.constexpr):
    """a / b, rounded once where DTYPE shows it, in which results are stored: Triton's own float32 division is not."""
    return tl.div_rn(a, b) if DTYPE == tl.float32 else a / b


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    """The square root of x, likewise."""
    return tl.sqrt_rn(x) if DTYPE == tl.float32 else tl.sqrt(x)


@triton.jit
def _power(base, exponent):
    """base ** exponent of float64 and a whole number from 0 on, by squaring."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _rule(row, step, lr, grad_scale, MODE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """What a step needs of the settings at `row`, in two tuples: what all optimizers have, and their own numbers."""
    lr = lr * tl.load(row + LR)
    decay = tl.load(row + WEIGHT_DECAY)
    is_decoupled = tl.load(row + IS_DECOUPLED)
    prox_l1, prox_slope = lr * tl.load(row + PROX_L1), 2 * lr * tl.load(row + PROX_L2)
    shrinks = (prox_l1 != 0) | (prox_slope != 0)
    first, second, third = tl.load(row + FIRST), tl.load(row + SECOND), tl.load(row + THIRD)
    if MODE == "sgd" or MODE == "momentum":
        # momentum, 1 - dampening, whether it is Nesterov's
        own = (lr.to(COMPUTE), first.to(COMPUTE), (1 - second).to(COMPUTE), third != 0)
        prox_slope = 1 / (1 + prox_slope)
    else:
        # step size, 1 - beta1, beta2, 1 - beta2, factor on the root of the second moment, eps, and of the proximal step
        # the furthest that it may go and whether this is a first step
        size = lr / (1 - _power(first, step))
        root = 1 / tl.sqrt(1 - _power(second, step))
        moments = ((1 - first).to(COMPUTE), second.to(COMPUTE), (1 - second).to(COMPUTE))
        # The factor is what roundings add, as `fastreg.formulas.steps.with_rounding` has it.
        reach = lr * tl.load(row + REACH) * (1 + 8 * _epsilon(COMPUTE) + _epsilon(DTYPE))
        bound = (reach.to(COMPUTE), step == 1)
        own = (size.to(COMPUTE), moments[0], moments[1], moments[2], root.to(COMPUTE), third.to(COMPUTE), bound)
    common = (
        (1 / grad_scale).to(COMPUTE),
        tl.load(row + GRAD_L1).to(COMPUTE),
        (2 * tl.load(row + GRAD_L2) + decay * (1 - is_decoupled)).to(COMPUTE),
        (1 - lr * decay * is_decoupled).to(COMPUTE),
        shrinks,
        prox_l1.to(COMPUTE),
        prox_slope.to(COMPUTE),
    )
    return common, own


@triton.jit
def _prox_by(w, square, denominator, prox_l1, prox_slope, bound, DTYPE: tl.constexpr):
    """The proximal step of size lr / denominator, for strengths that carry lr.

    It goes no further than steps of Adam can, and on a first step nowhere where the second moment is 0.
    """
    reach, is_first = bound
    ones = tl.full(w.shape, 1.0, w.dtype)
    inverse = _quotient(ones, denominator, DTYPE)
    shrinkage = ones
    if prox_slope != 0:
        shrinkage = _quotient(ones, prox_slope * inverse + 1.0, DTYPE)
    moved = _prox(w, prox_l1 * inverse, shrinkage)
    # Compared this way round, NaN survives.
    moved = tl.where(moved < w - reach, w - reach, tl.where(moved > w + reach, w + reach, moved))
    return tl.where(is_first & (square == 0), w, moved)


@triton.jit
def _step(w, grad, first, second, third, common, own, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights and up to three states after a step: the momentum buffer, or the moments and the largest second one.

    `grad` is that of the data; what the optimizer does not have comes back as it was.
    """
    inverse_scale, l1, slope, kept, shrinks, prox_l1, prox_slope = common
    if MODE == "adam_prox":
        denominator = _root(second, DTYPE) * own[4] + own[5]
        return _prox_by(w, second, denominator, prox_l1, prox_slope, own[6], DTYPE), first, second, third
    grad = grad * inverse_scale + _signed(w, l1)
    if slope != 0:  # infinity times 0 would be NaN
        grad += slope * w
    w *= kept
    if MODE == "sgd" or MODE == "momentum":
        lr, momentum, undamped, is_nesterov = own
        if MODE == "momentum":
            first = momentum * first + undamped * grad
            grad = tl.where(is_nesterov, grad + momentum * first, first)
        w -= lr * grad
        if shrinks:
            w = _prox(w, prox_l1, prox_slope)
    else:
        size, new1, beta2, new2, root, eps, bound = own
        # As torch.lerp has it: the larger part is not rounded.
        change = grad - first
        first = tl.where(new1 < 0.5, first + new1 * change, grad - (1 - new1) * change)
        second = beta2 * second + new2 * grad * grad
        used = second
        if MODE == "amsgrad":
            third = tl.where(third >= second, third, second)  # NaN is not below anything
            used = third
        denominator = _root(used, DTYPE) * root + eps
        w -= _quotient(size * first, denominator, DTYPE)
        if shrinks:
            w = _prox_by(w, used, denominator, prox_l1, prox_slope, bound, DTYPE)
    return w, first, second, third
