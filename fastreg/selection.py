"""From what a user passes to the weights that count, and whether they are still the same."""

import copy
import operator
import re
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, compress
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.collect import Candidate, OwnStrengths, collect
from fastreg.dtensor import any_dtensor, gathered_by_fsdp, is_fsdp1
from fastreg.filters import Filter, bias_and_norm, filtered
from fastreg.kinds import check_kinds
from fastreg.layout import Layout, find_layout
from fastreg.strengths import Strength, Strengths, check_strength, per_group
from fastreg.work import Work

Impl: TypeAlias = Literal["triton", "torch"] | None


class HeldCandidates:
    """Keeps tensors, and what is in their modules, alive."""

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        self.tensors = tensors
        self._contents = _contents(modules)
        self._sizes = list(map(len, self._contents))
        self._filled = [each for each in self._contents if each]
        self._values = list(_values(self._filled))

    def now(self, params: Any = None) -> Sequence[Tensor] | None:
        """The same tensors, or None where a module has others or other modules in it."""
        same = list(map(len, self._contents)) == self._sizes and all(
            map(operator.is_, _values(self._filled), self._values)
        )
        return self.tensors if same else None


class RememberedCandidates:
    """Keeps nothing alive. Tensors that merely look the same may be taken for the same ones: they would do as well."""

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        self._modules = list(map(weakref.ref, modules))
        values = list(_values(_contents(modules)))
        self._ids = list(map(id, values))
        place = {each: i for i, each in enumerate(self._ids)}
        self._places = [place[id(t)] for t in tensors] if modules else []

    def now(self, params: Any) -> Sequence[Tensor] | None:
        """The tensors in `params`, a list of them or the same module, or None where modules have changed."""
        if not self._modules:
            return params  # type: ignore[no-any-return]
        modules: list[Any] = [reference() for reference in self._modules]
        if modules[0] is not params or None in modules:
            return None
        values = list(_values(_contents(modules)))
        return list(map(values.__getitem__, self._places)) if list(map(id, values)) == self._ids else None


def _contents(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    return [contained for module in modules for contained in (module._parameters, module._modules)]


def _values(contents: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, contents))


class Selection:
    """Which of the tensors in `params` count, with their names and the strengths of their groups."""

    def __init__(self, params: Any, include: Filter, exclude: Filter) -> None:
        found, own_strengths, self._modules = collect(params)
        chosen = filtered(found, _trainable(found), include, exclude, self._modules)
        self.names = [c.name for c in chosen]
        weights = [c.tensor for c in chosen]
        check_kinds(self.names, weights)
        _check_fsdp(chosen, self._modules)
        # Groups that bring no strengths are one. Those that do are not compared: two that become equal would otherwise
        # make another number of groups.
        keys = [c.group if any(s is not None for s in own_strengths[c.group]) else None for c in chosen]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups = [index_of[key] for key in keys]
        self._own_strengths: list[OwnStrengths] = [
            (None, None) if key is None else own_strengths[key] for key in index_of
        ]
        tensors = [c.tensor for c in found]
        self.candidates: Any = HeldCandidates(tensors, self._modules)
        self._is_chosen = [each in set(weights) for each in tensors]
        self._all_chosen = all(self._is_chosen)
        self._kinds_of_all = _kinds(tensors)
        self._are_leaves: bool | None = all([w.is_leaf for w in weights])
        self._is_sharded = any_dtensor(weights)
        # Of the weights at the last call. Threads may call in different modes; each finds a layout of the same memory.
        self.layout: Layout | None = None

    @property
    def weights(self) -> Sequence[Tensor]:
        """The tensors that count, of a selection that holds them."""
        return self._chosen(self.candidates.tensors)

    def remembered(self) -> "Selection":
        """The same without holding any tensor or module; its candidates are to be asked with the params."""
        twin = copy.copy(self)
        twin.candidates = RememberedCandidates(self.candidates.tensors, self._modules)
        twin._modules, twin._are_leaves = [], None
        return twin

    def can_be_remembered(self, params: Any) -> bool:
        """Whether the candidates are those of a module, or just the tensors of a list."""
        tensors = self.candidates.tensors
        return isinstance(params, nn.Module) or (
            len(tensors) == len(params) and all(map(operator.is_, tensors, params))
        )

    def current(self, params: Any, is_compiling: bool) -> Sequence[Tensor] | None:
        """The candidates, or None where one was frozen, thawed or replaced since, or a module."""
        tensors: Sequence[Tensor] | None = self.candidates.now(params)
        if tensors is None:
            return None
        if is_compiling:
            return tensors if _kinds(tensors) == self._kinds_of_all else None
        weights = self._chosen(tensors)
        if self.layout is not None and self.layout.holds(weights):
            # Which answers for the weights; there may be others.
            same = self._all_chosen or _kinds(tensors) == self._kinds_of_all
        else:
            same = _kinds(tensors) == self._kinds_of_all
            self.layout = find_layout(weights, self.groups) if same and not self._is_sharded else None
        return tensors if same else None

    def work_can_be_kept(self, l1: Strength, l2: Strength) -> bool:
        """Whether `work` may be kept: its strengths are then not new tensors made of those that were passed."""
        strengths = [l1, l2, *chain.from_iterable(self._own_strengths)]
        return len(self._own_strengths) == 1 or not any(isinstance(s, torch.Tensor) for s in strengths)

    def work(
        self, tensors: Sequence[Tensor], l1: Strength, l2: Strength, impl: str | None, all_reduce: bool = True
    ) -> Work:
        """The weights among the candidates with their groups' own strengths, or `l1` and `l2` where one has none."""
        weights = self._chosen(tensors)
        n_groups = len(self._own_strengths)
        device = weights[0].device
        strengths = Strengths(
            per_group([l1 if own is None else own for own, _ in self._own_strengths], device, "l1"),
            per_group([l2 if own is None else own for _, own in self._own_strengths], device, "l2"),
        )
        layout = None if torch.compiler.is_compiling() else self.layout
        is_attached = False
        return Work(
            self.names, weights, self.groups, n_groups, strengths, impl,
            self._is_sharded, all_reduce, is_attached, self._are_leaves, layout,
        )  # fmt: skip

    def _chosen(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self._all_chosen else list(compress(tensors, self._is_chosen))


def _kinds(tensors: Sequence[Tensor]) -> tuple[list[bool], list[type]]:
    return [t.requires_grad for t in tensors], list(map(type, tensors))


# What single calls have selected, for the next one; it keeps no tensor alive.
_REMEMBERED: dict[Hashable, Selection] = {}
MOST_REMEMBERED = 64
_REMEMBERING = threading.Lock()


def select(
    params: Any, l1: Strength, l2: Strength, include: Filter, exclude: Filter, impl: Impl, all_reduce: bool = True
) -> Work:
    """The work of a single call, with every argument checked."""
    check_impl(impl)
    check_reduce(all_reduce)
    l1, l2 = check_strength(l1, "l1"), check_strength(l2, "l2")
    if torch.compiler.is_compiling():
        selection = Selection(params, include, exclude)
        return selection.work(selection.candidates.tensors, l1, l2, impl, all_reduce)
    if not isinstance(params, (nn.Module, list)) and isinstance(params, Iterator):
        params = list(params)
    key = _key(params, include, exclude)
    remembered = None if key is None else _REMEMBERED.get(key)
    if remembered is not None:
        tensors = remembered.current(params, is_compiling=False)
        if tensors is not None:
            return remembered.work(tensors, l1, l2, impl, all_reduce)
    selection = Selection(params, include, exclude)
    if key is not None and selection.can_be_remembered(params):
        with _REMEMBERING:
            while len(_REMEMBERED) >= MOST_REMEMBERED and key not in _REMEMBERED:
                del _REMEMBERED[next(iter(_REMEMBERED))]
            _REMEMBERED[key] = selection.remembered()
    return selection.work(selection.candidates.tensors, l1, l2, impl, all_reduce)


def _key(params: Any, include: Filter, exclude: Filter) -> Hashable:
    """Where to find a selection again, or None for one that has to be made anew."""
    # A callable may change its mind, and an exclude that matches nothing has to warn.
    if exclude not in (None, bias_and_norm) or not isinstance(include, (type(None), str, re.Pattern, type)):
        return None
    if isinstance(params, nn.Module):
        return id(params), include, exclude
    return (tuple(map(id, params)), include, exclude) if isinstance(params, (list, tuple)) else None


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
