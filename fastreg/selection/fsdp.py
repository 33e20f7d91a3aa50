"""Modules whose weights FSDP hides: FSDP1 always, FSDP2 between forward and backward."""

import sys
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fastreg.core.dtensor import is_dtensor
from fastreg.core.torch_private import shown_by_fsdp


def gathered_by_fsdp(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of parameters that FSDP2 shows in place of its sharded ones between forward and backward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    gathered: set[int] = set()
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            shown = shown_by_fsdp(module)
            if shown is None:
                # FSDP2 may ignore some of these parameters. An error for them is better than a wrong penalty.
                shown = [p for p in module.parameters() if not is_dtensor(p)]
            gathered.update(map(id, shown))
    return gathered


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let every FSDP2 module show its sharded parameters again.

    FSDP2 keeps the parameters of its root gathered after a forward pass without backward, as in evaluation.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in modules:
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether `module` is wrapped by the older FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def check_fsdp(names: Sequence[str], weights: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """Raise TypeError for modules wrapped by FSDP1, and RuntimeError for weights that FSDP2 has gathered."""
    if any(map(is_fsdp1, modules)):
        raise TypeError(
            "params is wrapped by FullyShardedDataParallel, whose flattened shards hide which weight is which; shard "
            "it with torch.distributed.fsdp.fully_shard instead, or train with an optimizer of fastreg.optim"
        )
    gathered = gathered_by_fsdp(modules)
    for name, w in zip(names, weights, strict=True) if gathered else ():
        if id(w) in gathered:
            raise RuntimeError(
                f"parameter {name!r} is gathered by FSDP, as between forward and backward; call this "
                "before the forward pass, or after backward as attach() does, or shard with "
                "reshard_after_forward=True; after a forward pass without backward, call model.reshard() first"
            )
