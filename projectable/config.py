"""What a run is: everything that decides its numbers, in one frozen description.

`Profile` fixes the setting that all arms of a comparison share; `RunConfig` is one training run, which may be read from
JSON. What a config says is checked when it is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from .storage import read_json
from .tasks.images import FOLDER
from .tasks.text import LETTERS
from .transformer import Shape

PRECISIONS = ("float32", "bfloat16")

# what a config may say
AT_LEAST_1 = ("d_source", "n_layers", "steps", "tasks_per_step", "images_per_task", "eval_every", "checkpoint_every")
AT_LEAST_0 = ("warmup", "val_images", "patience")
NO_START = ("universal", "hypernetwork", "support_universal", "hard_mixture", "masked_universal")
ONE_SIZE = (*NO_START, "told", "distilled", "specialists", "distilled_specialists", "tuned", "cut")
STARTS = {  # whose start is of one kind, and of the same data and source
    "projectable": "source",
    "masked_projectable": "masked_source",
    "distilled": "source",
    "cut": "source",
    "tuned": "projectable",
}
GOES_ON = {"source": "source", "masked_source": "masked_source"}  # which may start from one of its kind, as above
OF_OTHER_DATA = {  # whose start may be of other data
    "told": ("support_universal",),
    "adapted": ("projectable", "universal", "hypernetwork", "source", "distilled", "adapted"),
}
NEED_START = (*STARTS, *OF_OTHER_DATA, "distilled_specialists")


def _at_least(config, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}; allowed: {least} or more")


@dataclass(frozen=True)
class DataConfig:
    """Which tasks: the arguments of `tasks.make_tasks`."""

    dataset: str = "fashion"  # a name that `make_tasks` takes: fashion, digits, glyphs, text, folder:PATH, …
    tasks: str = "classes"  # classes, clustersK, … (see there)
    vocab_size: int = 128  # codes of the codebook
    patch: int = 4  # pixels
    val_per_class: int = 600  # images held back for every choice

    def __post_init__(self) -> None:
        path = self.dataset.removeprefix(FOLDER)
        if path and path != self.dataset:  # the same images, wherever one asks from
            object.__setattr__(self, "dataset", FOLDER + os.path.abspath(os.path.expanduser(path)))
        _at_least(self, 0, "val_per_class")
        _at_least(self, 1, "vocab_size", "patch")


@dataclass(frozen=True)
class RunConfig:
    """One training run. `lr` goes with `sizes`; `start` is the run whose weights this one begins with."""

    model: str  # a name in experiment.MODELS: source, projectable, universal, …
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
    val_images: int = 100  # of each task, at every evaluation; 0: all
    patience: int = 0  # evaluations without a better one; 0: never stop early
    checkpoint_every: int = 200  # steps
    precision: str = "float32"  # or bfloat16: training under autocast, where that is measured to be faster
    options: tuple[tuple[str, object], ...] = ()  # further arguments of the model
    start: RunConfig | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the value and what is allowed. Lists and a dict of options become tuples.

        Options are sorted by name: in whatever order they were given, the run is the same.
        """
        pairs = sorted(dict(self.options).items())
        for name, listed in dict(sizes=self.sizes, lr=self.lr, options=pairs).items():
            object.__setattr__(self, name, tuple(map(_frozen, cast(Iterable, listed))))
        if len(self.lr) != len(self.sizes):
            raise ValueError(
                f"{len(self.lr)} learning rates for {len(self.sizes)} sizes {self.sizes}: one each is allowed"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; allowed: {', '.join(PRECISIONS)}")
        _at_least(self, 1, *AT_LEAST_1)
        _at_least(self, 0, *AT_LEAST_0)
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}; allowed: more than 0")
        rates = {f"lr of {member}": lr for member, lr in self.rates().items() if member != "source"}
        for name, value in (rates | dict(source_lr=self.source_lr, weight_decay=self.weight_decay)).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}; allowed: 0 or more")
        for name, most in (("seed", 2**63 - 1), ("steps", 10**9)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: up to {most}, not negative")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; allowed: each once")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; allowed: 1 or more")
        if self.model in ONE_SIZE and len(self.sizes) != 1:
            raise ValueError(f"sizes={list(self.sizes)}; allowed for model {self.model!r}: one size")
        if self.model in NO_START and self.start is not None:
            raise ValueError(f"model {self.model!r} starts from nothing; allowed: no 'start'")
        if self.model in NEED_START and self.start is None:
            raise ValueError(f"model {self.model!r} needs 'start', the config of what it starts from")
        if self.start is not None:
            self._check_start(self.start)

    def _check_start(self, start: RunConfig) -> None:
        alike = STARTS | GOES_ON
        allowed = (alike[self.model],) if self.model in alike else OF_OTHER_DATA.get(self.model, (start.model,))
        if start.model not in allowed:
            kinds = " or ".join(map(repr, allowed))
            raise ValueError(f"start: model {start.model!r}; allowed for {self.model!r}: {kinds}")
        if start.model.startswith("masked_") != self.model.startswith("masked_"):
            raise ValueError(f"start: model {start.model!r}; allowed for {self.model!r}: one that reads as it does")
        same = ("data", "d_source", "n_layers") if self.model in alike else ("n_layers",)
        for name in same:
            its, own = getattr(start, name), getattr(self, name)
            if its != own:
                raise ValueError(f"start: {name}={its}; allowed: that of the run itself, {own}")

    def shape(self, length: int, d_model: int | None = None) -> Shape:
        """The Transformer of that width (default: the source's) for sequences of `length` tokens."""
        masked = self.model.startswith("masked_")  # the mask is one more token
        vocab_size = self.data.vocab_size + masked
        return Shape(d_model or self.d_source, self.n_layers, vocab_size=vocab_size, length=length, masked=masked)

    def rates(self) -> dict[str, float]:
        """Learning rate by member."""
        rates = {f"d{size}": lr for size, lr in zip(self.sizes, self.lr, strict=True)}
        return rates | {"source": self.source_lr}

    def key(self) -> str:
        """A fingerprint of the description (12 hex digits)."""
        return self._key

    @cached_property
    def _key(self) -> str:
        said = asdict(self)
        part: dict | None = said
        while part is not None:  # where images lie is no part of it: what they are is in the name of a run's folder
            if part["data"]["dataset"].startswith(FOLDER):
                part["data"]["dataset"] = FOLDER
            part = part["start"]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    def with_(self, **changes) -> RunConfig:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Profile:
    """A setting: what every arm of a comparison shares; by default that of `laptop`, for two cores without a GPU."""

    name: str
    data: DataConfig = DataConfig()
    d_source: int = 64
    n_layers: int = 2
    sizes: tuple[int, ...] = (8, 16, 32)
    source_steps: int = 200  # of the source alone
    joint_steps: int = 800  # of source and projections together; rivals get both: equal examples
    images_per_task: int = 4
    tasks_per_step: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    trials: int = 3  # learning rates of an arm and size …
    max_trials: int = 12  # … and as many at most: where the best is at an edge, the sweep goes on
    n_clusters: int = 64
    eval_every: int = 200
    val_images: int = 100

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
    def featured(self) -> Profile:
        """The same images with clusters, of what a frozen image encoder sees in them, as tasks: `clustersK`."""
        return replace(self, data=replace(self.data, dataset=f"featured_{self.data.dataset}"))

    @property
    def captioned(self) -> Profile:
        """The same images with a caption of 24 characters before each: both in one sequence."""
        size = self.data.vocab_size + len(LETTERS)
        return replace(self, data=replace(self.data, dataset=f"captioned_{self.data.dataset}", vocab_size=size))

    @property
    def glyphs(self) -> Profile:
        """The same with letters as tasks; others are held out (tasks `heldout`)."""
        tasks = "train16" if self.name == "smoke" else "train256"
        return replace(self, data=replace(self.data, dataset="glyphs", tasks=tasks, patch=4, val_per_class=20))

    @property
    def short(self) -> Profile:
        """The same with three tenths of the steps, for comparisons of many arms: all of them shortened alike."""
        return replace(self, source_steps=3 * self.source_steps // 10, joint_steps=3 * self.joint_steps // 10)

    @property
    def long(self) -> Profile:
        """The same with four times the steps, evaluated as often in all: whether findings outlive a longer training."""
        source, joint, every = (4 * n for n in (self.source_steps, self.joint_steps, self.eval_every))
        return replace(self, source_steps=source, joint_steps=joint, eval_every=every)


_SMOKE = Profile(  # no evidence: it shows that everything runs
    "smoke",
    DataConfig("digits", vocab_size=32, patch=2, val_per_class=20),
    d_source=32,
    sizes=(8, 16, 24),
    source_steps=4,
    joint_steps=6,
    images_per_task=2,
    seeds=(0, 1),
    trials=2,
    max_trials=2,
    n_clusters=16,
    eval_every=3,
    val_images=10,
)
_GPU = Profile(  # one CUDA device: a bigger source, more sizes, seven times as many images
    "gpu",
    DataConfig(vocab_size=256),
    d_source=128,
    n_layers=3,
    sizes=(8, 16, 32, 64),
    joint_steps=1000,
    images_per_task=24,
    seeds=(0, 1, 2),
    val_images=200,
)
PROFILES = {profile.name: profile for profile in (_SMOKE, Profile("laptop"), _GPU)}


def get_profile(name: str) -> Profile:
    """The profile of that name; raises ValueError naming the allowed ones."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; allowed: {', '.join(PROFILES)}")
    return PROFILES[name]


# ---------------------------------------------------------------------------------------------- a config as JSON


class ConfigError(ValueError):
    """A config, or a run that was asked for, is none; the message names the value and what is allowed."""


def read_config(path: str | Path, models: Collection[str]) -> RunConfig:
    """The config in a JSON file, or in a run's folder, of one of the `models`. Raises ConfigError naming file, key
    and value.
    """
    path = Path(path)
    if path.is_dir():  # a run's folder
        path /= "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; allowed: a config as JSON, as config.json in every run") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error})") from None
    if isinstance(found, dict) and "sha256" in found:  # a run's own: what it says has to be what was trained
        found = read_json(path)
    return config_from(found, models, str(path))


def config_from(found: dict, models: Collection[str], where: str = "config") -> RunConfig:
    """The config that `dataclasses.asdict` turned into `found`; options may be an object. Raises ConfigError.

    `models` are the names of models that are allowed.
    """
    return _checked(_build(RunConfig, found, where), models, where)


def _checked(config: RunConfig, models: Collection[str], where: str) -> RunConfig:
    """A config whose model, and that of what it starts from, is known. Raises ConfigError."""
    if config.model not in models:
        raise ConfigError(f"{where}: unknown model {config.model!r}; allowed: {', '.join(models)}")
    if config.start is not None:
        _checked(config.start, models, f"{where}, start")
    return config


def _build(cls: type, found, where: str):
    """A dataclass from an object of its fields."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is {found!r:.60}; allowed: an object with the keys of {cls.__name__}")
    known = {field.name: field for field in fields(cls)}
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in found]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    kinds = typing.get_type_hints(cls)
    values = {key: _value(kinds[key], value, f"{where}: {key}", where) for key, value in found.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _value(kind, value, words: str, where: str):
    """`value` as a field of that type holds it."""
    if kind is DataConfig:
        return _build(DataConfig, value, f"{where}, data")
    if isinstance(kind, types.UnionType):
        return None if value is None else _build(RunConfig, value, f"{where}, start")
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if inner not in (int, float):  # options: pairs, or an object
            pairs = list(value.items()) if isinstance(value, dict) else value
            if not isinstance(pairs, list) or not all(
                isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
            ):
                raise ConfigError(f"{words}={value!r:.60}; allowed: an object, or a list of [name, value]")
            return value
        if not isinstance(value, list):
            raise ConfigError(f"{words}={value!r:.60}; allowed: a list of {inner.__name__}")
        return tuple(_value(inner, x, words, where) for x in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{words}={value!r:.60}; allowed: {kind.__name__}")
    return value


def _frozen(value):
    """JSON's lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
