"""Everything that is trained: universal models (rivals; and the source is one, too), specialists, and projections.

Every model of this package offers `members`, `weights(member, task_ids)`, `losses(task_ids, tokens)` and
`groups()`; the training loop knows nothing else.

Whatever a universal model is told of its task ends up in its weights: a shift of the positions, FiLM and AdaLN as
scaled rows and a bias of the weights that read the stream, AdaLN's gates as scaled columns of those that write to
it. So each is deployed for one task as a plain Transformer, and trained through the one forward pass.

Projection: source weights + task vector + size → the weights of a small Transformer.

    reads of the stream (q, k, v, up, head)   √(d/d_s) · Pᵀ W G_out
    writes to the stream (out, down)          G_inᵀ W P
    embedding, positions                      E P
    layers, where there are fewer             W_l = Σ_j α_lj W_j

P (d × d_s) maps the stream; G maps heads (one for q and k, one for v and out) and neurons (up and down).
All maps come from matrix generators and depend on the task through z. √(d/d_s) keeps the scale of what a read
sees after an RMSNorm in the smaller space. Two layouts: `shared` (one P and one G a role), `per_matrix`
(each matrix has its own left and right map).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .generators import LearnedID, SupportSet, make_conditioning, make_generator
from .transformer import (
    PLAIN_AXES,
    Shape,
    Weights,
    draw_places,
    forward,
    hidden,
    initial_weights,
    masked_losses,
    task_losses,
)

TOLD_BY = ("none", "token", "additive", "film", "adaln")  # how universal models, and the source, are told their task


class Model(nn.Module):
    """The contract of everything that is trained. A member is a Transformer with a loss, e.g. "source" or "d8"."""

    members: tuple[str, ...]
    shape: Shape
    n_tasks: int  # of all tasks

    @property
    def draws(self) -> bool:
        """Whether a step of training draws random numbers on the CPU: it is no CUDA graph then."""
        return self.shape.masked

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        """The Transformer weights of that member for tasks (T,), with or without a leading task axis."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by member: each group has its own learning rate and its own clipping."""
        (member,) = self.members
        return {member: [p for p in self.parameters() if p.requires_grad]}

    def rate_factor(self, name: str) -> float:
        """By how much the parameter of that name learns faster than its member's learning rate says."""
        return 1.0

    def losses(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Nats per token of every member on its tasks: {member: (T,)}; tokens (T, B, N).

        Nats per masked token where the model fills them in. In training masks come from torch's global generator on the
        CPU, whose state a checkpoint holds, and are drawn for all tasks, so that processes which share the tasks of a
        step draw alike; all members see the same ones. Without gradients they are fixed: every model, seed and member
        is evaluated on the same ones.
        """
        d_head = self.shape.d_head
        if not self.shape.masked:
            return {m: task_losses(self.weights(m, task_ids), tokens, d_head) for m in self.members}
        fixed = None if torch.is_grad_enabled() else torch.Generator().manual_seed(0)
        _, batch, length = tokens.shape
        places = draw_places(self.n_tasks, batch, length, fixed)[task_ids.cpu()].to(tokens.device)
        return {m: masked_losses(self.weights(m, task_ids), tokens, places, d_head) for m in self.members}


class Universal(Model):
    """One Transformer for all tasks, told the task by `conditioning`: none, token, additive, film or adaln.

    token: c(t) is added to the start of the sequence only; additive: to every position; film: the normalised
    stream is scaled and shifted before every read; adaln: AdaLN-Zero, scale, shift and a gate on every write, from
    an embedding of the task. All task terms start at zero, AdaLN-Zero's gates too; with `zero_writes` so do the weights
    that write to the stream (on validation images a gain for the wide source; for rivals see notebook 03). Raises
    ValueError for another conditioning, or for AdaLN-Zero with `zero_writes`.
    """

    def __init__(
        self,
        shape: Shape,
        n_tasks: int,
        conditioning: str = "additive",
        member: str | None = None,
        zero_writes: bool = False,
    ):
        super().__init__()
        if conditioning not in TOLD_BY:
            raise ValueError(f"unknown conditioning {conditioning!r}; allowed: {', '.join(TOLD_BY)}")
        self.shape, self.n_tasks, self.conditioning = shape, n_tasks, conditioning
        self.members = (member or f"d{shape.d_model}",)
        if zero_writes and conditioning == "adaln":
            raise ValueError("zero_writes=True with AdaLN-Zero, whose gates are zero: nothing would be learned")
        weights = initial_weights(shape)
        if zero_writes:
            weights["out"].zero_(), weights["down"].zero_()
        self.plain = nn.ParameterDict({k: nn.Parameter(w) for k, w in weights.items()})
        layers, d = shape.n_layers, shape.d_model
        if conditioning in ("token", "additive"):
            self.task_embedding = nn.Parameter(torch.zeros(n_tasks, d))
        elif conditioning == "film":
            self.film = nn.Parameter(torch.zeros(n_tasks, 2, 2 * layers + 1, d))
        elif conditioning == "adaln":
            self.task_embedding = nn.Parameter(torch.randn(n_tasks, d))
            self.modulation = nn.Parameter(torch.zeros(d, (6 * layers + 2) * d))

    def plain_weights(self) -> Weights:
        """The weights without any task term."""
        return dict(self.plain.items())

    def terms(self, task_ids: Tensor) -> dict[str, Tensor]:
        """What the model is told of tasks (T,); only the terms that it has.

        `positions` (T, N, d), the embeddings with c(t) added; `scale` and `shift` (T, 2L+1, d) of what each weight
        reads; `gate` (T, 2L, d) on what each weight writes.
        """
        layers, d = self.shape.n_layers, self.shape.d_model
        if self.conditioning in ("token", "additive"):
            c = self.task_embedding[task_ids].unsqueeze(1)  # (T, 1, d)
            if self.conditioning == "token":
                c = F.pad(c, (0, 0, 0, self.shape.length - 1))
            return {"positions": self.plain["positions"] + c}
        if self.conditioning == "film":
            scale, shift = self.film[task_ids].unbind(1)
            return {"scale": 1 + scale, "shift": shift}
        if self.conditioning == "adaln":
            m = F.silu(self.task_embedding[task_ids]) @ self.modulation
            m = m.view(len(task_ids), 6 * layers + 2, d)
            scale, shift, gate = m.split([2 * layers + 1, 2 * layers + 1, 2 * layers], dim=1)
            return {"scale": 1 + scale, "shift": shift, "gate": gate}
        return {}

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        w, layers, told = self.plain_weights(), self.shape.n_layers, self.terms(task_ids)
        if "positions" in told:
            w["positions"] = told["positions"]
        if "scale" in told:
            w = modulated(w, told["scale"], told["shift"], layers)
        if "gate" in told:
            w["out"] = w["out"] * told["gate"][:, :layers].unsqueeze(-2)
            w["down"] = w["down"] * told["gate"][:, layers:].unsqueeze(-2)
        return w


class SupportUniversal(Universal):
    """A universal model that is told of a task by some of its images, as maps may be: its terms are z W.

    z is what an encoder (`SupportSet`) makes of `support` (n_tasks, n, N), W starts at zero. `conditioning`: additive
    or film. Raises ValueError for another.
    """

    def __init__(self, shape: Shape, support: Tensor, z_dim: int = 8, conditioning: str = "additive"):
        width = {"additive": 1, "film": 2 * (2 * shape.n_layers + 1)}  # rows of d_model
        if conditioning not in width:
            raise ValueError(f"conditioning {conditioning!r} by images; allowed: {', '.join(width)}")
        super().__init__(shape, len(support), "none")
        self.conditioning = conditioning
        self.encoder = SupportSet(len(support), z_dim, support, shape.vocab_size)
        self.outward = nn.Parameter(torch.zeros(z_dim, width[conditioning] * shape.d_model))

    def rate_factor(self, name: str) -> float:
        """The encoder learns slower: 0.3 and 0.1 were alike, and better than 1 and 0.03 (validation, one seed)."""
        return 0.3 if name.startswith("encoder") else 1.0

    def terms(self, task_ids: Tensor) -> dict[str, Tensor]:
        c = (self.encoder(task_ids) @ self.outward).unflatten(-1, (-1, self.shape.d_model))  # (T, 1 or 2(2L+1), d)
        if self.conditioning == "additive":
            return {"positions": self.plain["positions"] + c}
        scale, shift = c.chunk(2, dim=1)
        return {"scale": 1 + scale, "shift": shift}

    def told_of(self, support: Tensor) -> SupportUniversal:
        """The same model for other tasks, by images of each (T, n, N)."""
        other = SupportUniversal(self.shape, support, len(self.outward), self.conditioning)
        other.load_state_dict(self.state_dict() | {"encoder.support": support})
        return other


def modulated(w: Weights, scale: Tensor, shift: Tensor, layers: int) -> Weights:
    """Weights that read scale ⊙ x + shift: (diag(scale) W, shift W). scale, shift (T, 2L+1, d)."""
    w = dict(w)
    reads = {"qkv": slice(0, layers), "up": slice(layers, 2 * layers), "head": 2 * layers}
    for name, rows in reads.items():
        w[f"{name}_bias"] = (shift[:, rows].unsqueeze(-1) * w[name]).sum(-2)  # as a product: many small ones, slower
        w[name] = scale[:, rows].unsqueeze(-1) * w[name]
    return w


class Hypernetwork(Model):
    """Generators that make the small weights themselves, from a learned task vector: no source behind them.

    All weights, and gains and shifts of every read, come from generators of `family`, one of `generators`, over the
    usual start; of `Linear` ones every weight is W + Σ_k z_k B_k, B from zero. What is deployed is as large as
    projected models are. Raises ValueError for another family.
    """

    def __init__(self, shape: Shape, n_tasks: int, z_dim: int = 8, family: str = "Linear"):
        super().__init__()
        self.shape, self.n_tasks, self.members = shape, n_tasks, (f"d{shape.d_model}",)
        self.family = family
        self.conditioning = LearnedID(n_tasks, z_dim)
        stacks = {name: w if w.dim() == 3 else w.unsqueeze(0) for name, w in initial_weights(shape).items()}
        stacks["modulation"] = torch.zeros(1, 2 * (2 * shape.n_layers + 1), shape.d_model)
        self.makers = nn.ModuleDict({name: make_generator(family, w, z_dim) for name, w in stacks.items()})

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        z = self.conditioning(task_ids)
        w = {name: maker(z) for name, maker in self.makers.items()}  # (T, L or 1, m, n)
        w = {name: x if name in ("qkv", "out", "up", "down") else x.squeeze(1) for name, x in w.items()}
        gain, shift = w.pop("modulation").chunk(2, dim=1)  # each (T, 2L+1, d)
        w = modulated(w, 1 + gain, shift, self.shape.n_layers)
        return {name: x.squeeze(0) if len(x) < len(z) else x for name, x in w.items()}  # of families that ask for no z

    def rate_factor(self, name: str) -> float:
        """As in projections: what is added to W learns slower, gains and shifts faster."""
        part, _, rest = name.partition(".")
        if part == "conditioning":
            return self.conditioning.rate_factor(rest)
        which, parameter = rest.split(".", 1)
        return (4.0 if which == "modulation" else 1.0) * self.makers[which].rate_factor(parameter)


def for_new_tasks(base: Universal | Hypernetwork, n_tasks: int, tune: str = "vector") -> Universal | Hypernetwork:
    """A trained model of all tasks for some that it does not know, told of each what it is told of its own on average.

    `tune`: `vector`, only what it is told of a task learns; `maps`, all of it. Raises ValueError for another, or where
    the model is not told of its task by a learned vector.
    """
    model: Universal | Hypernetwork
    if isinstance(base, Hypernetwork):
        model, table = Hypernetwork(base.shape, n_tasks, base.conditioning.z_dim, base.family), "conditioning.table"
    elif type(base) is Universal and base.conditioning != "none":
        model = Universal(base.shape, n_tasks, base.conditioning)
        table = "film" if base.conditioning == "film" else "task_embedding"
    else:
        allowed = ", ".join(TOLD_BY[1:])
        raise ValueError(
            f"{type(base).__name__} with {base.conditioning!r} conditioning; allowed for new tasks: {allowed}"
        )
    if tune not in ("vector", "maps"):
        raise ValueError(f"unknown tune {tune!r}; allowed: vector, maps")
    state = base.state_dict()
    mean = state[table].mean(0, keepdim=True)
    model.load_state_dict(state | {table: mean.repeat(n_tasks, *[1] * (mean.dim() - 1))})
    if tune == "vector":
        model.requires_grad_(False)
        model.get_parameter(table).requires_grad_(True)
    return model


class Specialists(Model):
    """One plain Transformer a task, trained side by side; from scratch, or from given weights of each task."""

    def __init__(self, shape: Shape, n_tasks: int, start: Weights | None = None):
        super().__init__()
        self.shape, self.n_tasks = shape, n_tasks
        self.members = (f"d{shape.d_model}",)
        start = start or initial_weights(shape)
        self.per_task = nn.ParameterDict()
        for name, w in start.items():
            w = w.detach()
            if w.dim() == PLAIN_AXES[name]:
                w = w.unsqueeze(0).repeat(n_tasks, *[1] * w.dim())
            self.per_task[name] = nn.Parameter(w.clone())

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        return {name: w[task_ids] for name, w in self.per_task.items()}


def group_tasks(tokens: Tensor, vocab_size: int, n_groups: int) -> Tensor:
    """Tasks that look alike: the group of each, (T,) int64, from training tokens (T, n, N).

    k-means over how often each token stands at each place, square roots taken: distances are Hellinger's.
    """
    from sklearn.cluster import KMeans

    often = torch.stack([F.one_hot(x, vocab_size).float().mean(0).sqrt() for x in tokens])  # (T, N, V)
    groups = KMeans(min(n_groups, len(tokens)), n_init=10, random_state=0).fit_predict(often.flatten(1).numpy())
    return torch.from_numpy(groups).long()


class HardMixture(Specialists):
    """A few plain Transformers, the experts; each task has one of them, `expert_of` (T,), and shares it with its group.

    What is deployed for a task is its expert: a plain model, as small as every rival's. A step trains each expert on
    the images of its own tasks only, so that examples and operations are those of one model of that size.
    """

    def __init__(self, shape: Shape, expert_of: Tensor):
        super().__init__(shape, int(expert_of.max()) + 1)
        self.n_tasks = len(expert_of)
        self.register_buffer("expert_of", expert_of)

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        return super().weights(member, self.expert_of[task_ids])


class _Taught(Model):
    """Also learns to answer as the source does: half cross-entropy, half KL to the teacher."""

    def __init__(self, teacher: Universal, *own, share: float = 0.5):
        super().__init__(*own)
        if not isinstance(teacher, Universal) and "source" not in teacher.members:
            raise ValueError(
                f"a teacher that is {type(teacher).__name__}; allowed: a universal model, as the source is"
            )
        self.__dict__["teacher"] = teacher.requires_grad_(False)  # no submodule: it is neither trained nor saved here
        self.share = share

    def _apply(self, fn, recurse=True):  # where this model moves, the teacher goes along
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def losses(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().losses(task_ids, tokens)
        (member,), d_head = self.members, self.shape.d_head
        with torch.no_grad():
            target = forward(self.teacher.weights("source", task_ids), tokens, d_head).softmax(-1)
        return {member: taught_losses(self.weights(member, task_ids), tokens, target, self.share, d_head)}


def taught_losses(weights: Weights, tokens: Tensor, target: Tensor, share: float, d_head: int) -> Tensor:
    """Cross-entropy with tokens (T, B, N), and that with a teacher's `target` (T, B, N, V) in its `share`: (T,)."""
    log_p = forward(weights, tokens, d_head).log_softmax(-1)  # (T, B, N, V)
    hit = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -((1 - share) * hit + share * (target * log_p).sum(-1)).mean((1, 2))


class Distilled(_Taught, Universal):
    """A universal model that also learns from a source, the `teacher`."""


class DistilledHypernetwork(_Taught, Hypernetwork):
    """A hypernetwork that also learns from a source, the `teacher`."""


class DistilledSpecialists(_Taught, Specialists):
    """Specialists from scratch that also learn from a source, the `teacher`."""


# ----------------------------------------------------------------------------------------------------------- projection

LAYOUTS = ("shared", "per_matrix")
BASES = ("pca", "slice", "random")
SOURCE_MODES = ("trained", "tuned", "frozen", "random_kept", "random_trained", "random_frozen")
KEEPS_OBJECTIVE = ("trained", "random_kept")  # those whose source is a member: its own loss is trained, too


def small_shape(source: Shape, d_model: int, n_layers: int | None = None) -> Shape:
    """The shape of a projected model of that size; raises ValueError where the source cannot give it."""
    n_layers = source.n_layers if n_layers is None else n_layers
    if not 1 <= n_layers <= source.n_layers:
        raise ValueError(f"{n_layers} layers of a source with {source.n_layers}; allowed: 1 to {source.n_layers}")
    if d_model > source.d_model:
        allowed = f"multiples of {source.d_head} up to {source.d_model}"
        raise ValueError(f"size {d_model} is above the source's {source.d_model}; allowed: {allowed}")
    return replace(source, d_model=d_model, n_layers=n_layers)


def kept_layers(n_source: int, n_small: int) -> list[int]:
    """The source's layers that those of a small model start from, spread evenly."""
    return [(2 * i + 1) * n_source // (2 * n_small) for i in range(n_small)]


@torch.no_grad()
def base_maps(weights: Weights, tokens: Tensor, shape: Shape, d_model: int, kind: str = "pca", seed: int = 0):
    """P₀ of stream (d, d_s), heads (L, d, d_s) and neurons (L, 4d, 4d_s), chosen on training tokens (T, B, N).

    `weights`: those of a source for these tasks, with or without a task axis.
    `pca`: the leading directions of the source's normalised stream after each layer, the last one counting twice (what
    the first layer reads is not among them), and the heads and neurons that write most to it; `slice`: the first of
    each; `random`: a random orthonormal P, the first heads and neurons. A masked source is seen reading from left to
    right with no token masked: with its own reading nothing is gained (validation images).

    Raises ValueError for another kind, or where the source cannot give that width.
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
        for i in range(layers):  # mean squares of what each head and each neuron writes
            out, down = (weights[name][..., i, :, :].expand(len(tokens), -1, -1) for name in ("out", "down"))
            y = seen[f"attention.{i}"].unflatten(-1, (shape.n_heads, shape.d_head))  # (T, M, h, d_h)
            out = out.unflatten(1, (shape.n_heads, shape.d_head))  # (T, h, d_h, d)
            head_power.append(torch.einsum("tmhe,tmhf,thed,thfd->h", y, y, out, out))
            neuron_power.append(torch.einsum("tmn,tnd->n", seen[f"mlp.{i}"].square(), down.square()))
        top_heads = torch.stack(head_power).argsort(1, descending=True)[:, :heads]
        top_neurons = torch.stack(neuron_power).argsort(1, descending=True)[:, : small.d_mlp]
    columns = top_heads.unsqueeze(-1) * shape.d_head + torch.arange(shape.d_head)  # (L, heads, d_h)
    select_heads = torch.eye(d)[columns.flatten(1)].transpose(1, 2)  # (L, d, d_s)
    select_neurons = torch.eye(shape.d_mlp)[top_neurons].transpose(1, 2)  # (L, 4d, 4d_s)
    return stream, select_heads, select_neurons


class Projection(nn.Module):
    """Maps of one size: `forward(source weights, what the source is told, z) -> Weights` with a leading task axis.

    Generators: `stream` for every P, `heads` and `neurons` for every G, `depth` for α where the small model has fewer
    layers, `modulation` for its own gains and shifts. In the `shared` layout one P serves all, one G each q and k, v
    and out, up and down; in `per_matrix` each matrix has its own. All maps are of `family`, which takes the `options`;
    those of the neurons of another one, where `neurons` names it: they are the largest. Raises ValueError for a layout,
    family or option that is unknown.
    """

    def __init__(
        self,
        shape: Shape,
        small: Shape,
        bases,
        z_dim: int,
        family: str,
        layout: str = "shared",
        neurons: str | None = None,
        **options,
    ):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
        self.shape, self.small, self.layout = shape, small, layout
        p_stream, p_heads, p_neurons = bases
        kept = kept_layers(shape.n_layers, small.n_layers)
        if layout == "shared":
            n_stream, n_heads, n_neurons = 1, 2, 1  # one P; q and k, v and out; up and down
        else:
            n_stream, n_heads, n_neurons = 2 + 6 * shape.n_layers, 4, 2
        self.stream = make_generator(family, p_stream.expand(n_stream, -1, -1), z_dim, **options)
        self.heads = make_generator(family, p_heads[kept].repeat(n_heads, 1, 1), z_dim, **options)
        p_neurons = p_neurons[kept].repeat(n_neurons, 1, 1)
        own = {} if neurons else options
        self.neurons = make_generator(neurons or family, p_neurons, z_dim, **own)
        simple = options.get("inner", family)  # of vectors and small matrices: Linear where maps depend on the task
        simple = simple if simple in ("Slice", "Static") else "Linear"
        n_reads = 2 * small.n_layers + 1
        self.modulation = make_generator(simple, torch.zeros(1, 2 * n_reads, small.d_model), z_dim)
        self.depth = None
        if small.n_layers < shape.n_layers:
            self.depth = make_generator(simple, torch.eye(shape.n_layers)[kept].unsqueeze(0), z_dim)
        # a selected start leaves every column of norm 1: the √(d/d_s) of the reads keeps the scale
        self.read_scale = math.sqrt(shape.d_model / small.d_model)
        self.learned = {name for name, p in self.named_parameters() if p.requires_grad}  # of Slice none

    def forward(self, weights: Weights, told: Weights, z: Tensor) -> Weights:
        """The small weights of T tasks: `weights` of a source without task terms; `told`, its terms; z (T, K).

        What the source reads through scale and shift, Pᵀ(diag(scale) W) and shift W, comes as one more row of
        [√(d/d_s) Pᵀ diag(scale); shift] W: from that row on it is a bias. Its gates act on P: (W diag(gate)) P.
        """
        layers, d, size = self.shape.n_layers, self.shape.d_model, self.small.d_model
        p, g, n = self.stream(z), self.heads(z), self.neurons(z)  # (T, S, d, d_s), (T, S, d, d_s), (T, S, 4d, 4d_s)
        if self.layout == "shared":
            p_embedding = p_head = p_up = p_out = p_down = p
            p_qkv = (p,)
        else:
            p_embedding, p_head, *p_qkv, p_up, p_out, p_down = p.split([1, 1] + 6 * [layers], dim=1)
        attention, mlp, last = slice(0, layers), slice(layers, 2 * layers), slice(2 * layers, 2 * layers + 1)
        qkv = weights["qkv"].split(3 * d // len(p_qkv), dim=-1)
        qkv = torch.cat([_times(self._rows(p, told, attention), w) for p, w in zip(p_qkv, qkv, strict=True)], dim=-1)
        # Gᵀ(W P) = ((W P)ᵀ G)ᵀ: reads and writes lie side by side, so that a shared G costs one product
        out = _times(_gated(p_out, told, attention), weights["out"].transpose(1, 2))  # (T, L, d_s, d)
        up = _times(self._rows(p_up, told, mlp), weights["up"])  # (T, L, d_s (+1), 4d)
        down = _times(_gated(p_down, told, mlp), weights["down"].transpose(1, 2))
        if self.depth is not None:
            depth = self.depth(z).squeeze(1)  # (T, L_s, L): W_l = Σ_j α_lj W_j
            qkv, out, up, down = (torch.einsum("tlj,tjmk->tlmk", depth, w) for w in (qkv, out, up, down))
        q, k, v = qkv.split(d, dim=-1)
        g_qk, g_vo = g.chunk(2, dim=1)
        q, k = _map_pair(q, k, g_qk)
        v, out = _map_pair(v, out, g_vo)
        up, down = _map_pair(up, down, n)
        qkv = torch.cat([q, k, v], dim=-1)
        head = self._rows(p_head, told, last).squeeze(1) @ weights["head"]
        small = {
            "embedding": weights["embedding"] @ p_embedding.squeeze(1),
            "positions": told.get("positions", weights["positions"]) @ p_embedding.squeeze(1),
            "qkv": qkv[..., :size, :],
            "out": out.transpose(-1, -2),
            "up": up[..., :size, :],
            "down": down.transpose(-1, -2),
            "head": head[..., :size, :],
        }
        gain, shift = self.modulation(z).squeeze(1).chunk(2, dim=1)  # each (T, 2·L_s+1, d_s)
        small = modulated(small, 1 + gain, shift, self.small.n_layers)
        if "shift" in told:
            for name, w in (("qkv", qkv), ("up", up), ("head", head)):
                small[f"{name}_bias"] = small[f"{name}_bias"] + w[..., size, :]
        # maps that do not depend on the task give plain weights, but for what carries the source's task terms
        return {name: w.squeeze(0) if len(w) < len(z) else w for name, w in small.items()}

    def _rows(self, p: Tensor, told: Weights, reads: slice) -> Tensor:
        """√(d/d_s) Pᵀ for these reads, (T, L or 1, d_s, d); with scale and shift one row more."""
        rows = p.transpose(-1, -2) * self.read_scale
        if "scale" not in told:
            return rows
        rows = rows * told["scale"][:, reads].unsqueeze(-2)
        shift = told["shift"][:, reads].unsqueeze(-2)
        return torch.cat([rows, shift.expand(len(rows), -1, -1, -1)], dim=-2)


def _gated(p: Tensor, told: Weights, writes: slice) -> Tensor:
    """(diag(gate) P)ᵀ for these writes: (T, L or 1, d_s, d)."""
    p = p.transpose(-1, -2)
    return p * told["gate"][:, writes].unsqueeze(-2) if "gate" in told else p


def _times(rows: Tensor, w: Tensor) -> Tensor:
    """rows (T, L or 1, m, d), for all layers or for each, times w (L, d, k) → (T, L, m, k)."""
    tasks, layers, m, d = rows.shape
    if layers == 1:  # one product of matrices for all tasks and layers
        y = rows.reshape(tasks * m, d) @ w.transpose(0, 1).reshape(d, -1)  # (T·m, L·k)
        return y.view(tasks, m, len(w), -1).transpose(1, 2)
    rows = rows.transpose(0, 1).reshape(layers, tasks * m, d)
    return torch.bmm(rows, w).view(layers, tasks, m, -1).transpose(0, 1)


def _map_pair(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """a G, b G of a, b (T, L, m, k): one G (T, L, k, n) for both, or one each, stacked (T, 2L, k, n)."""
    if g.shape[1] == a.shape[1]:
        n_tasks = max(len(a), len(b))  # where maps do not depend on the task, one of them may
        both = _mapped(torch.cat([w.expand(n_tasks, -1, -1, -1) for w in (a, b)], dim=-2), g)
        return both.split([a.shape[-2], b.shape[-2]], dim=-2)
    g_a, g_b = g.chunk(2, dim=1)
    return _mapped(a, g_a), _mapped(b, g_b)


def _mapped(w: Tensor, g: Tensor) -> Tensor:
    """w G of w (T, L, m, k), G (T, L, k, n); where one of them does not depend on the task, T = 1 in it."""
    if len(w) != len(g):
        return w @ g
    return torch.bmm(w.flatten(0, 1), g.flatten(0, 1)).unflatten(0, w.shape[:2])  # `@` would add views to undo


class Projectable(Model):
    """A source and its projections of several sizes: the paper's model.

    `conditioning` makes the task vectors (learned IDs by default) from what it is `told` of the tasks, `family` the
    maps; further options are those of `Projection` and of the family.
    `source_mode` says what becomes of the source: `trained` (keeps its own objective, weighed `source_weight`), `tuned`
    (along with the small models, for their losses alone), `frozen`, or the controls whose inner weights are redrawn at
    matched scale, embeddings, positions and head left: `random_kept` (trained, with the source's objective),
    `random_trained` (without), `random_frozen`. `source_rate` is the source's learning rate as a multiple of the
    config's. `use_task_embedding=False` hides the source's c(t) from the small models. Raises ValueError for a mode,
    start of the maps, layout, family, conditioning or option that is unknown, numbers that cannot be, or a size above
    the source's.
    """

    def __init__(
        self,
        source: Universal,
        n_tasks: int,
        sizes: tuple[int, ...],
        tokens: Tensor,
        family: str = "Linear",
        z_dim: int = 8,
        conditioning: str = "LearnedID",
        layout: str = "shared",
        p0: str = "pca",
        n_layers: int | None = None,
        source_mode: str = "trained",
        use_task_embedding: bool = True,
        source_weight: float = 1.0,
        source_rate: float = 1.0,
        seed: int = 0,
        told: dict | None = None,
        **options,
    ):
        super().__init__()
        if source_mode not in SOURCE_MODES:
            raise ValueError(f"unknown source_mode {source_mode!r}; allowed: {', '.join(SOURCE_MODES)}")
        for name, value in (("source_weight", source_weight), ("source_rate", source_rate)):
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}; allowed: 0 or more")
        if not isinstance(z_dim, int) or z_dim < 1:
            raise ValueError(f"z_dim={z_dim!r}; allowed: 1 or more")
        self.source, self.shape, self.n_tasks = source, source.shape, n_tasks
        self.use_task_embedding, self.source_weight, self.source_rate = use_task_embedding, source_weight, source_rate
        if source_mode.startswith("random"):
            redraw_inner_weights(source, seed)
        if source_mode.endswith("frozen"):
            source.requires_grad_(False)
        self.members = (("source",) if source_mode in KEEPS_OBJECTIVE else ()) + tuple(f"d{s}" for s in sizes)
        self.conditioning, self.projections = nn.ModuleDict(), nn.ModuleDict()
        weights = {k: w.detach() for k, w in source.weights("source", torch.arange(len(tokens))).items()}
        for size in sizes:
            small = small_shape(self.shape, size, n_layers)
            bases = base_maps(weights, tokens, self.shape, size, p0, seed)
            self.conditioning[f"d{size}"] = make_conditioning(conditioning, n_tasks, z_dim, **(told or {}))
            self.projections[f"d{size}"] = Projection(self.shape, small, bases, z_dim, family, layout, **options)

    def told(self, task_ids: Tensor) -> Weights:
        """What the small models get of the source's task terms (`Universal.terms`); the mean over tasks if hidden."""
        if self.use_task_embedding:
            return self.source.terms(task_ids)
        terms = self.source.terms(torch.arange(self.n_tasks, device=task_ids.device))
        return {name: w.mean(0, keepdim=True) for name, w in terms.items()}

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        if member == "source":
            return self.source.weights(member, task_ids)
        z = self.conditioning[member](task_ids)
        return self.projections[member](self.source.plain_weights(), self.told(task_ids), z)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        parts = {"source": self.source.parameters()}
        for name in self.projections:
            parts[name] = [*self.conditioning[name].parameters(), *self.projections[name].parameters()]
        groups = {name: [p for p in ps if p.requires_grad] for name, ps in parts.items()}
        return {name: ps for name, ps in groups.items() if ps}

    def rate_factor(self, name: str) -> float:
        """Relative rates that bring the best rates of all parts and sizes together, found on validation images.

        Maps learn in proportion to 1/fan-in: those of neurons 4 times slower than the stream's. Gains and shifts are
        vectors: faster. What a family adds to P₀ has factors of its own (`Generator.rates`).
        """
        part, _, rest = name.partition(".")
        if part == "source":
            return self.source_rate
        if part == "conditioning":
            member, parameter = rest.split(".", 1)
            return self.conditioning[member].rate_factor(parameter)
        member, kind, parameter = rest.split(".", 2)
        generator = getattr(self.projections[member], kind)
        factor = {"modulation": 4.0, "neurons": self.shape.d_model / self.shape.d_mlp}.get(kind, 1.0)
        return factor * generator.rate_factor(parameter)


class DistilledProjections(Projectable):
    """Projections whose small models also learn from the answers of their source, as it is in that step.

    Half cross-entropy, half KL, as rivals that are distilled; the source learns as ever, and nothing from it.
    """

    def __init__(self, *own, share: float = 0.5, **options):
        super().__init__(*own, **options)
        self.share = share

    def losses(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().losses(task_ids, tokens)
        source, d_head = self.weights("source", task_ids), self.shape.d_head
        logits = forward(source, tokens, d_head)  # (T, B, N, V)
        target = logits.detach().softmax(-1)
        found = {
            m: taught_losses(self.weights(m, task_ids), tokens, target, self.share, d_head) for m in self.projections
        }
        if "source" in self.members:
            own = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view(len(tokens), -1)
            found["source"] = own.mean(1)
        return {member: found[member] for member in self.members}


@torch.no_grad()
def redraw_inner_weights(source: Universal, seed: int) -> None:
    """Replace the source's inner weights by random ones of the same standard deviation, matrix by matrix."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for name in ("qkv", "out", "up", "down"):
        w = source.plain[name]
        std = w.std((1, 2), keepdim=True)
        w.copy_(torch.randn(w.shape, generator=generator) * std)


class Adapted(Model):
    """A trained source and its projections, told of new tasks by a few images of each.

    The source is frozen. `tune` says what learns: `z`, the new tasks' vectors; `vector`, what the source is told of
    them (its additive embedding c), too; `maps`, the generators as well, for all new tasks together. Vectors start
    where the base puts them: at what its encoder makes of `support` (T, n, N), else at the mean of the tasks that it
    knows. Raises ValueError for another `tune`, a size that the base lacks, or a source that is told of tasks in
    another way.
    """

    def __init__(self, base: Projectable, n_tasks: int, sizes: tuple[int, ...], support: Tensor, tune: str = "vector"):
        super().__init__()
        if tune not in ("z", "vector", "maps"):
            raise ValueError(f"unknown tune {tune!r}; allowed: z, vector, maps")
        if unknown := sorted({f"d{s}" for s in sizes} - set(base.members)):
            raise ValueError(f"no projections of {unknown[0]} to adapt; allowed: {', '.join(base.projections)}")
        if base.source.conditioning != "additive":
            raise ValueError(
                f"a source with {base.source.conditioning!r} conditioning; allowed for new tasks: additive"
            )
        self.members, self.n_tasks = tuple(f"d{s}" for s in sizes), n_tasks
        self.base, self.shape = base.requires_grad_(False), base.shape
        self.vectors, self.told = nn.ParameterDict(), nn.ParameterDict()
        for member in self.members:
            known = base.conditioning[member]
            with torch.no_grad():
                if isinstance(known, SupportSet):
                    start = known.encode(support[:, : known.n_eval])
                else:
                    start = known(torch.arange(base.n_tasks)).mean(0, keepdim=True).expand(n_tasks, -1)
            self.vectors[member] = nn.Parameter(start.clone())
            self.told[member] = nn.Parameter(base.source.task_embedding.mean(0, keepdim=True).repeat(n_tasks, 1))
            self.told[member].requires_grad_(base.use_task_embedding and tune != "z")
            projection = base.projections[member]
            for name, p in projection.named_parameters():
                p.requires_grad_(tune == "maps" and name in projection.learned)

    def weights(self, member: str, task_ids: Tensor) -> Weights:
        plain = self.base.source.plain_weights()
        told = {"positions": plain["positions"] + self.told[member][task_ids].unsqueeze(1)}
        return self.base.projections[member](plain, told, self.vectors[member][task_ids])

    def groups(self) -> dict[str, list[nn.Parameter]]:
        parts = {m: [self.vectors[m], self.told[m], *self.base.projections[m].parameters()] for m in self.members}
        return {name: [p for p in ps if p.requires_grad] for name, ps in parts.items()}

    def rate_factor(self, name: str) -> float:
        """Maps learn a hundred times slower than the vectors, whose entries are near 1."""
        part, _, rest = name.partition(".")
        return 1.0 if part != "base" else 0.01 * self.base.rate_factor(rest)
