"""Config → run directory: trained once, reused by every notebook; many side by side on the machine's cores.

A run's folder is named by its config *and* by whatever code can change its numbers (comments and docstrings apart), so
that a notebook never shows a stale run. `result.json` is written last: with it a run is whole, without it the
next call goes on from its checkpoint. A lock keeps two processes from training the same run twice. A training that
diverged leaves `diverged.json`: it would do so again, and is not tried again.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import generators, tasks
from .config import OF_OTHER_DATA, STARTS, DataConfig, RunConfig
from .generators import CONDITIONINGS, FAMILIES, Conditioning, Generator
from .models import (
    KEEPS_OBJECTIVE,
    Adapted,
    Distilled,
    DistilledHypernetwork,
    DistilledProjections,
    DistilledSpecialists,
    HardMixture,
    Hypernetwork,
    Model,
    Projectable,
    Projection,
    Specialists,
    SupportUniversal,
    Universal,
    for_new_tasks,
    group_tasks,
)
from .storage import (
    DamagedFile,
    current_commit,
    device,
    end_with_parent,
    fingerprint,
    keep_sources,
    load_tensors,
    locked,
    own_modules,
    read_json,
    root,
    save_tensors,
    write_json,
)
from .tasks import FEW, Codebook, TaskData, few, make_tasks, text
from .tasks.images import LOADERS, content_key, given_by, looked_at_once
from .training import DivergedError, Jobs, Outcome, Team, split_losses, train
from .transformer import Products

Report = Callable[[int, int, float], None]


def runs_dir() -> Path:
    """Where runs are kept: PROJECTABLE_RUNS, or runs/ beside the package."""
    return Path(os.environ.get("PROJECTABLE_RUNS") or root() / "runs").expanduser()


# ------------------------------------------------------------------------------------------------ what a run is


def _strings(value) -> Iterator[str]:
    """All strings in a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@cache
def _words_of(config: RunConfig) -> tuple[str, ...]:
    """All strings in a config, found once."""
    return tuple(_strings(asdict(config)))


_versions = cache(text.versions)  # 10 ms; they do not change meanwhile
_commit = cache(current_commit)  # nor does the code that was imported


def content_of(config: DataConfig) -> str:
    """What data depend on that may change beside their config: texts and fonts of packages, images in a folder, what
    a maker of one's own gives."""
    if (maker := tasks.MAKERS.get(config.dataset)) is not tasks.OURS.get(config.dataset):
        whole = re.sub(f"^{FEW}$", r"\1", config.tasks)
        return given_by(maker, whole, config.vocab_size, config.patch, config.val_per_class)
    makers = {"text": _versions, "glyphs": _drawn_by}
    return makers[config.dataset]() if config.dataset in makers else content_key(config.dataset)


@cache
def _drawn_by() -> str:
    """Whose fonts letters have, and what draws them."""
    return " ".join(f"{name} {version(name)}" for name in ("matplotlib", "pillow"))


def _data_code(config: DataConfig) -> str:
    """A hash of what makes these data beside their config: the code, and their content."""
    return content_of(config) + fingerprint([make_tasks], _strings(asdict(config)))


def _run_code(config: RunConfig) -> str:
    """A hash of what decides the numbers of a run beside its config: data, model, training, and those of its start."""
    decide = [untrained, train, RunConfig.shape, RunConfig.rates, RunConfig.drawn_before, make_tasks]
    code = content_of(config.data)
    code += fingerprint(decide, _words_of(config), dict(config.options))
    return code + _run_code(config.start) if config.start is not None else code


def data_for(config: DataConfig) -> TaskData:
    """The task data of a config, encoded once and kept with the runs; anew where the images in a folder changed."""
    return _data_for(config, _data_code(config))


@cache
def _data_for(config: DataConfig, code: str) -> TaskData:
    key = hashlib.sha256((json.dumps(asdict(config)) + code).encode()).hexdigest()[:12]
    words = re.sub(r"[^\w.-]+", "-", f"{Path(config.dataset).name}-{config.tasks}")[:40]  # a folder has any name
    path = runs_dir() / f"data-{words}-{key}.safetensors"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                if scarce := re.fullmatch(FEW, config.tasks):  # of the whole set, which is kept, too
                    data = few(data_for(replace(config, tasks=scarce[1])), int(scarce[2]), int(scarce[3] or 0))
                else:
                    data = make_tasks(**asdict(config))
                _check_data(data, config)
                tensors = {f"{split}.{t}": x for split, xs in data.tokens.items() for t, x in enumerate(xs)}
                book = data.codebook
                about: dict = {name: getattr(data, name) for name in ("name", "task_names", "licence", "families")}
                about |= dict(patch=book.patch, height=book.height, width=book.width)
                about |= dict(alphabet=isinstance(book, text.Alphabet))
                about |= dict(middle=book.middle.tolist()) if isinstance(book, text.Captioned) else {}
                save_tensors(path, tensors | {"codes": torch.from_numpy(book.codes)}, about)
    tensors, about = load_tensors(path)
    names = tuple(about["task_names"])
    tokens = {s: [tensors[f"{s}.{t}"] for t in range(len(names))] for s in tasks.SPLITS}
    codes = tensors["codes"].numpy()
    if about["alphabet"]:
        book = cast(Codebook, text.Alphabet.from_codes(codes, about["width"]))
    else:
        book = Codebook(codes, about["patch"], about["height"], about["width"])
    if "middle" in about:
        plain = replace(book, codes=codes[: len(codes) - len(text.LETTERS)])
        book = cast(Codebook, text.Captioned(plain, np.array(about["middle"])))
    return TaskData(about["name"], names, tokens, book, about["licence"], tuple(about["families"]))


def _check_data(data: TaskData, config: DataConfig) -> None:
    """Raises ValueError for data, of one's own maker perhaps, that cannot be kept or trained on."""
    book, known = data.codebook, (Codebook, text.Alphabet, text.Captioned)
    if type(book) not in known:
        kinds = ", ".join(kind.__name__ for kind in known)
        raise ValueError(f"a codebook of {data.name} that is {type(book).__name__}; allowed: {kinds}")
    if len(book.codes) != config.vocab_size:
        raise ValueError(f"{data.name} has {len(book.codes)} codes; allowed: vocab_size={config.vocab_size} of them")
    for name, tokens in zip(data.task_names, data.tokens["train"], strict=True):
        if not len(tokens):
            raise ValueError(f"task {name!r} of {data.name} has no training images; allowed: at least one")


def build(config: RunConfig, data: TaskData) -> Model:
    """The untrained model of a config, on the CPU; what it starts from is found, or trained first.

    Raises ValueError naming what is allowed: for an unknown model or option, or a start that would give other models
    than the config says.
    """
    _check_options(config)
    model = _made(config, data, run(config.start).model() if config.start is not None else None)
    members = set(model.members) - {"source"}
    if members != {f"d{size}" for size in config.sizes}:
        words = f"{config.model!r} with sizes={list(config.sizes)} would have {', '.join(sorted(members)) or 'none'}"
        raise ValueError(f"{words}; allowed: the widths that its start has")
    return model


def _check_options(config: RunConfig) -> None:
    """Raises ValueError for options that the model, or the family of its maps, does not take, or of another kind."""
    _check_registered()
    if config.model not in MODELS:
        return
    takes, options = _parameters(MODELS[config.model], 3), dict(config.options)  # beside config, data and start
    if MODELS[config.model] in (_projectable, _distilled_projectable):  # which hand options on
        takes = takes[:-1] + _parameters(Projectable, 4)[:-1] + _parameters(Projection, 5)[:-1]
        takes += _of_family(options, "family", "Linear")
    known = {p.name: p for p in takes if p.name not in ("seed", "told", "kind")}  # which the run gives
    for option, value in options.items():
        if option not in known and any(p.kind is p.VAR_KEYWORD for p in takes):
            continue
        if option not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"unknown option {option!r} of the model {config.model!r}; allowed: {allowed}")
        said = known[option].annotation
        kinds, words = KINDS.get(getattr(said, "__name__", str(said)).partition(" ")[0], ((), ""))
        if words and type(value) not in kinds and value is not known[option].default:
            raise ValueError(f"option {option}={value!r}; allowed: {words}")
        for names, least, most, words in BOUNDS:
            if option in names and not least <= cast(float, value) <= most:
                raise ValueError(f"option {option}={value!r}; allowed: {words}")


def _check_registered() -> None:
    """Raises ValueError for a family, conditioning or loader of one's own that has a taken name or is none."""
    for registry, base in ((FAMILIES, Generator), (CONDITIONINGS, Conditioning)):
        for name, cls in registry.items():
            if not (inspect.isclass(cls) and issubclass(cls, base)):
                raise ValueError(f"{name} is no {base.__name__}; allowed: a class that inherits from it")
            if getattr(generators, name, cls) is not cls:
                raise ValueError(f"{cls.__module__}.{name} has a name that is taken; allowed: another one")
    if taken := sorted(LOADERS.keys() & tasks.MAKERS.keys()):
        raise ValueError(f"LOADERS[{taken[0]!r}] has a name that is taken; allowed: another one")


BOUNDS = ((("z_dim", "n_experts"), 1, 2**16, f"1 to {2**16}"), (("share",), 0, 1, "0 to 1"))  # of options
KINDS = {  # of options, as signatures say them
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
    "tuple": ((tuple, list), "a list"),
}


def _parameters(thing: Callable, given: int) -> list[inspect.Parameter]:
    """What it takes beside the first ones, which are given."""
    return list(inspect.signature(thing).parameters.values())[given:]


def _of_family(options: dict, which: str, default: str) -> list[inspect.Parameter]:
    """What the family that options name takes, and the one inside it. Raises ValueError for an unknown one."""
    if not isinstance(name := options.get(which, default), str):
        return [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]
    if name not in FAMILIES:
        raise ValueError(f"unknown generator {name!r}; allowed: {', '.join(FAMILIES)}")
    takes = _parameters(FAMILIES[name], 2)
    inner = next((p.default for p in takes if p.name == "inner"), None) if which == "family" else None
    return takes[:-1] + _of_family(options, "inner", inner) if inner else takes


def _made(config: RunConfig, data: TaskData, start: Model | None) -> Model:
    """`untrained`, where its start and what it makes fit. Raises ValueError naming what does not."""
    own = config.shape(data.codebook.length)
    if start is not None and (its := start.shape) and (its.vocab_size, its.length) != (own.vocab_size, own.length):
        words = f"start: {its.length} tokens of {its.vocab_size} codes"
        raise ValueError(f"{words}; allowed: those of the run itself, {own.length} of {own.vocab_size}")
    if config.start is not None and _codes(before := data_for(config.start.data)) != _codes(data):
        words = f"start: the codes of {before.name}, which are not those of the run itself, {data.name}"
        raise ValueError(f"{words}; allowed: the same in both (one codebook: of the same images, but for their tasks)")
    model, z_dim = untrained(config, data, start), 0
    for part in model.modules():
        if isinstance(part, Conditioning):
            z_dim = part.z_dim
            two = torch.arange(part.n_tasks)[[0, -1]]
            _check_made(part, two, f"the conditioning {type(part).__name__}", "vectors", [(2, z_dim)], torch.float32)
    for part in model.modules():
        if isinstance(part, Generator):
            shapes = [(n, *part.base.shape) for n in (2, 1)]  # of two tasks, or alike for all
            two = torch.ones(2, z_dim)
            _check_made(part, two, f"the generator {type(part).__name__}", "maps", shapes, part.base.dtype)
    return model


def _check_made(maker: nn.Module, two: Tensor, who: str, what: str, shapes: list[tuple], dtype: torch.dtype) -> None:
    """Raises ValueError where a conditioning or generator, of one's own perhaps, makes the wrong thing of two tasks."""
    training = maker.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made, alone = maker.eval()(two), maker(two[:1])
        found = tuple(made.shape)
    except Exception as error:
        raise ValueError(f"{who} gives no {what}: {str(error) or type(error).__name__}") from error
    finally:
        maker.train(training)
    if found not in shapes:
        raise ValueError(f"{who} gives {what} {found} of 2 tasks; allowed: {' or '.join(map(str, shapes))}")
    if made.dtype != dtype or not made.isfinite().all():
        wrong = f"of {made.dtype}" if made.dtype != dtype else "that are not finite"
        raise ValueError(f"{who} gives {what} {wrong}; allowed: numbers, {dtype}")
    if not torch.allclose(made[:1], alone, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{who} gives a task other {what} alone than beside others, or each time; allowed: the same")


def untrained(config: RunConfig, data: TaskData, start: Model | None) -> Model:
    """The model of a config from that of its start; its random numbers come from the config's seed.

    Raises ValueError for an unknown model, and where it cannot be made.
    """
    if config.model not in MODELS:
        raise ValueError(f"unknown model {config.model!r}; allowed: {', '.join(MODELS)}")
    if start is not None and config.model not in OF_OTHER_DATA and start.n_tasks != data.n_tasks:
        raise ValueError(f"start: {start.n_tasks} tasks; allowed: as many as the run itself has, {data.n_tasks}")
    torch.manual_seed(config.seed)  # after the start was built, which draws from its own seed
    return MODELS[config.model](config, data, start, **dict(config.options))


def _universal(
    config: RunConfig,
    data: TaskData,
    start: Universal | None,
    conditioning: str = "additive",
    zero_writes: bool = False,
) -> Model:
    """Of a size; without one the source, which alone may go on from one of its kind."""
    if start is not None and (its := start.conditioning) != conditioning:
        raise ValueError(f"start: conditioning={its!r}, in the run itself {conditioning!r}; allowed: the same in both")
    shape, member = config.shape(data.codebook.length, *config.sizes), None if config.sizes else "source"
    model = Universal(shape, data.n_tasks, conditioning, member, zero_writes)
    if start is not None:
        model.load_state_dict(start.state_dict())
    return model


def _support_universal(config: RunConfig, data: TaskData, start: None, conditioning: str = "additive") -> Model:
    shape = config.shape(data.codebook.length, *config.sizes)
    return SupportUniversal(shape, data.first("train", 16), conditioning=conditioning)


def _hypernetwork(config: RunConfig, data: TaskData, start: None, z_dim: int = 8, family: str = "Linear") -> Model:
    return Hypernetwork(config.shape(data.codebook.length, *config.sizes), data.n_tasks, z_dim, family)


def _told(config: RunConfig, data: TaskData, start: SupportUniversal) -> Model:
    return start.told_of(data.first("train", 16))


def _distilled(
    config: RunConfig, data: TaskData, start: Universal, conditioning: str = "additive", share: float = 0.5
) -> Model:
    shape = config.shape(data.codebook.length, *config.sizes)
    return Distilled(start, shape, data.n_tasks, conditioning, share=share)


def _distilled_hypernetwork(
    config: RunConfig, data: TaskData, start: Universal, z_dim: int = 8, family: str = "Linear", share: float = 0.5
) -> Model:
    shape = config.shape(data.codebook.length, *config.sizes)
    return DistilledHypernetwork(start, shape, data.n_tasks, z_dim, family, share=share)


def _specialists(config: RunConfig, data: TaskData, start: Model | None) -> Specialists:
    (size,) = config.sizes
    weights = None
    if start is not None:
        whole = start.members == ("source",) and start.shape.d_model == size
        if (member := "source" if whole else f"d{size}") not in start.members:
            allowed = ", ".join(start.members)
            raise ValueError(f"{config.model!r} of width {size}; allowed: a width of its start: {allowed}")
        with torch.no_grad():
            weights = start.weights(member, torch.arange(data.n_tasks))
    return Specialists(config.shape(data.codebook.length, size), data.n_tasks, weights)


def _distilled_specialists(config: RunConfig, data: TaskData, start: Universal, share: float = 0.5) -> Model:
    return DistilledSpecialists(start, config.shape(data.codebook.length, *config.sizes), data.n_tasks, share=share)


def _typical(data: TaskData) -> torch.Tensor:
    """The sequences that P₀ is chosen on, (T, B, N): 20 of each task, fewer of more than 64."""
    return data.first("train", max(1, min(20, 1280 // data.n_tasks)))


def _cut(config: RunConfig, data: TaskData, start: Universal, p0: str = "pca") -> Specialists:
    tokens = _typical(data)
    whole = Projectable(start, data.n_tasks, config.sizes, tokens, family="Slice", p0=p0, seed=config.seed)
    return _specialists(config, data, whole)


def _distilled_cut(config: RunConfig, data: TaskData, start: Universal, p0: str = "pca", share: float = 0.5) -> Model:
    cut = _cut(config, data, start, p0)
    (member,) = cut.members
    weights = cut.weights(member, torch.arange(data.n_tasks))
    return DistilledSpecialists(start, cut.shape, data.n_tasks, weights, share=share)


def _adapted(
    config: RunConfig, data: TaskData, start: Universal | Hypernetwork | Projectable, tune: str = "vector"
) -> Model:
    if not isinstance(start, Projectable):
        return for_new_tasks(start, data.n_tasks, tune)
    return Adapted(start, data.n_tasks, config.sizes, data.first("train", 16), tune)


def _projectable(
    config: RunConfig,
    data: TaskData,
    start: Universal,
    encoder: tuple = (),
    kind: Callable[..., Projectable] = Projectable,
    **options,
) -> Model:
    """`encoder`: of image features, name and weights file of a ResNet, and its checksum (`image_features`)."""
    if len(encoder) > 3 or not all(isinstance(word, str) for word in encoder):
        raise ValueError(f"encoder={list(encoder)}; allowed: up to three strings, network, weights file and checksum")
    conditioning = CONDITIONINGS.get(options.get("conditioning", "LearnedID"))
    needs = conditioning.needs if conditioning is not None else ()
    if unknown := [need for need in needs if need not in TELL]:
        raise ValueError(
            f"a conditioning that needs {unknown[0]!r}; allowed: what `experiment.TELL` has, {', '.join(TELL)}"
        )
    told = {need: TELL[need](data, *encoder) for need in needs}
    tokens = _typical(data)
    return kind(start, data.n_tasks, config.sizes, tokens, told=told, seed=config.seed, **options)


def _distilled_projectable(
    config: RunConfig, data: TaskData, start: Universal, encoder: tuple = (), share: float = 0.5, **options
) -> Model:
    return _projectable(config, data, start, encoder, partial(DistilledProjections, share=share), **options)


def _hard_mixture(config: RunConfig, data: TaskData, start: None, n_experts: int = 4) -> Model:
    groups = group_tasks(data.first("train", 200), config.data.vocab_size, n_experts)
    return HardMixture(config.shape(data.codebook.length, *config.sizes), groups)


def _tell_vectors(data: TaskData, network: str = "", weights: str = "", sha256: str = "") -> torch.Tensor:
    """Mean image features of 50 training images of each task, as their codes show them: (n_tasks, F).

    Kept with the runs: who loads a model needs no encoder.
    """
    from .tasks.images import ENCODER, image_features

    tokens = data.first("train", 50)
    images = data.codebook.decode(tokens.flatten(0, 1).numpy())
    if not isinstance(images, np.ndarray):
        raise ValueError(f"image features of {data.name}, which is no images; allowed: other conditionings")
    encoder = (
        f"{network or ENCODER} {Path(weights).name} {sha256} {fingerprint([image_features])}"  # names hold checksums
    )
    kept = runs_dir() / f"told-{hashlib.sha256(encoder.encode() + images.tobytes()).hexdigest()[:12]}.safetensors"
    if not kept.exists():
        features = image_features(images, network or ENCODER, weights=weights or None, sha256=sha256 or None, size=96)
        save_tensors(kept, {"vectors": features.view(data.n_tasks, tokens.shape[1], -1).mean(1)}, {})
    return load_tensors(kept)[0]["vectors"]


TELL: dict[str, Callable[..., Any]] = {  # what a conditioning may need to be told of the tasks
    "vectors": _tell_vectors,
    "names": lambda data, *_: data.task_names,
    "support": lambda data, *_: data.first("train", 16),
    "vocab_size": lambda data, *_: len(data.codebook.codes),
}


MODELS: dict[str, Callable[..., Model]] = {
    "source": _universal,
    "universal": _universal,
    "hypernetwork": _hypernetwork,
    "support_universal": _support_universal,
    "told": _told,  # a support_universal for tasks that it has not seen
    "distilled": _distilled,
    "distilled_hypernetwork": _distilled_hypernetwork,
    "specialists": _specialists,
    "distilled_specialists": _distilled_specialists,
    "tuned": _specialists,  # specialists that start from projected models
    "cut": _cut,  # specialists that start from a source cut to their width, its maps' start left as it is
    "distilled_cut": _distilled_cut,
    "adapted": _adapted,  # a projectable or universal model or a hypernetwork for tasks that it has not seen
    "projectable": _projectable,
    "distilled_projectable": _distilled_projectable,
    "hard_mixture": _hard_mixture,
    "masked_source": _universal,  # of the family that fills in masked tokens: their shapes say so
    "masked_universal": _universal,
    "masked_projectable": _projectable,
}


# what they are, once trained
TAUGHT = {
    "distilled": "universal",
    "distilled_hypernetwork": "hypernetwork",
    "distilled_specialists": "specialists",
    "distilled_cut": "cut",
}


@looked_at_once()
def operations(config: RunConfig) -> float:
    """Multiply-adds of a run's training, its start and the generation of small weights included.

    Of matrix products alone. Forward and backward count as three forward passes; a source without its own objective
    makes no pass of its own. A masked model counts as its causal twin: its attention costs twice as much, its head
    half.
    """
    data = data_for(config.data)
    length = data.codebook.length
    mode = dict(config.options).get("source_mode", "trained")
    sizes = [(width, _small_layers(config)) for width in config.sizes]
    ours = config.model.endswith("projectable")
    if keeps := config.model.endswith("source") or ours and mode in KEEPS_OBJECTIVE:
        sizes.append((config.d_source, config.n_layers))
    shapes = [replace(config.shape(length, d), n_layers=n, vocab_size=config.data.vocab_size) for d, n in sizes]
    per_token = 3.0 * sum(shape.n_operations() for shape in shapes)
    if config.model in TAUGHT:
        teacher = cast(RunConfig, config.start)
        plain = teacher.sizes and not teacher.model.endswith("projectable")
        per_token += config.shape(length, teacher.sizes[0] if plain else teacher.d_source).n_operations()
    elif config.model == "distilled_projectable" and not keeps:  # the source answers all the same
        per_token += config.shape(length).n_operations()
    n_tasks = min(config.tasks_per_step, data.n_tasks)
    per_step = per_token * n_tasks * config.images_per_task * length
    if (maker := _maker(config)) is not None:
        alike: dict = dict(sizes=config.sizes, lr=(0.0,) * len(config.sizes), steps=1, seed=0)
        if maker.model.endswith("projectable"):
            options = dict(maker.options) | dict(conditioning="LearnedID")  # others cost next to nothing more
            options.pop("share", None)
            start = cast(RunConfig, maker.start).with_(model="source", source_lr=1.0, seed=0, start=None)
            alike |= dict(model="projectable", source_lr=1.0, options=options, start=start)
        per_step += 3.0 * _generation(maker.with_(**alike), n_tasks)
    return per_step * config.steps + (operations(config.start) if config.start is not None else 0.0)


def _small_layers(config: RunConfig) -> int:
    """Layers of its small models: as many as projections say, its own or those that it starts from, or the source's."""
    if config.model in ("tuned", "specialists", "adapted") and config.start is not None:
        return _small_layers(config.start)
    return cast(int, dict(config.options).get("n_layers") or config.n_layers)


def _maker(config: RunConfig) -> RunConfig | None:
    """The run whose generators make the small weights in a step, itself or the one that it adapts; None: none do."""
    if config.model == "adapted":
        return _maker(cast(RunConfig, config.start))
    return config if config.model.endswith(("projectable", "hypernetwork")) else None


@cache
def _generation(config: RunConfig, n_tasks: int) -> int:
    """Multiply-adds of the products that generate the small weights of that many tasks, of all sizes."""
    data = data_for(config.data)
    task_ids = torch.arange(n_tasks) % data.n_tasks  # adapted models may have more tasks than what they start from
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = _blank(config, data)
        with Products() as counter:
            for member in config.sizes:
                model.weights(f"d{member}", task_ids)
    return counter.multiply_adds


# ---------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """A config and its folder, trained or not; of a run that diverged there is a `result` only."""

    config: RunConfig
    folder: Path

    def is_done(self, test: bool = False) -> bool:
        """Whether it is finished; with `test` also tested."""
        return (self.folder / "result.json").exists() and (not test or (self.folder / "test.json").exists())

    @property
    def has_diverged(self) -> bool:
        """Whether its training, or that of what it starts from, was tried and diverged."""
        return (self.folder / "diverged.json").exists()

    @cached_property
    def result(self) -> dict:
        """val (nats per token by member), best_step, seconds, device, commit, n_parameters.

        Of a run that diverged: val, infinite for all members, and seconds, not known.
        """
        if self.has_diverged:
            return dict(val=dict.fromkeys(self.config.rates(), math.inf), seconds=math.nan)
        return read_json(self.folder / "result.json")

    @cached_property
    def history(self) -> list[dict]:
        """Rows of step, member, split, loss."""
        return self._whole(read_json, "history.json")["rows"]

    def model(self) -> Model:
        """The trained model, on the CPU; what it started from need not be there (nor is a distilled one's teacher).

        Raises DamagedFile where the weights are damaged or another run's.
        """
        tensors, about = self._whole(load_tensors, "model.safetensors")
        data = data_for(self.config.data)
        model, codes = _blank(self.config, data), _codes(data)
        if about.get("config") != self.config.key() or model.state_dict().keys() != tensors.keys():
            raise DamagedFile(f"{self.folder} holds the weights of another run: delete that folder and run again")
        if about.get("codes", codes) != codes:
            raise DamagedFile(
                f"{self.folder} was trained on other tokens than {data.name} has here, where its codebook was made "
                "anew (on another machine?): bring along the data-… file that lay beside it, or delete the folder and "
                "run again"
            )
        model.load_state_dict(tensors)
        return model.eval()

    def check(self) -> Run:
        """Itself, finished and whole. Raises DamagedFile where it is not.

        A config.json that is damaged, gone, or says where images lay before they were moved is written again.
        """
        _ = self.result, self.history, self._whole(load_tensors, "model.safetensors")
        said: dict = {}
        with suppress(DamagedFile, FileNotFoundError):
            said = read_json(self.folder / "config.json")
        if said != json.loads(json.dumps(asdict(self.config))):
            write_json(self.folder / "config.json", asdict(self.config))
        return self

    def _whole(self, read: Callable[[Path], Any], name: str) -> Any:
        """What one of its files holds. Raises DamagedFile where it is damaged or gone: the folder has to go then."""
        path = self.folder / name
        try:
            return read(path)
        except (DamagedFile, FileNotFoundError) as error:
            found = f"{path} is gone" if isinstance(error, FileNotFoundError) else f"{error}".rpartition(": ")[0]
            raise DamagedFile(f"{found}: delete the folder {self.folder} and run again") from None

    def test_losses(self) -> dict[str, Tensor]:
        """Nats per token on all test images: {member: (n_tasks,)}. Computed once, after all choices are made."""
        path = self.folder / "test.json"
        if not path.exists():
            losses = split_losses(_placed(self.model()), data_for(self.config.data), "test")
            write_json(path, {member: x.tolist() for member, x in losses.items()})
        return {member: torch.tensor(x, dtype=torch.float64) for member, x in read_json(path).items()}


def _codes(data: TaskData) -> str:
    """A fingerprint of the codes that tokens stand for."""
    return hashlib.sha256(np.ascontiguousarray(data.codebook.codes).tobytes()).hexdigest()[:12]


def _blank(config: RunConfig, data: TaskData) -> Model:
    """A model of that structure to load weights into: nothing is trained for it."""
    if its := TAUGHT.get(config.model):  # only its training asked the teacher
        options = tuple((k, v) for k, v in config.options if k != "share")
        config = config.with_(model=its, options=options, start=config.start if its in STARTS else None)
    start = _blank(config.start, data_for(config.start.data)) if config.start is not None else None
    if config.model.endswith("projectable"):  # whose start is overwritten: the one that costs nothing
        config = config.with_(options=dict(config.options) | {"p0": "slice"})
    return untrained(config, data, start)


def try_out(config: RunConfig) -> None:
    """Make the model of a config that has a start, but for its weights: raises what is wrong before that is trained."""
    _check_options(config)
    start = cast(RunConfig, config.start)
    with torch.random.fork_rng(devices=[]):
        _made(config, data_for(config.data), _blank(start, data_for(start.data)))


def chain(config: RunConfig) -> list[RunConfig]:
    """A config and what it starts from, the first to be trained first."""
    return [*(chain(config.start) if config.start else []), config]


@looked_at_once()
def folder_of(config: RunConfig) -> Path:
    """The run's folder."""
    key = hashlib.sha256((config.key() + _run_code(config)).encode()).hexdigest()[:12]
    return runs_dir() / f"{config.model}-{key}"


def is_done(config: RunConfig) -> bool:
    """Whether the run is finished."""
    return Run(config, folder_of(config)).is_done()


def run(
    config: RunConfig, report: Report | None = None, stop: Callable[[], bool] | None = None, team: Team | None = None
) -> Run:
    """The finished run of a config: trained now, or gone on with, or found.

    `report`, `stop` and `team` as in `training.train`. What it starts from comes first. Two processes that want the
    same run train it once; the processes of a team read and write the same folder. Raises DivergedError where its
    training diverges, or did before.
    """
    found, team = Run(config, folder_of(config)), team or Team()
    folder = found.folder
    said = f"{folder.name} is being trained by another process: waiting for it"

    def is_there() -> bool:
        if found.has_diverged:
            remembered = folder / "diverged.json"
            raise DivergedError(f"{read_json(remembered)['error']} (remembered: delete {remembered} to try again)")
        return found.is_done()

    if not team.first(is_there):
        lock = locked(folder.with_suffix(".lock"), lambda: print(said, file=sys.stderr))
        with lock if team.rank == 0 else nullcontext():
            if not team.first(is_there):
                try:
                    if config.start is not None:
                        if not is_done(config.start):
                            try_out(config)
                        run(config.start, report, stop, team)
                    _train(config, folder, report, stop, team)
                except DivergedError as error:
                    words = {"error": str(error)}
                    team.first(lambda: write_json(folder / "diverged.json", words))
        if team.rank == 0:
            folder.with_suffix(".lock").unlink(missing_ok=True)
        team.first(is_there)  # raises where it diverged
    return found


def _train(config: RunConfig, folder: Path, report: Report | None, stop: Callable[[], bool] | None, team: Team) -> None:
    with looked_at_once():  # what it starts from is there
        data = data_for(config.data)
        model = _placed(build(config, data))
    team.first(lambda: _prepare(config, folder))
    checkpoint = folder / "checkpoint.safetensors"
    outcome = train(model, data, config, checkpoint, report, stop=stop, team=team)
    team.first(lambda: _keep(config, folder, model, data, outcome, team.size))
    checkpoint.unlink(missing_ok=True)


def _placed(model: Model) -> Model:
    """The model on the GPU, where there is one."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _prepare(config: RunConfig, folder: Path) -> None:
    """Write what is trained, and clear away what a killed process was writing."""
    write_json(folder / "config.json", asdict(config))
    for draft in folder.glob(".*"):
        if draft.is_file():  # others put folders of theirs there
            draft.unlink()


def _keep(config: RunConfig, folder: Path, model: Model, data: TaskData, outcome: Outcome, processes: int) -> None:
    """Write what a training left; the result last."""
    about = {"config": config.key(), "codes": _codes(data)}
    (folder / "test.json").unlink(missing_ok=True)  # of weights of before, which may have come out otherwise
    save_tensors(folder / "model.safetensors", model.state_dict(), about)
    write_json(folder / "history.json", {"rows": outcome.history})
    best = [row for row in outcome.history if row["split"] == "val" and row["step"] == outcome.best_step]
    result = {
        "val": {row["member"]: row["loss"] for row in best},
        "best_step": outcome.best_step,
        "seconds": outcome.seconds,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "device": f"{processes} × {device()}" if processes > 1 else device(),
        "commit": _commit(),
    }
    write_json(folder / "result.json", result)


# ------------------------------------------------------------------------------------------------- many of them

_progress: Any = None  # a worker's queue to the process that shows the progress


def _start_worker(queue, threads: int, modules: tuple[str, ...]) -> None:
    global _progress
    _progress = queue
    for module in modules:
        with suppress(ImportError):  # what is missing is said for the run that asks for it
            importlib.import_module(module)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _work(config: RunConfig, folder: Path, test: bool, threads: int = 0) -> None:
    """One run, in a worker; or as a job on a cluster, on as many threads as beside others here: the same numbers."""
    if threads:
        torch.set_num_threads(threads)
    with looked_at_once():
        if folder_of(config) != folder:
            raise RuntimeError(
                f"code or images were changed while this process ran: start it again (a worker would write {folder}); "
                "or data, a family or a conditioning were registered where a worker does not come by, in a notebook or "
                "under `__main__`: put them into a module that is imported there, or set PROJECTABLE_WORKERS=1"
            )
        share = _own_operations(config) / config.steps
    if not Run(config, folder).is_done():
        seen = 0

        def report(step: int, steps: int, loss: float) -> None:
            nonlocal seen
            if step % 20 == 0 or step == steps:
                _progress.put(share * max(step - seen, 0) if seen else share * min(step, 20))
                seen = step

        run(config, report if _progress is not None else None)
    if test:
        run(config).test_losses()


@cache
def _pool(runs: Path, executor: str, said: str, modules: tuple[str, ...]):
    """The workers for that folder of runs, kept between calls: importing torch takes longer than a small run.

    And a queue of the operations that they have done. `said`, PROJECTABLE_WORKERS, is there for the cache alone.
    `modules` are imported first: what is registered there is known then.
    """
    if executor:
        return Jobs(executor, runs / "jobs", workers()), SimpleQueue()
    context = get_context("spawn")
    queue = context.Queue()
    return ProcessPoolExecutor(workers(), context, _start_worker, (queue, _threads(), modules)), queue


def _threads() -> int:
    """Threads of a run: one where several go side by side."""
    return 1 if workers() > 1 else torch.get_num_threads()


def workers() -> int:
    """How many runs go side by side: as PROJECTABLE_WORKERS says, else one a core, one thread each.

    On a GPU, too, which small models leave idle, but no more than one for each 2 GiB that are free on it. Raises
    ValueError where PROJECTABLE_WORKERS is no whole number of 1 or more.
    """
    said = os.environ.get("PROJECTABLE_WORKERS", "")
    if said and not (said.isdecimal() and int(said) > 0):
        raise ValueError(f"PROJECTABLE_WORKERS={said!r}; allowed: a whole number of 1 or more")
    if said:
        return int(said)
    from joblib import cpu_count

    cores = cpu_count()  # that this process may use: in a container, too
    most = torch.cuda.mem_get_info()[0] >> 31 if torch.cuda.is_available() else sys.maxsize
    return max(1, min(cores, most))


def _own_operations(config: RunConfig) -> float:
    """Multiply-adds of a run's training without its start."""
    return operations(config) - (operations(config.start) if config.start else 0.0)


def run_many(
    configs: list[RunConfig],
    words: str = "training",
    test: bool = False,
    executor: str | None = None,
    diverging: bool = False,
) -> list[Run]:
    """The finished runs of all configs, in order; what is missing is trained side by side, with a line of progress.

    `test=True` also evaluates them on test images. `executor` says where: by workers of this process (""), or as jobs
    of submitit, `local` or `slurm`; by default as PROJECTABLE_EXECUTOR says. With `diverging`, runs that diverge
    are among the finished ones. Raises the first error, after the others have been saved; ValueError for an unknown
    executor and, before anything is trained, for options that a model or a family does not take.
    """
    executor = os.environ.get("PROJECTABLE_EXECUTOR", "") if executor is None else executor
    with looked_at_once():
        runs = [Run(c, folder_of(c)) for c in configs]
    todo = {r.folder: r.config for r in runs if not r.is_done(test) and not (diverging and r.has_diverged)}
    if not todo:
        return runs
    undone = {folder: c for folder, c in todo.items() if not Run(c, folder).is_done()}
    for part in {part for config in undone.values() for part in chain(config)}:
        _check_options(part)
    starts = {folder: Run(c.start, folder_of(c.start)) for folder, c in undone.items() if c.start is not None}
    lost: list[Exception] = []
    if parents := {start.folder: start.config for start in starts.values() if not start.is_done()}:
        try:
            run_many(list(parents.values()), f"{words}: what these start from", executor=executor, diverging=diverging)
        except Exception as error:  # those that start from others are trained first
            held = {start.folder for start in starts.values() if not start.is_done()}
            lost = [error]
            todo = {f: c for f, c in todo.items() if f not in held and (f not in starts or starts[f].is_done())}
    in_turn = workers() == 1 and not executor  # no worker to wait for
    for data in {c.data for c in todo.values()}:
        data_for(data)
    with looked_at_once():
        order = sorted(todo.values(), key=operations, reverse=True)  # so that the cores end together
        rest = {folder: _own_operations(c) if folder in undone else 0.0 for folder, c in todo.items()}
    bar = tqdm(
        total=sum(rest.values()) / 1e9,
        unit="GMAC",
        desc=f"{words}, {len(order)} run{'s' * (len(order) > 1)}",
        mininterval=5,
        bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}, {rate_fmt}",
    )
    with bar:
        errors = _in_turn(order, test, bar) if in_turn else _side_by_side(order, rest, test, executor, bar)
        bar.update(bar.total - bar.n)
    if len(others := [error for error in errors if not isinstance(error, BrokenProcessPool)]) < len(errors):
        _pool.cache_clear()  # a worker was killed: the next call starts new ones
        words = "a worker was killed (memory?), or a script trains outside of `if __name__ == '__main__':`"
        errors = [*others, BrokenProcessPool(words)]
    errors = sorted(lost + errors, key=lambda error: isinstance(error, DivergedError))  # others say more
    if errors and not (diverging and all(r.is_done(test) or r.has_diverged for r in runs)):
        raise errors[0]
    return runs


def _in_turn(order: list[RunConfig], test: bool, bar) -> list[Exception]:
    """Train them here, one after the other; returns the errors."""
    global _progress
    _progress, errors = SimpleNamespace(put=lambda done: bar.update(min(done / 1e9, bar.total - bar.n))), []
    try:
        for config in order:
            try:
                _work(config, folder_of(config), test)
            except Exception as error:
                errors.append(error)
    finally:
        _progress = None
    return errors


def _side_by_side(order: list[RunConfig], rest: dict[Path, float], test: bool, executor: str, bar) -> list[Any]:
    """Train them by workers, or as jobs; returns the errors."""
    modules = own_modules(FAMILIES, CONDITIONINGS, TELL, tasks.MAKERS, LOADERS)
    which = runs_dir(), executor, os.environ.get("PROJECTABLE_WORKERS", ""), modules
    pool, queue = _pool(*which)
    threads = _threads() if executor else 0
    try:
        waiting = {pool.submit(_work, c, folder_of(c), test, threads): folder_of(c) for c in order}
    except BrokenProcessPool:  # a worker was killed since the last call
        _pool.cache_clear()
        pool, queue = _pool(*which)
        waiting = {pool.submit(_work, c, folder_of(c), test, threads): folder_of(c) for c in order}
    errors = []
    try:
        while waiting:
            done, _ = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
            for future in done:
                folder, error = waiting.pop(future), future.exception()
                errors += [error] if error is not None else []
                if executor:  # a job does not say how far it is
                    queue.put(rest[folder])
            while not queue.empty():
                bar.update(min(queue.get() / 1e9, bar.total - bar.n))
    except KeyboardInterrupt:  # the workers go at once; what they had is in their checkpoints
        _pool.cache_clear()
        if executor:
            pool.cancel()
        else:
            for process in list(pool._processes.values()):
                process.terminate()
        raise
    return errors


keep_sources()  # keys are about the code that is run, not about what its files hold later
