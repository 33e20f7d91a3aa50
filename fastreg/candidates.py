"""The tensors that were passed as `params`, as they are at a later call: held, or only remembered.

Modules are asked for what they contain, since parameters and modules may be replaced at any time.
"""

import operator
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn


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
