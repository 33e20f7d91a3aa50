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
    """Return True for biases and weights of normalization layers: parameters with fewer than two dimensions.

    Pass it as `exclude=bias_and_norm`. These parameters are usually not regularized.
    """
    return param.ndim < 2


def filtered(
    candidates: Sequence[Candidate], trainable: list[bool], include: Filter, exclude: Filter, modules: Modules
) -> list[Candidate]:
    """Return the trainable candidates that `include` matches and `exclude` does not.

    Raise ValueError if `include` matches nothing or nothing is left. Warn if `exclude` matches nothing.
    """
    matched = matches(include, True, candidates, modules)
    included = list(map(operator.and_, trainable, matched))
    if include is not None and not any(included):
        raise ValueError(f"nothing selected: {_nothing_matched('include', include, candidates, trainable)}")
    excluded = matches(exclude, False, candidates, modules)
    # `bias_and_norm` is a rule for every model, even without biases. Other filters that match nothing are likely wrong.
    if exclude not in (None, bias_and_norm) and not any(excluded) and not torch.compiler.is_compiling():
        warn_user(_nothing_matched("exclude", exclude, candidates, trainable))
    chosen = list(itertools.compress(candidates, map(operator.gt, included, excluded)))
    if not chosen:
        raise ValueError(
            f"nothing selected: include and exclude leave none of {sum(trainable)} trainable parameters, such as "
            f"{candidates[trainable.index(True)].name!r}"
        )
    if not all(trainable) and not torch.compiler.is_compiling():
        untrained = map(operator.gt, map(operator.gt, matched, excluded), trainable)
        _warn_of_tensors(list(itertools.compress(candidates, untrained)), modules)
    return chosen


def _warn_of_tensors(left_out: Sequence[Candidate], modules: Modules) -> None:
    """Warn of tensors that are left out, unlike frozen parameters and tensors that a module holds, by mistake."""
    tensors = [c for c in left_out if not isinstance(c.tensor, nn.Parameter)]
    held = {id(t) for each in module_contents(modules)[::2] for t in each.values()} if tensors else set()
    names = [c.name for c in tensors if id(c.tensor) not in held]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn_user(
            f"{names[0]!r}{others} requires no gradient, unlike other tensors in params, and does not count; pass the "
            "parameter itself, not its detach(), .data or entry of a state_dict()"
        )


def matches(pattern: Filter, is_include: bool, candidates: Sequence[Candidate], modules: Modules) -> list[bool]:
    """Return which candidates a filter matches. None includes all and excludes none."""
    if pattern is None:
        return [is_include] * len(candidates)
    predicate = _predicate(pattern, "include" if is_include else "exclude", modules)
    return [bool(predicate(c.name, c.tensor)) for c in candidates]


def check_filter(pattern: Any, which: str) -> None:
    """Raise TypeError or ValueError for an object that cannot be a filter."""
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
        raise TypeError(f"{which} is called with two arguments, (name, param), but does not accept them") from error
    except ValueError:  # some functions written in C have no signature
        pass


def _are_module_classes(pattern: Any) -> bool:
    classes = pattern if isinstance(pattern, tuple) else (pattern,)
    return bool(classes) and all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes)


def _predicate(pattern: Any, which: str, modules: Modules) -> Predicate:
    check_filter(pattern, which)
    if _are_module_classes(pattern):
        if not modules:
            raise ValueError(
                f"{which} selects by the module that owns a parameter, but params holds no module; pass the module"
            )
        owners = [m for m in modules if isinstance(m, pattern)]
        parameters = module_contents(owners)[::2]
        owned = dict.fromkeys(p for each in parameters for p in each.values())  # tensors hash by identity
        return lambda name, param: param in owned
    if isinstance(pattern, (str, re.Pattern)):
        search = re.compile(pattern).search
        return lambda name, param: search(name) is not None
    predicate: Predicate = pattern
    return predicate


def _nothing_matched(which: str, pattern: Any, candidates: Sequence[Candidate], trainable: list[bool]) -> str:
    """Return an error message with the names that are closest to a regular expression."""
    names = [c.name for c in itertools.compress(candidates, trainable)]
    if isinstance(pattern, (str, re.Pattern)):
        shown = repr(pattern if isinstance(pattern, str) else pattern.pattern)
        # A regular expression often is a part of a name.
        name_of = {part: name for name in reversed(names) for part in (name, *name.split("."))}
        near = difflib.get_close_matches(shown.strip("'"), name_of, 3, 0.5)
        examples = list(dict.fromkeys(name_of[part] for part in near))
        hint = f"did you mean {' or '.join(map(repr, examples))}?" if near else f"their names are like {names[0]!r}"
        if pattern == bias_and_norm.__name__:
            hint = "did you mean fastreg.bias_and_norm, without quotes?"
    else:
        shown = getattr(pattern, "__name__", None) or repr(pattern)
        hint = f"their names are like {names[0]!r}"
    return f"{which}={shown} matches none of {len(names)} trainable parameters; {hint}"
