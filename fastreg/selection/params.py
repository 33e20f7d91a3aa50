"""The tensors in `params`, each once, with their names and groups."""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from fastreg.core.checks import warn_user
from fastreg.core.penalty import Strength
from fastreg.core.strengths import check_strength
from fastreg.core.torch_private import is_state_dict

# Types of `params`: a module, a tensor, tensors with or without names, or groups as optimizers take them.
Params: TypeAlias = (
    nn.Module
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Mapping[str, Any]
    | Iterable[Mapping[str, Any]]
)
OwnStrengths: TypeAlias = tuple[Strength | None, ...]  # of a group; None means the call's strength


class Candidate(NamedTuple):
    """A tensor in `params`, before frozen and excluded tensors are left out."""

    name: str
    tensor: Tensor
    group: int


def copied(params: Any) -> Any:
    """Return `params` with copies of its lists, mappings and iterators, so that later changes have no effect."""
    if isinstance(params, (nn.Module, Tensor, str)) or not isinstance(params, Iterable):
        return params
    if is_state_dict(params):
        return copy.copy(params)
    if isinstance(params, Mapping):
        return {key: copied(value) if key == "params" else value for key, value in params.items()}
    return [copied(item) if isinstance(item, (Mapping, Iterator)) else item for item in params]


def collect(params: Any, names: Sequence[str]) -> tuple[list[Candidate], list[OwnStrengths], list[nn.Module]]:
    """Return the tensors in `params`, each group's strengths called `names`, and the modules that own the parameters.

    Raise ValueError or TypeError for anything that cannot be penalized. The message names the place in `params`.
    """
    if isinstance(params, Mapping) and _is_group(params, names):
        params = [params]
    if not isinstance(params, (nn.Module, Tensor, Mapping)):
        if isinstance(params, str) or not isinstance(params, Iterable):
            raise TypeError(
                "params must be an nn.Module, a tensor, an iterable of tensors or of (name, tensor) pairs, or a list "
                f"of group dicts, got {type(params).__name__}"
            )
        params = list(params)
    groups = params if isinstance(params, list) and any(isinstance(p, Mapping) for p in params) else None
    strengths: list[OwnStrengths] = []
    modules: list[nn.Module] = []
    seen: dict[Tensor, Candidate] = {}  # tensors hash by identity
    for index, group in enumerate([{"params": params}] if groups is None else groups):
        if not isinstance(group, Mapping):
            raise TypeError(f"params mixes group dicts with {type(group).__name__}; put that into a group of its own")
        where = "" if groups is None else f"groups[{index}]."
        if groups is not None:
            check_keys(group, index)
        strengths.append(
            tuple([None if group.get(k) is None else check_strength(group[k], f"{where}{k}") for k in names])
        )
        if isinstance(group["params"], nn.Module):
            modules.extend(list(group["params"].modules()))
        for name, tensor in _named(group["params"], where, group.get("param_names")):
            known = seen.setdefault(tensor, Candidate(name, tensor, index))
            if known.group != index:
                raise ValueError(
                    f"parameter {name!r} is in groups[{known.group}] and in groups[{index}]; its strengths would be "
                    "ambiguous, so leave it in one of them"
                )
    return list(seen.values()), strengths, modules


def warn_of_state_dicts(params: Any) -> None:
    """Warn if `params` or the tensors of a group are a state dict of detached tensors."""
    groups = [params] if isinstance(params, Mapping) else params if isinstance(params, Sequence) else []
    for each in groups:
        tensors = each.get("params") if isinstance(each, Mapping) and not is_state_dict(each) else each
        if is_state_dict(tensors) and not any(t.requires_grad for t in tensors.values() if isinstance(t, Tensor)):
            warn_user(
                "params is a state_dict: its tensors are detached, so that the penalty has no gradient, and its "
                "buffers count as weights; pass the model"
            )


def _is_group(params: Mapping[Any, Any], names: Sequence[str]) -> bool:
    """Return whether this is a group dict, not a mapping of named tensors with one called "params"."""
    if "params" in params:
        return not any(isinstance(v, nn.Parameter) for k, v in params.items() if k not in ("params", *names))
    return not all(isinstance(value, Tensor) for value in params.values())


def check_keys(group: Mapping[Any, Any], index: int) -> None:
    """Raise ValueError for keys that look misspelled or misplaced. Keys of optimizers, such as lr, are ignored."""
    for key in group:
        if key in ("params", "l1", "l2", "prox") or not isinstance(key, str):
            continue
        plain = re.sub(r"[^a-z0-9]", "", key.lower())
        strength = re.search(r"(?:l|lam|lambda|lambd|alpha|reg)([12])", plain)
        near = difflib.get_close_matches(plain, ["params", "parameters", "prox"], 1, 0.8)
        if strength or near:
            meant = f"l{strength[1]}" if strength else "prox" if near == ["prox"] else "params"
            raise ValueError(f"groups[{index}] has a key {key!r}, which means nothing here; write {meant!r}")
        if key in ("include", "exclude"):
            raise ValueError(f"groups[{index}] has a key {key!r}, which is an argument of the call, for all groups")
    if "params" not in group:
        raise ValueError(f"groups[{index}] has no 'params' entry")


def _named(params: Any, where: str, names: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(params, nn.Module):
        yield from _named_parameters(params)
    elif isinstance(params, Tensor):
        yield f"{where}params", params
    else:
        items = params.items() if isinstance(params, Mapping) else params
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise TypeError(f"{where}params must hold tensors, got {type(items).__name__}")
        for index, item in enumerate(items):
            default = f"{where}params[{index}]" if names is None else names[index]  # an optimizer's param_names
            name, tensor = item if isinstance(item, (tuple, list)) and len(item) == 2 else (default, item)
            if not isinstance(tensor, Tensor) or not isinstance(name, str):
                parts = f" of {', '.join(type(p).__name__ for p in item)}" if isinstance(item, (tuple, list)) else ""
                raise TypeError(
                    f"{default} must be a tensor or a (name, tensor) pair, got {type(item).__name__}{parts}"
                )
            yield name, tensor


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_MARKS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # from torch.compile and checkpoint_wrapper, anywhere in a name


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield `module.named_parameters()` with the names of the user's own model."""
    wrapped = [f"{name}.module.".lstrip(".") for name, each in module.named_modules() if isinstance(each, _WRAPPERS)]
    for name, parameter in module.named_parameters():
        # Inner prefixes first, so that outer prefixes still match.
        for prefix in reversed(wrapped):
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        for mark in _MARKS:
            name = name.replace(mark, "")
        yield name, parameter
