"""A small model that stands alone, read from its folder: neither source nor generators nor the run are needed.

    model.safetensors   weights, codebook and description, with a checksum
    config.json         the description again, for people and tools; it has to agree
    README.md           a model card

What is notable:

- Logits are bit for bit those of the model in memory: the file holds plain weights (in × out), and the description says
  which of them were multiplied transposed or with a task axis, since that decides how sums are rounded.
- Nothing is unpickled, and everything is checked before it is used: a `ModelError` names the file and what is wrong.

`export` writes such folders.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import sample
from .storage import DamagedFile, load_tensors
from .tasks.codebook import Codebook
from .transformer import Shape, Weights, forward

FORMAT, VERSION = "projectable model", 1
KEYS = {  # of the description, and what they hold
    "format": str,
    "version": int,
    "task": str,
    "task_id": int,
    "member": str,  # of the run: d16, source
    "shape": dict(d_model=int, n_layers=int, d_head=int, mlp_ratio=int, vocab_size=int, length=int),
    "codebook": dict(patch=int, height=int, width=int),
    "transposed": list,  # weights that were multiplied transposed
    "task_axis": list,  # weights that had a task axis
    "data": dict(dataset=str, tasks=str, vocab_size=int, patch=int, val_per_class=int),
    "data_name": str,
    "licence": str,
    "run": dict(name=str, model=str, seed=int, commit=str),
    "losses": dict,  # nats per token by split, on all images of the task
    "n_parameters": int,
    "n_operations": int,  # multiply-adds a token
    "commit": str,  # that wrote the folder
}
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")
BIASES = dict(qkv_bias="qkv", up_bias="up", head_bias="head")


class ModelError(RuntimeError):
    """A folder or file is no model that this package can read or write; the message names it and what is wrong."""


class SmallTransformer(nn.Module):
    """A model of one task. `weights` as a `Model` gives them for one task; `config` is the description."""

    def __init__(self, config: dict, weights: Weights, codebook: Codebook):
        super().__init__()
        self.config, self.codebook, self.shape = config, codebook, Shape(**config["shape"])
        self.weights = nn.ParameterDict({k: nn.Parameter(w.detach()) for k, w in weights.items()})

    @property
    def task(self) -> str:
        return self.config["task"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, V) of tokens (B, N), int64; row i sees tokens before i only."""
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.shape.length:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; allowed: (images, 1 to {self.shape.length})")
        return forward(dict(self.weights.items()), tokens.unsqueeze(0), self.shape.d_head).squeeze(0)

    def losses(self, tokens: Tensor) -> Tensor:
        """Nats per token of each image: tokens (B, N) → (B,)."""
        return F.cross_entropy(self(tokens).transpose(1, 2), tokens, reduction="none").mean(1)

    @torch.no_grad()
    def mean_loss(self, tokens: Tensor, block: int = 200) -> float:
        """Nats per token of all these images (B, N), `block` of them at a time."""
        return torch.cat([self.losses(part).double() for part in tokens.split(block)]).mean().item()

    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None) -> np.ndarray:
        """n new images (n, H, W, C) in [0, 1]; the same seed gives the same images (None: torch's own state)."""
        device = self.weights["embedding"].device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        weights = dict(self.weights.items())
        tokens = sample(weights, n, self.shape.length, self.shape.d_head, temperature, generator)
        return self.codebook.decode(tokens[0].cpu())


def load(folder: str | Path) -> SmallTransformer:
    """The model in a folder written by `export`, on the CPU. Raises ModelError naming what is wrong with which file."""
    folder = Path(folder)
    config_path, path = folder / "config.json", folder / "model.safetensors"
    config = read_config(folder)
    try:
        tensors, about = load_tensors(path)
    except DamagedFile as error:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\3\4" or head[:1] == b"\x80":
            raise ModelError(f"{path} is a pickle, which can run code when it is opened: refused") from None
        raise ModelError(f"{str(error).rpartition(': ')[0]}: export the model again") from None
    if config != about:
        differ = [key for key in KEYS if not isinstance(about, dict) or config[key] != about.get(key)]
        raise ModelError(f"{config_path} does not belong to {path.name}: they differ in {', '.join(differ)}")
    try:
        expected = Shape(**config["shape"]).weight_shapes()
    except ValueError as error:
        raise ModelError(f"{config_path}: {error}") from None
    codebook = _take_codebook(tensors, config, path)
    expected |= {b: expected[w][:-2] + expected[w][-1:] for b, w in BIASES.items() if b in tensors}
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            raise ModelError(f"{path}: {name!r} is {'missing' if name in expected else 'unknown'}")
        _check_tensor(name, tensors[name], expected[name], path)
    for name in config["transposed"] + config["task_axis"]:
        if name not in tensors:
            raise ModelError(f"{config_path}: {name!r} is no weight; allowed: {', '.join(tensors)}")
    weights = {k: w.mT.contiguous().mT if k in config["transposed"] else w for k, w in tensors.items()}
    weights = {k: w.unsqueeze(0) if k in config["task_axis"] else w for k, w in weights.items()}
    return SmallTransformer(config, weights, codebook).eval()


def _take_codebook(tensors: dict[str, Tensor], config: dict, path: Path) -> Codebook:
    if "codes" not in tensors:
        raise ModelError(f"{path}: 'codes' is missing")
    codes, shape = tensors.pop("codes"), config["shape"]
    book = Codebook(codes.numpy(), **config["codebook"])
    channels = max(1, codes.shape[-1] // book.patch**2) if codes.dim() else 1
    _check_tensor("codes", codes, (shape["vocab_size"], channels * book.patch**2), path)
    if book.length != shape["length"] or book.height % book.patch or book.width % book.patch:
        raise ModelError(
            f"{path}: patches of {book.patch} in {book.height}×{book.width} pixels; allowed: {shape['length']} of them"
        )
    return book


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], path: Path) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ModelError(f"{path}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}; allowed: {torch.float32} {shape}")


def read_config(folder: Path) -> dict:
    """The description in the folder of a model, checked. Raises ModelError naming what is wrong with which file."""
    if not folder.is_dir():
        if folder.suffix in PICKLES:
            raise ModelError(f"{folder} is a pickle, which can run code when it is opened: refused")
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"{folder} {what}; allowed: a folder written by `projectable project`")
    path = folder / "config.json"
    if not looks_like_model(folder):
        raise ModelError(f"{folder} is a run, of many tasks; `projectable project {folder}` writes the model of one")
    for needed in (path, folder / "model.safetensors"):
        if not needed.is_file():
            pickles = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES))
            hint = f"; {pickles}: pickles can run code when they are opened, and are refused" if pickles else ""
            raise ModelError(f"{folder} holds no model: {needed.name} is missing{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): export the model again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelError(f"{path} is no description of a {FORMAT}")
    if config.get("version") != VERSION:
        raise ModelError(f"{path}: version={config.get('version')!r}; allowed: {VERSION}")
    _check_keys(config, KEYS, str(path))
    return config


def looks_like_model(folder: Path) -> bool:
    """Whether the folder was meant as such a model, whole or not; a run's folder was not."""
    of_runs = ("history.json", "result.json", "checkpoint.safetensors")
    return folder.exists() and not any((folder / name).exists() for name in of_runs)


def _check_keys(found: dict, allowed: dict, where: str) -> None:
    for key, kind in allowed.items():
        if key not in found:
            raise ModelError(f"{where}: {key!r} is missing")
        value, needed = found[key], dict if isinstance(kind, dict) else kind
        inner = str if kind is list else float if kind is dict else None  # what these hold; keys are free
        if (
            type(value) is not needed
            or inner
            and not all(type(x) is inner for x in (value.values() if kind is dict else value))
        ):
            raise ModelError(f"{where}: {key}={value!r:.60} is no {needed.__name__}")
        if isinstance(kind, dict):
            _check_keys(value, kind, f"{where}, {key}")
        elif needed is int and value < (key not in ("task_id", "seed", "val_per_class")):
            raise ModelError(f"{where}: {key}={value} is too small")
    for key in found.keys() - allowed.keys():
        raise ModelError(f"{where}: unknown key {key!r}; allowed: {', '.join(allowed)}")
