"""Config → run directory: trained once, reused by every notebook; many side by side on the machine's cores.

A run's folder is named by its config *and* by whatever code can change its numbers (comments and docstrings apart), so
that a notebook never shows a stale run. `result.json` is written last: with it a run is whole, without it the
next call goes on from its checkpoint. A lock keeps two processes from training the same run twice.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import inspect
import json
import os
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import baselines, conditioning, generators, projection, tasks, training, transformer
from .baselines import Distilled, Model, Specialists, Universal
from .config import DataConfig, RunConfig
from .projection import Projectable
from .storage import (
    current_commit,
    device,
    load_tensors,
    locked,
    read_json,
    root,
    save_tensors,
    write_atomically,
)
from .tasks import TaskData, make_tasks
from .tasks.codebook import Codebook
from .tasks.images import content_key
from .training import split_losses, train

MODELS = ("source", "universal", "distilled", "specialists", "projectable")


def runs_dir() -> Path:
    """Where runs are kept: PROJECTABLE_RUNS, or runs/ beside the package."""
    return Path(os.environ.get("PROJECTABLE_RUNS") or root() / "runs")


# ------------------------------------------------------------------------------------------------ what a run is


def _code_of(thing) -> str:
    """The code of a module or function without comments and docstrings, as a canonical string."""
    tree = ast.parse(inspect.getsource(thing))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.dump(tree)


@cache
def _fingerprint(part: str) -> str:
    """A hash of all code that can change the numbers of data, or of a run."""
    data = (tasks, tasks.codebook, tasks.images)
    models = (transformer, generators, conditioning, projection, baselines, training, build)
    things = data if part == "data" else data + models
    versions = f"{np.__version__.split('.')[0]} torch {torch.__version__.split('+')[0]}"
    return hashlib.sha256("".join(map(_code_of, things)).encode() + versions.encode()).hexdigest()


def data_for(config: DataConfig) -> TaskData:
    """The task data of a config, encoded once and kept with the runs; anew where the images in a folder changed."""
    return _data_for(config, content_key(config.dataset))


@cache
def _data_for(config: DataConfig, content: str) -> TaskData:
    key = hashlib.sha256((json.dumps(asdict(config)) + content + _fingerprint("data")).encode()).hexdigest()[:12]
    path = runs_dir() / f"data-{Path(config.dataset).name}-{config.tasks}-{key}.safetensors"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                data = make_tasks(**asdict(config))
                tensors = {f"{split}.{t}": x for split, xs in data.tokens.items() for t, x in enumerate(xs)}
                book = data.codebook
                about = dict(name=data.name, task_names=data.task_names, licence=data.licence)
                about |= dict(patch=book.patch, height=book.height, width=book.width)
                save_tensors(path, tensors | {"codes": torch.from_numpy(book.codes)}, about)
    tensors, about = load_tensors(path)
    names = tuple(about["task_names"])
    tokens = {s: [tensors[f"{s}.{t}"] for t in range(len(names))] for s in tasks.SPLITS}
    book = Codebook(tensors["codes"].numpy(), about["patch"], about["height"], about["width"])
    return TaskData(about["name"], names, tokens, book, about["licence"])


def build(config: RunConfig, data: TaskData) -> Model:
    """The untrained model of a config, on the CPU; its random numbers come from the config's seed."""
    start = run(config.start).model() if config.start is not None else None
    torch.manual_seed(config.seed)  # after the start was built, which draws from its own seed
    options, length = dict(config.options), data.codebook.length
    if config.model == "source":
        source = Universal(config.shape(length), data.n_tasks, member="source", **options)
        if start is not None:
            source.load_state_dict(start.state_dict())
        return source
    if config.model == "projectable":
        return Projectable(start, data.n_tasks, config.sizes, data.first("train", 20), seed=config.seed, **options)
    shape = config.shape(length, *config.sizes)
    if config.model == "universal":
        return Universal(shape, data.n_tasks, **options)
    if config.model == "distilled":
        return Distilled(shape, data.n_tasks, teacher=start, **options)
    if config.model == "specialists":
        if start is not None:
            with torch.no_grad():
                start = start.weights(start.members[0], torch.arange(data.n_tasks))
        return Specialists(shape, data.n_tasks, start)
    raise ValueError(f"unknown model {config.model!r}; allowed: {', '.join(MODELS)}")


def operations(config: RunConfig) -> float:
    """Multiply-adds of a run's training, its start included (projections' generation left out: see the bench).

    Forward and backward count as three forward passes; a frozen source's inner pass does not exist.
    """
    data = data_for(config.data)
    length = data.codebook.length
    widths = list(config.sizes)
    options = dict(config.options)
    if config.model == "source" or config.model == "projectable" and options.get("source_mode", "trained") == "trained":
        widths.append(config.d_source)
    per_token = 3.0 * sum(config.shape(length, width).n_operations() for width in widths)
    if config.model == "distilled":
        per_token += config.shape(length).n_operations()
    tokens = config.steps * min(config.tasks_per_step, data.n_tasks) * config.images_per_task * length
    return per_token * tokens + (operations(config.start) if config.start is not None else 0.0)


# ---------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: RunConfig
    folder: Path

    @cached_property
    def result(self) -> dict:
        """val (nats per token by member), best_step, seconds, device, commit, n_parameters."""
        return read_json(self.folder / "result.json")

    @cached_property
    def history(self) -> list[dict]:
        """Rows of step, member, split, loss."""
        return read_json(self.folder / "history.json")

    def model(self) -> Model:
        """The trained model, on the CPU."""
        model = build(self.config, data_for(self.config.data))
        model.load_state_dict(load_tensors(self.folder / "model.safetensors")[0])
        return model.eval()

    def test_losses(self) -> dict[str, Tensor]:
        """Nats per token on all test images: {member: (n_tasks,)}. Computed once, after all choices are made."""
        path = self.folder / "test.json"
        if not path.exists():
            losses = split_losses(self.model(), data_for(self.config.data), "test")
            write_atomically(path, json.dumps({member: x.tolist() for member, x in losses.items()}))
        return {member: torch.tensor(x, dtype=torch.float64) for member, x in read_json(path).items()}


def folder_of(config: RunConfig) -> Path:
    """The run's folder."""
    content = content_key(config.data.dataset)
    key = hashlib.sha256((config.key() + content + _fingerprint("all")).encode()).hexdigest()[:12]
    return runs_dir() / f"{config.model}-{key}"


def is_done(config: RunConfig) -> bool:
    """Whether the run is finished."""
    return (folder_of(config) / "result.json").exists()


def run(config: RunConfig, report=None) -> Run:
    """The finished run of a config: trained now, or gone on with, or found. `report` as in `training.train`."""
    folder = folder_of(config)
    if not is_done(config):
        if config.start is not None:
            run(config.start, report=report)
        with locked(folder.with_suffix(".lock")):
            if not is_done(config):
                _train(config, folder, report)
        folder.with_suffix(".lock").unlink(missing_ok=True)
    return Run(config, folder)


def _train(config: RunConfig, folder: Path, report) -> None:
    data = data_for(config.data)
    model = build(config, data)
    if torch.cuda.is_available():
        model.to("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(asdict(config), indent=1))
    checkpoint = folder / "checkpoint.safetensors"
    outcome = train(model, data, config, checkpoint, report)
    save_tensors(folder / "model.safetensors", model.state_dict(), {"config": config.key()})
    write_atomically(folder / "history.json", json.dumps(outcome.history))
    val = {
        row["member"]: row["loss"]
        for row in outcome.history
        if row["split"] == "val" and row["step"] == outcome.best_step
    }
    n_parameters = sum(p.numel() for p in model.parameters())
    result = dict(val=val, best_step=outcome.best_step, seconds=outcome.seconds, n_parameters=n_parameters)
    write_atomically(
        folder / "result.json", json.dumps(result | dict(device=device(), commit=current_commit()), indent=1)
    )
    checkpoint.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- many of them

_progress = None  # a worker's queue to the process that shows the progress


def _start_worker(queue, threads: int) -> None:
    global _progress
    _progress = queue
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a worker does not outlive its parent


def _work(config: RunConfig, folder: Path, test: bool) -> None:
    if folder_of(config) != folder:
        raise RuntimeError(
            f"code or images were changed while this process ran: start it again (a worker would write {folder})"
        )
    if not is_done(config):
        share = (operations(config) - (operations(config.start) if config.start else 0)) / config.steps
        seen = 0

        def report(step: int, steps: int, loss: float) -> None:
            nonlocal seen
            if step % 20 == 0 or step == steps:
                _progress.put(share * max(step - seen, 0) if seen else share * min(step, 20))
                seen = step

        run(config, report)
    if test:
        run(config).test_losses()


@cache
def _pool(runs: Path):
    """The workers for that folder of runs, kept between calls: importing torch takes longer than a small run."""
    context = get_context("spawn")
    queue = context.Queue()
    threads = 1 if workers() > 1 else torch.get_num_threads()
    return ProcessPoolExecutor(workers(), context, _start_worker, (queue, threads)), queue


def workers() -> int:
    """How many runs go side by side: one a core, one thread each; a single one on a GPU."""
    return 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)))


def run_many(configs: list[RunConfig], words: str = "training", test: bool = False) -> list[Run]:
    """The finished runs of all configs, in order; what is missing is trained side by side, with a line of progress.

    `test=True` also evaluates them on test images. Raises the first error, after the others have been saved.
    """
    from tqdm import tqdm

    todo = {folder_of(c): c for c in configs if not is_done(c) or test and not (folder_of(c) / "test.json").exists()}
    if not todo:
        return [Run(c, folder_of(c)) for c in configs]
    parents = [c.start for c in todo.values() if c.start is not None and not is_done(c.start)]
    if parents:
        run_many(list({folder_of(c): c for c in parents}.values()), f"{words}: what these start from")
    for data in {c.data for c in todo.values()}:
        data_for(data)
    order = sorted(todo.values(), key=operations, reverse=True)  # long ones first: the cores end together

    def rest(c: RunConfig) -> float:
        return 0.0 if is_done(c) else operations(c) - (operations(c.start) if c.start else 0.0)

    total = sum(map(rest, order))
    bar = tqdm(total=total / 1e9, unit="GMAC", desc=f"{words}, {len(order)} runs", mininterval=5, bar_format=BAR)
    pool, queue = _pool(runs_dir())
    waiting = {pool.submit(_work, c, folder_of(c), test) for c in order}
    errors = []
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                bar.update(min(queue.get() / 1e9, bar.total - bar.n))
            errors += [future.exception() for future in done if future.exception() is not None]
    except KeyboardInterrupt:  # the workers go at once; what they had is in their checkpoints
        _pool.cache_clear()
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    bar.update(bar.total - bar.n)
    bar.close()
    if any(isinstance(error, BrokenProcessPool) for error in errors):
        _pool.cache_clear()  # a worker was killed: the next call starts new ones
    if errors:
        raise errors[0]
    return [Run(c, folder_of(c)) for c in configs]


BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}, {rate_fmt}"
