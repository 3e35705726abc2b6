"""Where we are, and files that are whole or not there: atomic writes, checksums (safetensors), locks. No pickles."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor


class DamagedFile(RuntimeError):
    """A file of ours is not what was written; the message names it and says what to do."""


class WriteError(OSError):
    """A folder can't be written to; the message names it and says what to do."""


def root() -> Path:
    """The project's folder: PROJECTABLE_ROOT, or the folder that holds the package."""
    return Path(os.environ.get("PROJECTABLE_ROOT") or Path(__file__).resolve().parent.parent)


def device() -> str:
    """What computes here, in words."""
    cuda = torch.cuda.is_available()
    return f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {os.cpu_count()} cores"


def current_commit() -> str:
    """The commit of the working tree, with a `+` where package or notebooks differ from it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "projectable", "notebooks") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _touch(path: Path) -> None:
    """Make an empty file, and the folder it lies in. Raises WriteError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        advice = "choose another folder (for runs: PROJECTABLE_RUNS), or make it writable"
        raise WriteError(f"{path.parent} can't be written to ({error.strerror}): {advice}") from None


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file to write to beside `path`; it takes the place of `path` at the end, or goes where writing fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _touch(draft)
        mode = draft.stat().st_mode  # the umask's: safetensors would leave files that only their owner reads
        yield draft
        draft.chmod(mode)
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where it could not even be made
            draft.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with draft_of(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    sha = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        sha.update(t.view(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a JSON-able description as one checksummed safetensors file, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    words = json.dumps(about, sort_keys=True)
    with draft_of(path) as draft:
        save_file(tensors, draft, {"about": words, "sha256": _digest(tensors, words)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_tensors` wrote; raises DamagedFile where a bit of it has changed or a part is missing."""
    advice = "delete it and run again"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        tensors = load_file(path)
        words, expected = about["about"], about["sha256"]
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {error}): {advice}") from None
    if _digest(tensors, words) != expected:
        raise DamagedFile(f"{path} is damaged (its checksum differs): {advice}")
    return tensors, json.loads(words)


def checksum(value: dict) -> str:
    """SHA-256 of what a JSON object says, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object with its checksum in the field `sha256`, atomically."""
    write_atomically(path, json.dumps(value | {"sha256": checksum(value)}, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """What `write_json` wrote; raises DamagedFile where it says anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): delete it and run again") from None
    if not isinstance(value, dict) or value.pop("sha256", None) != checksum(value):
        raise DamagedFile(f"{path} is damaged (its checksum differs): delete it and run again")
    return value


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file; wait for whoever holds it (calling `waiting` once). Freed when the process ends."""
    _touch(path)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
