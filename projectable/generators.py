"""Task → vector → matrices: what a generator is told of a task, and what it makes of it.

A conditioning maps task_ids (T,) to task vectors z (T, K), with entries near 1 at the start. What it knows of the
tasks beside their number (`needs`) is given when it is made; tasks that come later are told to `encode`. Add one:
subclass `Conditioning`, decorate it with `@conditioning`; `tests/test_conditioning.py` runs its contract.

A matrix generator maps z (T, K) to matrices (T, S, m, n): a stack of S maps of the same shape (all layers at once),
from base maps P₀ (S, m, n) that the caller chooses. Add a family: subclass `Generator`, decorate it with `@family`. The
contract, which every family inherits and `tests/test_generators.py` checks:

- `forward(z)` gives (T, S, m, n), or (1, S, m, n) where the maps do not depend on the task;
- at the start it gives P₀ for every task: the task term starts at zero;
- gradients reach every parameter within two steps.

z is the only thing that a generator knows of a task. What multiplies a zero starts with entries near 1, so that a step
of the learning rate in any parameter moves the maps' entries by about as much; `rates` corrects what is left.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        vectors = torch.as_tensor(vectors, dtype=torch.float32).clone()
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

        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), lowercase=False)
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


# --------------------------------------------------------------------------------------------------------- z → matrices

FAMILIES: dict[str, type[Generator]] = {}


def family(cls: type[Generator]) -> type[Generator]:
    """Register a generator family under its class name."""
    FAMILIES[cls.__name__] = cls
    return cls


def make_generator(name: str, base: Tensor, z_dim: int, **options) -> Generator:
    """The generator of that family over base maps P₀ (S, m, n).

    Raises ValueError naming the allowed values for an unknown family or option, and for maps it cannot make.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown generator {name!r}; allowed: {', '.join(FAMILIES)}")
    known = inspect.signature(FAMILIES[name]).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not takes_any:
            allowed = ", ".join(key for key in known if key not in ("base", "z_dim")) or "none"
            raise ValueError(f"unknown option {option!r} of the generator {name}; allowed: {allowed}")
    return FAMILIES[name](base, z_dim, **options)


class Generator(nn.Module):
    """The base: a learned P₀ and no task term. `base` is (S, m, n)."""

    rates: dict[str, float] = {}  # parameter → how much faster than P₀ it learns; 1 where it is not named

    def __init__(self, base: Tensor, z_dim: int):
        super().__init__()
        self.base = nn.Parameter(base.clone(memory_format=torch.contiguous_format))

    def forward(self, z: Tensor) -> Tensor:  # (T, K) → (T, S, m, n)
        raise NotImplementedError

    def rate_factor(self, name: str) -> float:
        """By how much the generator's parameter of that name learns faster than P₀."""
        return self.rates.get(name, 1.0)


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
class StaticMaps(Static):
    """P₀, trained, in a model whose gains and shifts still depend on the task: tells these from the maps."""


@family
class Linear(Generator):
    """P₀ + Σ_k z_k B_k: the simplest form. B starts at zero."""

    rates = {"directions": 0.4}  # they add up over the dimensions of z

    def __init__(self, base: Tensor, z_dim: int):
        super().__init__(base, z_dim)
        self.directions = nn.Parameter(torch.zeros(z_dim, *base.shape))

    def forward(self, z: Tensor) -> Tensor:
        maps = torch.addmm(self.base.flatten(), z, self.directions.flatten(1))  # (T, S·m·n)
        return maps.view(-1, *self.base.shape)


@family
class LowRank(Generator):
    """P₀ + U diag(A z) Vᵀ, at most r columns in U and V. A starts at zero."""

    def __init__(self, base: Tensor, z_dim: int, rank: int = 4):
        super().__init__(base, z_dim)
        stack, m, n = base.shape
        rank = min(_positive(rank=rank), m, n)
        self.left = nn.Parameter(torch.randn(stack, m, rank))
        self.right = nn.Parameter(torch.randn(stack, n, rank) / math.sqrt(rank))
        self.gate = nn.Parameter(torch.zeros(z_dim, stack * rank))

    def forward(self, z: Tensor) -> Tensor:
        gate = (z @ self.gate).view(len(z), len(self.base), 1, -1)  # (T, S, 1, r)
        return self.base + (self.left * gate) @ self.right.mT


@family
class LowRankMLP(Generator):
    """P₀ + U(z) V(z)ᵀ, at most r columns each, from one small MLP for the whole stack (as in Text-to-LoRA).

    The hidden layer is GELU(z W + e): e, an embedding of every map, tells layers and roles apart. U starts at zero.
    """

    rates = {"left": 0.1}  # adds up over the hidden units

    def __init__(self, base: Tensor, z_dim: int, rank: int = 4, hidden: int = 32):
        super().__init__(base, z_dim)
        stack, m, n = base.shape
        hidden, rank = _positive(hidden=hidden), min(_positive(rank=rank), m, n)
        self.inward = nn.Parameter(torch.randn(z_dim, hidden) / math.sqrt(z_dim))
        self.embedding = nn.Parameter(torch.randn(stack, hidden))
        self.left = nn.Parameter(torch.zeros(hidden, m * rank))
        self.right = nn.Parameter(torch.randn(hidden, n * rank) / math.sqrt(hidden * rank))

    def forward(self, z: Tensor) -> Tensor:
        h = F.gelu((z @ self.inward).unsqueeze(1) + self.embedding)  # (T, S, H)
        _, m, n = self.base.shape
        left, right = (h @ self.left).unflatten(-1, (m, -1)), (h @ self.right).unflatten(-1, (n, -1))
        return self.base + left @ right.mT  # (T, S, m, r), (T, S, n, r)


@family
class Kronecker(Generator):
    """P₀ + Σ_k A_k(z) ⊗ B_k, A_k linear in z and zero at the start: cheap, and of full rank.

    B_k is (m₂, n₂), the largest divisors of m and n up to their roots: 1 for a prime, and A_k as large as the map.
    """

    def __init__(self, base: Tensor, z_dim: int, terms: int = 4):
        super().__init__(base, z_dim)
        stack, m, n = base.shape
        terms, rows, columns = _positive(terms=terms), _divisor(m), _divisor(n)
        self.coefficients = nn.Parameter(torch.zeros(z_dim, stack, terms, m // rows, n // columns))
        self.blocks = nn.Parameter(torch.randn(stack, terms, rows, columns) / math.sqrt(terms))

    def forward(self, z: Tensor) -> Tensor:
        a = (z @ self.coefficients.flatten(1)).view(-1, *self.coefficients.shape[1:])  # (T, S, k, m₁, n₁)
        term = torch.einsum("tskab,skcd->tsacbd", a, self.blocks)
        return self.base + term.reshape(-1, *self.base.shape)


@family
class Orthonormal(Generator):
    """The polar factor of another family's maps X, the nearest matrices with orthonormal columns: X (XᵀX)^(−1/2).

    The root is made by a fixed number of Newton–Schulz steps of fifth order on XᵀX: no SVD, whose gradient does not
    exist where singular values are equal, as all are at the start. Where the singular values of X are within a factor
    2.5 of each other, four steps bring PᵀP to 1e-5 of the identity, two to 0.1; within a factor 5 to 1e-3 and 0.6.
    Further `options` go to the inner family. P₀ must have orthonormal columns (ValueError): maps that start at zero
    need another family.
    """

    def __init__(self, base: Tensor, z_dim: int, inner: str = "Linear", steps: int = 4, **options):
        nn.Module.__init__(self)  # P₀ belongs to the inner generator
        self.steps = _positive(steps=steps)
        error = (base.mT @ base - torch.eye(base.shape[-1]).to(base)).abs().max().item()
        if error > 1e-3:
            raise ValueError(
                f"Orthonormal starts from maps with orthonormal columns; PᵀP of this P₀ {tuple(base.shape)} is "
                f"{error:.2g} away from the identity"
            )
        self.inner = make_generator(inner, base, z_dim, **options)

    @property
    def base(self) -> Tensor:
        return self.inner.base

    def rate_factor(self, name: str) -> float:
        return self.inner.rate_factor(name.removeprefix("inner."))

    def forward(self, z: Tensor) -> Tensor:
        maps = self.inner(z)
        with torch.autocast(maps.device.type, enabled=False):  # in bfloat16 the steps would end elsewhere
            x = maps.flatten(0, 1).to(torch.promote_types(maps.dtype, torch.float32))
            return _Polar.apply(x, self.steps).view(maps.shape)


@family
class Mixture(Generator):
    """Σ_e softmax(g z)_e P_e, P_e = P₀ + D_e: experts that start alike, mixed by a gate of each map.

    D starts at zero, g at random (logits of standard deviation 2 for entries of z near 1): tasks pull at experts of
    their own.
    """

    def __init__(self, base: Tensor, z_dim: int, experts: int = 4):
        super().__init__(base, z_dim)
        experts = _positive(experts=experts)
        self.offsets = nn.Parameter(torch.zeros(experts, *base.shape))
        self.gate = nn.Parameter(torch.randn(z_dim, len(base) * experts) * 2 / math.sqrt(z_dim))

    def forward(self, z: Tensor) -> Tensor:
        share = (z @ self.gate).view(len(z), len(self.base), -1).softmax(-1)  # (T, S, E)
        return self.base + torch.einsum("tse,esmn->tsmn", share, self.offsets)


def _positive(**option: int) -> int:
    """The value of an option that has to be a whole number of 1 or more; raises ValueError naming it."""
    ((name, value),) = option.items()
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number of 1 or more")
    return value


def _divisor(size: int) -> int:
    """The largest divisor of size that is not above its root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)


class _Polar(torch.autograd.Function):
    """X (XᵀX)^(−1/2) of X (B, m, n), m ≥ n, by Newton–Schulz steps: singular values s become s (15 − 10 s² + 3 s⁴) / 8.

    That converges where s² < 7/3. All matrices (n × n) are polynomials of one, XᵀX, so they commute and are symmetric;
    hence of a gradient only the symmetric part counts, which takes three quarters of the products of autograd.
    """

    @staticmethod
    def forward(ctx, x: Tensor, steps: int) -> Tensor:
        gram = torch.bmm(x.mT, x)  # (B, n, n)
        square = torch.bmm(gram, gram)
        scale = _scale_of(gram, square)  # the polar factor has no scale
        grams = [gram / scale]  # G of each step
        factors = [square.mul_(0.375 / scale.square())]  # (15 − 10 G + 3 G²) / 8 of each
        factors[0].sub_(grams[0], alpha=1.25).diagonal(dim1=-2, dim2=-1).add_(1.875)
        products = [factors[0]]  # of the factors up to each; the last is the root
        for _ in range(steps - 1):
            gram = torch.bmm(torch.bmm(factors[-1], grams[-1]), factors[-1])
            grams.append(gram)
            factors.append(torch.baddbmm(gram, gram, gram, beta=-1.25, alpha=0.375))
            factors[-1].diagonal(dim1=-2, dim2=-1).add_(1.875)
            products.append(torch.bmm(products[-1], factors[-1]))
        root = products[-1] * scale.rsqrt()
        ctx.save_for_backward(x, scale, root, *grams, *factors, *products[:-1])
        ctx.steps = steps
        return torch.bmm(x, root)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, root, *rest = ctx.saved_tensors
        grams, factors, products = rest[: ctx.steps], rest[ctx.steps : 2 * ctx.steps], rest[2 * ctx.steps :]
        dx, droot = torch.bmm(grad, root), torch.bmm(x.mT, grad).mul_(scale.rsqrt())
        dgram = None  # of the step after
        for i in reversed(range(ctx.steps)):
            # of symmetric matrices twice the gradient, here and below: it is what X needs in the end
            dfactor = _and_transposed(torch.bmm(products[i - 1], droot) if i else droot)
            if dgram is not None:
                half = torch.bmm(dgram, factors[i])
                dfactor += _and_transposed(torch.bmm(half, grams[i]))
            if i:
                droot = torch.bmm(droot, factors[i])
            more = _and_transposed(torch.bmm(dfactor, grams[i])).mul_(0.375).sub_(dfactor, alpha=1.25)
            dgram = more if dgram is None else more.baddbmm_(factors[i], half)
        return dx.baddbmm_(x, dgram.div_(scale)), None


def _and_transposed(x: Tensor) -> Tensor:
    return x + x.mT


def _scale_of(gram: Tensor, square: Tensor) -> Tensor:
    """The size of the eigenvalues of G, (…, 1, 1): 1 for the identity, and never below 1/2.2 of the largest."""
    bound = square.abs().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()  # of the largest, by row sums of G²
    middle = torch.linalg.matrix_norm(square, keepdim=True) / torch.linalg.matrix_norm(gram, keepdim=True)
    return torch.maximum(middle, bound / 2.2).clamp_min(1e-30)
