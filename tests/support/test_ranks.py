"""The processes that cases run on say which case went wrong on which rank, and the next case gets new ones."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import Ranks, Team, Teams, by_name, on_processes

pytestmark = on_processes
CPU = ("torch", "cpu")


def all_is_well(ranks: Ranks) -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == ranks.world


def one_rank_fails(ranks: Ranks) -> None:
    assert ranks.rank == 0, "this one"


def one_rank_dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)


def one_rank_hangs(ranks: Ranks) -> None:
    time.sleep(60 * ranks.rank)


CASES = by_name(all_is_well, one_rank_fails, one_rank_dies, one_rank_hangs)


def test_the_case_and_the_rank_that_fail_are_named(tmp_path: Path) -> None:
    teams = Teams(lambda: tmp_path)
    try:
        with pytest.raises(pytest.fail.Exception, match=r"(?s)one_rank_fails on 2 processes.*rank 1: .*this one"):
            teams.run(__name__, "one_rank_fails", 2, CPU)
        assert not teams.teams
    finally:
        teams.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("one_rank_dies", "rank 1: died with exit code 3"), ("one_rank_hangs", "rank 1: was still running")],
)
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, name: str, message: str) -> None:
    team = Team(2, CPU, tmp_path)
    try:
        assert team.run(__name__, "all_is_well") == ""
        assert team.is_usable
        assert message in team.run(__name__, name, deadline=2.0)
        assert not team.is_usable
    finally:
        team.close()
