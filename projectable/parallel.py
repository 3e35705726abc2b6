"""Beyond one process: a team that shares one training, jobs on a cluster for many, and how to stop.

- `torchrun` starts a team; each process has its share of every step's tasks, and the whole model. Gradients are
  averaged by DistributedDataParallel, so that a step is that of one process on all the tasks, up to rounding; what
  processes have to agree on (losses, a stop) is summed over them.
- Jobs go through submitit: to this machine, or to Slurm.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]


class Team:
    """The processes of one training: here a process alone."""

    rank, size = 0, 1

    def losses(self, model: nn.Module) -> Losses:
        """`model.losses`, with gradients that are averaged over the team."""
        return model.losses  # type: ignore[return-value]

    def share(self, n: int) -> slice:
        """Which of n things are this process's."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the team of each process's values."""
        return values

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives the first process; the others wait for it. Its error is everybody's."""
        return make()


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
        return self.model.losses(task_ids, tokens)  # type: ignore[operator]


@contextmanager
def team() -> Iterator[Team]:
    """The team that torchrun's environment describes, for as long as it is needed; else this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # others wait for the first while it waits for a lock, or makes data: longer than the usual half hour, if need be
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    try:
        yield Torchrun()
    finally:
        distributed.destroy_process_group()


class Stop:
    """Ctrl-C and SIGTERM while runs are trained: a step in progress is ended first; anything else is left at once.

    A context manager; asked (as `stop` of `training.train`) it says whether such a signal came. Outside of a training,
    and at a second Ctrl-C, KeyboardInterrupt is raised right away.
    """

    def __init__(self, team: Team):
        self.signal, self.training, self.team = 0, False, team

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
        if executor == "slurm":
            parameters |= json.loads(os.environ.get("PROJECTABLE_SLURM", "{}"))
        self.executor.update_parameters(**parameters)
        self.threads = ThreadPoolExecutor(at_once if executor == "local" else 500)
        self.jobs: set[Any] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The future of what the function returns; its error is that of the job, the last line of its trace."""
        return self.threads.submit(self._follow, function, arguments)

    def _follow(self, function: Callable[..., Any], arguments: tuple) -> Any:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        job = self.executor.submit(function, *arguments)
        self.jobs.add(job)
        try:
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            parts = re.split(r"\n-{5,}\n", str(error))  # words, the job's trace, where its logs lie
            raise RuntimeError(f"job {job.job_id}: {parts[min(1, len(parts) - 1)].strip().splitlines()[-1]}") from None
        finally:
            self.jobs.discard(job)

    def cancel(self) -> None:
        """End all jobs; what they had is in their checkpoints."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for job in list(self.jobs):
            job.cancel()
