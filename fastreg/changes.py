"""Notices weights that were changed between forward and backward, in place or by assigning `.data`."""

import weakref
from collections.abc import Sequence

from torch import Tensor

from fastreg.dtensor import any_dtensor, is_dtensor, local


class WeightState:
    """Where each weight lies, its shape, and how often it was changed in place; nothing is known of a None."""

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        self._facts = _facts(weights)
        # The shard of a DTensor counts by itself. FSDP2 may give a weight another shard, which says nothing.
        distributed = any_dtensor(weights)
        shards = [(i, local(w)) for i, w in enumerate(weights) if distributed and w is not None and is_dtensor(w)]
        self._shards = [(i, weakref.ref(shard), _facts([shard])) for i, shard in shards]

    def check(self, weights: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError where one of the same weights was changed since."""
        changed = _facts(weights) != self._facts
        for i, shard, facts in self._shards:
            weight = weights[i]
            assert weight is not None
            now = local(weight)
            changed |= shard() is now and _facts([now]) != facts
        if changed:
            raise RuntimeError(
                "one of the weights needed for the gradient of the elastic penalty was modified by an in-place "
                "operation, or given other .data, between forward and backward; call backward before optimizer.step(), "
                "or compute the penalty again"
            )


def _facts(weights: Sequence[Tensor | None]) -> list[object]:
    try:
        return [[w._version for w in weights], [w.data_ptr() for w in weights], [w.shape for w in weights]]  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # a None, an inference tensor, a DTensor
        return [None if w is None else _fact(w) for w in weights]


def _fact(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return version, 0 if is_dtensor(weight) else weight.data_ptr(), weight.shape
