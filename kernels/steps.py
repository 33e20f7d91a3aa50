"""Whole steps of optimizers with the penalty in them, element by element.

Imports nothing but Triton. `fastreg.formulas.steps` states the steps; here they are in float32 or float64, with the
numbers that are the same for all elements formed once per program, in float64.
"""

import triton
import triton.language as tl

from fastreg.kernels.penalty import _prox, _signed, _with_finite_slope


@triton.constexpr_function
def _states(mode):
    """Return the names of the states that `mode` reads, as fastreg.core.types.STATES has them; none without a step."""
    states = {
        "sgd": (),
        "momentum": ("momentum_buffer",),
        "adam": ("exp_avg", "exp_avg_sq"),
        "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        "elementwise_prox": ("square",),
    }
    if mode not in states and mode not in ("value", "gradient", "rescale", "accumulate", "prox"):
        raise ValueError(f"no kernel makes a step of mode {mode!r}")
    return states.get(mode, ())


@triton.constexpr_function
def _columns(mode):
    """Return the columns of the settings of `mode`: the fields of its settings in fastreg.core.types."""
    of_every_step = ("lr", "weight_decay", "is_decoupled", "l1", "l2", "prox_l1", "prox_l2")
    adam = (*of_every_step, "beta1", "beta2", "eps", "reach")
    sgd = (*of_every_step, "momentum", "dampening", "nesterov")
    elementwise_prox = ("lr", "prox_l1", "prox_l2", "beta2", "eps", "reach", "steps_made")
    return {"sgd": sgd, "momentum": sgd, "adam": adam, "amsgrad": adam, "elementwise_prox": elementwise_prox}[mode]


@triton.constexpr_function
def _column(mode, name):
    """Return the number of a column, or -1 if `mode` has no such column."""
    return _columns(mode).index(name) if name in _columns(mode) else -1


@triton.constexpr_function
def _n_columns(mode):
    return len(_columns(mode))


@triton.constexpr_function
def _is_step(mode):
    """Return whether `mode` is an optimizer's whole step, which reads gradients and writes its states."""
    return mode in ("sgd", "momentum", "adam", "amsgrad")


@triton.constexpr_function
def _has_settings(mode):
    """Return whether `mode` reads settings and states: a whole step, or a proximal step with elementwise sizes."""
    return mode in ("sgd", "momentum", "adam", "amsgrad", "elementwise_prox")


@triton.constexpr_function
def _counts_steps(mode):
    """Return whether each weight has a counter of its steps, which the kernel increments."""
    return mode in ("adam", "amsgrad")


@triton.constexpr_function
def _has_grad(mode):
    """Return whether there are gradients beside the weights."""
    return mode in ("gradient", "rescale", "accumulate", "sgd", "momentum", "adam", "amsgrad")


@triton.constexpr_function
def _has_state(mode, number):
    """Return whether `mode` reads that many states or more."""
    return number <= len(_states(mode))


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
def _setting(row, MODE: tl.constexpr, NAME: tl.constexpr):
    """The number in the column NAME of the settings at `row`; 0 if MODE has no such column."""
    COLUMN: tl.constexpr = _column(MODE, NAME)
    number = tl.full((), 0.0, tl.float64)
    if COLUMN >= 0:
        number = tl.load(row + COLUMN)
    return number


@triton.jit
def _rule(row, step, lr, grad_scale, MODE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of a step, formed from the settings at `row`, in two tuples: for all modes, and for this one."""
    lr = lr * _setting(row, MODE, "lr")
    decay = _setting(row, MODE, "weight_decay")
    is_decoupled = _setting(row, MODE, "is_decoupled")
    prox_l1, prox_slope = lr * _setting(row, MODE, "prox_l1"), 2 * lr * _setting(row, MODE, "prox_l2")
    shrinks = (prox_l1 != 0) | (prox_slope != 0)
    if MODE == "sgd" or MODE == "momentum":
        momentum, dampening = _setting(row, MODE, "momentum"), _setting(row, MODE, "dampening")
        nesterov = _setting(row, MODE, "nesterov")
        own = (lr.to(COMPUTE), momentum.to(COMPUTE), (1 - dampening).to(COMPUTE), nesterov != 0)
        prox_slope = 1 / (1 + prox_slope)
    else:
        beta1, beta2 = _setting(row, MODE, "beta1"), _setting(row, MODE, "beta2")
        eps = _setting(row, MODE, "eps")
        size = lr / (1 - _power(beta1, step))
        root = 1 / tl.sqrt(1 - _power(beta2, step))  # a factor on the root of the second moment
        moments = ((1 - beta1).to(COMPUTE), beta2.to(COMPUTE), (1 - beta2).to(COMPUTE))
        # The last factor is for rounding, as in `fastreg.formulas.steps.with_rounding`.
        reach = lr * _setting(row, MODE, "reach") * (1 + 8 * _epsilon(COMPUTE) + _epsilon(DTYPE))
        bound = (reach.to(COMPUTE), tl.where(step == 1, 0.0, reach).to(COMPUTE))
        own = (size.to(COMPUTE), moments[0], moments[1], moments[2], root.to(COMPUTE), eps.to(COMPUTE), bound)
    slope = 2 * _setting(row, MODE, "l2") + decay * (1 - is_decoupled)
    l1, slope = _with_finite_slope(_setting(row, MODE, "l1"), slope, COMPUTE)
    common = (
        (1 / grad_scale).to(COMPUTE),
        l1.to(COMPUTE),
        slope.to(COMPUTE),
        (1 - lr * decay * is_decoupled).to(COMPUTE),
        shrinks,
        prox_l1.to(COMPUTE),
        prox_slope.to(COMPUTE),
    )
    return common, own


@triton.jit
def _prox_elementwise(w, square, denominator, prox_l1, prox_slope, bound, DTYPE: tl.constexpr):
    """The proximal step of size lr / denominator, for strengths that carry lr.

    No element moves further than the reach, and on a first step those whose square is 0 do not move.
    """
    reach, reach_of_zero = bound
    ones = tl.full(w.shape, 1.0, w.dtype)
    inverse = _quotient(ones, denominator, DTYPE)
    shrinkage = ones
    if prox_slope != 0:
        shrinkage = _quotient(ones, prox_slope * inverse + 1.0, DTYPE)
    # As `_prox`, with |w| - reach below it. A maximum of magnitudes takes fewer instructions than comparisons.
    magnitude = tl.abs(w)
    allowed = tl.where(square == 0, reach_of_zero, reach)
    shrunk = _larger(magnitude - prox_l1 * inverse, 0.0) * shrinkage
    shrunk = _larger(shrunk, magnitude - allowed)
    return tl.where(w < 0, -shrunk, shrunk)


@triton.jit
def _larger(a, b):
    """The maximum, NaN if one of both is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _step(w, grad, first, second, third, common, own, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights and up to three states after a step, the states in the order of `_states`.

    `grad` is the gradient of the data. States that MODE does not change come back as they were.
    """
    if MODE == "elementwise_prox":
        denominator = _root(first, DTYPE) * own[4] + own[5]
        w = _prox_elementwise(w, first, denominator, common[5], common[6], own[6], DTYPE)
    else:
        w, first, second, third = _optimizer_step(w, grad, first, second, third, common, own, MODE, DTYPE)
    return w, first, second, third


@triton.jit
def _optimizer_step(w, grad, first, second, third, common, own, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """The same for the modes that `_is_step` names."""
    inverse_scale, l1, slope, kept, shrinks, prox_l1, prox_slope = common
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
            w = _prox_elementwise(w, used, denominator, prox_l1, prox_slope, bound, DTYPE)
    return w, first, second, third
