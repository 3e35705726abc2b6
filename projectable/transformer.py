"""The one Transformer of this package; its weights are an argument.

What is notable:

- `forward(weights, tokens)` serves the source, the projected and the universal models. Any weight may carry
  a leading task axis (T, ...); products are then batched over tasks, and one call trains all tasks of a step.
- Pre-RMSNorm blocks, no gains in the forward pass: a gain γ multiplies the rows of the weight that reads the
  normalised stream, diag(γ)W, so whoever makes the weights folds it in. The same holds for FiLM and AdaLN.
- No biases, unless the maker of the weights adds them (`*_bias`: a folded shift, from FiLM or AdaLN).
- Position 0 has no token: its position embedding is the start of the sequence. Row i predicts token i.
- A second family, of `masked` shapes, differs in its reading alone: every row holds its own token and sees them all,
  half of them replaced by a mask, and only those are predicted. The mask is one more token, V + 1 rows of the
  embedding; the head's last column, there because a `Shape` has one vocabulary, is left out of the loss.
- On a CPU the loss never keeps the logits: `task_losses` computes loss and gradient in one pass.
- Sampling prepares the weights once: task axes filled in, layers unbound, 1/√d_h and the temperature folded in. A step
  touches one position of all sequences of all tasks; keys and values of earlier positions are cached.
- Each cache lies as its product reads it fastest on a CPU: keys in rows of length d_h, values in rows of length N.
- A token is drawn by inverting the cumulative distribution: there six times as fast as `torch.multinomial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Weights = dict[str, Tensor]

EPS = 1e-6  # of RMSNorm
MASKED = 0.5  # the share of a sequence's tokens that a masked model has to fill in


@dataclass(frozen=True)
class Shape:
    """Sizes of a Transformer. ValueError where `d_model` is no multiple of `d_head`: small ones have fewer heads."""

    d_model: int
    n_layers: int = 2
    d_head: int = 8
    mlp_ratio: int = 4
    vocab_size: int = 256  # of a masked model the mask counts, too: it is the last one
    length: int = 49  # tokens of an image
    masked: bool = False  # reads in both directions and fills in masked tokens

    def __post_init__(self) -> None:
        if self.d_model <= 0 or self.d_model % self.d_head:
            allowed = ", ".join(str(self.d_head * i) for i in range(1, 5))
            raise ValueError(f"d_model={self.d_model} is no multiple of d_head={self.d_head}; allowed: {allowed}, …")

    @property
    def n_heads(self) -> int:
        return self.d_model // self.d_head

    @property
    def d_mlp(self) -> int:
        return self.d_model * self.mlp_ratio

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of a plain model's weights, (in × out), layers stacked first."""
        n, d, m = self.n_layers, self.d_model, self.d_mlp
        return {
            "embedding": (self.vocab_size, d),
            "positions": (self.length, d),
            "qkv": (n, d, 3 * d),  # columns: q of all heads, k of all heads, v of all heads
            "out": (n, d, d),
            "up": (n, d, m),
            "down": (n, m, d),
            "head": (d, self.vocab_size),
        }

    def n_parameters(self) -> int:
        """Parameters of the deployed model, the RMSNorm gains folded in."""
        return sum(math.prod(s) for s in self.weight_shapes().values())

    def n_operations(self) -> int:
        """Multiply-adds of a forward pass over one sequence, per token (attention included)."""
        n, d, m = self.n_layers, self.d_model, self.d_mlp
        return n * (4 * d * d + 2 * d * m + d * (self.length + 1)) + d * self.vocab_size


class Products(TorchFunctionMode):
    """Counts the multiply-adds of matrix products while it is entered: `multiply_adds`, from the shapes they are given.

    Of `@`, mm, bmm, addmm, baddbmm, linear, and einsum of two; of those torch's own counter sees the same, but imports
    torch's compiler for it, for seconds in every process.
    """

    multiply_adds = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y, name = func(*args, **kwargs), func.__name__
        operands = [*args, *kwargs.values()]
        if name == "einsum" and isinstance(operands[0], str):
            self.multiply_adds += _einsum_size(*operands)
        elif name in ("matmul", "mm", "bmm", "linear"):
            self.multiply_adds += y.numel() * kwargs.get("input", operands[0]).shape[-1]
        elif name in ("addmm", "baddbmm"):
            first = kwargs.get("mat1", kwargs.get("batch1", operands[1]))
            self.multiply_adds += y.numel() * first.shape[-1]
        return y


def _einsum_size(equation: str, *operands) -> int:
    """The product of the sizes of all axes that the equation names, those of `...` among them."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    sizes: dict[str | int, int] = {}
    for letters, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        before, dots, after = letters.partition("...")
        unnamed = range(len(before) + len(after) - operand.dim(), 0) if dots else ()  # the last of them is -1
        for axis, size in zip([*before, *unnamed, *after], operand.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))  # an axis of one may stand for many
    return math.prod(sizes.values())


def initial_weights(shape: Shape, generator: torch.Generator | None = None) -> Weights:
    """Random weights: embeddings N(0, 0.3²), matrices N(0, 1/fan_in), writes to the stream smaller by √(2·layers)."""
    smaller = dict(head=2.0, out=math.sqrt(2 * shape.n_layers), down=math.sqrt(2 * shape.n_layers))
    weights = {}
    for name, size in shape.weight_shapes().items():
        std = 0.3 if name in ("embedding", "positions") else 1 / math.sqrt(size[-2]) / smaller.get(name, 1.0)
        weights[name] = torch.randn(size, generator=generator) * std
    return weights


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) with a backward pass of four passes over the stream, where autograd makes eight."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1 / y.shape[-1]).mul_(scale)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis; no gain (it lives in the weights that read the result)."""
    return _RMSNorm.apply(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, M, in) times weight (in, out) or (T, in, out), plus bias (out) or (T, out)."""
    if bias is not None and bias.dim() == 2 and weight.dim() == 3:
        return torch.baddbmm(bias.unsqueeze(1), x, weight)
    y = torch.matmul(x, weight) if weight.dim() == 2 else torch.bmm(x, weight)
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias.unsqueeze(-2))
    return y


def embed(weights: Weights, tokens: Tensor, causal: bool = True) -> Tensor:
    """tokens (T, B, N) → the stream's first state (T, B, N, d): the token before (or its own), plus the position."""
    n_tasks, _, length = tokens.shape
    table, positions = weights["embedding"], weights["positions"]
    index = tokens[:, :, :-1] if causal else tokens
    if table.dim() == 3:  # one table a task: (T, V, d) read as (T·V, d)
        offset = torch.arange(n_tasks, device=tokens.device) * table.shape[1]
        index = index + offset[:, None, None]
        table = table.reshape(-1, table.shape[-1])
    x = F.embedding(index, table)
    x = F.pad(x, (0, 0, 1, 0)) if causal else x  # (T, B, N, d): nothing stands before token 0
    positions = positions[..., :length, :]
    return x + (positions if positions.dim() == 2 else positions.unsqueeze(1))


def _layers(weights: Weights, name: str) -> tuple[Tensor | None, ...]:
    """A stacked weight, (L, in, out) or (T, L, in, out), or a bias, (L, out) or (T, L, out), layer by layer."""
    if name not in weights:
        return (None,) * weights["qkv"].shape[-3]
    return weights[name].unbind(-2 if name.endswith("_bias") else -3)


def _powers_of_2(scores: Callable[[], Tensor], causal: bool = False) -> tuple[Tensor, Tensor]:
    """2^scores, up to a factor a row that a softmax cancels, and the sums of its rows, (…, 1).

    Row maxima are slow: only where sums leave what float32 holds well are the scores made again, and shifted by them.
    """
    e = scores().exp2_()
    e = e.tril_() if causal else e
    total = e.sum(-1, keepdim=True)
    low, high = total.aminmax()
    if low > 1e-30 and high < 1e30:
        return e, total
    e = scores()
    if causal:
        e.add_(torch.full_like(e[0], -math.inf).triu_(1))
    e.sub_(e.amax(-1, keepdim=True)).exp2_()
    return e, e.sum(-1, keepdim=True)


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ/√d_h + causal mask) v for many small heads, three times as fast as the general kernels on a CPU.

    Small matrices decide how: every product writes rows of length N, never of length d_h; exponentials are
    powers of 2 and normalised after the product with v; of the (N × N) arrays only the exponentials are kept.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, causal: bool) -> Tensor:  # (G, N, 3, h, d_h) → (G, N, h·d_h)
        groups, length, _, n_heads, d_head = qkv.shape
        flat = qkv.permute(2, 0, 3, 4, 1).contiguous()  # with one head a view would do, but its products would be slow
        flat = flat.view(3, groups * n_heads, d_head, length)  # q, k, v as (G·h, d_h, N)
        q = flat[0] * (1 / (math.sqrt(d_head) * math.log(2)))  # scores in powers of 2
        e, total = _powers_of_2(lambda: torch.bmm(q.transpose(1, 2), flat[1]), causal)  # (G·h, N, N)
        total = total.transpose(1, 2)  # (G·h, 1, N)
        y = torch.bmm(flat[2], e.transpose(1, 2)).div_(total)  # (G·h, d_h, N)
        ctx.save_for_backward(q, flat, e, total, y)
        ctx.heads = n_heads
        return y.view(groups, n_heads * d_head, length).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, flat, e, total, y = ctx.saved_tensors
        _, rows, d_head, length = flat.shape
        grad = grad.transpose(1, 2).reshape(rows, d_head, length) / total
        delta = (grad * y).sum(1).neg_().unsqueeze(-1)  # (G·h, N, 1)
        dflat = torch.empty_like(flat)
        torch.bmm(grad, e, out=dflat[2])
        ds = torch.baddbmm(delta, grad.transpose(1, 2), flat[2]).mul_(e)
        torch.bmm(flat[1], ds.transpose(1, 2), out=dflat[0]).mul_(1 / math.sqrt(d_head))
        torch.bmm(q, ds, out=dflat[1]).mul_(math.log(2))
        parts = [part.view(-1, ctx.heads * d_head, length).mT for part in dflat]  # each (G, N, h·d_h)
        return torch.stack(parts, 2).unflatten(-1, (ctx.heads, d_head)), None  # twice as fast as one permutation


def attention(qkv: Tensor, d_head: int, batch: int, causal: bool = True) -> Tensor:
    """Attention to what stands before a row and itself, or to all. qkv (T, B·N, 3·d) → (T, B·N, d)."""
    n_tasks, rows, three_d = qkv.shape
    d = three_d // 3
    qkv = qkv.view(n_tasks * batch, rows // batch, 3, d // d_head, d_head)
    if qkv.device.type == "cpu":
        y = _Attention.apply(qkv, causal)
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (T·B, h, N, d_h)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    return y.reshape(n_tasks, rows, d)


def hidden(
    weights: Weights,
    tokens: Tensor,
    d_head: int = 8,
    watch: Callable[[str, Tensor], None] | None = None,
    causal: bool = True,
) -> Tensor:
    """The normalised last state of the stream, (T, B·N, d). `watch(name, x)` sees what each weight reads."""
    n_tasks, batch, length = tokens.shape
    x = embed(weights, tokens, causal).view(n_tasks, batch * length, -1)
    names = ("qkv", "qkv_bias", "out", "up", "up_bias", "down")
    for layer, (qkv, qkv_bias, out, up, up_bias, down) in enumerate(
        zip(*(_layers(weights, n) for n in names), strict=True)
    ):
        y = attention(linear(rms_norm(x), qkv, qkv_bias), d_head, batch, causal)
        z = linear(y, out)
        x = x + z
        a = F.gelu(linear(rms_norm(x), up, up_bias))
        x = x + linear(a, down)
        if watch is not None:
            watch(f"attention.{layer}", y)
            watch(f"mlp.{layer}", a)
            watch(f"stream.{layer}", x)
    return rms_norm(x)


def forward(weights: Weights, tokens: Tensor, d_head: int = 8) -> Tensor:
    """Logits (T, B, N, V) of tokens (T, B, N); row i sees tokens before i only."""
    h = hidden(weights, tokens, d_head)
    return linear(h, weights["head"], weights.get("head_bias")).view(*tokens.shape, -1)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a linear head: loss and gradient in one go, so that the logits are passed over once."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (T, M, d), (T, d, V), (T, M) → (T,)
        scaled = weight / math.log(2)
        e, total = _powers_of_2(lambda: torch.bmm(h, scaled))  # (T, M, V), (T, M, 1)
        targets = targets.unsqueeze(-1)
        hit = e.gather(-1, targets)
        e.scatter_(-1, targets, hit - total)  # probabilities minus the targets, times total
        # written in rows of length M: faster for small d
        dh = torch.bmm(weight, e.transpose(1, 2)).div_(total.transpose(1, 2)).transpose(1, 2)
        dweight = torch.bmm((h / total).transpose(1, 2), e)
        ctx.save_for_backward(dh, dweight)
        return -(hit / total).clamp_min(1e-38).log().mean((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dh, dweight = ctx.saved_tensors
        grad = (grad / dh.shape[1]).view(-1, 1, 1)
        return dh * grad, dweight * grad, None


def task_losses(weights: Weights, tokens: Tensor, d_head: int = 8) -> Tensor:
    """Mean cross-entropy of each task's tokens (T, B, N), in nats per token: (T,)."""
    h = hidden(weights, tokens, d_head)  # (T, B·N, d)
    head, bias = weights["head"], weights.get("head_bias")
    if torch.is_autocast_enabled(h.device.type):  # the loss itself stays in float32
        with torch.autocast(h.device.type, enabled=False):
            return _losses(h.float(), head.float(), None if bias is None else bias.float(), tokens)
    return _losses(h, head, bias, tokens)


def _losses(h: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """`task_losses` from the last state of the stream, h (T, B·N, d)."""
    fused = h.device.type == "cpu" and torch.is_grad_enabled()
    if fused and (bias is None or head.dim() == 3 and bias.dim() == 2):
        targets = tokens.reshape(tokens.shape[0], -1)
        if bias is not None:  # one more row, which reads a one
            h, head = F.pad(h, (0, 1), value=1.0), torch.cat([head, bias.unsqueeze(1)], dim=1)
        return _HeadLoss.apply(h, head.expand(len(h), -1, -1), targets)
    logits = linear(h, head, bias)
    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return nll.view(tokens.shape[0], -1).mean(1)


def draw_places(n_tasks: int, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens of (n_tasks, batch, length) are masked: their places (n_tasks, batch, n), n = length · MASKED.

    As many in every sequence, so that shapes stay rectangular, and only these rows pass through the head.
    """
    n = max(1, int(length * MASKED))
    return torch.rand(n_tasks, batch, length, generator=generator).argsort(-1)[..., :n]


def masked_losses(weights: Weights, tokens: Tensor, places: Tensor, d_head: int = 8) -> Tensor:
    """Mean cross-entropy of the tokens (T, B, N) of each task at the masked places (T, B, n), in nats: (T,)."""
    n_tasks, batch, length = tokens.shape
    mask = weights["embedding"].shape[-2] - 1
    h = hidden(weights, tokens.scatter(-1, places, mask), d_head, causal=False)  # (T, B·N, d)
    rows = places + length * torch.arange(batch, device=places.device).unsqueeze(-1)
    rows = rows.view(n_tasks, -1, 1).expand(-1, -1, h.shape[-1])
    h = h.gather(1, rows)  # (T, B·n, d)
    head, bias = weights["head"][..., :mask], weights.get("head_bias")
    dtype = torch.promote_types(h.dtype, torch.float32)  # under autocast the loss itself stays in float32
    with torch.autocast(h.device.type, enabled=False):
        bias = None if bias is None else bias[..., :mask].to(dtype)
        return _losses(h.to(dtype), head.to(dtype), bias, tokens.gather(-1, places))


# --------------------------------------------------------------------------- sampling with a key–value cache

PLAIN_AXES = dict(embedding=2, positions=2, qkv=3, out=3, up=3, down=3, head=2, qkv_bias=2, up_bias=2, head_bias=1)


class _Decoder:
    """Prepared weights of T tasks and the caches of n sequences each: `step(tokens before) → logits`."""

    def __init__(self, weights: Weights, n_tasks: int, n: int, length: int, d_head: int, temperature: float):
        d, room = weights["qkv"].shape[-2], weights["positions"].shape[-2]
        if not 1 <= length <= room:
            raise ValueError(f"length={length} does not fit the model's positions; allowed: 1 to {room}")
        if d_head < 1 or d % d_head:
            raise ValueError(f"d_head={d_head} does not divide the model's width; allowed: divisors of {d}")
        scale = weights["qkv"].new_ones(weights["qkv"].shape[-1])
        scale[:d] = 1 / math.sqrt(d_head)  # of the queries
        factors: dict = dict(qkv=scale, qkv_bias=scale, head=1 / temperature, head_bias=1 / temperature)
        full = {}
        for name, w in weights.items():  # every weight gets the task axis
            w = w.detach() if w.dim() > PLAIN_AXES[name] else w.detach().unsqueeze(0)
            w = w.expand(n_tasks, *w.shape[1:])
            full[name] = w * factors[name] if name in factors else w
        self.size, self.heads, self.at = (n_tasks, n, d), (n_tasks, n, d // d_head, d_head), 0
        self.table = full["embedding"].reshape(-1, d)  # (T·V, d)
        self.offset = torch.arange(n_tasks, device=self.table.device).unsqueeze(1) * weights["embedding"].shape[-2]
        self.positions = full["positions"].unsqueeze(2).unbind(1)  # N of (T, 1, d)
        self.head = full["head"], full.get("head_bias")
        layers: list = [full[name].contiguous().unbind(1) for name in ("qkv", "out", "up", "down")]
        for name in ("qkv_bias", "up_bias"):
            layers.append(full[name].unbind(1) if name in full else [None] * len(layers[0]))
        for shape in ((length, d_head), (d_head, length)):  # caches of keys and values
            layers.append([self.table.new_empty(*self.heads[:3], *shape) for _ in layers[0]])
        self.layers = list(zip(*layers, strict=True))

    def step(self, before: Tensor | None) -> Tensor:
        """Logits (T, n, V) of the next token, after the tokens before it (T, n); None at the start."""
        at, heads = self.at, self.heads
        x = self.positions[at].expand(self.size)
        if before is not None:
            x = x + F.embedding(before + self.offset, self.table)
        for qkv, out, up, down, qkv_bias, up_bias, keys, values in self.layers:
            q, k, v = linear(rms_norm(x), qkv, qkv_bias).chunk(3, -1)  # each (T, n, d)
            keys[..., at, :], values[..., at] = k.view(heads), v.view(heads)
            seen = keys.flatten(0, 2)[:, : at + 1], values.flatten(0, 2)[..., : at + 1]  # (T·n·h, i, d_h), (…, d_h, i)
            scores = torch.bmm(q.reshape(-1, 1, heads[-1]), seen[0].transpose(1, 2))  # (T·n·h, 1, i)
            y = torch.bmm(scores.softmax(-1), seen[1].transpose(1, 2))  # (T·n·h, 1, d_h)
            x = x + torch.bmm(y.view(self.size), out)
            x = x + torch.bmm(F.gelu(linear(rms_norm(x), up, up_bias)), down)
        self.at += 1
        return linear(rms_norm(x), *self.head)


@torch.no_grad()
def sample(
    weights: Weights,
    n: int,
    length: int,
    d_head: int = 8,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw n sequences of every task: tokens (T, n, length), int64; T = 1 where no weight has a task axis.

    `temperature` divides the logits. The same state of `generator` gives the same tokens. Raises ValueError naming
    the value and what is allowed.
    """
    if not 1e-6 <= temperature < math.inf:  # below, logits leave what float32 holds
        raise ValueError(f"temperature={temperature} is no temperature; allowed: 1e-6 or more")
    if n < 1:
        raise ValueError(f"n={n} is no number of sequences; allowed: 1 or more")
    n_tasks = max(len(w) if w.dim() > PLAIN_AXES[name] else 1 for name, w in weights.items())
    decoder = _Decoder(weights, n_tasks, n, length, d_head, temperature)
    tokens: list[Tensor] = []
    for _ in range(length):
        total = decoder.step(tokens[-1] if tokens else None).softmax(-1).cumsum(-1)  # (T, n, V)
        point = torch.rand((n_tasks, n, 1), generator=generator, dtype=total.dtype, device=total.device)
        drawn = torch.searchsorted(total, point.mul_(total[..., -1:]), right=True)
        tokens.append(drawn.squeeze(-1).clamp_max_(total.shape[-1] - 1))
    return torch.stack(tokens, -1)
