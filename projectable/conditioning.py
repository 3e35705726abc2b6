"""Tasks as vectors: what the matrix generators are told about a task.

A conditioning maps task_ids (T,) to task vectors z (T, K). Add one: subclass `Conditioning`, decorate it with
`@conditioner`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONDITIONERS: dict[str, type[Conditioning]] = {}


def conditioner(cls: type[Conditioning]) -> type[Conditioning]:
    """Register a conditioning under its class name."""
    CONDITIONERS[cls.__name__] = cls
    return cls


def make_conditioning(name: str, n_tasks: int, z_dim: int, tokens: Tensor, about: Any = None) -> Conditioning:
    """The conditioning of that name; raises ValueError naming the allowed ones."""
    if name not in CONDITIONERS:
        raise ValueError(f"unknown conditioning {name!r}; allowed: {', '.join(CONDITIONERS)}")
    return CONDITIONERS[name](n_tasks, z_dim, tokens, about)


class Conditioning(nn.Module):
    """The contract: `forward(task_ids (T,)) -> z (T, z_dim)`.

    What one may use of the tasks: `tokens` (T, n, N), some of each one's training sequences, and `about`, their
    TaskData (names, codebook, images).
    """

    def __init__(self, n_tasks: int, z_dim: int, tokens: Tensor | None = None, about: Any = None):
        super().__init__()
        self.n_tasks, self.z_dim = n_tasks, z_dim

    def forward(self, task_ids: Tensor) -> Tensor:  # (T,) → (T, z_dim)
        raise NotImplementedError


@conditioner
class LearnedID(Conditioning):
    """One learned vector a task, N(0, 1/K)·√K at the start: entries of size 1."""

    def __init__(self, n_tasks: int, z_dim: int, tokens: Tensor | None = None, about: Any = None):
        super().__init__(n_tasks, z_dim)
        self.table = nn.Parameter(torch.randn(n_tasks, z_dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]
