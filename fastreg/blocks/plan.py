"""Cut weights into pieces and group the pieces into blocks that stay in cache."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastreg.core.dtypes import compute_dtype
from fastreg.core.layout import Part

# Vectors of packed pieces are padded to a multiple of this. Operators may round the remainder after the last full step
# of a vector unit in another way, so that two operators for the same expression differ there.
LANES = 16


class Block(NamedTuple):
    """Pieces of weights of one strength group that are processed together, by their indices in the list of pieces."""

    group: int
    pieces: tuple[int, ...]  # all pieces, which are summed together
    in_place: tuple[int, ...]  # pieces that are changed, or whose gradients are written, without a copy
    packed: tuple[int, ...]  # the other pieces, copied to and from scratch memory


T = TypeVar("T")

# Elements of a block on a CPU: few enough for the cores' caches, and enough to hide the cost of an operator call
# (bench/results/tuning). Other devices pay for launches, not for cache misses.
CPU_BLOCK = 1 << 19
# On a CPU, pieces of at least CPU_SMALL elements are changed in place. Smaller pieces are packed.
CPU_SMALL = 1 << 14
# From this size on, PyTorch's operators use several cores. Such a piece is a block of its own: each core then reuses
# its own share of scratch memory, while one core alone would copy packed pieces.
CPU_ALONE = 1 << 15
DEVICE_BLOCK = 1 << 26


def reserve() -> int:
    """Return the number of elements of scratch memory that a block needs on a CPU."""
    return CPU_BLOCK


class BlockPlan:
    """The blocks of a part. A block has as many pieces of one strength group as fit."""

    def __init__(self, part: Part) -> None:
        size, small, alone, lanes = DEVICE_BLOCK, DEVICE_BLOCK, DEVICE_BLOCK, 1
        if part.device.type == "cpu":
            size, small, lanes = CPU_BLOCK, min(CPU_BLOCK, CPU_SMALL), LANES
            # A model that fits one block takes no more operator calls than one tensor.
            alone = min(CPU_BLOCK, CPU_ALONE) if sum(part.numels) > CPU_BLOCK else CPU_BLOCK
        is_computed_in_place = part.dtype == compute_dtype(part.dtype)
        self._positions = part.positions
        pieces: list[list[tuple[int, int]]] = [[] for _ in part.positions]  # (elements, group) of its pieces
        for weight, numel, group in zip(part.segments.weights, part.segments.numels, part.segments.groups, strict=True):
            left, tail = numel % size, numel % lanes
            # The size of a piece that is changed in place is a multiple of `lanes`.
            rest = [left - tail, tail] if is_computed_in_place and left - tail >= small else [left]
            pieces[weight] += [(n, group) for n in [size] * (numel // size) + rest if n]
        # Weights that are cut: index in the part, and sizes of the pieces. These pieces follow all weights of the part.
        self._cuts: list[tuple[int, list[int]]] = []
        n_pieces = len(part.positions)
        blocks: list[Block] = []
        filled: dict[int, tuple[list[int], list[int], list[int]]] = {}
        free: dict[int, int] = {}
        for weight, own_pieces in enumerate(pieces):
            numbers = range(weight, weight + 1)
            if len(own_pieces) > 1:
                self._cuts.append((weight, [n for n, _ in own_pieces]))
                numbers = range(n_pieces, n_pieces + len(own_pieces))
                n_pieces += len(own_pieces)
            for number, (n, group) in zip(numbers, own_pieces, strict=bool(own_pieces)):
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
        """Return a value for each piece: the value of its weight."""
        of_pieces = [values[i] for i in self._positions]
        for weight, sizes in self._cuts:
            of_pieces += [of_pieces[weight]] * len(sizes)
        return of_pieces

    def pieces_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the part's share of dense `tensors` in storage order, then the pieces of tensors that are cut."""
        pieces = [tensors[i] for i in self._positions]
        if not all(map(Tensor.is_contiguous, pieces)):
            pieces = [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in pieces]
        for weight, sizes in self._cuts:
            pieces += pieces[weight].view(-1).split(sizes)
        return pieces
