"""What a parameter group of fastreg.optim says, checked."""

from typing import Any

from torch import Tensor

from fastreg.strengths import Strength, check_strength


def learning_rate(group: dict[str, Any], number: int) -> Strength:
    """The lr of a group; ValueError for one that is negative, NaN or infinite."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else check_strength(lr, f"lr of param group {number}")


def strengths_of(
    group: dict[str, Any], number: int, factor: float = 1.0
) -> tuple[Strength, Strength, Strength, Strength]:
    """l1 and l2 for the gradient, and times `factor` for the proximal step: one pair of both is 0."""
    if group.get("maximize"):
        raise ValueError("maximize=True would reward the penalty; minimize -loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step is one operation without a derivative")
    l1, l2 = (check_strength(group[name], f"{name} of param group {number}") for name in ("l1", "l2"))
    if not isinstance(group["prox"], bool):
        raise TypeError(f"prox of param group {number} must be True or False, got {group['prox']!r}")
    return (0.0, 0.0, l1 * factor, l2 * factor) if group["prox"] else (l1, l2, 0.0, 0.0)
