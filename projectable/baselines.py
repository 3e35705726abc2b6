"""Universal conditional models (rivals; and the source is one, too) and specialists.

Whatever a universal model is told of its task ends up in its weights: a shift of the positions, FiLM and AdaLN as
scaled rows and a bias of the weights that read the stream, AdaLN's gates as scaled columns of those that write to
it. So each is deployed for one task as a plain Transformer, and trained through the one forward pass.

Every model of this package offers `members`, `weights(member, task_ids)`, `losses(task_ids, tokens)` and
`groups()`; the training loop knows nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import LearnedID, SupportSet
from .generators import make_generator
from .transformer import PLAIN_AXES, Shape, Weights, draw_places, forward, initial_weights, masked_losses, task_losses

CONDITIONINGS = ("none", "token", "additive", "film", "adaln")


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
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown conditioning {conditioning!r}; allowed: {', '.join(CONDITIONINGS)}")
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
        return modulated(w, 1 + gain, shift, self.shape.n_layers)

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
        allowed = ", ".join(CONDITIONINGS[1:])
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

    share: float

    def _learn_from(self, teacher: Universal, share: float) -> None:
        self.__dict__["teacher"] = teacher.requires_grad_(False)  # no submodule: it is neither trained nor saved here
        self.share = share

    def _apply(self, fn, recurse=True):  # where this model moves, the teacher goes along
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def losses(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().losses(task_ids, tokens)
        (member,) = self.members
        with torch.no_grad():
            target = forward(self.teacher.weights("source", task_ids), tokens, self.shape.d_head).softmax(-1)
        log_p = forward(self.weights(member, task_ids), tokens, self.shape.d_head).log_softmax(-1)  # (T, B, N, V)
        hit = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        cross = (target * log_p).sum(-1)
        return {member: -((1 - self.share) * hit + self.share * cross).mean((1, 2))}


class Distilled(_Taught, Universal):
    """A universal model that also learns from a source, the `teacher`."""

    def __init__(
        self, shape: Shape, n_tasks: int, teacher: Universal, conditioning: str = "additive", share: float = 0.5
    ):
        super().__init__(shape, n_tasks, conditioning)
        self._learn_from(teacher, share)


class DistilledSpecialists(_Taught, Specialists):
    """Specialists from scratch that also learn from a source, the `teacher`."""

    def __init__(self, shape: Shape, n_tasks: int, teacher: Universal, share: float = 0.5):
        super().__init__(shape, n_tasks)
        self._learn_from(teacher, share)
