"""Every sweep starts here: one of three functions makes it, and memory is checked before the first write."""

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
