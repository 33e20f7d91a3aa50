"""What a sharded penalty costs on any number of devices, by formula.

`python -m bench.static.scaling` writes bench/results/scaling.md.

The weights are sharded as FSDP2 does it, in rows, the first device holding the most. Bytes moved are reads and writes
of that device's memory by operations on weights and gradients; tables, partial sums and scalars are left out. Bytes
sent are those of ring algorithms: an all-reduce of S bytes on P devices sends 2 (P - 1) / P * S from each, an
all-gather to which each gives S bytes sends (P - 1) * S (Thakur, Rabenseifner and Gropp, Optimization of Collective
Communication Operations in MPICH, 2005). tests/bench/test_scaling.py compares the formulas with what 1, 2 and 4
processes do.
"""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch

from bench.measure.models import SHAPES, Shapes, n_weights
from bench.report.results import FOLDER, table

TARGET = FOLDER / "scaling.md"
FLOAT32 = 4
SUMS = 16  # bytes: of |w| and of w², float64


class Cost(NamedTuple):
    """Of one call on the device with the most, for float32 weights."""

    moved: int  # bytes read and written in its own memory
    collectives: int
    given: int  # bytes that it gives to them
    sent: int  # bytes that leave it


def shard_bytes(shapes: Shapes, devices: int) -> int:
    """Bytes of the largest shards."""
    return FLOAT32 * sum(-(-rows // devices) * torch.Size(row).numel() for rows, *row in shapes)


def penalty(shapes: Shapes, devices: int, passes: int = 4) -> Cost:
    """`loss + elastic_penalty(model)` and backward, onto a .grad that exists: one pass forward, three after it."""
    return Cost(passes * shard_bytes(shapes, devices), 1, SUMS, 2 * (devices - 1) * SUMS // devices)


# `add_elastic_grad_(model)`: three passes.
add_grad = functools.partial(penalty, passes=3)


def gathered(shapes: Shapes, devices: int) -> Cost:
    """The usual formulation made right: `torch.cat([p.full_tensor().flatten() for p in model.parameters()])`.

    Passes over all weights: gathering writes 1, cat moves 2, abs 2, its sum 1, square 2, its sum 1; backward forms the
    gradient of the squares in 6 and of the magnitudes in 4, and adds them in 3. Passes over the shard: gathering reads
    1, the gradient is cut out in 2 and added to .grad in 3. On one device nothing is gathered or cut.
    """
    whole, own = FLOAT32 * n_weights(shapes), shard_bytes(shapes, devices)
    if devices == 1:
        return Cost(24 * whole, 0, 0, 0)
    return Cost(22 * whole + 6 * own, len(shapes), own, (devices - 1) * own)


METHODS = {
    "`elastic_penalty` and backward": penalty,
    "`add_elastic_grad_`": add_grad,
    "`torch.cat` of `full_tensor()` and backward": gathered,
}


def report() -> str:
    tables: list[str] = []
    for model in ("gpt2", "llama3.2_1b"):
        shapes, rows = SHAPES[model], []
        for (name, method), devices in itertools.product(METHODS.items(), (1, 64, 4096)):
            moved, collectives, _, sent = method(shapes, devices)
            rows.append([name, f"{devices:,}", _bytes(moved), collectives, _bytes(sent)])
        tables += ["", f"## {model}: {n_weights(shapes):,} weights in {len(shapes)} tensors", ""]
        tables += table(["call", "devices", "moved", "collectives", "sent"], rows)
    return Path(__file__).with_name("scaling.in.md").read_text().format(tables="\n".join(tables[1:]))


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


if __name__ == "__main__":
    TARGET.write_text(report())
    print(f"wrote {TARGET}")
