"""The PyTorch path: a sweep block by block, in scratch memory that stays in cache."""

from fastreg.blocks.sweep import block_sweep

__all__ = ["block_sweep"]
