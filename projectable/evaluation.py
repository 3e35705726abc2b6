"""From losses to verdicts: paired gaps, intervals, the width that matches, whose image is it.

A seed is one draw of initialisation and order of data; codebook and splits are fixed. Gaps are paired: per seed, the
mean over tasks of (rival's loss − ours), positive where ours is better; then Student's t over seeds.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Run, data_for, workers
from .models import Model, Projectable
from .tasks import TaskData
from .transformer import Products, forward, task_losses


def side_by_side(function: Callable, things: Iterable) -> list:
    """`[function(x) for x in things]`, in threads of one core each: for what small models compute.

    Whoever wants no gradients says so within the function.
    """
    with ThreadPoolExecutor(workers(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, things))


def origin(runs: dict[str, list[Run]]) -> dict[str, str]:
    """Which commits trained these runs, and on what devices: as claims about them say."""
    found = [run.result for group in runs.values() for run in group]
    return {name: ", ".join(dict.fromkeys(result[name] for result in found)) for name in ("commit", "device")}


def loss_table(runs: dict[str, list[Run]], data: TaskData, sources: bool = True) -> pd.DataFrame:
    """Test losses of finished runs, tidy: arm, d_s, seed, task, loss (nats per token), bits_per_pixel.

    The source beside an arm's small models is the arm `NAME: source`, left out without `sources`. Raises ValueError
    for a run of other tasks than those of `data`.
    """
    book, rows = data.codebook, []
    bits = bits_per_pixel(1.0, book.length, book.height * book.width)
    for arm, arm_runs in runs.items():
        for run in arm_runs:
            if (its := data_for(run.config.data)).task_names != data.task_names:
                raise ValueError(f"{run.folder.name} is of {its.name}; allowed: runs of {data.name}")
            for member, losses in run.test_losses().items():
                beside = member == "source" and not run.config.model.endswith("source")
                if beside and not sources:
                    continue
                d_s = run.config.d_source if member == "source" else int(member[1:])
                name = f"{arm}: source" if beside else arm
                rows += [
                    dict(arm=name, d_s=d_s, seed=run.config.seed, task=task, loss=loss, bits_per_pixel=loss * bits)
                    for task, loss in zip(data.task_names, losses.tolist(), strict=True)
                ]
    return pd.DataFrame(rows)


def seed_means(losses: pd.DataFrame) -> pd.DataFrame:
    """Mean over tasks: arm, d_s, seed, loss."""
    return losses.groupby(["arm", "d_s", "seed"], sort=False, as_index=False)["loss"].mean()


def over_seeds(table: pd.DataFrame, by: Sequence[str] = ("arm", "d_s"), value: str = "loss") -> pd.DataFrame:
    """Of a table with a row a seed: the columns `by`, and mean, std and count (how many seeds) of `value`."""
    return table.groupby(list(by), sort=False)[value].agg(["mean", "std", "count"]).reset_index()


def paired_gaps(losses: pd.DataFrame, rival: str, ours: str) -> pd.DataFrame:
    """Per size and seed, the mean over tasks of loss(rival) − loss(ours): d_s, seed, gap (nats per token).

    Raises ValueError for an arm that is not there, and where the two have no task, size and seed in common.
    """
    wide = losses.pivot_table(index=["d_s", "seed", "task"], columns="arm", values="loss")
    if unknown := [arm for arm in (rival, ours) if arm not in wide]:
        raise ValueError(f"no losses of an arm {unknown[0]!r}; allowed: {', '.join(wide)}")
    wide = wide[[rival, ours]].dropna()
    if wide.empty:
        raise ValueError(f"{rival!r} and {ours!r} have no task, size and seed in common: no gap is paired")
    gap = (wide[rival] - wide[ours]).groupby(level=["d_s", "seed"]).mean()
    return gap.rename("gap").reset_index()


def gaps_to_each(losses: pd.DataFrame, rivals: Iterable[str], ours: str = "projected") -> pd.DataFrame:
    """`paired_gaps` to each of these arms, one below the other: d_s, seed, gap, comparison (the rival's name)."""
    return pd.concat([paired_gaps(losses, rival, ours).assign(comparison=rival) for rival in rivals])


def t_interval(values) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval by Student's t; NaN ends for fewer than two values."""
    from scipy import special  # of `stats`, which takes a second to import, the quantiles

    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def crossed_bootstrap(losses: pd.DataFrame, rival: str, ours: str, by: str = "task") -> tuple[float, float, float]:
    """(mean, low, high): gap and 95 % interval, nats per token, where seeds *and* tasks are samples: both are redrawn.

    `losses` of one size: arm, seed, task, loss. Tasks are redrawn by what they have in common in the column `by`, all
    of it with each draw. The interval is Student's t around the gap, by the bootstrap's deviation times √(n/(n−1)) with
    n − 1 degrees of freedom, n the smaller number of seeds and groups: quantiles of few draws are too narrow. Raises
    ValueError where a seed lacks a task, sizes are several, or there are fewer than two seeds or groups.
    """
    if "d_s" in losses and losses["d_s"].nunique() > 1:
        raise ValueError(f"losses of sizes {sorted(losses['d_s'].unique().tolist())}; allowed: of one size")
    from scipy import special

    wide = losses.pivot_table(index=["seed", "task"], columns="arm", values="loss")[[rival, ours]].dropna()
    table = (wide[rival] - wide[ours]).unstack("task")
    gap = table.to_numpy()  # (seeds, tasks)
    if np.isnan(gap).any():
        raise ValueError(
            f"{int(np.isnan(gap).sum())} pairs of seed and task are missing; allowed: every seed has every task"
        )
    member = losses.drop_duplicates("task").set_index("task")[by] if by != "task" else table.columns.to_series()
    in_group = pd.get_dummies(member.loc[table.columns]).to_numpy(float)  # (tasks, groups)
    sums, counts = gap @ in_group, in_group.sum(0)  # (seeds, groups), (groups,)
    (n_seeds, n_groups), n = sums.shape, min(sums.shape)
    if n < 2:
        raise ValueError(f"{n_seeds} seeds and {n_groups} groups of tasks; allowed: two of each or more")
    rng, draws = np.random.default_rng(0), 4000
    seeds = rng.integers(n_seeds, size=(draws, n_seeds))
    groups = rng.integers(n_groups, size=(draws, n_groups))
    means = sums[seeds[:, :, None], groups[:, None, :]].mean(1).sum(1) / counts[groups].sum(1)
    half = special.stdtrit(n - 1, 0.975) * means.std(ddof=1) * math.sqrt(n / (n - 1))
    return float(gap.mean()), float(gap.mean() - half), float(gap.mean() + half)


def verdict(ci_low: float, ci_high: float, seeds: int, above: float = 0.0) -> str:
    """The rule for a claim "the statistic is above `above`", by its 95 % interval.

    reproduced: the interval lies above; not reproduced: below; inconclusive: neither, or fewer than three seeds.
    """
    if seeds < 3 or math.isnan(ci_low):
        return "inconclusive"
    return "reproduced" if ci_low > above else "not reproduced" if ci_high < above else "inconclusive"


def judge(values, above: float = 0.0, below: float | None = None, longer: float = 1.0) -> dict:
    """A claim's numbers from its statistic a seed: value, ci_low, ci_high (95 %, t), seeds, verdict.

    The claim is that the statistic lies above `above`; or, where that is given, below `below`. The interval is made
    `longer` as many times: where seeds share what they are compared with, Student's is too short.
    """
    value, low, high = t_interval(values)
    low, high = low + (longer - 1) * (low - value), high + (longer - 1) * (high - value)
    ends, bound = ((low, high), above) if below is None else ((-high, -low), -below)
    return dict(value=value, ci_low=low, ci_high=high, seeds=len(values), verdict=verdict(*ends, len(values), bound))


def judge_sampled(losses: pd.DataFrame, rival: str, ours: str, by: str = "task") -> dict:
    """`judge` of the gap between two arms where tasks are a sample: the interval also covers `crossed_bootstrap`'s.

    `losses` of one size, as in `paired_gaps`; redrawn are tasks, or what another column groups them by.
    """
    found = judge(paired_gaps(losses, rival, ours).gap)
    if found["seeds"] < 2:
        return found
    _, low, high = crossed_bootstrap(losses, rival, ours, by)
    ends = min(found["ci_low"], low), max(found["ci_high"], high)
    return found | dict(ci_low=ends[0], ci_high=ends[1], verdict=verdict(*ends, found["seeds"]))


def compare(
    losses: pd.DataFrame,
    questions: dict[str, tuple[str, str, str]],
    words: Callable[[str], str] = str,
    unit: str = "nats per token",
    by: str = "",
) -> Iterator[dict]:
    """Claims "the gap is above zero", judged at each size: arguments of `Report.claim`, but for `tasks` and origin.

    `losses` as `loss_table` gives them. `questions`: (rival, ours, claim) by the start of an id, `{d_s}` in the claim
    standing for the width. `words` says what an arm is called in the statistic. `by`: tasks are a sample, see
    `judge_sampled`.
    """
    for id, (rival, ours, claim) in questions.items():
        statistic = f"{words(rival)} − {words(ours)}, {unit}"
        for d_s, gaps in paired_gaps(losses, rival, ours).groupby("d_s"):
            found = judge_sampled(losses[losses.d_s == d_s], rival, ours, by) if by else judge(gaps.gap)
            yield dict(id=f"{id}.d{d_s}", claim=claim.format(d_s=d_s), statistic=statistic, **found)


def widening(gaps: pd.DataFrame, id: str, claim: str, unit: str = "nats per token") -> Iterator[dict]:
    """Claims "the gap at a size is larger than at the next", paired by seed: as `compare` gives them.

    `gaps` as `paired_gaps` gives them; `claim` goes on by "from width 16 to 8", `id` by ".8_16".
    """
    by_size = gaps.pivot(index="seed", columns="d_s", values="gap")
    statistic = f"gap at the smaller width − gap at the larger, {unit}"
    for small, large in itertools.pairwise(by_size.columns):
        words, found = f"{claim} from width {large} to {small}", judge((by_size[small] - by_size[large]).dropna())
        yield dict(id=f"{id}.{small}_{large}", claim=words, statistic=statistic, **found)


def matching_width(sizes, universal, loss: float) -> float:
    """The width at which the universal model's loss would equal `loss`: linear in log2(width), ends extended."""
    x, y = np.log2(np.asarray(sizes, float)), np.asarray(universal, float)
    order = np.argsort(x)
    x, y = x[order], y[order]
    i = int(np.clip(np.searchsorted(-y, -loss) - 1, 0, len(x) - 2))
    slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    return float(2 ** (x[i] + (loss - y[i]) / slope)) if slope < 0 else math.nan


@torch.no_grad()
def swap_losses(model: Model, member: str, data: TaskData, per_task: int = 100) -> Tensor:
    """Nats per token of test images under every task's model: (T models, T tasks, n images)."""
    tokens = data.first("test", per_task)  # (T, n, N)
    n_tasks, n, length = tokens.shape
    weights = model.weights(member, torch.arange(n_tasks))
    losses = torch.empty(n_tasks, n_tasks, n)
    for task in range(n_tasks):
        x = tokens[task].expand(n_tasks, -1, -1)  # every model sees the same images
        logits = forward(weights, x, model.shape.d_head)
        nll = F.cross_entropy(logits.flatten(0, 2), x.reshape(-1), reduction="none")
        losses[:, task] = nll.view(n_tasks, n, length).mean(-1)
    return losses


def naming_accuracy(losses: Tensor) -> float:
    """How often the model that finds an image likeliest is that of its own task; losses (T, T, n) of `swap_losses`."""
    named = losses.argmin(0)  # (T tasks, n)
    return (named == torch.arange(len(losses)).unsqueeze(1)).double().mean().item()


@torch.no_grad()
def disagreement(models: list[Model], member: str, data: TaskData, per_task: int = 40) -> Tensor:
    """KL of each model's predictions from each other's on images of their task: (M, M), nats per token."""
    tokens = data.first("test", per_task)
    ids = torch.arange(data.n_tasks)
    log_p = [forward(m.weights(member, ids), tokens, m.shape.d_head).log_softmax(-1) for m in models]
    kl = [F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean() for p in log_p for q in log_p]
    return torch.stack(kl).view(len(models), -1)


@torch.no_grad()
def losses_between(model: Projectable, member: str, data: TaskData, fractions, per_task: int = 40) -> pd.DataFrame:
    """Along the line from a task's vector to the next task's: fraction, task, own, other.

    `own` is the loss of the model at that fraction of the way (nats per token) on test images of the task where the
    line begins, `other` on those of the task where it ends. What the source is told of the task goes along.
    """
    tokens = data.first("test", per_task)
    ids = torch.arange(data.n_tasks)
    ends = torch.stack([ids, ids.roll(-1)])
    (first, last), z, rows = map(model.told, ends), [*map(model.conditioning[member], ends)], []
    for fraction in fractions:
        told = {name: torch.lerp(w, last[name], fraction) for name, w in first.items()}
        weights = model.projections[member](model.source.plain_weights(), told, torch.lerp(z[0], z[1], fraction))
        own, other = (task_losses(weights, tokens[end], model.shape.d_head) for end in ends)
        for t in range(data.n_tasks):
            rows.append(dict(fraction=fraction, task=data.task_names[t], own=own[t].item(), other=other[t].item()))
    return pd.DataFrame(rows)


@torch.no_grad()
def generation_cost(model: Projectable, member: str, repeats: int = 30) -> dict:
    """What one task's small model costs to make and to use.

    `maps`, `source`, `deployed`: parameters of the generators (task vectors included), of the source, of the small
    model; `multiply_adds` to generate it; `ms`, the median time for that, and `ms_low`, `ms_high`, its quartiles.
    """
    one = torch.arange(1)
    with Products() as counter:
        weights = model.weights(member, one)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.weights(member, one)
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    maps = [*model.conditioning[member].parameters(), *model.projections[member].parameters()]
    sizes = dict(maps=maps, source=model.source.parameters(), deployed=weights.values())
    counts = {name: sum(w.numel() for w in ws) for name, ws in sizes.items()}
    return counts | dict(multiply_adds=counter.multiply_adds, ms=middle, ms_low=low, ms_high=high)


def training_memory(model: Model, data: TaskData, tasks: int, images: int) -> dict[str, int]:
    """Bytes that a training step of `tasks` tasks with `images` each holds: state, kept.

    `state`: all parameters, and of trained ones their gradients and AdamW's two moments; `kept`: what the forward pass
    leaves for the backward one, each storage once, parameters apart. What an operation needs for a moment is not in it.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    tasks = min(tasks, data.n_tasks)  # as in training

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.losses(torch.arange(tasks), data.first("train", images)[:tasks])
    parameters = list(model.parameters())
    state = sum(w.nbytes * (4 if w.requires_grad else 1) for w in parameters)
    own = {w.untyped_storage().data_ptr() for w in parameters}
    return dict(state=state, kept=sum(s.nbytes() for at, s in storages.items() if at not in own))


def steps_worth(steps, losses, loss: float) -> float:
    """The steps after which training that reaches `losses` after `steps` would reach `loss`.

    Between them a monotone cubic in log(steps) (PCHIP): losses fall ever slower, so that a straight line would say too
    many. Infinite where even the longest does not reach it; the shortest where already that does.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import brentq

    order = np.argsort(steps)
    x, y = np.log(np.asarray(steps, float)[order]), np.minimum.accumulate(np.asarray(losses, float)[order])
    if loss < y[-1]:
        return math.inf
    gains = np.diff(y, prepend=math.inf) < 0  # more steps that are no better count for nothing
    x, y = x[gains], y[gains]
    if loss >= y[0]:
        return float(np.exp(x[0]))
    curve = PchipInterpolator(x, y)
    least = max(loss, float(curve(x[-1])))  # rounding apart the last loss
    return float(np.exp(brentq(lambda at: curve(at) - least, x[0], x[-1])))


def worth(means: pd.DataFrame, ours: str, steps: dict[str, int]) -> pd.DataFrame:
    """`steps_worth` of one arm's models, by the losses of others after as many `steps`: d_s, seed, worth_steps.

    `means` as `seed_means` gives them; a row for each size and seed that all of them have.
    """
    wide = means.pivot(index=["d_s", "seed"], columns="arm", values="loss")[[*steps, ours]].dropna()
    found = [steps_worth(list(steps.values()), row[list(steps)], row[ours]) for _, row in wide.iterrows()]
    return wide.index.to_frame(index=False).assign(worth_steps=found)


def seconds_to(run: Run, member: str, loss: float) -> float:
    """Seconds of a run's training up to the first evaluation with a validation loss of at most `loss`; inf if none."""
    rows = [r for r in run.history if (r["split"], r["member"]) == ("val", member)]
    reached = [r["step"] for r in rows if r["loss"] <= loss]
    return run.result["seconds"] * min(reached, default=math.inf) / rows[-1]["step"]


def deviation_ratio(a, b) -> tuple[float, float, float]:
    """Standard deviation of a over that of b, and its 95 % interval by the F distribution."""
    from scipy import special

    ratio = float(np.var(a, ddof=1) / np.var(b, ddof=1))
    f = [special.fdtri(len(a) - 1, len(b) - 1, at) for at in (0.975, 0.025)]
    return ratio**0.5, (ratio / f[0]) ** 0.5, (ratio / f[1]) ** 0.5


def bits_per_pixel(nats_per_token: float, n_tokens: int, n_pixels: int) -> float:
    """Code length of an image's tokens, in bits per pixel, without the codebook's own error."""
    return nats_per_token * n_tokens / math.log(2) / n_pixels
