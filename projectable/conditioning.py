"""Tasks as vectors: what the matrix generators are told about a task.

A conditioning maps task_ids (T,) to task vectors z (T, K). Add one by subclassing `Conditioning`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conditioning(nn.Module):
    """The contract: `z_dim`, and `forward(task_ids (T,)) -> z (T, z_dim)`."""

    z_dim: int


class LearnedID(Conditioning):
    """One learned vector a task, N(0, 1/K)·√K at the start: entries of size 1."""

    def __init__(self, n_tasks: int, z_dim: int):
        super().__init__()
        self.z_dim = z_dim
        self.table = nn.Parameter(torch.randn(n_tasks, z_dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]


class Features(Conditioning):
    """Fixed vectors, e.g. image features of a task's training images: (n_tasks, K), standardised by the caller."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.z_dim = vectors.shape[1]
        self.register_buffer("table", vectors)

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]
