"""Every way to regularise a model that is compared, each in a file of its own.

A peer is a module with a NAME and a function `prepare(weights, l1, l2)`, which returns what it can do as callables
without arguments, by task:

    penalty     returns the penalty as a graph; from it follow
        value       returns the penalty, without a graph
        backward    adds the penalty's gradient to .grad, through autograd
    add_grad    adds the gradient without autograd, and returns the penalty
    prox        shrinks the weights in place, by a step of strengths.LR

`weight_decay` is none of these: it is an optimizer, for the question of the whole step.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bench.peers import article, compiled, fastreg_, foreach, loop

Tasks = dict[str, Callable[[], Any]]

PEERS: dict[str, ModuleType] = {peer.NAME: peer for peer in (fastreg_, article, loop, foreach)}
COMPILED = {f"{base.NAME} {suffix}": (base, mode) for base in (loop, foreach) for suffix, mode in compiled.MODES}


def prepare(name: str, weights: Sequence[nn.Parameter], l1: float, l2: float) -> Tasks:
    """The tasks of the peer called `name`."""
    base, mode = COMPILED[name] if name in COMPILED else (PEERS[name], None)
    tasks: Tasks = base.prepare(weights, l1, l2)
    tasks.setdefault("value", torch.no_grad()(tasks["penalty"]))
    if mode is not None:
        tasks = compiled.compile_tasks(tasks, mode)
    penalty = tasks["penalty"]
    # The backward pass starts outside of what is compiled, as it does in training.
    tasks["backward"] = lambda: penalty().backward()
    return tasks


def methods(task: str) -> list[str]:
    """The names of the peers that can do `task`, compiled forms last."""
    one = [nn.Parameter(torch.ones(1))]
    eager = [name for name in PEERS if task in prepare(name, one, 1.0, 1.0)]
    return eager + [name for name, (base, _) in COMPILED.items() if base.NAME in eager]
