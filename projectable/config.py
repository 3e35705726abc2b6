"""What a run is: everything that decides its numbers, in one frozen description.

`Profile` fixes the setting that all arms of a comparison share; `RunConfig` is one training run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from .transformer import Shape

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class DataConfig:
    """Which tasks: the arguments of `tasks.make_tasks`."""

    dataset: str = "fashion"  # fashion, digits
    tasks: str = "classes"  # classes, clustersK
    vocab_size: int = 128  # codes of the codebook
    patch: int = 4  # pixels
    val_per_class: int = 600  # images held back for every choice


@dataclass(frozen=True)
class RunConfig:
    """One training run. `lr` goes with `sizes`; `start` is the run whose weights this one begins with."""

    model: str  # universal, distilled, specialists, source, projectable
    data: DataConfig
    d_source: int
    n_layers: int
    sizes: tuple[int, ...]  # of the small models
    lr: tuple[float, ...]  # one a size
    steps: int
    seed: int
    source_lr: float = 0.0
    tasks_per_step: int = 10
    images_per_task: int = 4
    warmup: int = 50  # steps
    clip: float = 1.0  # gradient norm of a member
    weight_decay: float = 0.0
    eval_every: int = 200  # steps
    val_images: int = 100  # of each task, at every evaluation
    patience: int = 0  # evaluations without a better one; 0: never stop early
    checkpoint_every: int = 200  # steps
    precision: str = "float32"  # or bfloat16: training under autocast, on CUDA only (slower on a CPU)
    options: tuple[tuple[str, object], ...] = ()  # further arguments of the model
    start: RunConfig | None = None

    def __post_init__(self) -> None:
        if len(self.lr) != len(self.sizes):
            raise ValueError(
                f"{len(self.lr)} learning rates for {len(self.sizes)} sizes {self.sizes}: one each is allowed"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; allowed: {', '.join(PRECISIONS)}")

    def shape(self, length: int, d_model: int | None = None) -> Shape:
        """The Transformer of that width (default: the source's) for sequences of `length` tokens."""
        return Shape(d_model or self.d_source, self.n_layers, vocab_size=self.data.vocab_size, length=length)

    def rates(self) -> dict[str, float]:
        """Learning rate by member."""
        rates = {f"d{size}": lr for size, lr in zip(self.sizes, self.lr, strict=True)}
        return rates | {"source": self.source_lr}

    def key(self) -> str:
        """A fingerprint of the description (12 hex digits)."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def with_(self, **changes) -> RunConfig:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Profile:
    """A setting: what every arm of a comparison shares."""

    name: str
    data: DataConfig
    d_source: int
    n_layers: int
    sizes: tuple[int, ...]
    source_steps: int  # of the source alone
    joint_steps: int  # of source and projections together; rivals get both: equal examples
    images_per_task: int
    tasks_per_step: int
    seeds: tuple[int, ...]
    trials: int  # learning rates of an arm and size …
    max_trials: int  # … and as many at most, where the best is at an edge
    n_clusters: int
    eval_every: int
    val_images: int

    @property
    def clusters(self) -> DataConfig:
        """The same images with clusters as tasks."""
        return replace(self.data, tasks=f"clusters{self.n_clusters}")

    @property
    def text(self) -> Profile:
        """The same with kinds of writing as tasks: characters instead of patches."""
        n = 40 if self.name == "smoke" else 400
        return replace(self, data=DataConfig("text", "kinds", vocab_size=96, val_per_class=n))

    @property
    def glyphs(self) -> Profile:
        """The same with letters as tasks; others are held out (tasks `heldout`)."""
        tasks = "train16" if self.name == "smoke" else "train256"
        return replace(self, data=replace(self.data, dataset="glyphs", tasks=tasks, patch=4, val_per_class=20))

    @property
    def short(self) -> Profile:
        """The same with half of the steps, for comparisons of many arms: all of them shortened alike."""
        return replace(self, source_steps=self.source_steps // 2, joint_steps=self.joint_steps // 2)


PROFILES = {
    "smoke": Profile(
        name="smoke",  # no evidence: it shows that everything runs
        data=DataConfig("digits", vocab_size=32, patch=2, val_per_class=20),
        d_source=32,
        n_layers=2,
        sizes=(8, 16, 24),
        source_steps=20,
        joint_steps=20,
        images_per_task=4,
        tasks_per_step=10,
        seeds=(0, 1),
        trials=2,
        max_trials=2,
        n_clusters=16,
        eval_every=10,
        val_images=20,
    ),
    "laptop": Profile(
        name="laptop",  # two cores, no GPU
        data=DataConfig(),
        d_source=64,
        n_layers=2,
        sizes=(8, 16, 32),
        source_steps=200,
        joint_steps=800,
        images_per_task=4,
        tasks_per_step=10,
        seeds=(0, 1, 2, 3, 4),
        trials=3,
        max_trials=6,
        n_clusters=64,
        eval_every=200,
        val_images=100,
    ),
    "gpu": Profile(
        name="gpu",
        data=DataConfig(vocab_size=256),
        d_source=128,
        n_layers=3,
        sizes=(8, 16, 32, 64),
        source_steps=2000,
        joint_steps=10000,
        images_per_task=24,
        tasks_per_step=10,
        seeds=(0, 1, 2, 3, 4),
        trials=4,
        max_trials=8,
        n_clusters=64,
        eval_every=500,
        val_images=600,
    ),
}


def get_profile(name: str) -> Profile:
    """The profile of that name; raises ValueError naming the allowed ones."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; allowed: {', '.join(PROFILES)}")
    return PROFILES[name]
