"""Detect weights that were changed between forward and backward."""

import operator
import weakref
from collections.abc import Sequence

from torch import Tensor

from fastreg.core.dtensor import is_dtensor, local_shard
from fastreg.core.layout import Layout
from fastreg.core.torch_private import version

_SHAPE = operator.attrgetter("shape")


class WeightState:
    """The address, shape and version counter of each weight.

    A DTensor is compared by its shard. A new shard object is no change: FSDP2 replaces shards.
    """

    def __init__(self, weights: Sequence[Tensor], is_sharded: bool, layout: Layout | None) -> None:
        """Record the state. If the weights' `layout` is known, record versions only."""
        self._layout = None if is_sharded else layout
        self._facts = _facts(weights, self._layout)
        shards = [(i, local_shard(w)) for i, w in enumerate(weights) if is_dtensor(w)] if is_sharded else ()
        self._shards = [(i, weakref.ref(shard), _facts([shard], None)) for i, shard in shards]

    def check(self, weights: Sequence[Tensor]) -> Layout | None:
        """Return the layout of the weights if it is known and still valid.

        Raise RuntimeError if a weight was changed after the forward pass, in place or by assigning `.data`.
        """
        layout = self._layout
        changed = _facts(weights, layout) != self._facts
        if layout is not None and not layout.guards_match(weights):
            # Guards also fail without a change: under autocast, or after a weight was frozen.
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
            return list(map(version, weights))
        return [*map(version, weights), *map(Tensor.data_ptr, weights), *map(_SHAPE, weights)]
    except RuntimeError:  # an inference tensor has no version, and a DTensor has no address
        return [(0 if w.is_inference() else version(w), 0 if is_dtensor(w) else w.data_ptr(), w.shape) for w in weights]
