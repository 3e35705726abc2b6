"""Sampling: new token sequences from any weights of the one Transformer, token by token.

What is notable:

- The weights are prepared once: task axes filled in, layers unbound, 1/√d_h and the temperature folded in.
- A step touches one position of all sequences of all tasks; keys and values of earlier positions are cached. Each
  cache lies as its product reads it fastest on a CPU: keys in rows of length d_h, values in rows of length N.
- A token is drawn by inverting the cumulative distribution: there six times as fast as `torch.multinomial`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .transformer import Weights, rms_norm

PLAIN_AXES = dict(embedding=2, positions=2, qkv=3, out=3, up=3, down=3, head=2, qkv_bias=2, up_bias=2, head_bias=1)


class _Decoder:
    """Prepared weights of T tasks and the caches of n sequences each: `step(tokens before) → logits`."""

    def __init__(self, weights: Weights, n_tasks: int, n: int, length: int, d_head: int, temperature: float = 1.0):
        d, room = weights["qkv"].shape[-2], weights["positions"].shape[-2]
        if not 1 <= length <= room:
            raise ValueError(f"length={length} does not fit the model's positions; allowed: 1 to {room}")
        if d_head < 1 or d % d_head:
            raise ValueError(f"d_head={d_head} does not divide the model's width; allowed: divisors of {d}")
        full = {}
        for name, w in weights.items():  # every weight gets the task axis
            w = w.detach() if w.dim() > PLAIN_AXES[name] else w.detach().unsqueeze(0)
            full[name] = w.expand(n_tasks, *w.shape[1:])
        scale = torch.ones_like(full["qkv"][0, 0, 0])
        scale[:d] = 1 / math.sqrt(d_head)  # of the queries
        factors: dict[str, Tensor | float] = dict(qkv=scale, qkv_bias=scale)
        factors |= dict(head=1 / temperature, head_bias=1 / temperature)
        for name, factor in factors.items():
            if name in full:
                full[name] = full[name] * factor
        self.size, self.heads, self.at = (n_tasks, n, d), (n_tasks, n, d // d_head, d_head), 0
        self.table = full["embedding"].reshape(-1, d)  # (T·V, d)
        self.offset = torch.arange(n_tasks, device=self.table.device).unsqueeze(1) * weights["embedding"].shape[-2]
        self.positions = full["positions"].unsqueeze(2).unbind(1)  # N of (T, 1, d)
        self.head = full["head"], full["head_bias"].unsqueeze(1) if "head_bias" in full else None
        layers: list = [full[name].contiguous().unbind(1) for name in ("qkv", "out", "up", "down")]
        for name in ("qkv_bias", "up_bias"):
            layers.append(full[name].unsqueeze(2).unbind(1) if name in full else [None] * len(layers[0]))  # (T, 1, ·)
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
            q, k, v = _affine(rms_norm(x), qkv, qkv_bias).chunk(3, -1)  # each (T, n, d)
            keys[..., at, :], values[..., at] = k.view(heads), v.view(heads)
            seen = keys.flatten(0, 2)[:, : at + 1], values.flatten(0, 2)[..., : at + 1]  # (T·n·h, i, d_h), (…, d_h, i)
            scores = torch.bmm(q.reshape(-1, 1, heads[-1]), seen[0].transpose(1, 2))  # (T·n·h, 1, i)
            y = torch.bmm(scores.softmax(-1), seen[1].transpose(1, 2))  # (T·n·h, 1, d_h)
            x = x + torch.bmm(y.view(self.size), out)
            x = x + torch.bmm(F.gelu(_affine(rms_norm(x), up, up_bias)), down)
        self.at += 1
        return _affine(rms_norm(x), *self.head)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, n, in) times weight (T, in, out), plus bias (T, 1, out)."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is no temperature; allowed: any number above 0")
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


@torch.no_grad()
def logits_cached(weights: Weights, tokens: Tensor, d_head: int = 8) -> Tensor:
    """What `transformer.forward` gives, token by token as `sample` does it: tokens (T, n, N) → (T, n, N, V)."""
    n_tasks, n, length = tokens.shape
    decoder = _Decoder(weights, n_tasks, n, length, d_head)
    return torch.stack([decoder.step(t) for t in (None, *tokens[..., :-1].unbind(-1))], 2)
