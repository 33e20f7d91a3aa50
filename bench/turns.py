"""Many candidates measured against each other: all take turns in one run, each right after the floor."""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.clock import clock_for, seconds
from bench.harness import Harness, quantiles, ratios


def arguments(description: str | None, **options: Any) -> argparse.Namespace:
    """The command line of a tuning script: --rounds, --out, and an option with a default for each keyword."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def take_turns(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    rounds: int,
    cases: Mapping[str, Callable[[], object]],
    prepare: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, dict[str, float]], float]:
    """Quantiles of each case's time in multiples of the floor's over `n` elements, and the floor's median time.

    Args:
        prepare: called with a case's name, untimed, before each of its turns.
    """
    clock = clock_for(device)
    floor = Harness(device, dtype, 0.0, rounds).floor(n)
    times: dict[str, list[float]] = {name: [] for name in cases}
    floors: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):  # the first of them warms up
        for name, call in cases.items():
            prepare(name)
            floors[name].append(seconds(clock, floor))
            times[name].append(seconds(clock, call))
        print(f"round {number}/{rounds}", flush=True)
    found = {name: quantiles(ratios(times[name][1:], floors[name][1:]))._asdict() for name in cases}
    return found, statistics.median(chain(*floors.values()))


def write(path: Path | None, device: torch.device, found: Mapping[str, Any], **facts: Any) -> None:
    """Stores what was found with what it has to be read with, if there is a path to."""
    if path is not None:
        record = {"environment": environment.facts(device), **facts, "ratio": found}
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
