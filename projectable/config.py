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
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from .storage import DamagedFile, read_json
from .tasks.images import FOLDER
from .tasks.text import LETTERS
from .transformer import Shape

PRECISIONS = ("float32", "bfloat16")

# what a config may say
AT_LEAST_1 = ("d_source", "n_layers", "steps", "tasks_per_step", "images_per_task", "eval_every", "checkpoint_every")
AT_LEAST_0 = ("warmup", "val_images", "patience")
AT_MOST = dict(d_source=2**16, n_layers=1000, val_images=10**6)
NO_START = ("universal", "hypernetwork", "support_universal", "hard_mixture", "masked_universal")
ONE_SIZE = (
    *NO_START,
    *("told", "specialists", "tuned", "cut"),
    *("distilled", "distilled_hypernetwork", "distilled_specialists", "distilled_cut"),
)
STARTS = {  # whose start is of one kind, and of the same data and source
    "projectable": "source",
    "masked_projectable": "masked_source",
    "distilled_projectable": "source",
    "distilled": "source",
    "distilled_hypernetwork": "source",
    "cut": "source",
    "distilled_cut": "source",
    "tuned": "projectable",
}
GOES_ON = {"source": "source", "masked_source": "masked_source"}  # which may start from one of its kind, as above
OF_OTHER_DATA = {  # whose start may be of other data
    "told": ("support_universal",),
    "adapted": ("projectable", "universal", "hypernetwork", "source", "distilled", "adapted"),
}
NEED_START = (*STARTS, *OF_OTHER_DATA, "distilled_specialists")
MOST_IMAGES = 10**8  # that a training may draw: their order is held in memory, 8 bytes each


def _at_least(config, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}; allowed: {least} or more")


# how a field holds what it is given


def _object(pairs: Collection) -> dict:
    """JSON's pairs as a dict; raises ValueError for a key that is there twice, of which one would not count."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice; allowed: each key once")
    return dict(pairs)


def _build(cls: type, found, where: str):
    """A dataclass from an object of its fields. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r:.60}; allowed: an object with the keys of {cls.__name__}")
    known = {field.name: field for field in fields(cls)}
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in found]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


_kinds: typing.Any = cache(typing.get_type_hints)


def _typed(config) -> None:
    """Have the fields hold what their types say, whoever made the config. Raises ValueError naming field and value."""
    for name, kind in _kinds(type(config)).items():
        object.__setattr__(config, name, _value(kind, getattr(config, name), name))


def _value(kind, value, name: str):
    """`value` as a field of that type holds it: numpy's numbers as Python's, objects of JSON as configs."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if kind is DataConfig:
        return value if isinstance(value, DataConfig) else _build(DataConfig, value, name)
    if isinstance(kind, types.UnionType):
        return value if isinstance(value, RunConfig | None) else _build(RunConfig, value, name)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if inner not in (int, float):
            return _options(value)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r:.60}; allowed: a list of {inner.__name__}")
        return tuple(_value(inner, x, name) for x in value)
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r:.60}; allowed: {kind.__name__}")
    return value


def _options(value) -> tuple[tuple[str, object], ...]:
    """Options as pairs, sorted by name."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise ValueError(f"options={value!r:.60}; allowed: an object, or a list of [name, value]")
    return tuple(sorted((name, _frozen(x, name)) for name, x in _object(pairs).items()))


def _frozen(value, name: str):
    """An option's value, JSON's lists as tuples, all the way down."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(value, list | tuple):
        return tuple(_frozen(x, name) for x in value)
    if not isinstance(value, str | bool | int | float | None):
        raise ValueError(f"option {name}={value!r:.60}; allowed: a number, a string, true, false, null, or a list")
    return value


@dataclass(frozen=True)
class DataConfig:
    """Which tasks: the arguments of `tasks.make_tasks`."""

    dataset: str = "fashion"  # a name that `make_tasks` takes: fashion, digits, glyphs, text, folder:PATH, …
    tasks: str = "classes"  # classes, clustersK, … (see there)
    vocab_size: int = 128  # codes of the codebook
    patch: int = 4  # pixels
    val_per_class: int = 600  # images held back for every choice; of letters and text the others grow with it

    def __post_init__(self) -> None:
        _typed(self)
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
        _typed(self)
        if len(self.lr) != len(self.sizes):
            raise ValueError(
                f"{len(self.lr)} learning rates for {len(self.sizes)} sizes {self.sizes}: one each is allowed"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; allowed: {', '.join(PRECISIONS)}")
        _at_least(self, 1, *AT_LEAST_1)
        _at_least(self, 0, *AT_LEAST_0)
        for name, most in AT_MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: up to {most}")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}; allowed: more than 0")
        rates = {f"lr of {member}": lr for member, lr in self.rates().items() if member != "source"}
        for name, value in (rates | dict(source_lr=self.source_lr, weight_decay=self.weight_decay)).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}; allowed: 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}; allowed: up to {2**63 - 1}, not negative")
        if self.steps * self.tasks_per_step * self.images_per_task > MOST_IMAGES:
            product = f"steps={self.steps} × tasks_per_step={self.tasks_per_step} × images_per_task"
            raise ValueError(f"{product}={self.images_per_task}; allowed: up to {MOST_IMAGES} images")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; allowed: each once")
        if any(not 1 <= size <= AT_MOST["d_source"] for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; allowed: 1 to {AT_MOST['d_source']}")
        if self.model in GOES_ON and self.sizes:
            raise ValueError(f"sizes={list(self.sizes)}; allowed for {self.model!r}: none")
        if self.model in NEED_START and not self.sizes:
            raise ValueError(f"sizes=[]; allowed for {self.model!r}: one or more")
        if self.model in ONE_SIZE and len(self.sizes) != 1:
            raise ValueError(f"sizes={list(self.sizes)}; allowed for model {self.model!r}: one size")
        if self.model in NO_START and self.start is not None:
            raise ValueError(f"model {self.model!r} starts from nothing; allowed: no 'start'")
        if self.model in NEED_START and self.start is None:
            raise ValueError(f"model {self.model!r} needs 'start', the config of what it starts from")
        if self.start is not None:
            self._check_start(self.start)
        mode = dict(self.options).get("source_mode", "trained")
        learns = self.model in GOES_ON or self.model.endswith("projectable") and not str(mode).endswith("frozen")
        if learns and not self.source_lr:
            raise ValueError(f"source_lr={self.source_lr}, with which the source learns nothing; allowed: more than 0")

    def _check_start(self, start: RunConfig) -> None:
        alike = STARTS | GOES_ON
        allowed = (alike[self.model],) if self.model in alike else OF_OTHER_DATA.get(self.model, (start.model,))
        if start.model not in allowed:
            kinds = " or ".join(map(repr, allowed))
            raise ValueError(f"start: model {start.model!r}; allowed for {self.model!r}: {kinds}")
        if self.model == start.model and start.start is not None and start.start.model == "projectable":
            raise ValueError("start: projections that are adapted already; allowed for 'adapted': the projections")
        if start.model.startswith("masked_") != self.model.startswith("masked_"):
            raise ValueError(f"start: model {start.model!r}; allowed for {self.model!r}: one that reads as it does")
        same = ("data", "d_source", "n_layers") if self.model in alike else ("n_layers",)
        for name in same:
            its, own = getattr(start, name), getattr(self, name)
            if its != own:
                raise ValueError(f"start: {name}={its}, in the run itself {own}; allowed: the same in both")

    def shape(self, length: int, d_model: int | None = None) -> Shape:
        """The Transformer of that width (default: the source's) for sequences of `length` tokens."""
        masked = self.model.startswith("masked_")  # the mask is one more token
        vocab_size = self.data.vocab_size + masked
        return Shape(d_model or self.d_source, self.n_layers, vocab_size=vocab_size, length=length, masked=masked)

    def rates(self) -> dict[str, float]:
        """Learning rate by member."""
        rates = {f"d{size}": lr for size, lr in zip(self.sizes, self.lr, strict=True)}
        return rates | {"source": self.source_lr}

    def drawn_before(self) -> int:
        """How many of the runs that it starts from drew the images in the same order: it draws others."""
        order, found, part = ("data", "steps", "tasks_per_step", "images_per_task", "seed"), 0, self.start
        while part is not None:
            found += all(getattr(part, name) == getattr(self, name) for name in order)
            part = part.start
        return found

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

    def __post_init__(self) -> None:
        """Raises ValueError naming the value and what is allowed."""
        _typed(self)
        _at_least(self, 1, "trials", "max_trials", "n_clusters", "joint_steps")
        _at_least(self, 0, "source_steps")
        for name in ("sizes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}=(); allowed: one or more")

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
        """The same with letters as tasks, validated by five images of each; others are held out (tasks `heldout`)."""
        tasks, n = ("train16", 10) if self.name == "smoke" else ("train256", 20)
        data = replace(self.data, dataset="glyphs", tasks=tasks, patch=4, val_per_class=n)
        return replace(self, data=data, val_images=5)

    @property
    def short(self) -> Profile:
        """The same with three tenths of the steps, for comparisons of many arms: all of them shortened alike."""
        source, joint = (max(1, 3 * n // 10) for n in (self.source_steps, self.joint_steps))
        return replace(self, source_steps=source, joint_steps=joint)

    @property
    def long(self) -> Profile:
        """The same with four times the steps, evaluated as often in all: whether findings outlive a longer training."""
        source, joint, every = (4 * n for n in (self.source_steps, self.joint_steps, self.eval_every))
        return replace(self, source_steps=source, joint_steps=joint, eval_every=every)


_SMOKE = Profile(  # no evidence: it shows that everything runs
    "smoke",
    DataConfig("digits", vocab_size=32, patch=2, val_per_class=20),
    d_source=32,
    n_layers=1,
    sizes=(8, 16, 24),
    source_steps=8,
    joint_steps=2,
    images_per_task=2,
    seeds=(0, 1),
    trials=2,
    max_trials=2,
    n_clusters=16,
    eval_every=4,
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
    path, again = Path(path), "`projectable train` with the config that it came from writes it again"
    if of_run := path.is_dir():
        path /= "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; allowed: a config as JSON, as config.json in every run") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error})" + (f": {again}" if of_run else "")) from None
    trained = of_run and (path.parent / "result.json").exists()
    if isinstance(found, dict) and ("sha256" in found or trained):  # a run's own has to say what was trained
        try:
            found = read_json(path)
        except DamagedFile as error:
            changed = "out of a copy that you changed take its sha256"
            raise DamagedFile(f"{str(error).rpartition(': ')[0]}: {again}; {changed}") from None
    if isinstance(found, dict) and "format" in found:
        others = "`projectable sample`, `evaluate` and `info` take it"
        raise ConfigError(f"{path.parent} is no run but a small model: {others}")
    return config_from(found, models, str(path))


def config_from(found: dict, models: Collection[str], where: str = "config") -> RunConfig:
    """The config that `dataclasses.asdict` turned into `found`; options may be an object. Raises ConfigError.

    `models` are the names of models that are allowed.
    """
    try:
        config = part = _build(RunConfig, found, where)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    while part is not None:
        if part.model not in models:
            raise ConfigError(f"{where}: unknown model {part.model!r}; allowed: {', '.join(models)}")
        part, where = part.start, f"{where}, start"
    return config
