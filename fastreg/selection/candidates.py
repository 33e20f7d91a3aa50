"""The tensors in `params`, and a check whether its modules still contain the same tensors."""

import operator
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from torch import Tensor, nn

from fastreg.core.torch_private import module_contents


class HeldCandidates:
    """Strong references to tensors and to the contents of modules."""

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        self.tensors = tensors
        self._contents = module_contents(modules)
        self._sizes = list(map(len, self._contents))
        self._filled = [each for each in self._contents if each]
        self._values = list(_values(self._filled))

    def now(self, params: Any) -> Sequence[Tensor] | None:
        """Return the tensors, or None if the parameters or submodules of a module changed. `params` is not read."""
        same = list(map(len, self._contents)) == self._sizes and all(
            map(operator.is_, _values(self._filled), self._values)
        )
        return self.tensors if same else None


class RememberedCandidates:
    """Weak references and ids only. An id may be reused, so `Selection` compares the rest."""

    def __init__(self, modules: Sequence[nn.Module], ids: list[int], places: list[int]) -> None:
        self._modules = list(map(weakref.ref, modules))
        self._ids = ids
        self._places = places

    def now(self, params: Any) -> Sequence[Tensor] | None:
        """Return the tensors in `params`, a list of tensors or the same module, or None if a module changed."""
        if not self._modules:
            return list(params)  # a copy: the caller may change the list before backward
        modules: list[Any] = [reference() for reference in self._modules]
        if modules[0] is not params or any(map(operator.is_, modules, repeat(None))):
            return None
        values = list(_values(module_contents(modules)))
        return list(map(values.__getitem__, self._places)) if list(map(id, values)) == self._ids else None


def remembered_candidates(
    params: Any, tensors: Sequence[Tensor], modules: Sequence[nn.Module]
) -> RememberedCandidates | None:
    """Return weak references to `params`, or None if it is neither a list of tensors nor a module of the usual kind."""
    if not isinstance(params, nn.Module):
        just_tensors = len(tensors) == len(params) and all(map(operator.is_, tensors, params))
        return RememberedCandidates([], [], []) if just_tensors else None
    ids = list(map(id, _values(module_contents(modules))))
    place = {each: i for i, each in enumerate(ids)}
    own = type(params)
    is_usual = own.named_parameters is nn.Module.named_parameters and own.named_modules is nn.Module.named_modules
    if not is_usual or not all(id(t) in place for t in tensors):
        return None
    return RememberedCandidates(modules, ids, [place[id(t)] for t in tensors])


def _values(contents: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable([each.values() for each in contents])  # not always dicts: see `module_contents`
