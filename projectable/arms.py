"""The comparison: which arms there are, each with its own learning-rate sweep, and their runs over seeds.

Rules, alike for all arms: the trials of a sweep are full-length runs of the first seed, `TRIALS` of them a size, a
factor 2 apart; where the best is at an edge, the sweep goes on beyond it. The rate with the lowest validation loss
is used for every seed. A choice between variants (the best conditioning) is made on validation images, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from .config import Profile, RunConfig
from .experiment import Run, operations, run_many

TRIALS = 4  # learning rates of an arm and size; more where the best is at an edge
MAX_TRIALS = 8
FACTOR = 2.0


@dataclass(frozen=True)
class Arm:
    """One contender. `lr`: where its sweep begins, by size; `steps`: how long it trains, in a profile's phases."""

    name: str
    words: str  # as a legend shows it
    model: str
    lr: dict[int, float]
    steps: str = "both"  # source (the source alone), joint, both (as many examples as a projection in all), matched
    start: str = ""  # the arm whose run it starts from
    options: dict = field(default_factory=dict)

    @property
    def together(self) -> bool:
        """Whether all sizes are trained in one run."""
        return self.model == "projectable"
