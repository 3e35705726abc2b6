"""Projection: source weights + task vector + size → the weights of a small Transformer.

    reads of the stream (q, k, v, up, head)   √(d/d_s) · Pᵀ W G_out
    writes to the stream (out, down)          G_inᵀ W P
    embedding, positions                      E P

P (d × d_s) maps the stream; G maps heads (one for q and k, one for v and out) and neurons (up and down).
All maps come from matrix generators and depend on the task through z. √(d/d_s) keeps the scale of what a read
sees after an RMSNorm in the smaller space. Two layouts: `shared` (one P and one G a role), `per_matrix`
(each matrix has its own left and right map).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .baselines import Model, Universal, modulated
from .conditioning import LearnedID
from .generators import make_generator
from .transformer import Shape, Weights, hidden

LAYOUTS = ("shared", "per_matrix")
BASES = ("pca", "slice", "random")
SOURCE_MODES = ("trained", "frozen", "random_trained", "random_frozen")


def small_shape(source: Shape, d_model: int) -> Shape:
    """The shape of a projected model of that size; raises ValueError where the source cannot give it."""
    if d_model > source.d_model:
        allowed = f"multiples of {source.d_head} up to {source.d_model}"
        raise ValueError(f"size {d_model} is above the source's {source.d_model}; allowed: {allowed}")
    return replace(source, d_model=d_model)


@torch.no_grad()
def base_maps(weights: Weights, tokens: Tensor, shape: Shape, d_model: int, kind: str = "pca", seed: int = 0):
    """P₀ of stream (d, d_s), heads (L, d, d_s) and neurons (L, 4d, 4d_s), chosen on training tokens (T, B, N).

    `pca`: the leading directions of the source's normalised stream, and the heads and neurons that write most to
    it; `slice`: the first of each; `random`: a random orthonormal P, the first heads and neurons.
    """
    small = small_shape(shape, d_model)
    d, layers, heads = shape.d_model, shape.n_layers, small.n_heads
    if kind not in BASES:
        raise ValueError(f"unknown p0 {kind!r}; allowed: {', '.join(BASES)}")
    top_heads = torch.arange(heads).expand(layers, -1)
    top_neurons = torch.arange(small.d_mlp).expand(layers, -1)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        stream = torch.linalg.qr(torch.randn(d, d, generator=generator))[0][:, :d_model]
    elif kind == "slice":
        stream = torch.eye(d)[:, :d_model]
    else:
        seen: dict[str, Tensor] = {}
        last = hidden(weights, tokens, shape.d_head, watch=seen.__setitem__)
        states = [seen[f"stream.{i}"] for i in range(layers)] + [last]
        covariance = torch.zeros(d, d, dtype=torch.float64)
        for x in states:
            x = x.reshape(-1, d).double()
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
            covariance += x.T @ x
        stream = torch.linalg.eigh(covariance)[1].flip(1)[:, :d_model].float()
        head_power, neuron_power = [], []
        for i in range(layers):
            y = seen[f"attention.{i}"].reshape(-1, shape.n_heads, shape.d_head)
            out = weights["out"][i].view(shape.n_heads, shape.d_head, d)
            head_power.append(torch.einsum("nhe,hed->hnd", y, out).square().mean((1, 2)))
            a = seen[f"mlp.{i}"].reshape(-1, shape.d_mlp)
            neuron_power.append(a.square().mean(0) * weights["down"][i].square().sum(1))
        top_heads = torch.stack(head_power).argsort(1, descending=True)[:, :heads]
        top_neurons = torch.stack(neuron_power).argsort(1, descending=True)[:, : small.d_mlp]
    columns = top_heads.unsqueeze(-1) * shape.d_head + torch.arange(shape.d_head)  # (L, heads, d_h)
    select_heads = torch.eye(d)[columns.flatten(1)].transpose(1, 2)  # (L, d, d_s)
    select_neurons = torch.eye(shape.d_mlp)[top_neurons].transpose(1, 2)  # (L, 4d, 4d_s)
    return stream, select_heads, select_neurons


class Projection(nn.Module):
    """Maps of one size: `forward(source weights, z, c) -> Weights` with a leading task axis.

    Three generators: `stream` for every P, `heads` and `neurons` for every G. `slots` say which map of a stack
    a weight uses: the layout is nothing but that table.
    """

    def __init__(self, shape: Shape, d_model: int, bases, z_dim: int, family: str, layout: str = "shared", **options):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
        self.shape, self.small, self.layout = shape, small_shape(shape, d_model), layout
        stream, heads, neurons = bases
        layers = shape.n_layers
        if layout == "shared":
            n_stream, n_heads, n_neurons = 1, 2, 1  # one P; q and k, v and out; up and down
        else:
            n_stream, n_heads, n_neurons = 2 + 6 * layers, 4, 2
        self.stream = make_generator(family, stream.expand(n_stream, -1, -1), z_dim, **options)
        self.heads = make_generator(family, heads.repeat(n_heads, 1, 1), z_dim, **options)
        self.neurons = make_generator(family, neurons.repeat(n_neurons, 1, 1), z_dim, **options)
        n_reads = 2 * layers + 1
        self.modulation = make_generator(family, torch.zeros(1, 2 * n_reads, d_model), z_dim, **options)
        # a selected start leaves every column of norm 1: the √(d/d_s) of the reads keeps the scale
        self.read_scale = math.sqrt(shape.d_model / d_model)

    def forward(self, weights: Weights, z: Tensor, task_embedding: Tensor | None = None) -> Weights:
        """The small weights of T tasks. `weights`: a plain source; z (T, K); task_embedding c(t) (T, d) or None."""
        d, layers = self.shape.d_model, self.shape.n_layers
        p, g, n = self.stream(z), self.heads(z), self.neurons(z)
        if self.layout == "shared":
            p = p.squeeze(1)  # (T, d, d_s): one P for all
            p_embedding = p_head = p_up = p_out = p_down = p
            q, k, v = _read(p, weights["qkv"]).split(d, dim=-1)  # each (T, L, d_s, d)
            g_qk, g_vo = g.split(layers, dim=1)  # each (T, L, d, d_s)
            g_up = g_down = n  # (T, L, 4d, 4d_s)
        else:
            p_embedding, p_head, body = p.split([1, 1, 6 * layers], dim=1)
            p_embedding, p_head = p_embedding.squeeze(1), p_head.squeeze(1)
            *p_qkv, p_up, p_out, p_down = body.split(layers, dim=1)  # each (T, L, d, d_s)
            q, k, v = (_read(p, w) for p, w in zip(p_qkv, weights["qkv"].split(d, dim=-1), strict=True))
            g_qk, g_vo = g.split(2 * layers, dim=1)
            g_up, g_down = n.split(layers, dim=1)
        # Gᵀ(W P) = ((W P)ᵀ G)ᵀ: reads and writes lie side by side, so that a shared G costs one product
        out, down = _write(weights["out"], p_out), _write(weights["down"], p_down)  # (T, L, d_s, d), (T, L, d_s, 4d)
        q, k = _times(q, k, g_qk)
        v, out = _times(v, out, g_vo)
        up, down = _times(_read(p_up, weights["up"]), down, g_up, g_down)
        positions = weights["positions"]
        if task_embedding is not None:
            positions = positions + task_embedding.unsqueeze(1)  # (T, N, d)
        small = {
            "embedding": weights["embedding"] @ p_embedding,
            "positions": positions @ p_embedding,
            "qkv": torch.cat([q, k, v], dim=-1) * self.read_scale,
            "out": out.transpose(-1, -2),
            "up": up * self.read_scale,
            "down": down.transpose(-1, -2),
            "head": p_head.transpose(-1, -2) @ weights["head"] * self.read_scale,
        }
        gain, shift = self.modulation(z).squeeze(1).chunk(2, dim=1)  # each (T, 2L+1, d_s)
        small = modulated(small, 1 + gain, shift, layers)
        # maps that do not depend on the task give plain weights, but for what carries c(t)
        return {name: w.squeeze(0) if len(w) < len(z) else w for name, w in small.items()}


def _times(a: Tensor, b: Tensor, g: Tensor, g_b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a G, b G of a, b (T, L, m, k): G (T, L, k, n) for both, or two of them stacked (T, 2L, k, n), or given apart."""
    if g_b is None and g.shape[1] == 2 * a.shape[1]:
        g, g_b = g.chunk(2, dim=1)
    if g_b is None or g_b is g:
        both = torch.cat([a, b], dim=-2) @ g
        return both.split([a.shape[-2], b.shape[-2]], dim=-2)
    return a @ g, b @ g_b


def _read(p: Tensor, w: Tensor) -> Tensor:
    """Pᵀ W for all tasks and layers: p (T, d, d_s) or (T, L, d, d_s), w (L, d, k) → (T, L, d_s, k)."""
    return torch.einsum("tdi,ldk->tlik" if p.dim() == 3 else "tldi,ldk->tlik", p, w)


def _write(w: Tensor, p: Tensor) -> Tensor:
    """(W P)ᵀ for all tasks and layers: w (L, k, d), p (T, d, d_s) or (T, L, d, d_s) → (T, L, d_s, k)."""
    return torch.einsum("tdi,lkd->tlik" if p.dim() == 3 else "tldi,lkd->tlik", p, w)


class Projectable(Model):
    """A source and its projections of several sizes, with learned task IDs: the paper's model.

    `source_mode` says what becomes of the source: `trained` (keeps its own objective), `frozen`, or the controls
    `random_trained` and `random_frozen` (inner weights redrawn at matched scale; embeddings, positions and head
    kept; no objective of its own). `use_task_embedding=False` hides the source's c(t) from the small models.
    """

    def __init__(
        self,
        source: Universal,
        n_tasks: int,
        sizes: tuple[int, ...],
        tokens: Tensor,
        family: str = "Linear",
        z_dim: int = 8,
        layout: str = "shared",
        p0: str = "pca",
        source_mode: str = "trained",
        use_task_embedding: bool = True,
        source_weight: float = 1.0,
        seed: int = 0,
        **options,
    ):
        super().__init__()
        if source_mode not in SOURCE_MODES:
            raise ValueError(f"unknown source_mode {source_mode!r}; allowed: {', '.join(SOURCE_MODES)}")
        self.source, self.shape, self.sizes = source, source.shape, tuple(sizes)
        self.source_mode, self.use_task_embedding, self.source_weight = (
            source_mode,
            use_task_embedding,
            source_weight,
        )
        if source_mode.startswith("random"):
            redraw_inner_weights(source, seed)
        if source_mode.endswith("frozen"):
            source.requires_grad_(False)
        self.members = (("source",) if source_mode == "trained" else ()) + tuple(f"d{s}" for s in sizes)
        self.conditioning, self.projections = nn.ModuleDict(), nn.ModuleDict()
        for size in sizes:
            bases = base_maps(source.plain_weights(), tokens, self.shape, size, p0, seed)
            self.conditioning[f"d{size}"] = LearnedID(n_tasks, z_dim)
            self.projections[f"d{size}"] = Projection(self.shape, size, bases, z_dim, family, layout, **options)

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        if member == "source":
            return self.source.weights(member, task_ids)
        z = self.conditioning[member](task_ids)
        c = self.source.task_embedding[task_ids] if self.use_task_embedding else None
        return self.projections[member](self.source.plain_weights(), z, c)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        parts = {"source": self.source.parameters()}
        for name in self.projections:
            parts[name] = [*self.conditioning[name].parameters(), *self.projections[name].parameters()]
        groups = {name: [p for p in ps if p.requires_grad] for name, ps in parts.items()}
        return {name: ps for name, ps in groups.items() if ps}

    def rate_factor(self, name: str) -> float:
        """Relative rates that bring the best rates of all parts and sizes together, found on validation images.

        Maps learn in proportion to 1/fan-in: those of neurons 4 times slower than the stream's. Directions B_k add up
        over the dimensions of z: slower than P₀. Gains and shifts are vectors: faster.
        """
        factor = 4.0 if ".modulation." in name else 1.0
        if ".neurons." in name:
            factor *= self.shape.d_model / self.shape.d_mlp
        return factor * 0.4 if name.endswith(".directions") else factor


@torch.no_grad()
def redraw_inner_weights(source: Universal, seed: int) -> None:
    """Replace the source's inner weights by random ones of the same standard deviation, matrix by matrix."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for name in ("qkv", "out", "up", "down"):
        w = source.plain[name]
        std = w.std((1, 2), keepdim=True)
        w.copy_(torch.randn(w.shape, generator=generator) * std)
