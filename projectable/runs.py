"""Runs from the outside: a config as JSON, a finished run by its folder or name."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from .config import DataConfig, RunConfig
from .experiment import MODELS, Run, folder_of, runs_dir
from .storage import read_json

AT_LEAST_1 = ("d_source", "n_layers", "steps", "tasks_per_step", "images_per_task", "eval_every", "checkpoint_every")
ONE_SIZE = ("universal", "distilled", "specialists")
NEED_START = ("distilled", "projectable")


class ConfigError(ValueError):
    """A config, or a run that was asked for, is none; the message names the value and what is allowed."""


def read_config(path: str | Path) -> RunConfig:
    """The config in a JSON file, e.g. a run's config.json. Raises ConfigError naming file, key and value."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; allowed: a config as JSON, as config.json in every run") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error})") from None
    if isinstance(found, dict) and "sha256" in found:  # a run's own: what it says has to be what was trained
        found = read_json(path)
    return config_from(found, str(path))


def config_from(found: dict, where: str = "config") -> RunConfig:
    """The config that `dataclasses.asdict` turned into `found`; options may be an object. Raises ConfigError."""
    config = _build(RunConfig, found, where)
    if config.model not in MODELS:
        raise ConfigError(f"{where}: unknown model {config.model!r}; allowed: {', '.join(MODELS)}")
    for name in AT_LEAST_1:
        if getattr(config, name) < 1:
            raise ConfigError(f"{where}: {name}={getattr(config, name)}; allowed: 1 or more")
    if config.model in ONE_SIZE and len(config.sizes) != 1:
        raise ConfigError(f"{where}: sizes={list(config.sizes)}; allowed for model {config.model!r}: one size")
    if config.model in NEED_START and config.start is None:
        raise ConfigError(f"{where}: model {config.model!r} needs 'start', the config of a source")
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
            return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in pairs)
        if not isinstance(value, list):
            raise ConfigError(f"{words}={value!r:.60}; allowed: a list of {inner.__name__}")
        return tuple(_value(inner, x, words, where) for x in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{words}={value!r:.60}; allowed: {kind.__name__}")
    return value


def chain(config: RunConfig) -> list[RunConfig]:
    """A config and what it starts from, the first to be trained first."""
    return [*(chain(config.start) if config.start else []), config]


def find_run(name: str | Path) -> Run:
    """The finished run of that folder, or of that name in runs/. Raises ConfigError saying why there is none."""
    folder = Path(name) if (Path(name) / "config.json").exists() else runs_dir() / name
    if not (folder / "config.json").exists():
        raise ConfigError(f"no run {str(name)!r}; allowed: the folder of a run, or the name of one in {runs_dir()}")
    if not (folder / "result.json").exists():
        raise ConfigError(f"{folder} is not finished: `projectable train {folder / 'config.json'}` goes on with it")
    return Run(config_from(read_json(folder / "config.json"), str(folder / "config.json")), folder)


def check_current(run: Run) -> Run:
    """The run itself. Raises ConfigError where this code would train it otherwise."""
    if folder_of(run.config).name != run.folder.name:
        commit, again = run.result.get("commit"), f"`projectable train {run.folder / 'config.json'}` trains it anew"
        raise ConfigError(f"{run.folder} was trained by other code, at commit {commit}: {again}, or use that commit")
    return run


def facts(run: Run) -> dict[str, str]:
    """What there is to know of a finished run, in words."""
    config, result = run.config, run.result
    options = ", ".join(f"{name}={value}" for name, value in config.options)
    examples = config.steps * config.tasks_per_step * config.images_per_task
    losses = ", ".join(f"{member} {loss:.4f}" for member, loss in result["val"].items())
    rates = ", ".join(f"{member} {rate:g}" for member, rate in config.rates().items() if rate)
    return {
        "model": f"{config.model} ({options})" if options else config.model,
        "members": ", ".join(result["val"]),
        "source": f"width {config.d_source}, {config.n_layers} layers",
        "data": f"{config.data.dataset}, tasks: {config.data.tasks}, {config.data.vocab_size} codes",
        "steps": f"{config.steps:,} ({examples:,} images), the best at {result['best_step']:,}",
        "learning rates": rates,
        "val loss": f"{losses} (nats per token, mean over tasks, {config.val_images or 'all'} images each)",
        "parameters": f"{result['n_parameters']:,} trained",
        "seconds": f"{result['seconds']:.0f} on {result['device']}",
        "seed, commit": f"{config.seed}, {result['commit']}",
        "starts from": str(folder_of(config.start)) if config.start else "nothing",
    }
