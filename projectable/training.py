"""The one training loop: every arm goes through it, its members side by side.

    L = λ · CE(source; x, t) + Σ over other members of CE(member; x, t)        nats per token, mean over tasks

- Each member has its own learning rate and its own gradient clipping, so that members that share no weights learn
  exactly as if they were alone.
- The order of data is a pure function of the config (`TaskData.draw`), the schedule one of the step; a checkpoint
  holds everything else. A run killed anywhere and resumed ends bitwise where an unbroken one does (CPU, same threads).
- The best step on validation images is kept, one for all members: that of the lowest mean over members, each of them a
  mean over the tasks that have validation images (`patience` evaluations without a better one end the run early).
- Several processes may share a training, a `Team` that torchrun starts: each has its share of every step's tasks, and
  the whole model. Gradients are averaged by DistributedDataParallel, so that a step is that of one process on all the
  tasks, up to rounding; what processes have to agree on (losses, a stop) is summed over them.
- Many trainings may be `Jobs` of submitit: on this machine, or on Slurm.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import math
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .config import PRECISIONS, RunConfig
from .models import Model
from .storage import DamagedFile, load_tensors, save_tensors
from .tasks import TaskData


class DivergedError(RuntimeError):
    """Loss, gradient or weights are not finite; the message says at which step and what to try."""


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor of every learning rate: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


class AdamW(torch.optim.AdamW):
    """Without what torch wraps its methods in for compiled code: that imports its compiler, for seconds."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def make_optimizer(model: Model, rates: dict[str, float], weight_decay: float) -> AdamW:
    """AdamW, fused: each member's parameters at that member's rate times their own factor."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[float, list] = {}
    for member, parameters in model.groups().items():
        for p in parameters:
            groups.setdefault(rates[member] * model.rate_factor(names[id(p)]), []).append(p)
    rated = [dict(params=ps, lr=rate, rate=rate) for rate, ps in groups.items()]
    return AdamW(rated, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: given back, it costs thousands of page faults a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: arrays up to 32 MB, the most that every version takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def gains_by_onednn(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor of these `torch.cpu.get_capabilities` multiplies faster by oneDNN, and still in float32."""
    amx = any(on for name, on in capabilities.items() if name.startswith("amx"))
    return "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f", False) and not amx


class FastProducts(contextlib.ContextDecorator):
    """While entered, float32 products are made by oneDNN on AMD's processors with AVX-512: 240 GFLOP/s a core.

    MKL, PyTorch's usual way, leaves AVX-512 unused there: 110. The one way to oneDNN is to allow bfloat16 inside of
    products, which it makes use of only where a processor has AMX; elsewhere they stay in float32, with up to 1.7 times
    MKL's rounding errors (a test compares). Calls are dearer, so that many tiny products are slower: sampling does
    without, and so do other models of the same process. A precision that the user has set is left alone;
    `torch.get_float32_matmul_precision` raises meanwhile. The switch is the process's: it is on while any thread is in.
    """

    _now = SimpleNamespace(lock=Lock(), inside=0, on=False)  # not plain values of the class: those are in keys of runs

    def __enter__(self) -> None:
        matmul, now = torch.backends.mkldnn.matmul, self._now  # type: ignore[attr-defined]
        with now.lock:
            if not now.inside:
                capabilities = getattr(torch.cpu, "get_capabilities", dict)()
                now.on = matmul.fp32_precision == "none" and gains_by_onednn(capabilities)
                if now.on:
                    matmul.fp32_precision = "bf16"
            now.inside += 1

    def __exit__(self, *_: object) -> None:
        matmul, now = torch.backends.mkldnn.matmul, self._now  # type: ignore[attr-defined]
        with now.lock:
            now.inside -= 1
            if not now.inside and now.on and matmul.fp32_precision == "bf16":
                matmul.fp32_precision = "none"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """What the forward pass runs under."""
    return contextlib.nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def check_precision(model: Model, task_ids: Tensor, tokens: Tensor, precision: str, rounds: int = 5) -> None:
    """Time passes forward and backward in both precisions; raises ValueError where bfloat16 is not the faster one.

    Medians of `rounds`, in turn, after one to warm up, on a GPU without CUDA graphs, which float32 may train with; the
    model and the random state are left as they were.
    """
    if precision == "float32":
        return
    device, seconds = tokens.device, {name: [] for name in PRECISIONS}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name in PRECISIONS * (1 + rounds):
            start = time.perf_counter()
            with autocast(device, name):
                losses = model.losses(task_ids, tokens)
            torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    ms = {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}
    if ms["bfloat16"] >= ms["float32"]:
        raise ValueError(
            f"precision='bfloat16' takes {ms['bfloat16']:.3g} ms a pass on this device ({device}), "
            f"float32 {ms['float32']:.3g} ms; allowed: float32"
        )


@FastProducts()
@torch.no_grad()
def split_losses(
    model: Model, data: TaskData, split: str, per_task: int | None = None, block: int = 20, team: Team | None = None
) -> dict[str, Tensor]:
    """Nats per token of every member on every task: {member: (n_tasks,)}, over the first `per_task` images of each.

    With 0 or None of all images. float64, on the CPU; NaN for a task that has no images in that split.
    """
    team = team or Team()
    sums = {member: torch.zeros(data.n_tasks, dtype=torch.float64) for member in model.members}
    counts = torch.zeros(data.n_tasks, dtype=torch.float64)
    device = next(model.parameters()).device
    per_task = per_task or max(1, *(len(t) for t in data.tokens[split]))
    at_once = max(20, 400 // min(block, per_task))  # tasks
    mine = range(data.n_tasks)[team.share(data.n_tasks)]
    training = model.training
    model.eval()  # as it is used: maps of one's own may have dropout
    for first in range(0, len(mine), at_once):
        ids = mine[first : first + at_once]
        for start in range(0, per_task, block):
            rows = [data.tokens[split][t][start : min(start + block, per_task)] for t in ids]
            for size in sorted({len(r) for r in rows} - {0}):  # tasks with as many images left go together
                group = [t for t, r in zip(ids, rows, strict=True) if len(r) == size]
                tokens = torch.stack([r for r in rows if len(r) == size]).to(device)
                losses = model.losses(torch.tensor(group, device=device), tokens)
                counts[group] += size
                for member, values in losses.items():
                    sums[member][group] += values.double().cpu() * size
    model.train(training)
    return {member: team.sum(total) / team.sum(counts) for member, total in sums.items()}


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


def _diverged(what: str, step: int, config: RunConfig) -> DivergedError:
    return DivergedError(
        f"{what} at step {step} of {config.steps}; the last good checkpoint, if there was one, is kept. "
        f"Try lower learning rates than {config.rates()}, or a longer warm-up than {config.warmup} steps"
    )


@dataclass(frozen=True)
class Outcome:
    """What training leaves beside the model."""

    history: list[dict]
    best_step: int
    seconds: float  # of training and evaluation, interruptions left out


@FastProducts()
def train(
    model: Model,
    data: TaskData,
    config: RunConfig,
    checkpoint: Path | None = None,
    report: Callable[[int, int, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
    team: Team | None = None,
) -> Outcome:
    """Train in place; the model ends as it was at its best step.

    The history has one row an evaluation and member: step, member, split (train, val), loss in nats per token.
    `checkpoint` is written every `config.checkpoint_every` steps and resumed from if it is there; `report(step,
    steps, loss)` is called every step; `stop()` is asked after every step but the last, and where it says yes a
    checkpoint is written and KeyboardInterrupt raised. Of a `team` only the first process writes and reports.

    Raises DivergedError where loss, gradient or weights are not finite, before anything of it is saved; DamagedFile
    where the checkpoint is damaged or another run's; ValueError where there is nothing to choose the best step by, a
    team is larger than a step has tasks, or bfloat16 is not the faster one (`check_precision`, before the first step).
    """
    keep_freed_memory()
    team = team or Team()
    rates = config.rates()
    optimizer = make_optimizer(model, rates, config.weight_decay)
    device = next(model.parameters()).device
    order = config.steps, config.tasks_per_step, config.images_per_task, config.seed, config.drawn_before()
    task_ids, index = data.draw(*order)
    n_tasks = task_ids.shape[1]
    if team.size > n_tasks:
        raise ValueError(f"{team.size} processes for {n_tasks} tasks a step; allowed: 1 to {n_tasks}")
    has_val = torch.tensor([len(tokens) > 0 for tokens in data.tokens["val"]])
    if not has_val.any():
        raise ValueError(f"{data.name} has no validation images: the best step is chosen by them; hold some back")
    weight = {member: getattr(model, "source_weight", 1.0) if member == "source" else 1.0 for member in model.members}
    best, history, step, seconds = _Best(), [], 0, 0.0
    running: dict[str, list[float]] = {member: [] for member in model.members}
    if checkpoint is not None and checkpoint.exists():
        tensors, about = load_tensors(checkpoint)
        if about.get("config") != config.key():
            raise DamagedFile(f"{checkpoint} is the checkpoint of another run: delete it and run again")
        _unpack(tensors, model, optimizer, best)
        step, history, running, seconds = about["step"], about["history"], about["running"], about["seconds"]
        best.loss, best.step, best.bad = about["best"]
    groups = list(model.groups().values())
    losses_of, mine = team.losses(model), team.share(n_tasks)

    def save() -> None:
        if checkpoint is None or team.rank > 0:
            return
        if not all(p.isfinite().all() for p in model.parameters()):
            raise _diverged("some weights are not finite", step, config)
        about = dict(config=config.key(), step=step, history=history, running=running)
        about |= dict(seconds=time.perf_counter() - began, best=[best.loss, best.step, best.bad])
        save_tensors(checkpoint, _pack(model, optimizer, best), about)

    first = task_ids[0, mine].to(device), data.batch(task_ids[0, mine], index[0, mine]).to(device)
    if not step:
        team.first(lambda: check_precision(model, *first, config.precision))
    began = time.perf_counter() - seconds
    if stop is not None:
        stop()  # from here on a step in progress is ended first
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config.steps, config.warmup)
        ids = task_ids[step, mine]
        tokens = data.batch(ids, index[step, mine]).to(device)  # (T', B, N)
        with autocast(device, config.precision):
            losses = losses_of(ids.to(device), tokens)
        means = {member: loss.sum() / n_tasks for member, loss in losses.items()}  # this process's part of them
        total: Any = sum(weight[member] * mean for member, mean in means.items())
        found = dict(zip(means, team.sum(torch.stack([*means.values()]).detach()).tolist(), strict=True))
        value = sum(weight[member] * mean for member, mean in found.items())
        if not total.requires_grad:
            names = ", ".join(means)
            raise ValueError(f"the loss of {names} hangs on nothing that is trained; allowed: maps that learn")
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value}", step + 1, config)
        optimizer.zero_grad(set_to_none=True)
        (total * team.size).backward()  # a team's gradients are averaged
        clipped = [torch.nn.utils.clip_grad_norm_(parameters, config.clip) for parameters in groups]
        norms = torch.stack([norm.to(device) for norm in clipped])  # of a group without gradients it lies on the CPU
        if not norms.isfinite().all():
            raise _diverged("the gradient is not finite", step + 1, config)
        optimizer.step()
        step += 1
        for member, mean in found.items():
            running[member].append(mean)
        if report is not None and team.rank == 0:
            report(step, config.steps, value)
        if step % config.eval_every == 0 or step == config.steps:
            losses = split_losses(model, data, "val", config.val_images, team=team)
            val = {member: loss[has_val].mean().item() for member, loss in losses.items()}
            for member in model.members:
                mean = sum(running[member]) / len(running[member])
                history.append(dict(step=step, member=member, split="train", loss=mean))
                history.append(dict(step=step, member=member, split="val", loss=val[member]))
                running[member].clear()
            mean = sum(val.values()) / len(val)
            if not math.isfinite(mean):
                raise _diverged(f"the validation loss is {mean}", step, config)
            best.see(mean, step, model)
            if config.patience and best.bad >= config.patience:
                break
        if step % config.checkpoint_every == 0 and step < config.steps:
            save()
        if stop is not None and step < config.steps and team.sum(torch.tensor(float(stop()))) > 0:
            save()
            raise KeyboardInterrupt
    model.load_state_dict(best.state)
    return Outcome(history, best.step, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------- beyond one process

Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]


class Team:
    """The processes of one training: here a process alone."""

    rank, size = 0, 1

    def losses(self, model: Model) -> Losses:
        """`model.losses`, with gradients that are averaged over the team; on a GPU as CUDA graphs."""
        if next(model.parameters()).is_cuda and not any(getattr(m, "draws", False) for m in model.modules()):
            return cuda_graph(model)
        return model.losses

    def share(self, n: int) -> slice:
        """Which of n things are this process's."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the team of each process's values."""
        return values

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives the first process; the others wait for it. Its error is everybody's."""
        return make()


def cuda_graph(model: Model) -> Losses:
    """`model.losses` with its gradients as CUDA graphs: hundreds of small kernels are launched at once.

    Captured at the first call, for tokens of that shape; others, and what runs under autocast, go without. Not for a
    model that draws random numbers on the CPU: they could be captured once only.
    """
    graph, shape = None, torch.Size()  # type: Any, torch.Size

    def losses(task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        nonlocal graph, shape
        if torch.is_autocast_enabled("cuda") or graph is not None and tokens.shape != shape:
            return model.losses(task_ids, tokens)
        if graph is None:
            like, shape = (task_ids.clone(), tokens.clone()), tokens.shape
            graph = torch.cuda.make_graphed_callables(_Losses(model), like, allow_unused_input=True)
        return graph(task_ids, tokens)

    return losses


class Torchrun(Team):
    """Processes started by torchrun, one a device: gloo on CPUs, NCCL on GPUs."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")

    def losses(self, model: nn.Module) -> Losses:
        # all steps have the same graph; what no loss reaches (IDs beside Static maps) has no gradient, as ever
        return DistributedDataParallel(_Losses(model), static_graph=True)

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def first(self, make: Callable[[], Any]) -> Any:
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = make()
            except Exception as error:
                said[1] = error
        distributed.broadcast_object_list(said, device=self.device)
        if said[1] is not None:
            raise said[1]
        return said[0]


class _Losses(nn.Module):
    """A whole model, source and generators and all, with its losses as the forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, task_ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return self.model.losses(task_ids, tokens)


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The team that torchrun's environment describes, for as long as it is needed; else this process alone."""
    said = os.environ.get("WORLD_SIZE") or "1"
    if said == "1":
        yield Team()
        return
    if not said.isdecimal() or "LOCAL_RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={said!r} without what torchrun sets beside it; allowed: unset, or under torchrun")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # others wait for the first while it waits for a lock, or makes data: longer than the usual half hour, if need be
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    try:
        yield Torchrun()
        distributed.barrier()  # nobody leaves while another still talks
    finally:
        gc.collect()  # what holds the group goes first
        distributed.destroy_process_group()


class Stop:
    """Ctrl-C and SIGTERM while runs are trained: a step in progress is ended first; anything else is left at once.

    A context manager; asked (as `stop` of `train`) it says whether such a signal came. Outside of a training,
    and at a second Ctrl-C, KeyboardInterrupt is raised right away; `cut` says that it was amid a training.
    """

    def __init__(self, team: Team):
        self.signal, self.training, self.cut, self.team = 0, False, False, team

    def __call__(self) -> bool:
        self.training = True
        return self.signal != 0

    def end(self) -> None:
        """A training has ended. Raises KeyboardInterrupt where any process of the team was asked to stop."""
        self.training = False
        if self.team.sum(torch.tensor(float(self.signal != 0))) > 0:
            raise KeyboardInterrupt

    def __enter__(self) -> Stop:
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        again, self.signal = self.signal == number, number
        if again and self.team.size == 1 or not self.training:  # torchrun passes signals on: there they come twice
            self.cut = self.training
            raise KeyboardInterrupt


EXECUTORS = ("local", "slurm")


class Jobs:
    """Functions as jobs of submitit; as an executor of `concurrent.futures`: `submit` gives a future.

    `local` runs as many processes as `at_once` says, `slurm` as many jobs as the cluster lets run (at most 500 wait).
    PROJECTABLE_SLURM, a JSON object, goes to submitit's `update_parameters`: partition, time, memory, GPUs. Files of
    the jobs lie in `folder`. Raises ValueError for an unknown executor, ImportError where submitit is not installed.
    """

    def __init__(self, executor: str, folder: Path, at_once: int):
        if executor not in EXECUTORS:
            raise ValueError(f"unknown executor {executor!r}; allowed: {', '.join(EXECUTORS)}")
        try:
            import submitit
        except ImportError:
            raise ImportError("--executor needs submitit: pip install 'projectable[cluster]'") from None
        self.executor = submitit.AutoExecutor(folder, cluster=executor)
        parameters = dict(name="projectable", cpus_per_task=1, mem_gb=4, timeout_min=24 * 60)
        if executor == "local":
            parameters["gpus_per_node"] = torch.cuda.device_count()  # else submitit hides them
        else:
            said = os.environ.get("PROJECTABLE_SLURM", "{}")
            try:
                parameters |= json.loads(said)
            except (ValueError, TypeError):
                raise ValueError(f"PROJECTABLE_SLURM={said!r}; allowed: a JSON object") from None
        self.executor.update_parameters(**parameters)
        self.threads = ThreadPoolExecutor(at_once if executor == "local" else 500)
        self.cancelled = Event()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The future of what the function returns; its error is that of the job, the last line of its trace."""
        return self.threads.submit(self._follow, function, arguments)

    def _follow(self, function: Callable[..., Any], arguments: tuple) -> Any:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        job = self.executor.submit(function, *arguments)
        try:
            while not job.done():
                if self.cancelled.wait(0.5):  # a job that was ended has no result, for which submitit would wait
                    job.cancel()
                    last = time.monotonic() + 5  # it is seen to end
                    while time.monotonic() < last and not job.done():
                        time.sleep(0.1)
                    raise CancelledError
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            words, trace, *_ = [*re.split(r"\n-{5,}\n", str(error)), ""]  # what, the job's trace, where its logs lie
            last = (trace.strip() or words.strip()).splitlines()[-1]  # of a job that was lost there is no trace
            raise RuntimeError(f"job {job.job_id}: {last}") from None

    def cancel(self) -> None:
        """End all jobs, and see them end; what they had is in their checkpoints."""
        self.cancelled.set()
        self.threads.shutdown(cancel_futures=True)
