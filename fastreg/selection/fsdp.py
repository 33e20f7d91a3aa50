"""Modules whose weights FSDP hides: the older one always, FSDP2 between forward and backward."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def gathered_by_fsdp(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of parameters that FSDP2 shows in place of its sharded ones between forward and backward.

    It has no public way of asking: where these names are missing in some version, none are found.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    found = set()
    owners: list[Any] = [module for module in modules if hasattr(module, "_get_fsdp_state")]
    for owner in owners:
        state = owner._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if group is None or getattr(group, "is_sharded", True):
                continue
            for param in group.fsdp_params:
                for name in ("_unsharded_param", "_sharded_post_forward_param"):
                    found.add(id(getattr(param, name, None)))
    return found


def is_fsdp1(module: nn.Module) -> bool:
    """Whether `module` is wrapped by the older FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def check_fsdp(names: Sequence[str], weights: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """Raises TypeError for modules wrapped by the older FSDP, RuntimeError for weights that FSDP2 shows gathered."""
    if any(map(is_fsdp1, modules)):
        raise TypeError(
            "params is wrapped by FullyShardedDataParallel, whose flattened shards hide which weight is which; shard "
            "it with torch.distributed.fsdp.fully_shard instead"
        )
    gathered = gathered_by_fsdp(modules)
    for name, w in zip(names, weights, strict=True) if gathered else ():
        if id(w) in gathered:
            raise RuntimeError(
                f"parameter {name!r} is gathered by FSDP at this moment, as between forward and backward; call this "
                "before the forward pass, or after backward as attach() does, or shard with "
                "reshard_after_forward=True; after a forward pass without backward, call model.reshard() first"
            )
