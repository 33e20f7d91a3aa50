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
    """The plan of weights that need no copy, laid out in one way, and which gradients were laid out as they are."""

    def __init__(self, weights: Sequence[Tensor], groups: Sequence[int], plan: Plan) -> None:
        self.plan = plan
        self._addresses = _addresses(weights)
        self._groups = list(groups)
        self._weights = Snapshot(weights)
        self._grads: Snapshot | None = None

    def holds(self, weights: Sequence[Tensor], addresses: list[int], groups: Sequence[int]) -> bool:
        """Whether these are the same weights, at the same `addresses`, in the same groups."""
        return self._addresses == addresses and self._groups == list(groups) and self._weights.holds(weights)

    def accepts(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether `grads` are as those accepted last: all there, laid out as the weights are, free to be changed."""
        return self._grads is not None and self._grads.holds(grads)

    def accept(self, grads: Sequence[Tensor]) -> None:
        """Says so of `grads`."""
        self._grads = Snapshot(grads)


# By what is quick to find; whatever is found is compared in full. Some of each: snapshots differ under autocast and in
# inference mode, and the same weights may be in other groups for another penalty.
_RECENT: dict[tuple[int, int], list[Known]] = {}
MOST_OF_EACH = 4


def recall(weights: Sequence[Tensor], groups: Sequence[int]) -> Known | None:
    """What is known of `weights`, if anything is."""
    addresses = _addresses(weights)
    for known in _RECENT.get((addresses[0], len(addresses)), ()):
        if known.holds(weights, addresses, groups):
            return known
    return None


def remember(weights: Sequence[Tensor], groups: Sequence[int], plan: Plan) -> Known | None:
    """Keeps the `plan` of weights that are all dense; from their second time on, as many have no second one."""
    if plan.uses < 2:
        return None
    key = weights[0].data_ptr(), len(weights)
    known = Known(weights, groups, plan)
    while len(_RECENT) >= MOST_REMEMBERED and key not in _RECENT:
        _RECENT.pop(next(iter(_RECENT)), None)
    _RECENT[key] = [known, *_RECENT.get(key, ())][:MOST_OF_EACH]
    return known


def forget() -> None:
    """Gives up every plan that is kept."""
    _RECENT.clear()
    _build.cache_clear()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
