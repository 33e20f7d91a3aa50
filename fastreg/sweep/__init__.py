"""Every sweep starts here: which of three functions makes it, and checks of memory before the first write."""

from fastreg.sweep.dispatch import measure, sweep_for
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.local import local_sweep
from fastreg.sweep.prox import apply_elementwise_prox, apply_prox
from fastreg.sweep.sharded import Ownership, sharded_sweep
from fastreg.sweep.steps import StepWork, apply_steps
from fastreg.sweep.traced import traced_sweep

__all__ = [
    "Ownership",
    "StepWork",
    "add_gradient",
    "apply_elementwise_prox",
    "apply_prox",
    "apply_steps",
    "local_sweep",
    "measure",
    "sharded_sweep",
    "sweep_for",
    "traced_sweep",
]
