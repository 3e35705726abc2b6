"""Matrix generators: task vector z (T, K) → matrices (T, S, m, n).

One generator makes a stack of S maps of the same shape (all layers at once), from base maps P₀ (S, m, n) that the
caller chooses. The contract, which every family inherits and `tests/test_generators.py` checks:

- `forward(z)` gives (T, S, m, n), or (1, S, m, n) where the maps do not depend on the task;
- at the start it gives P₀ for every task: the task term starts at zero;
- gradients reach every parameter within two steps.

Add a family: subclass `Generator`, decorate it with `@family`. DESIGN: z is the only thing it knows of a task.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FAMILIES: dict[str, type[Generator]] = {}


def family(cls: type[Generator]) -> type[Generator]:
    """Register a generator family under its class name."""
    FAMILIES[cls.__name__] = cls
    return cls


def make_generator(name: str, base: Tensor, z_dim: int, **options) -> Generator:
    """The generator of that family over base maps P₀ (S, m, n); raises ValueError naming the allowed families."""
    if name not in FAMILIES:
        raise ValueError(f"unknown generator {name!r}; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name](base, z_dim, **options)


class Generator(nn.Module):
    """The base: a learned P₀ and no task term. `base` is (S, m, n)."""

    def __init__(self, base: Tensor, z_dim: int):
        super().__init__()
        self.base = nn.Parameter(base.clone(memory_format=torch.contiguous_format))
        self.z_dim = z_dim

    def forward(self, z: Tensor) -> Tensor:  # (T, K) → (T, S, m, n)
        raise NotImplementedError


@family
class Slice(Generator):
    """P₀ as it is, never trained: with P₀ = [I; 0], MatFormer-like slicing of the source."""

    def __init__(self, base: Tensor, z_dim: int):
        super().__init__(base, z_dim)
        self.base.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return self.base.unsqueeze(0)


@family
class Static(Generator):
    """P₀, trained: the same small model for every task (the no-task control)."""

    def forward(self, z: Tensor) -> Tensor:
        return self.base.unsqueeze(0)


@family
class Linear(Generator):
    """P₀ + Σ_k z_k B_k: the plain reading of the paper. B starts at zero."""

    def __init__(self, base: Tensor, z_dim: int):
        super().__init__(base, z_dim)
        self.directions = nn.Parameter(torch.zeros(z_dim, *base.shape))

    def forward(self, z: Tensor) -> Tensor:
        maps = torch.addmm(self.base.flatten(), z, self.directions.flatten(1))  # (T, S·m·n)
        return maps.view(-1, *self.base.shape)


@family
class LowRank(Generator):
    """P₀ + U diag(A z) Vᵀ, r columns in U and V. A starts at zero."""

    def __init__(self, base: Tensor, z_dim: int, rank: int = 4):
        super().__init__(base, z_dim)
        stack, m, n = base.shape
        rank = min(rank, m, n)
        self.left = nn.Parameter(torch.randn(stack, m, rank) / math.sqrt(m))
        self.right = nn.Parameter(torch.randn(stack, n, rank) / math.sqrt(n))
        self.gate = nn.Parameter(torch.zeros(z_dim, stack * rank))

    def forward(self, z: Tensor) -> Tensor:
        gate = (z @ self.gate).view(len(z), len(self.base), 1, -1)  # (T, S, 1, r)
        return self.base + (self.left * gate) @ self.right.transpose(1, 2)
