"""The truth the library is held to, in NumPy float64, written without looking at the library."""

from tests.oracle.penalty import (
    FINFO,
    FLOAT32_ULP,
    GRADIENT_ULPS,
    VALUE_RTOL,
    array,
    gradient,
    penalty,
    prox,
    rounding,
    ulp_distance,
)
from tests.oracle.step_size import reach, step_size
from tests.oracle.steps import step

__all__ = [
    "FINFO",
    "FLOAT32_ULP",
    "GRADIENT_ULPS",
    "VALUE_RTOL",
    "array",
    "gradient",
    "penalty",
    "prox",
    "reach",
    "rounding",
    "step",
    "step_size",
    "ulp_distance",
]
