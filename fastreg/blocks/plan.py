"""Which pieces of weights the PyTorch path works on together, so that they stay in cache."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastreg.core.dtypes import compute_dtype
from fastreg.core.layout import Part

# Vectors of packed pieces are filled up to a multiple of this. What is left over after a vector unit's last full step
# might be rounded in another way there, and differ between two operators for the same thing.
LANES = 16


class Block(NamedTuple):
    """Pieces of weights of one strength group that are worked on together; numbers are places in the list of pieces."""

    group: int
    pieces: tuple[int, ...]  # all, which are summed together
    in_place: tuple[int, ...]  # those of them that are changed, or have gradients written, where they are
    packed: tuple[int, ...]  # the others, copied to and from scratch memory


T = TypeVar("T")

# Elements of a block on a CPU: small enough for the cores' caches, large enough that the cost of an operator call
# disappears (bench/results/tuning). Other devices pay for launches, not cache misses.
CPU_BLOCK = 1 << 19
# On a CPU, pieces of CPU_SMALL elements or more are changed where they are, not in copies together with others.
CPU_SMALL = 1 << 14
# PyTorch's operators use several cores from here on. Such pieces are worked on by themselves: each core then comes back
# to its own share of scratch memory, while one core copies all that is packed.
CPU_ALONE = 1 << 15
DEVICE_BLOCK = 1 << 26


def reserve() -> int:
    """The elements of scratch memory that a block needs, on a CPU."""
    return CPU_BLOCK


class BlockPlan:
    """The blocks of a part: pieces of segments of one strength group, as many as fit into a block."""

    def __init__(self, part: Part) -> None:
        size, small, alone, lanes = DEVICE_BLOCK, DEVICE_BLOCK, DEVICE_BLOCK, 1
        if part.device.type == "cpu":
            size, small, lanes = CPU_BLOCK, min(CPU_BLOCK, CPU_SMALL), LANES
            # A model of one block needs no more operator calls than one tensor.
            alone = min(CPU_BLOCK, CPU_ALONE) if sum(part.numels) > CPU_BLOCK else CPU_BLOCK
        is_computed_in_place = part.dtype == compute_dtype(part.dtype)
        self._positions = part.positions
        pieces: list[list[tuple[int, int]]] = [[] for _ in part.positions]  # of each weight: elements and group
        for weight, numel, group in zip(part.segments.weights, part.segments.numels, part.segments.groups, strict=True):
            left, tail = numel % size, numel % lanes
            # A piece that is changed where it is fills the vector units.
            rest = [left - tail, tail] if is_computed_in_place and left - tail >= small else [left]
            pieces[weight] += [(n, group) for n in [size] * (numel // size) + rest if n]
        # Weights that are cut, by their place among the part's, and their pieces' sizes. The pieces follow all weights.
        self._cuts: list[tuple[int, list[int]]] = []
        n_pieces = len(part.positions)
        blocks: list[Block] = []
        filled: dict[int, tuple[list[int], list[int], list[int]]] = {}
        free: dict[int, int] = {}
        for place, of_weight in enumerate(pieces):
            numbers = range(place, place + 1)
            if len(of_weight) > 1:
                self._cuts.append((place, [n for n, _ in of_weight]))
                numbers = range(n_pieces, n_pieces + len(of_weight))
                n_pieces += len(of_weight)
            for number, (n, group) in zip(numbers, of_weight, strict=bool(of_weight)):
                is_in_place = is_computed_in_place and n >= small
                if n >= alone:
                    one, none = (number,), ()
                    blocks.append(Block(group, one, one, none) if is_in_place else Block(group, one, none, one))
                    continue
                if free.get(group, 0) < n:
                    if group in filled:
                        blocks.append(Block(group, *map(tuple, filled[group])))
                    filled[group], free[group] = ([], [], []), size
                of_block, in_place, packed = filled[group]
                of_block.append(number)
                (in_place if is_in_place else packed).append(number)
                free[group] -= n
        self.blocks = (*blocks, *(Block(group, *map(tuple, lists)) for group, lists in filled.items()))

    def for_pieces(self, values: Sequence[T]) -> list[T]:
        """The value of each piece, from those of the weights."""
        of_pieces = [values[i] for i in self._positions]
        for place, sizes in self._cuts:
            of_pieces += [of_pieces[place]] * len(sizes)
        return of_pieces

    def pieces_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The part's share of dense `tensors`: each in storage order, then the pieces of those that are cut."""
        pieces = [tensors[i] for i in self._positions]
        if not all(map(Tensor.is_contiguous, pieces)):
            pieces = [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in pieces]
        for place, sizes in self._cuts:
            pieces += pieces[place].view(-1).split(sizes)
        return pieces
