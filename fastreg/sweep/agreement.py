"""A check for debugging: do all ranks make the same call? The environment variable FASTREG_DEBUG_RANKS=1 turns it on.

A call on sharded weights must be the same on every rank that holds shards. If ranks differ in the number of strength
groups, one gets a wrong value and another one waits until its all-reduce times out. Other differences are silent.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from fastreg.core.dtensor import is_dtensor
from fastreg.core.penalty import BasePenalty
from fastreg.core.types import Work

IS_ON = os.environ.get("FASTREG_DEBUG_RANKS", "0") not in ("", "0")

Facts = Iterable[tuple[str, str]]  # names, and values that must be the same on every rank


def facts_of(work: Work) -> Iterator[tuple[str, str]]:
    """Yield the strengths and the selected weights of a call. Read strengths that are tensors, which waits for them."""
    yield "the penalty", type(work.penalty).__name__
    yield from strengths_of([work.penalty.of_group(group) for group in range(work.n_groups)])
    for name, w, group in zip(work.names, work.weights, work.groups, strict=True):
        # Plain weights may be the rank's own, as experts are.
        if is_dtensor(w):
            placed: Any = w
            yield f"parameter {name!r}", f"{w.dtype} {tuple(w.shape)} {placed.placements} in strength group {group}"


def strengths_of(penalties: Sequence[BasePenalty]) -> Iterator[tuple[str, str]]:
    """Yield the number of strength groups and the strengths of each, given as penalties of one group."""
    yield "the number of strength groups", str(len(penalties))
    for group, penalty in enumerate(penalties):
        for name, strength in zip(penalty.NAMES, penalty.strengths, strict=True):
            yield f"{name} of strength group {group}", repr(float(strength))


def check_agreement(facts: Facts, process_groups: Iterable[Any]) -> None:
    """Raise RuntimeError on every rank of a process group if their facts differ. It says what differs."""
    own = dict(facts)
    for process_group in process_groups:
        ranks = dist.get_process_group_ranks(process_group)
        everywhere: list[Any] = [None] * len(ranks)
        dist.all_gather_object(everywhere, own, group=process_group)
        first = everywhere[0]
        for rank, other in zip(ranks, everywhere, strict=True):
            for fact in {**first, **other}:
                if first.get(fact) != other.get(fact):
                    raise RuntimeError(
                        f"ranks make different calls: {fact} is {first.get(fact, 'not there')} on rank {ranks[0]} and "
                        f"{other.get(fact, 'not there')} on rank {rank}; pass the same params, filters and strengths "
                        "on every rank"
                    )
