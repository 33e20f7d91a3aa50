"""`include` and `exclude`: regular expressions, predicates and module classes."""

import difflib
import inspect
import itertools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.core.checks import warn_user
from fastreg.core.torch_private import module_contents
from fastreg.selection.params import Candidate

Predicate: TypeAlias = Callable[[str, Tensor], bool]
Modules: TypeAlias = Sequence[nn.Module]
Filter: TypeAlias = str | re.Pattern[str] | Predicate | type[nn.Module] | tuple[type[nn.Module], ...] | None


def bias_and_norm(name: str, param: Tensor) -> bool:
    """True for biases and the weights of normalisation layers: parameters with fewer than two dimensions.

    Meant for `exclude=`; weights of that shape are usually not regularised.
    """
    return param.ndim < 2


def filtered(
    candidates: Sequence[Candidate], trainable: list[bool], include: Filter, exclude: Filter, modules: Modules
) -> list[Candidate]:
    """The trainable candidates that `include` matches and `exclude` does not.

    Raises ValueError where `include` matches nothing or nothing is left, and warns where `exclude` matches nothing.
    """
    included = list(map(operator.and_, trainable, matches(include, True, candidates, modules)))
    if include is not None and not any(included):
        raise ValueError(f"nothing selected: {_nothing_matched('include', include, candidates, trainable)}")
    excluded = matches(exclude, False, candidates, modules)
    # `bias_and_norm` is a rule for every model, and may find nothing in this one; all else is likely a mistake.
    if exclude not in (None, bias_and_norm) and not any(excluded) and not torch.compiler.is_compiling():
        warn_user(_nothing_matched("exclude", exclude, candidates, trainable))
    chosen = list(itertools.compress(candidates, map(operator.gt, included, excluded)))
    if not chosen:
        raise ValueError(
            f"nothing selected: include and exclude leave none of {sum(trainable)} trainable parameters, such as "
            f"{candidates[trainable.index(True)].name!r}"
        )
    return chosen


def matches(pattern: Filter, is_include: bool, candidates: Sequence[Candidate], modules: Modules) -> list[bool]:
    """Which candidates a filter matches; one of None includes all and excludes none."""
    if pattern is None:
        return [is_include] * len(candidates)
    predicate = _predicate(pattern, "include" if is_include else "exclude", modules)
    return [bool(predicate(c.name, c.tensor)) for c in candidates]


def check_filter(pattern: Any, which: str) -> None:
    """Raises TypeError or ValueError for what can be no filter, whatever the parameters."""
    if pattern is None or _are_module_classes(pattern):
        return
    if isinstance(pattern, str) or (isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{which} is not a valid regular expression: {pattern!r}: {error}") from error
        return
    if isinstance(pattern, (nn.Module, type)) or not callable(pattern):
        raise TypeError(
            f"{which} must be a regular expression, a callable (name, param) -> bool, a class of modules or a tuple of "
            f"such classes, got {pattern!r}"
        )
    try:
        if not torch.compiler.is_compiling():
            inspect.signature(pattern).bind("", None)
    except TypeError as error:
        raise TypeError(f"{which} is called with two arguments, (name, param), which it does not take") from error
    except ValueError:  # of some functions written in C nothing is known
        pass


def _are_module_classes(pattern: Any) -> bool:
    classes = pattern if isinstance(pattern, tuple) else (pattern,)
    return bool(classes) and all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes)


def _predicate(pattern: Any, which: str, modules: Modules) -> Predicate:
    check_filter(pattern, which)
    if _are_module_classes(pattern):
        if not modules:
            raise ValueError(
                f"{which} selects by the module that owns a parameter, but params holds no module; pass it"
            )
        owners = [m for m in modules if isinstance(m, pattern)]
        parameters = module_contents(owners)[::2]
        owned = dict.fromkeys(p for each in parameters for p in each.values())  # by identity, as tensors are hashed
        return lambda name, param: param in owned
    if isinstance(pattern, (str, re.Pattern)):
        search = re.compile(pattern).search
        return lambda name, param: search(name) is not None
    predicate: Predicate = pattern
    return predicate


def _nothing_matched(which: str, pattern: Any, candidates: Sequence[Candidate], trainable: list[bool]) -> str:
    """What is wrong, with the names that come nearest to a regular expression."""
    names = [c.name for c in itertools.compress(candidates, trainable)]
    if isinstance(pattern, (str, re.Pattern)):
        shown = repr(pattern if isinstance(pattern, str) else pattern.pattern)
        # A regular expression may stand for a part of a name, and often does.
        name_of = {part: name for name in reversed(names) for part in (name, *name.split("."))}
        near = difflib.get_close_matches(shown.strip("'"), name_of, 3, 0.5)
        examples = list(dict.fromkeys(name_of[part] for part in near))
        hint = f"did you mean {' or '.join(map(repr, examples))}?" if near else f"its names are like {names[0]!r}"
        if pattern == bias_and_norm.__name__:
            hint = "did you mean fastreg.bias_and_norm, without quotes?"
    else:
        shown = getattr(pattern, "__name__", None) or repr(pattern)
        hint = f"their names are like {names[0]!r}"
    return f"{which}={shown} matches none of {len(names)} trainable parameters; {hint}"
