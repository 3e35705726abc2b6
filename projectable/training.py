"""The one training loop: every arm goes through it, its members side by side.

    L = λ · CE(source; x, t) + Σ over other members of CE(member; x, t)        nats per token, mean over tasks

- Each member has its own learning rate and its own gradient clipping, so that members that share no weights learn
  exactly as if they were alone.
- The order of data is a pure function of the seed (`TaskData.draw`), the schedule one of the step; a checkpoint
  holds everything else. A run killed anywhere and resumed ends bitwise where an unbroken one does (CPU, same threads).
- The best step on validation images is kept (`patience` evaluations without a better one end the run early).
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .baselines import Model
from .config import RunConfig
from .storage import load_tensors, save_tensors
from .tasks import TaskData


class DivergedError(RuntimeError):
    """The loss is not a number; the message says at which step and what to try."""


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor of every learning rate: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: Model, rates: dict[str, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused: each member's parameters at that member's rate times their own factor."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[float, list] = {}
    for member, parameters in model.groups().items():
        for p in parameters:
            groups.setdefault(rates[member] * model.rate_factor(names[id(p)]), []).append(p)
    rated = [dict(params=ps, lr=rate, rate=rate) for rate, ps in groups.items()]
    return torch.optim.AdamW(rated, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: given back, it costs thousands of page faults a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: arrays up to 32 MB, the most that every version takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.no_grad()
def split_losses(model: Model, data: TaskData, split: str, per_task: int | None = None, block: int = 20):
    """Nats per token of every member on every task: {member: (n_tasks,)}, over the first `per_task` images of each."""
    sums = {member: torch.zeros(data.n_tasks, dtype=torch.float64) for member in model.members}
    counts = torch.zeros(data.n_tasks, dtype=torch.float64)
    device = next(model.parameters()).device
    per_task = per_task or max(len(t) for t in data.tokens[split])
    at_once = max(1, 400 // (block * data.n_tasks)) * data.n_tasks if data.n_tasks > 20 else data.n_tasks
    for first in range(0, data.n_tasks, at_once):
        ids = range(first, min(first + at_once, data.n_tasks))
        for start in range(0, per_task, block):
            rows = [data.tokens[split][t][start : min(start + block, per_task)] for t in ids]
            for size in sorted({len(r) for r in rows} - {0}):  # tasks with as many images left go together
                group = [t for t, r in zip(ids, rows, strict=True) if len(r) == size]
                tokens = torch.stack([r for r in rows if len(r) == size]).to(device)
                losses = model.losses(torch.tensor(group, device=device), tokens)
                counts[group] += size
                for member, values in losses.items():
                    sums[member][group] += values.double().cpu() * size
    return {member: total / counts for member, total in sums.items()}


class _Best:
    """The best step so far, by the mean validation loss of all members."""

    def __init__(self):
        self.loss, self.step, self.state, self.bad = math.inf, -1, {}, 0

    def see(self, loss: float, step: int, model: Model) -> None:
        if loss < self.loss:
            self.loss, self.step, self.bad = loss, step, 0
            self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        else:
            self.bad += 1


def _pack(model: Model, optimizer, best: _Best) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in best.state.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    return tensors | {"rng": torch.get_rng_state()}


def _unpack(tensors: dict[str, Tensor], model: Model, optimizer, best: _Best) -> None:
    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

    model.load_state_dict(part("model"))
    best.state = part("best")
    states: dict[int, dict] = {}
    for key, value in part("optimizer").items():
        i, name = key.split(".")
        states.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    torch.set_rng_state(tensors["rng"])


def _diverged(loss: float, step: int, config: RunConfig) -> DivergedError:
    return DivergedError(
        f"the loss is {loss} at step {step} of {config.steps}; the last good checkpoint is kept. "
        f"Try lower learning rates than {config.rates()}, or a longer warm-up than {config.warmup} steps"
    )


@dataclass(frozen=True)
class Outcome:
    """What training leaves beside the model."""

    history: list[dict]
    best_step: int
    seconds: float  # of training and evaluation, interruptions left out


def train(
    model: Model,
    data: TaskData,
    config: RunConfig,
    checkpoint: Path | None = None,
    report: Callable[[int, int, float], None] | None = None,
    stop_after: int | None = None,
) -> Outcome:
    """Train in place; the model ends as it was at its best step.

    The history has one row an evaluation and member: step, member, split (train, val), loss in nats per token.
    `checkpoint` is written every `config.checkpoint_every` steps and resumed from if it is there; `report(step,
    steps, loss)` is called every step; `stop_after` ends early with a checkpoint, as an interruption would.

    Raises DivergedError where the loss is no number, DamagedFile where the checkpoint is damaged.
    """
    keep_freed_memory()
    rates = config.rates()
    optimizer = make_optimizer(model, rates, config.weight_decay)
    device = next(model.parameters()).device
    task_ids, index = data.draw(config.steps, config.tasks_per_step, config.images_per_task, config.seed)
    weight = {member: getattr(model, "source_weight", 1.0) if member == "source" else 1.0 for member in model.members}
    best, history, step, seconds = _Best(), [], 0, 0.0
    running: dict[str, list[float]] = {member: [] for member in model.members}
    if checkpoint is not None and checkpoint.exists():
        tensors, about = load_tensors(checkpoint)
        _unpack(tensors, model, optimizer, best)
        step, history, running, seconds = about["step"], about["history"], about["running"], about["seconds"]
        best.loss, best.step, best.bad = about["best"]
    groups = list(model.groups().values())
    began = time.perf_counter() - seconds

    def save() -> None:
        about = dict(step=step, history=history, running=running, seconds=time.perf_counter() - began)
        save_tensors(checkpoint, _pack(model, optimizer, best), about | {"best": [best.loss, best.step, best.bad]})

    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config.steps, config.warmup)
        ids = task_ids[step]
        tokens = data.batch(ids, index[step]).to(device)  # (T', B, N)
        losses = model.losses(ids.to(device), tokens)
        total = sum(weight[member] * loss.mean() for member, loss in losses.items())
        value = total.item()
        if not math.isfinite(value):
            raise _diverged(value, step + 1, config)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        for parameters in groups:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        step += 1
        for member, loss in losses.items():
            running[member].append(loss.mean().item())
        if report is not None:
            report(step, config.steps, value)
        if step % config.eval_every == 0 or step == config.steps:
            val = split_losses(model, data, "val", config.val_images)
            for member in model.members:
                mean = sum(running[member]) / len(running[member])
                history.append(dict(step=step, member=member, split="train", loss=mean))
                history.append(dict(step=step, member=member, split="val", loss=val[member].mean().item()))
                running[member].clear()
            mean = sum(v.mean().item() for v in val.values()) / len(val)
            if not math.isfinite(mean):
                raise _diverged(mean, step, config)
            best.see(mean, step, model)
            if config.patience and best.bad >= config.patience:
                break
        if checkpoint is not None and (
            step % config.checkpoint_every == 0 and step < config.steps or step == stop_after
        ):
            save()
        if step == stop_after:
            return Outcome(history, best.step, time.perf_counter() - began)
    model.load_state_dict(best.state)
    return Outcome(history, best.step, time.perf_counter() - began)
