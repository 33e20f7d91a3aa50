"""Which weights to penalize, and whether an earlier selection is still valid."""

import copy
import threading
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.core.checks import Impl, check_impl, check_reduce, check_tensors, warn_of_overlap
from fastreg.core.dtensor import any_dtensor
from fastreg.core.layout import Layout, find_layout
from fastreg.core.penalty import BasePenalty
from fastreg.core.strengths import check_device, penalty_of_groups
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Groups, Work
from fastreg.selection.candidates import HeldCandidates, remembered_candidates
from fastreg.selection.filters import Filter, bias_and_norm, filtered
from fastreg.selection.fsdp import check_fsdp, reshard
from fastreg.selection.params import Candidate, OwnStrengths, collect, warn_of_state_dicts


class Selection:
    """The tensors in `params` that count, with their names and the strengths of their groups.

    If `is_penalized` is False, only their values are of interest: `params` may be a state dict.
    """

    def __init__(
        self, params: Any, penalty: type[BasePenalty], include: Filter, exclude: Filter, *, is_penalized: bool = True
    ) -> None:
        if is_penalized and not torch.compiler.is_compiling():
            warn_of_state_dicts(params)
        candidates, own_strengths, self._modules = collect(params, penalty.NAMES)
        chosen = filtered(candidates, _trainable(candidates), include, exclude, self._modules)
        self.names = [c.name for c in chosen]
        weights = [c.tensor for c in chosen]
        check_tensors(self.names, weights)
        check_fsdp(self.names, weights, self._modules)
        # Groups without strengths form one strength group. Groups with strengths stay separate even if these are equal:
        # the number of strength groups must not change with values.
        keys = [c.group if any(s is not None for s in own_strengths[c.group]) else None for c in chosen]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups: Groups = [index_of[key] for key in keys]
        # None for the group without strengths.
        self._own_strengths: list[OwnStrengths | None] = [
            None if key is None else own_strengths[key] for key in index_of
        ]
        tensors = [c.tensor for c in candidates]
        self.candidates: Any = HeldCandidates(tensors, self._modules)
        chosen_tensors = set(weights)  # tensors hash by identity
        self._is_chosen = [each in chosen_tensors for each in tensors]
        self._all_chosen = all(self._is_chosen)
        self._traits_of_all = _traits(tensors)
        self._are_leaves: bool | None = all([w.is_leaf for w in weights])
        self._is_sharded = any_dtensor(weights)
        # The last call's layout. A thread in inference mode or autocast may replace it by one for the same memory.
        self.layout: Layout | None = None
        self._addresses: list[int] | None = None  # of the plain weights that were last compared with each other
        if not torch.compiler.is_compiling() and not is_transformed():
            self._compare_memory(weights)

    @property
    def weights(self) -> Sequence[Tensor]:
        """The tensors that count. The selection must hold its tensors."""
        return self._chosen(self.candidates.tensors)

    def remembered(self, params: Any) -> "Selection | None":
        """Return a copy that keeps no tensor or module alive, or None if it could not find them again."""
        candidates = remembered_candidates(params, self.candidates.tensors, self._modules)
        if candidates is None:
            return None
        twin = copy.copy(self)
        twin.candidates, twin._modules, twin._are_leaves = candidates, [], None
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layout": None}  # guards cannot be pickled

    def current(self, params: Any, is_traced: bool) -> Sequence[Tensor] | None:
        """Return the candidates, or None if one of them or a module was frozen, thawed, converted or replaced.

        If `is_traced`, the tensors have no addresses, so no layout is looked up.
        """
        tensors: Sequence[Tensor] | None = self.candidates.now(params)
        if tensors is None:
            return None
        if is_traced:
            return tensors if _traits(tensors) == self._traits_of_all else None
        weights = self._chosen(tensors)
        if self.layout is not None and self.layout.guards_match(weights):
            # The guards cover the chosen candidates only.
            same = self._all_chosen or _traits(tensors) == self._traits_of_all
        else:
            same = _traits(tensors) == self._traits_of_all
            self.layout = find_layout(weights, self.groups) if same and not self._is_sharded else None
            # A layout that another call has cached may be of memory that is new to this selection.
            if same and not self._is_sharded and (self.layout is None or self.layout.overlap is not None):
                self._compare_memory(weights)
        return tensors if same else None

    def reshard(self) -> None:
        """Let FSDP2 show its sharded parameters again."""
        reshard(self._modules)

    def _compare_memory(self, weights: Sequence[Tensor]) -> None:
        """Warn, once for the same memory, if two weights share some."""
        addresses = [] if self._is_sharded else list(map(Tensor.data_ptr, weights))
        if addresses != self._addresses:
            self._addresses = addresses
            warn_of_overlap(self.names, weights)

    def work_can_be_kept(self, penalty: BasePenalty) -> bool:
        """Return whether `work` may be cached: not if it combines the user's tensors into new ones at each call."""
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
        """Return the chosen candidates as a Work. Groups without their own strengths take those of `penalty`."""
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
    # `bias_and_norm` depends on ndim.
    return [t.requires_grad for t in tensors], list(map(type, tensors)), [t.ndim for t in tensors]


# Cache of the selections of single calls. It keeps no tensor alive.
_REMEMBERED: dict[Hashable, Selection] = {}
MOST_REMEMBERED = 64
_REMEMBERING = threading.Lock()


def select(
    params: Any,
    penalty: BasePenalty,
    include: Filter,
    exclude: Filter,
    impl: Impl,
    all_reduce: bool = True,
    *,
    is_penalized: bool = True,
) -> Work:
    """Return the work of a single call. Check all arguments except the strengths, which the caller has checked."""
    check_impl(impl)
    check_reduce(all_reduce)
    if torch.compiler.is_compiling() or is_transformed():
        selection = Selection(params, type(penalty), include, exclude, is_penalized=is_penalized)
        return selection.work(selection.candidates.tensors, penalty, impl, all_reduce, is_traced=True)
    if not isinstance(params, (nn.Module, list)) and isinstance(params, Iterator):
        params = list(params)
    # Other filters may depend on names, classes or anything that a callable reads, so their results are not cached.
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
    selection = Selection(params, type(penalty), include, exclude, is_penalized=is_penalized)
    to_remember = None if key is None else selection.remembered(params)
    if to_remember is not None:
        with _REMEMBERING:
            while len(_REMEMBERED) >= MOST_REMEMBERED and key not in _REMEMBERED:
                del _REMEMBERED[next(iter(_REMEMBERED))]
            _REMEMBERED[key] = to_remember
    return selection.work(selection.candidates.tensors, penalty, impl, all_reduce)


def _trainable(candidates: list[Candidate]) -> list[bool]:
    """Return whether each candidate counts, unless a filter leaves it out."""
    # If no candidate is a parameter or requires a gradient, all are data rather than frozen weights, and all count.
    plain = not any(c.tensor.requires_grad or isinstance(c.tensor, nn.Parameter) for c in candidates)
    trainable = [plain or c.tensor.requires_grad for c in candidates]
    if not candidates:
        raise ValueError("nothing selected: params holds no tensors")
    if not any(trainable):
        raise ValueError(f"nothing selected: all {len(candidates)} parameters are frozen (requires_grad=False)")
    return trainable
