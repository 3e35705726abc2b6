"""Tasks as vectors: what the matrix generators are told about a task.

A conditioning maps task_ids (T,) to task vectors z (T, K), with entries near 1 at the start. What it knows of the
tasks beside their number (`needs`) is given when it is made; tasks that come later are told to `encode`.

Add one: subclass `Conditioning`, decorate it with `@conditioning`; `tests/test_conditioning.py` runs its contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONDITIONINGS: dict[str, type[Conditioning]] = {}


def conditioning(cls: type[Conditioning]) -> type[Conditioning]:
    """Register a conditioning under its class name."""
    CONDITIONINGS[cls.__name__] = cls
    return cls


def make_conditioning(name: str, n_tasks: int, z_dim: int, **options) -> Conditioning:
    """The conditioning of that name; `options` hold what it `needs`. Raises ValueError naming what is allowed."""
    if name not in CONDITIONINGS:
        raise ValueError(f"unknown conditioning {name!r}; allowed: {', '.join(CONDITIONINGS)}")
    missing = [need for need in CONDITIONINGS[name].needs if options.get(need) is None]
    if missing:
        raise ValueError(f"the conditioning {name} has to be given {', '.join(missing)} of the tasks")
    return CONDITIONINGS[name](n_tasks, z_dim, **options)


class Conditioning(nn.Module):
    """The contract: `forward(task_ids (T,)) -> z (T, z_dim)`; a task's vector depends on no other task of the call."""

    needs: tuple[str, ...] = ()  # what has to be told about the tasks: names of the constructor's arguments
    draws = False  # random numbers on the CPU in a step of training, which is no CUDA graph then

    def __init__(self, n_tasks: int, z_dim: int):
        super().__init__()
        self.n_tasks, self.z_dim = n_tasks, z_dim
        self.rates: dict[str, float] = {}

    def forward(self, task_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def rate_factor(self, name: str) -> float:
        """By how much the parameter of that name learns faster than a learned ID."""
        return self.rates.get(name, 1.0)


@conditioning
class LearnedID(Conditioning):
    """One learned vector a task, N(0, 1) at the start."""

    def __init__(self, n_tasks: int, z_dim: int):
        super().__init__(n_tasks, z_dim)
        self.table = nn.Parameter(torch.randn(n_tasks, z_dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]


@conditioning
class NoID(Conditioning):
    """One learned vector for all tasks: no task information, the generators as they are."""

    def __init__(self, n_tasks: int, z_dim: int):
        super().__init__(n_tasks, z_dim)
        self.vector = nn.Parameter(torch.randn(z_dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.vector.expand(len(task_ids), -1)


@conditioning
class ShuffledID(LearnedID):
    """The control: in training mode with gradients each task gets the vector of one drawn at random, maybe its own.

    As many parameters as `LearnedID`, and maps that vary as much, but no vector says anything of a task.
    """

    draws = True

    def forward(self, task_ids: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            task_ids = torch.randint(self.n_tasks, task_ids.shape).to(task_ids.device)
        return super().forward(task_ids)


@conditioning
class Features(Conditioning):
    """Fixed vectors (n_tasks, F), e.g. mean image features of a task's training images, and a learned linear map.

    The vectors are centred and scaled (one number for all F). Raises ValueError where they are not one of finite
    numbers a task.
    """

    needs = ("vectors",)

    def __init__(self, n_tasks: int, z_dim: int, vectors: Tensor):
        super().__init__(n_tasks, z_dim)
        vectors = (
            torch.tensor(vectors, dtype=torch.float32) if not isinstance(vectors, Tensor) else vectors.float().clone()
        )
        if vectors.dim() != 2 or len(vectors) != n_tasks or not vectors.isfinite().all():
            raise ValueError(
                f"vectors of shape {tuple(vectors.shape)}; allowed: one of finite numbers a task, ({n_tasks}, F)"
            )
        center = vectors.mean(0)
        scale = (vectors - center).square().mean().sqrt().clamp_min(1e-6)
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)
        self.register_buffer("table", vectors)
        width = vectors.shape[1]
        self.map = nn.Parameter(torch.randn(width, z_dim) / math.sqrt(width))
        self.rates = {"map": 4 / width}  # what F weights do adds up

    def encode(self, vectors: Tensor) -> Tensor:
        """Task vectors (T, z_dim) of other tasks by their vectors (T, F)."""
        return (vectors - self.center) / self.scale @ self.map

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.encode(self.table[task_ids])


@conditioning
class Attributes(Features):
    """What a task's name says: `Features` of its words' letters, 1 to 3 in a row (TF–IDF), and a learned linear map.

    A name can tell any attributes (“letter a, bold, turned”).
    """

    needs = ("names",)

    def __init__(self, n_tasks: int, z_dim: int, names: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3))
        super().__init__(n_tasks, z_dim, letters.fit_transform(names).toarray())


@conditioning
class SupportSet(Conditioning):
    """A few images of the task: tokens embedded and gated by position, their mean over all images, a small MLP.

    `support` (n_tasks, n_max, N) are training images as tokens below `vocab_size`. In training mode with gradients, n
    is drawn from `n_train` (1, 4 and 16, where there are as many) and the images from the task's support, with torch's
    random numbers; else z is that of the first `n_eval` images (at most 16). The pooled state is centred and scaled
    by the support's single images at the start. Raises ValueError for a support that cannot be.
    """

    needs = ("support", "vocab_size")
    draws = True

    def __init__(self, n_tasks: int, z_dim: int, support: Tensor, vocab_size: int):
        super().__init__(n_tasks, z_dim)
        width, n_max = 64, support.shape[1] if support.dim() == 3 else 0
        if len(support) != n_tasks or not n_max:
            raise ValueError(f"support of shape {tuple(support.shape)}; allowed: ({n_tasks}, images, tokens)")
        if not 0 <= support.min() <= support.max() < vocab_size:
            raise ValueError(
                f"support has tokens from {support.min()} to {support.max()}; allowed: 0 to {vocab_size - 1}"
            )
        self.n_train, self.n_eval = tuple(n for n in (1, 4, 16) if n <= n_max), min(16, n_max)
        self.register_buffer("support", support.clone())  # several sizes are given the same one
        self.tokens = nn.Parameter(torch.randn(vocab_size, width))
        self.positions = nn.Parameter(torch.randn(support.shape[2], width))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.inward = nn.Linear(width, width)
        self.outward = nn.Linear(width, z_dim)
        with torch.no_grad():
            images = self._pooled(support.flatten(0, 1).unsqueeze(1))  # (n_tasks · n_max, width): one image each
            self.center.copy_(images.mean(0))
            self.scale.copy_(images.std(0, unbiased=False).clamp_min(1e-3))
            for layer in (self.inward, self.outward):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
                nn.init.zeros_(layer.bias)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Images of T tasks, (T, n, N) → (T, width)."""
        return (self.tokens[tokens] * self.positions).mean((1, 2))

    def encode(self, tokens: Tensor) -> Tensor:
        """Task vectors (T, z_dim) of other tasks by n images of each, (T, n, N)."""
        x = (self._pooled(tokens) - self.center) / self.scale
        return self.outward(F.gelu(self.inward(x)))

    def forward(self, task_ids: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self.encode(self.support[task_ids, : self.n_eval])
        n = self.n_train[torch.randint(len(self.n_train), ()).item()]
        drawn = torch.rand(len(task_ids), self.support.shape[1]).argsort(1)[:, :n].to(task_ids.device)  # (T, n)
        return self.encode(self.support[task_ids.unsqueeze(1), drawn])
