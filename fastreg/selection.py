"""From what a user passes to the weights that count: named, deduplicated, filtered and checked."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.dtensor import is_dtensor, is_fsdp1, local, problem_with, resharding
from fastreg.strengths import Strength, Strengths, check_strength, combine, place

Filter: TypeAlias = str | re.Pattern[str] | Callable[[str, Tensor], bool] | None

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Candidate(NamedTuple):
    """A tensor that was passed, before freezing and filters have their say."""

    name: str
    tensor: Tensor
    group: int


class Selection:
    """The weights that count, and the strengths of their groups."""

    def __init__(self, params: Any, include: Filter, exclude: Filter) -> None:
        self._candidates, self._own_strengths, modules = _collect(params)
        # What is in each module, to notice when that changes.
        self._contents: list[dict[str, Any]] = [
            contained for module in modules for contained in (module._parameters, module._modules)
        ]
        self._lengths = list(map(len, self._contents))
        self._filled = [contained for contained in self._contents if contained]
        self._contained = self._now_contained()
        self._requires_grad = [c.tensor.requires_grad for c in self._candidates]
        chosen = _choose(self._candidates, _matcher(include, "include"), _matcher(exclude, "exclude"))
        _check_fsdp(chosen, modules)
        self.names = [c.name for c in chosen]
        self.weights = [c.tensor for c in chosen]
        # Groups of equal strengths are one, and groups that lost all their weights are none.
        brought, self._own_strengths = self._own_strengths, []
        places = {group: place(brought[group], self._own_strengths) for group in dict.fromkeys(c.group for c in chosen)}
        self.groups = [places[c.group] for c in chosen]

    def is_current(self) -> bool:
        """Whether no weight was frozen, thawed or replaced since, and no module."""
        # Hundreds of modules, asked at every call: without a loop in Python.
        return (
            [c.tensor.requires_grad for c in self._candidates] == self._requires_grad
            and list(map(len, self._contents)) == self._lengths
            and all(map(operator.is_, self._now_contained(), self._contained))
        )

    def _now_contained(self) -> list[Any]:
        return list(chain.from_iterable([contained.values() for contained in self._filled]))

    def strengths(self, l1: Strength, l2: Strength) -> Strengths:
        """The groups' own strengths, with `l1` and `l2` where a group has none."""
        device = self.weights[0].device
        return Strengths(
            combine([l1 if own[0] is None else own[0] for own in self._own_strengths], device, "l1"),
            combine([l2 if own[1] is None else own[1] for own in self._own_strengths], device, "l2"),
        )


def bias_and_norm(name: str, param: Tensor) -> bool:
    """True for biases and the weights of normalisation layers: parameters with fewer than two dimensions.

    Meant for `exclude=`; weights of that shape are usually not regularised.
    """
    return param.ndim < 2


def _collect(
    params: Any,
) -> tuple[list[Candidate], list[tuple[Strength | None, Strength | None]], list[nn.Module]]:
    """All candidates, each once; the strengths that each group brings along; and the modules that were walked."""
    if isinstance(params, Mapping) and "params" in params:
        params = [params]
    if not isinstance(params, (nn.Module, Tensor, Mapping)):
        if isinstance(params, str) or not isinstance(params, Iterable):
            raise TypeError(
                "params must be an nn.Module, a tensor, an iterable of tensors or of (name, tensor) pairs, or a list "
                f"of group dicts, got {type(params).__name__}"
            )
        params = list(params)
    groups = params if isinstance(params, list) and any(isinstance(p, Mapping) for p in params) else None
    own: list[tuple[Strength | None, Strength | None]] = []
    candidates: list[Candidate] = []
    find = _finder(candidates)
    modules: list[nn.Module] = []
    for index, group in enumerate([{"params": params}] if groups is None else groups):
        where = "" if groups is None else f"groups[{index}]."
        if not isinstance(group, Mapping):
            raise TypeError(f"params mixes group dicts with {type(group).__name__}; put that into a group of its own")
        if "params" not in group:
            raise ValueError(f"groups[{index}] has no 'params' entry")
        l1, l2 = (None if group.get(k) is None else check_strength(group[k], f"{where}{k}") for k in ("l1", "l2"))
        own.append((l1, l2))
        if isinstance(group["params"], nn.Module):
            modules.extend(list(group["params"].modules()))
        for name, tensor in _named(group["params"], where):
            known = find(tensor)
            if known is None:
                candidates.append(Candidate(name, tensor, index))
            elif known.group != index:
                raise ValueError(
                    f"parameter {name!r} is in groups[{known.group}] and in groups[{index}]; its strengths would be "
                    "ambiguous, so leave it in one of them"
                )
    return candidates, own, modules


def _finder(candidates: list[Candidate]) -> Callable[[Tensor], Candidate | None]:
    """How to tell whether a tensor is among `candidates`, to which they are appended in between."""
    places: dict[int, int] = {}

    def by_id(tensor: Tensor) -> Candidate | None:
        place = places.setdefault(id(tensor), len(candidates))
        return candidates[place] if place < len(candidates) else None

    def by_comparison(tensor: Tensor) -> Candidate | None:
        for candidate in candidates:
            if candidate.tensor is tensor:
                return candidate
        return None

    # A compiler would take an id for a constant, and compile again for the next tensor.
    return by_comparison if torch.compiler.is_compiling() else by_id


def _named(params: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(params, nn.Module):
        yield from params.named_parameters()
    elif isinstance(params, Tensor):
        yield f"{where}params", params
    else:
        items = params.items() if isinstance(params, Mapping) else params
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise TypeError(f"{where}params must hold tensors, got {type(items).__name__}")
        for index, item in enumerate(items):
            default = f"{where}params[{index}]"
            name, tensor = item if isinstance(item, (tuple, list)) and len(item) == 2 else (default, item)
            if not isinstance(tensor, Tensor) or not isinstance(name, str):
                raise TypeError(f"{default} must be a tensor or a (name, tensor) pair, got {_describe(item)}")
            yield name, tensor


def _describe(item: object) -> str:
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of {', '.join(type(part).__name__ for part in item)}"
    return type(item).__name__


def _choose(
    candidates: list[Candidate], included: Callable[[str, Tensor], bool], excluded: Callable[[str, Tensor], bool]
) -> list[Candidate]:
    # Tensors without gradients count only where nothing else is there: then they are data, not frozen weights.
    plain = not any(c.tensor.requires_grad or isinstance(c.tensor, nn.Parameter) for c in candidates)
    alive = [c for c in candidates if plain or c.tensor.requires_grad]
    chosen = [c for c in alive if included(c.name, c.tensor) and not excluded(c.name, c.tensor)]
    if not chosen:
        if not candidates:
            reason = "params holds no tensors"
        elif not alive:
            reason = f"all {len(candidates)} parameters are frozen (requires_grad=False)"
        else:
            reason = f"include and exclude leave none of {len(alive)} trainable parameters, such as {alive[0].name!r}"
        raise ValueError(f"nothing selected: {reason}")
    for c in chosen:
        check_weight(c.name, c.tensor)
    return chosen


def check_weight(name: str, tensor: Tensor) -> None:
    """Raises TypeError where `tensor` is of a kind that has no penalty here, with its name and a way out."""
    if isinstance(tensor, nn.UninitializedParameter):
        problem = "is not initialised yet; run a batch through its lazy module first"
    elif tensor.is_quantized:
        problem = "is quantized; exclude it, or dequantize() it"
    elif tensor.layout != torch.strided:
        problem = f"is sparse or otherwise not strided ({tensor.layout}); exclude it, or pass to_dense()"
    elif tensor.dtype not in DTYPES:
        problem = f"has dtype {tensor.dtype}; supported are float64, float32, bfloat16 and float16, so exclude it"
    elif tensor.device.type == "meta":
        problem = "is on the meta device and has no values; materialise it with to_empty() and initialise it"
    elif is_dtensor(tensor):
        found = problem_with(tensor)
        if found is None:
            # Of a kind that has a penalty, as far as the ranks agree on: they all raise, or none does.
            check_weight(name, local(tensor))
            return
        problem = found
    elif type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not torch.compiler.is_compiling():
        problem = f"is a {type(tensor).__name__}, a tensor subclass whose memory cannot be read; exclude it"
    else:
        return
    raise TypeError(f"parameter {name!r} {problem}")


def _check_fsdp(chosen: list[Candidate], modules: list[nn.Module]) -> None:
    if any(map(is_fsdp1, modules)):
        raise TypeError(
            "params is wrapped by FullyShardedDataParallel, whose flattened shards hide which weight is which; shard "
            "it with torch.distributed.fsdp.fully_shard instead"
        )
    gathered = resharding(modules)
    for c in chosen if gathered else []:
        if id(c.tensor) in gathered:
            raise RuntimeError(
                f"parameter {c.name!r} is gathered by FSDP at this moment, as between forward and backward; call this "
                "before the forward pass, or after backward as attach() does, or shard with "
                "reshard_after_forward=True; after a forward pass without backward, call model.reshard() first"
            )


def _matcher(pattern: Filter, which: str) -> Callable[[str, Tensor], bool]:
    if pattern is None:
        return lambda name, param: which == "include"
    if callable(pattern):
        return pattern
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(
            f"{which} must be a regular expression or a callable (name, param) -> bool, got {type(pattern).__name__}"
        )
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"{which} is not a valid regular expression: {pattern!r}: {error}") from error
    return lambda name, param: search(name) is not None
