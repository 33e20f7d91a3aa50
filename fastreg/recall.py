"""What the last sweep found out about a list of weights, to be used again while nothing about them has changed.

A model has hundreds of tensors, and a GPU waits for whatever Python asks of each of them. So each is asked twice: for
its address, and in C++, by what torch.compile guards its graphs with, for everything else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.plan import Plan, _build

MOST_REMEMBERED = 64


def _guards() -> Any:
    """The class, or None where PyTorch has none that works as this one does."""
    some: Any = torch.empty(0, device="cpu")
    try:
        found: Any = torch._C._dynamo.guards.TensorGuards
        works = found(some, dynamic_dims_sizes=None, dynamic_dims_strides=None).check(some)
    except (AttributeError, TypeError):
        return None
    return found if works else None


_GUARDS = _guards()


class Snapshot:
    """Kind, dtype, device, shape, strides and requires_grad of a list of tensors, none of which it keeps alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards: Any = None
        if _GUARDS is not None:
            self._guards = _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        else:
            self._facts = [_facts(t) for t in tensors]

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether all is the same of `tensors`, as many as there were."""
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return [_facts(t) for t in tensors] == self._facts


def _facts(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None or tensor.layout != torch.strided:
        return (tensor is None,)
    kind = type(tensor), tensor.dtype, tensor.device, tensor.is_inference(), torch.is_inference_mode_enabled()
    return *kind, tensor.shape, tensor.stride(), tensor.requires_grad


class Known:
    """The plan of weights that need no copy, and which gradients were laid out as they are."""

    def __init__(self, addresses: list[int], groups: Sequence[int], plan: Plan) -> None:
        self.plan = plan
        self.addresses = addresses
        self.groups = list(groups)
        self.weights: Snapshot | None = None
        self.grads: Snapshot | None = None

    def is_at(self, addresses: list[int], groups: Sequence[int]) -> bool:
        """Whether weights of these groups were at `addresses`."""
        return self.addresses == addresses and self.groups == list(groups)

    def accepts(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether `grads` are as those accepted last: all there, laid out as the weights are, free to be changed."""
        return self.grads is not None and self.grads.holds(grads)

    def accept(self, grads: Sequence[Tensor]) -> None:
        """Says so of `grads`."""
        self.grads = Snapshot(grads)


# By what is quick to find; whatever is found is compared in full.
_RECENT: dict[tuple[int, int], Known] = {}


def recall(weights: Sequence[Tensor], groups: Sequence[int]) -> Known | None:
    """What is known of `weights`, if anything is."""
    addresses = _addresses(weights)
    known = _RECENT.get((addresses[0], len(addresses)))
    if known is None or known.weights is None or not known.is_at(addresses, groups):
        return None
    return known if known.weights.holds(weights) else None


def remember(weights: Sequence[Tensor], groups: Sequence[int], plan: Plan) -> Known | None:
    """Keeps the `plan` of weights that are all dense; from their second time on, as many have no second one."""
    addresses = _addresses(weights)
    key = addresses[0], len(addresses)
    known = _RECENT.get(key)
    if known is not None and known.plan is plan and known.is_at(addresses, groups):
        known.weights, known.grads = Snapshot(weights), None
        return known
    while len(_RECENT) >= MOST_REMEMBERED:
        _RECENT.pop(next(iter(_RECENT)), None)
    _RECENT[key] = Known(addresses, groups, plan)
    return None


def forget() -> None:
    """Gives up every plan that is kept."""
    _RECENT.clear()
    _build.cache_clear()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
