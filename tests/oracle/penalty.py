"""The truth the library is held to: NumPy float64 and exact summation, written without looking at the library."""

import math
from collections.abc import Iterable

import numpy as np
import torch

FINFO = {dtype: torch.finfo(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

# How far a gradient or a shrunk weight may be from the formula, in units in the last place of its dtype. Measured from
# the float32 formula (float64 for float64): its own two roundings and the one on store stay within one.
GRADIENT_ULPS = {torch.float64: 1.0, torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# How far a value may be from the exact sum, relative to it.
VALUE_RTOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
FLOAT32_ULP = 2.0**-23


def array(tensor: torch.Tensor) -> np.ndarray:
    """The elements as float64, in logical order."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def penalty(weights: Iterable[torch.Tensor], l1: float, l2: float) -> tuple[float, float, float]:
    """(total, l1 term, l2 term) by exact summation; products of float64 weights are rounded once each."""
    values = np.concatenate([array(w).ravel() for w in weights] or [np.zeros(0)])
    l1_term = l1 * math.fsum(np.abs(values))
    l2_term = l2 * math.fsum(values * values)
    return l1_term + l2_term, l1_term, l2_term


def rounding(dtype: torch.dtype) -> float:
    """What is added to the longest step of Adam, relative to it, for roundings of the step and of the weight."""
    return 8 * FINFO[torch.float64 if dtype == torch.float64 else torch.float32].eps + FINFO[dtype].eps


def _formula_dtype(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.float32


def gradient(w: torch.Tensor, l1: float, l2: float) -> np.ndarray:
    """l1 * sign(w) + 2 * l2 * w with the strengths in the precision of the formula; evaluated in float64."""
    real = _formula_dtype(w.dtype)
    values = array(w)
    with np.errstate(all="ignore"):
        # 0 is 0 for any strengths, though float32 has no number for those beyond 3e38.
        slope = np.float64(real(l1)) * np.sign(values) + np.float64(real(2 * l2)) * values
        return np.where(values == 0, 0.0, slope)


def prox(w: torch.Tensor, l1: float, l2: float, lr: float) -> np.ndarray:
    """sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2), likewise."""
    real = _formula_dtype(w.dtype)
    values = array(w)
    with np.errstate(all="ignore"):
        shrunk = np.maximum(np.abs(values) - np.float64(real(lr * l1)), 0.0) / (1.0 + 2.0 * np.float64(real(lr * l2)))
        return np.where(np.isnan(values), np.nan, np.sign(values) * shrunk)


def ulp_distance(actual: torch.Tensor, expected: np.ndarray) -> float:
    """The largest |actual - expected| in units in the last place of `actual`'s dtype at `expected`.

    Infinite where one is NaN and the other is not, or where an infinity or an overflow is not matched.
    """
    info = FINFO[actual.dtype]
    got = array(actual)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if got.size == 0:
        return 0.0
    with np.errstate(all="ignore"):
        magnitude = np.maximum(np.abs(expected), info.tiny)
        ulp = np.exp2(np.floor(np.log2(np.where(np.isfinite(magnitude), magnitude, 1.0)))) * info.eps
        distance = np.abs(got - expected) / ulp
        overflow = np.abs(expected) >= info.max * (1 - info.eps / 4)
        distance = np.where(overflow & np.isinf(got) & (np.sign(got) == np.sign(expected)), 0.0, distance)
    distance = np.where(np.isnan(got) & np.isnan(expected), 0.0, distance)
    distance = np.where(np.isnan(distance), np.inf, distance)
    return float(distance.max())
