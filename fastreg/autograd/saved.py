"""Whether weights were changed between forward and backward."""

import operator
import weakref
from collections.abc import Sequence

from torch import Tensor

from fastreg.core.dtensor import is_dtensor, local_shard
from fastreg.core.layout import Layout

_VERSION, _SHAPE = map(operator.attrgetter, ("_version", "shape"))


class WeightState:
    """Where each weight lies, its shape, and how often it was changed in place.

    The shard of a DTensor counts by itself. FSDP2 may give a weight another shard object, which is no change.
    """

    def __init__(self, weights: Sequence[Tensor], is_sharded: bool, layout: Layout | None) -> None:
        """`layout` is that of the weights, if it is known: only versions then need to be noted."""
        self._layout = None if is_sharded else layout
        self._facts = _facts(weights, self._layout)
        shards = [(i, local_shard(w)) for i, w in enumerate(weights) if is_dtensor(w)] if is_sharded else ()
        self._shards = [(i, weakref.ref(shard), _facts([shard], None)) for i, shard in shards]

    def check(self, weights: Sequence[Tensor]) -> Layout | None:
        """Raises RuntimeError where one of the same weights was changed since, in place or by assigning `.data`.

        Returns their layout, if it is known and still holds.
        """
        layout = self._layout
        changed = _facts(weights, layout) != self._facts
        if layout is not None and not layout.guards_match(weights):
            # Not a change by itself: backward may run under autocast, or after a weight was frozen.
            changed |= not layout.same_memory(weights)
            layout = None
        for i, shard, facts in self._shards:
            now = local_shard(weights[i])
            changed |= shard() is now and _facts([now], None) != facts
        if changed:
            raise RuntimeError(
                "one of the weights needed for the gradient of the elastic penalty was modified by an in-place "
                "operation, or given other .data, between forward and backward; call backward before optimizer.step(), "
                "or compute the penalty again"
            )
        return layout


def _facts(weights: Sequence[Tensor], layout: Layout | None) -> list[object]:
    try:
        if layout is not None:
            return list(map(_VERSION, weights))
        return [*map(_VERSION, weights), *map(Tensor.data_ptr, weights), *map(_SHAPE, weights)]
    except RuntimeError:  # an inference tensor, a DTensor
        return [(0 if w.is_inference() else w._version, 0 if is_dtensor(w) else w.data_ptr(), w.shape) for w in weights]
