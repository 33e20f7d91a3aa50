"""The fraction of weights that are exactly zero, and the table that `ElasticNet.summary` returns."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.core.checks import check_tensors
from fastreg.core.dtensor import local_shards
from fastreg.core.torch_private import no_subclass
from fastreg.core.types import Work
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.selection.filters import Filter, matches
from fastreg.selection.params import Candidate, Params, collect
from fastreg.selection.selection import select
from fastreg.sweep.agreement import facts_of
from fastreg.sweep.sharded import Ownership


def sparsity(params: Params, *, include: Filter = None, exclude: Filter = None) -> Tensor:
    """Return the fraction of weights that are exactly zero.

    Args:
        params, include, exclude: As in `elastic_penalty`.

    Returns:
        A 0-dim float32 tensor on the first weight's device.

    Raises:
        ValueError: As in `elastic_penalty`, or the selected weights have no elements.
        TypeError: As in `elastic_penalty`.
    """
    work = select(params, ElasticNetPenalty((0.0, 0.0)), include, exclude, None, is_penalized=False)
    weights = work.weights
    check_tensors(work.names, weights)
    total = sum(w.numel() for w in weights)
    if total == 0:
        raise ValueError("nothing selected: the selected parameters have no elements")
    device = weights[0].device
    with torch.no_grad(), no_subclass():
        counts = [torch.count_nonzero(part).to(device) for part in local_shards(weights)]
        ownership = Ownership(weights, True, facts_of(work))
        return ((total - ownership.total(counts, ownership.mesh_index)).double() / total).float()


def summary_of(work: Work, params: Any, exclude: Filter) -> str:
    """Return a table: a row for each weight that counts, the totals, and the tensors left out, each with the reason.

    The call waits for the device. For sharded weights, all ranks must call it.
    """
    zeros = _zeros(work)
    names = work.penalty.NAMES
    rows = [("name", "shape", "dtype", *names, "exact zeros")]
    for name, w, group, n_zeros in zip(work.names, work.weights, work.groups, zeros, strict=True):
        first = group if isinstance(group, int) else group[0]  # all segments of a weight have the same strengths
        strengths = [f"{float(strength):g}" for strength in work.penalty.of_group(first).strengths]
        rows.append((name, _shape(w), str(w.dtype).removeprefix("torch."), *strengths, _share(n_zeros, w.numel())))
    n = sum(w.numel() for w in work.weights)
    rows.append((f"{len(work.weights)} tensors", f"{n:,}", "", *[""] * len(names), _share(sum(zeros), n)))
    lines = _aligned(rows, n_left=3)
    lines = [lines[0], "-" * max(map(len, lines)), *lines[1:-1], "-" * max(map(len, lines)), lines[-1]]
    left_out = list(_left_out(work, params, exclude))
    if left_out:
        lines += ["", "left out:", *_aligned([(f"  {c.name}", _shape(c.tensor), why) for c, why in left_out], n_left=3)]
    return "\n".join(lines)


def _zeros(work: Work) -> list[int]:
    """Return the number of elements of each weight that are exactly zero, over all ranks."""
    check_tensors(work.names, work.weights)
    with torch.no_grad(), no_subclass():
        parts = local_shards(work.weights)
        first = parts[0].device
        counts = torch.stack([torch.count_nonzero(part).to(first) for part in parts])
        ownership = Ownership(work.weights, True, facts_of(work))
        # The counts on a diagonal: one sum over ranks then gives the sum of each weight.
        totals = ownership.total(list(torch.diag(counts)), ownership.mesh_index).tolist()
    return [w.numel() - n for w, n in zip(work.weights, totals, strict=True)]


def _left_out(work: Work, params: Any, exclude: Filter) -> Iterator[tuple[Candidate, str]]:
    candidates, _, modules = collect(params, work.penalty.NAMES)
    chosen = set(work.weights)  # tensors hash by identity
    name_of = {id(w): name for name, w in zip(work.names, work.weights, strict=True)}
    is_excluded = matches(exclude, False, candidates, modules)
    for candidate, excluded in zip(candidates, is_excluded, strict=True):
        if candidate.tensor not in chosen:
            # A tensor that is neither frozen nor excluded does not match `include`.
            frozen = not candidate.tensor.requires_grad
            yield candidate, "frozen: requires_grad=False" if frozen else "excluded" if excluded else "not included"
    for module in modules[:1]:
        seen: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in seen and id(parameter) in name_of:
                yield Candidate(name, parameter, 0), f"tied: the same tensor as {name_of[id(parameter)]}"
            seen[id(parameter)] = name


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _share(n_zeros: int, n: int) -> str:
    return f"{n_zeros / n:.2%}" if n else "-"


def _aligned(rows: Sequence[tuple[str, ...]], n_left: int) -> list[str]:
    """Return aligned lines: the first `n_left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
