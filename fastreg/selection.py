"""From what a user passes to the weights that count, and whether they are still the same."""

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from fastreg.collect import Candidate, OwnStrengths, collect
from fastreg.dtensor import any_dtensor, gathered_by_fsdp, is_fsdp1
from fastreg.filters import Filter, filtered
from fastreg.kinds import check_kinds
from fastreg.strengths import Strength, Strengths, check_strength, per_group
from fastreg.work import Work

Impl: TypeAlias = Literal["triton", "torch"] | None


class Selection:
    """The weights that count, with their names and the strengths of their groups."""

    def __init__(self, params: Any, include: Filter, exclude: Filter) -> None:
        candidates, own_strengths, modules = collect(params)
        # What is in each module, to notice when that changes.
        self._module_dicts: list[dict[str, Any]] = [
            contained for module in modules for contained in (module._parameters, module._modules)
        ]
        self._dict_sizes = list(map(len, self._module_dicts))
        self._filled_dicts = [contained for contained in self._module_dicts if contained]
        self._dict_values = list(chain.from_iterable([contained.values() for contained in self._filled_dicts]))
        self._tensors = [c.tensor for c in candidates]
        self._requires_grad = [t.requires_grad for t in self._tensors]
        self._types = list(map(type, self._tensors))
        chosen = filtered(candidates, _trainable(candidates), include, exclude, modules)
        self.names = [c.name for c in chosen]
        self.weights = [c.tensor for c in chosen]
        check_kinds(self.names, self.weights)
        _check_fsdp(chosen, modules)
        # Groups that bring no strengths are one. Those that do are not compared: two that become equal would otherwise
        # make another number of groups, for which kernels are compiled again.
        keys = [c.group if any(s is not None for s in own_strengths[c.group]) else None for c in chosen]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups = [index_of[key] for key in keys]
        self._own_strengths: list[OwnStrengths] = [
            (None, None) if key is None else own_strengths[key] for key in index_of
        ]

    def is_current(self) -> bool:
        """Whether no weight was frozen, thawed or replaced since, and no module."""
        # This runs at every call, over hundreds of modules: each question is one pass.
        contained = chain.from_iterable([contained.values() for contained in self._filled_dicts])
        return (
            [t.requires_grad for t in self._tensors] == self._requires_grad
            and list(map(type, self._tensors)) == self._types
            and list(map(len, self._module_dicts)) == self._dict_sizes
            and all(map(operator.is_, contained, self._dict_values))
        )

    def work_can_be_kept(self, l1: Strength, l2: Strength) -> bool:
        """Whether `work` may be kept: its strengths are then not new tensors made of those that were passed."""
        strengths = [l1, l2, *chain.from_iterable(self._own_strengths)]
        return len(self._own_strengths) == 1 or not any(isinstance(s, torch.Tensor) for s in strengths)

    def work(self, l1: Strength, l2: Strength, impl: str | None, all_reduce: bool = True) -> Work:
        """The weights with their groups' own strengths, or `l1` and `l2` where a group has none."""
        device = self.weights[0].device
        strengths = Strengths(
            per_group([l1 if own[0] is None else own[0] for own in self._own_strengths], device, "l1"),
            per_group([l2 if own[1] is None else own[1] for own in self._own_strengths], device, "l2"),
        )
        n_groups, is_sharded = len(self._own_strengths), any_dtensor(self.weights)
        return Work(self.names, self.weights, self.groups, n_groups, strengths, impl, is_sharded, all_reduce)


def select(
    params: Any, l1: Strength, l2: Strength, include: Filter, exclude: Filter, impl: Impl, all_reduce: bool = True
) -> Work:
    """The work of a single call, with every argument checked."""
    check_impl(impl)
    check_reduce(all_reduce)
    l1, l2 = check_strength(l1, "l1"), check_strength(l2, "l2")
    return Selection(params, include, exclude).work(l1, l2, impl, all_reduce)


def check_impl(impl: object) -> None:
    """Raises ValueError where `impl` names no implementation."""
    if impl not in (None, "triton", "torch"):
        raise ValueError(f'impl must be "triton", "torch" or None, got {impl!r}')


def check_reduce(reduce: object) -> None:
    """Raises TypeError where `reduce` is not a bool: it does not name a reduction, as in a loss of torch.nn."""
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be True (sum over ranks) or False, got {reduce!r}")


def _trainable(candidates: list[Candidate]) -> list[bool]:
    """Whether each candidate is trained, and so counts unless it is filtered out."""
    # Tensors without gradients count only where nothing else is there: then they are data, not frozen weights.
    plain = not any(c.tensor.requires_grad or isinstance(c.tensor, nn.Parameter) for c in candidates)
    trainable = [plain or c.tensor.requires_grad for c in candidates]
    if not candidates:
        raise ValueError("nothing selected: params holds no tensors")
    if not any(trainable):
        raise ValueError(f"nothing selected: all {len(candidates)} parameters are frozen (requires_grad=False)")
    return trainable


def _check_fsdp(chosen: list[Candidate], modules: Iterable[nn.Module]) -> None:
    if any(map(is_fsdp1, modules)):
        raise TypeError(
            "params is wrapped by FullyShardedDataParallel, whose flattened shards hide which weight is which; shard "
            "it with torch.distributed.fsdp.fully_shard instead"
        )
    gathered = gathered_by_fsdp(modules)
    for c in chosen if gathered else []:
        if id(c.tensor) in gathered:
            raise RuntimeError(
                f"parameter {c.name!r} is gathered by FSDP at this moment, as between forward and backward; call this "
                "before the forward pass, or after backward as attach() does, or shard with "
                "reshard_after_forward=True; after a forward pass without backward, call model.reshard() first"
            )
