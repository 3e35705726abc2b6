"""Several processes, one training: `torchrun` starts them, each takes its share of a step's tasks.

Every process keeps the whole model. DistributedDataParallel averages the gradients, so that a step is that of one
process on all the tasks, up to rounding; what processes have to agree on (losses, a stop) is summed over them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        # what no loss reaches (a hidden task embedding, say) has no gradient, as in one process
        return DistributedDataParallel(_Losses(model), find_unused_parameters=True)

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
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Torchrun()
    finally:
        distributed.destroy_process_group()
