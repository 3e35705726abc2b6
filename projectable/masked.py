"""A second architectural family: bidirectional Transformers that fill in masked patches, and their projections.

What is notable:

- Weights, task terms, maps and training are those of the first family. New are the reading (every row sees all tokens,
  half of them replaced by a mask), and with it the loss: mean cross-entropy of the masked tokens, in nats each.
- The mask is one more token: V + 1 rows of the embedding. It is never to be predicted, so the head's last column, there
  because a `Shape` has one vocabulary, is left out of the loss: what is left is a distribution over the V codes.
- As many tokens are masked in every sequence, so shapes stay rectangular, and only these rows pass through the head.
- In training masks come from torch's global generator on the CPU, whose state a checkpoint holds; they are drawn for
  all tasks, so that processes which share the tasks of a step draw alike. All members of a model see the same ones.
- Without gradients masks are fixed: every model, seed and member is evaluated on the same ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .baselines import Model, Universal
from .projection import Projectable
from .transformer import Shape, Weights, _layers, _losses, embed, linear, rms_norm

SHARE = 0.5  # of a sequence's tokens that are masked
SEED = 0  # of the masks of an evaluation


def with_mask(shape: Shape) -> Shape:
    """The shape of a masked model for tokens of `shape`: the mask is the last of V + 1 tokens."""
    return replace(shape, vocab_size=shape.vocab_size + 1)


def draw_places(n_tasks: int, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens of (n_tasks, batch, length) are masked: their places (n_tasks, batch, n), n = length · SHARE."""
    n = max(1, int(length * SHARE))
    return torch.rand(n_tasks, batch, length, generator=generator).argsort(-1)[..., :n]


def attention(qkv: Tensor, d_head: int, batch: int) -> Tensor:
    """Attention in both directions. qkv (T, B·N, 3·d) → (T, B·N, d)."""
    n_tasks, rows, three_d = qkv.shape
    q, k, v = qkv.view(n_tasks * batch, rows // batch, 3, -1, d_head).permute(2, 0, 3, 1, 4)  # each (T·B, h, N, d_h)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n_tasks, rows, three_d // 3)


def hidden(weights: Weights, tokens: Tensor, d_head: int = 8) -> Tensor:
    """The normalised last state of the stream, (T, B·N, d): row i holds token i of (T, B, N), and has seen them all."""
    n_tasks, batch, length = tokens.shape
    late = weights | {"positions": F.pad(weights["positions"], (0, 0, 1, 0))}
    x = embed(late, F.pad(tokens, (0, 1)))[:, :, 1:]  # `embed` puts token i in row i + 1: (T, B, N, d)
    x = x.reshape(n_tasks, batch * length, -1)
    names = ("qkv", "qkv_bias", "out", "up", "up_bias", "down")
    for qkv, qkv_bias, out, up, up_bias, down in zip(*(_layers(weights, n) for n in names), strict=True):
        x = x + linear(attention(linear(rms_norm(x), qkv, qkv_bias), d_head, batch), out)
        x = x + linear(F.gelu(linear(rms_norm(x), up, up_bias)), down)
    return rms_norm(x)


def masked_losses(weights: Weights, tokens: Tensor, places: Tensor, d_head: int = 8) -> Tensor:
    """Mean cross-entropy of the tokens (T, B, N) of each task at the masked places (T, B, n), in nats: (T,)."""
    n_tasks, batch, length = tokens.shape
    mask = weights["embedding"].shape[-2] - 1
    h = hidden(weights, tokens.scatter(-1, places, mask), d_head)  # (T, B·N, d)
    rows = places + length * torch.arange(batch, device=places.device).unsqueeze(-1)
    rows = rows.view(n_tasks, -1, 1).expand(-1, -1, h.shape[-1])
    h = h.gather(1, rows)  # (T, B·n, d)
    head, bias = weights["head"][..., :mask], weights.get("head_bias")
    dtype = torch.promote_types(h.dtype, torch.float32)  # under autocast the loss itself stays in float32
    with torch.autocast(h.device.type, enabled=False):
        bias = None if bias is None else bias[..., :mask].to(dtype)
        return _losses(h.to(dtype), head.to(dtype), bias, tokens.gather(-1, places))


class Masked(Model):
    """What makes a model a masked one: its loss. `n_tasks` is the number of all tasks."""

    n_tasks: int
    draws = True

    def losses(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Nats per masked token of every member on its tasks: {member: (T,)}; tokens (T, B, N)."""
        fixed = None if torch.is_grad_enabled() else torch.Generator().manual_seed(SEED)
        _, batch, length = tokens.shape
        places = draw_places(self.n_tasks, batch, length, fixed)[task_ids.cpu()].to(tokens.device)
        return {m: masked_losses(self.weights(m, task_ids), tokens, places, self.shape.d_head) for m in self.members}


class MaskedUniversal(Masked, Universal):
    """One masked Transformer for all tasks, told the task in any way that `Universal` knows; the source is one, too.

    `shape` counts the mask (`with_mask`).
    """

    def __init__(self, shape: Shape, n_tasks: int, *args, **options):
        super().__init__(shape, n_tasks, *args, **options)
        self.n_tasks = n_tasks


class MaskedProjectable(Masked, Projectable):
    """A masked source and its projections of several sizes.

    P₀ by PCA is that of the source's activations as `base_maps` sees them, from left to right with no token masked:
    with those of its own reading nothing is gained (validation images).
    """
