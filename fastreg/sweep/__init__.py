"""Entry points of every sweep. They check memory before the first write and dispatch to one of three functions."""

from fastreg.sweep.dispatch import is_traced_now, sweep
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.prox import apply_elementwise_prox, apply_prox, apply_prox_of_groups
from fastreg.sweep.sharded import Ownership
from fastreg.sweep.steps import apply_steps

__all__ = [
    "Ownership",
    "add_gradient",
    "apply_elementwise_prox",
    "apply_prox",
    "apply_prox_of_groups",
    "apply_steps",
    "is_traced_now",
    "sweep",
]
