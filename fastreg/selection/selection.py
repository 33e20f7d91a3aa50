"""From what a user passes to the weights that count, and whether they are still the same."""

import copy
import threading
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.core.checks import Impl, check_impl, check_kinds, check_reduce
from fastreg.core.dtensor import any_dtensor
from fastreg.core.layout import Layout, find_layout
from fastreg.core.penalty import BasePenalty
from fastreg.core.strengths import check_device, penalty_of_groups
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Groups, Work
from fastreg.selection.candidates import HeldCandidates, remembered_candidates
from fastreg.selection.filters import Filter, bias_and_norm, filtered
from fastreg.selection.fsdp import check_fsdp
from fastreg.selection.params import Candidate, OwnStrengths, collect


class Selection:
    """Which of the tensors in `params` count, with their names and the strengths of their groups."""

    def __init__(self, params: Any, penalty: type[BasePenalty], include: Filter, exclude: Filter) -> None:
        candidates, own_strengths, self._modules = collect(params, penalty.NAMES)
        chosen = filtered(candidates, _trainable(candidates), include, exclude, self._modules)
        self.names = [c.name for c in chosen]
        weights = [c.tensor for c in chosen]
        check_kinds(self.names, weights)
        check_fsdp(self.names, weights, self._modules)
        # Groups that bring no strengths are one. Those that do are not compared: two that become equal would otherwise
        # make another number of groups.
        keys = [c.group if any(s is not None for s in own_strengths[c.group]) else None for c in chosen]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups: Groups = [index_of[key] for key in keys]
        # None for the group of those that bring none.
        self._own_strengths: list[OwnStrengths | None] = [
            None if key is None else own_strengths[key] for key in index_of
        ]
        tensors = [c.tensor for c in candidates]
        self.candidates: Any = HeldCandidates(tensors, self._modules)
        chosen_tensors = set(weights)  # by identity, as tensors are hashed
        self._is_chosen = [each in chosen_tensors for each in tensors]
        self._all_chosen = all(self._is_chosen)
        self._traits_of_all = _traits(tensors)
        self._are_leaves: bool | None = all([w.is_leaf for w in weights])
        self._is_sharded = any_dtensor(weights)
        # Of the last call's weights. Threads may call in different modes; each finds a layout of the same memory.
        self.layout: Layout | None = None

    @property
    def weights(self) -> Sequence[Tensor]:
        """The tensors that count, of a selection that holds them."""
        return self._chosen(self.candidates.tensors)

    def remembered(self, params: Any) -> "Selection | None":
        """The same without holding any tensor or module, if there is a way to find them again."""
        candidates = remembered_candidates(params, self.candidates.tensors, self._modules)
        if candidates is None:
            return None
        twin = copy.copy(self)
        twin.candidates, twin._modules, twin._are_leaves = candidates, [], None
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layout": None}  # whose guards cannot be pickled

    def current(self, params: Any, is_traced: bool) -> Sequence[Tensor] | None:
        """The candidates, or None where one was frozen, thawed, converted or replaced since, or a module.

        Where a compiler or a transform looks on, weights have no memory to be asked for, and no layout.
        """
        tensors: Sequence[Tensor] | None = self.candidates.now(params)
        if tensors is None:
            return None
        if is_traced:
            return tensors if _traits(tensors) == self._traits_of_all else None
        weights = self._chosen(tensors)
        if self.layout is not None and self.layout.guards_match(weights):
            # Which answers for the weights; there may be others.
            same = self._all_chosen or _traits(tensors) == self._traits_of_all
        else:
            same = _traits(tensors) == self._traits_of_all
            self.layout = find_layout(weights, self.groups) if same and not self._is_sharded else None
        return tensors if same else None

    def work_can_be_kept(self, penalty: BasePenalty) -> bool:
        """Whether `work` can be kept: its strengths are then not new tensors made from those that were passed."""
        strengths = chain(penalty.strengths, *filter(None, self._own_strengths))  # type: ignore[arg-type]
        return len(self._own_strengths) == 1 or not any(isinstance(s, torch.Tensor) for s in strengths)

    def work(
        self,
        tensors: Sequence[Tensor],
        penalty: BasePenalty,
        impl: str | None,
        all_reduce: bool = True,
        *,
        is_traced: bool = False,
    ) -> Work:
        """The weights among the candidates. Groups without strengths of their own take those of `penalty`."""
        weights = self._chosen(tensors)
        n_groups, device = len(self._own_strengths), weights[0].device
        if self._own_strengths == [None]:
            check_device(penalty, device)
        else:
            rows = [
                [p if s is None else s for p, s in zip(penalty.strengths, own or penalty.strengths, strict=True)]
                for own in self._own_strengths
            ]
            penalty = penalty_of_groups(type(penalty), rows, device)
        is_attached, layout = False, None if is_traced else self.layout
        return Work(
            self.names, weights, self.groups, n_groups, penalty, impl,
            self._is_sharded, is_traced, all_reduce, is_attached, self._are_leaves, layout,
        )  # fmt: skip

    def _chosen(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self._all_chosen else list(compress(tensors, self._is_chosen))


def _traits(tensors: Sequence[Tensor]) -> tuple[list[bool], list[type], list[int]]:
    # The dimensions are what `bias_and_norm` goes by.
    return [t.requires_grad for t in tensors], list(map(type, tensors)), [t.ndim for t in tensors]


# What single calls have selected, for the next one; it keeps no tensor alive.
_REMEMBERED: dict[Hashable, Selection] = {}
MOST_REMEMBERED = 64
_REMEMBERING = threading.Lock()


def select(
    params: Any, penalty: BasePenalty, include: Filter, exclude: Filter, impl: Impl, all_reduce: bool = True
) -> Work:
    """The work of a single call, with every argument checked; the strengths have been checked."""
    check_impl(impl)
    check_reduce(all_reduce)
    if torch.compiler.is_compiling() or is_transformed():
        selection = Selection(params, type(penalty), include, exclude)
        return selection.work(selection.candidates.tensors, penalty, impl, all_reduce, is_traced=True)
    if not isinstance(params, (nn.Module, list)) and isinstance(params, Iterator):
        params = list(params)
    # With other filters all would have to be compared that they may go by: names, classes, what a callable looks at.
    key: Hashable = None
    if include is None and (exclude is None or exclude is bias_and_norm):
        if isinstance(params, nn.Module):
            key = type(penalty), exclude, id(params)
        elif isinstance(params, (list, tuple)):
            key = type(penalty), exclude, *map(id, params)
    remembered = None if key is None else _REMEMBERED.get(key)
    if remembered is not None:
        tensors = remembered.current(params, is_traced=False)
        if tensors is not None:
            return remembered.work(tensors, penalty, impl, all_reduce)
    selection = Selection(params, type(penalty), include, exclude)
    to_remember = None if key is None else selection.remembered(params)
    if to_remember is not None:
        with _REMEMBERING:
            while len(_REMEMBERED) >= MOST_REMEMBERED and key not in _REMEMBERED:
                del _REMEMBERED[next(iter(_REMEMBERED))]
            _REMEMBERED[key] = to_remember
    return selection.work(selection.candidates.tensors, penalty, impl, all_reduce)


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
