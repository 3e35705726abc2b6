"""One task's model of a finished run → a folder that stands alone (what lies in it: see `standalone`).

The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from .config import DataConfig
from .evaluation import bits_per_pixel
from .experiment import Run, data_for
from .onnx_file import export_onnx
from .sampling import PLAIN_AXES
from .standalone import FORMAT, VERSION, ModelError, SmallTransformer
from .storage import current_commit, draft_of, save_tensors, write_atomically
from .tasks import SPLITS
from .tasks.codebook import Codebook
from .transformer import Shape, Weights

FILES = {"model.safetensors", "config.json", "README.md", "model.onnx"}


@torch.no_grad()
def export(
    run: Run, width: str | int, task: str | int, folder: str | Path, overwrite: bool = False, onnx: bool = False
) -> Path:
    """Write one task's model of a finished run as a folder (with `onnx`, model.onnx in it, too); returns the folder.

    `width` is a number (16) or a member's name ("d16", "source"), `task` a name or number. Raises ValueError naming the
    allowed ones; ModelError where the folder exists (with `overwrite`: where it holds anything but such a model).
    """
    folder = Path(folder).resolve()
    if folder.exists():
        if not overwrite:
            raise ModelError(f"{folder} exists: choose another folder, or pass overwrite (--overwrite)")
        if not folder.is_dir() or {p.name for p in folder.iterdir()} - FILES:
            raise ModelError(f"{folder} holds more than an exported model: it is left alone")
    data, model = data_for(run.config.data), run.model()
    task_id, member = data.task_id(task), _member(run, model.members, width)
    weights = model.weights(member, torch.tensor([task_id]))
    shape, book = replace(model.shape, d_model=weights["qkv"].shape[-2]), data.codebook
    config = {
        "format": FORMAT,
        "version": VERSION,
        "task": data.task_names[task_id],
        "task_id": task_id,
        "member": member,
        "shape": asdict(shape),
        "codebook": dict(patch=book.patch, height=book.height, width=book.width),
        "transposed": [k for k, w in weights.items() if not w.is_contiguous()],
        "task_axis": [k for k, w in weights.items() if w.dim() > PLAIN_AXES[k]],
        "data": asdict(run.config.data),
        "data_name": data.name,
        "licence": data.licence,
        "run": dict(name=run.folder.name, model=run.config.model, seed=run.config.seed, commit=run.result["commit"]),
        "n_parameters": sum(w.numel() for w in weights.values()),
        "n_operations": shape.n_operations(),
        "commit": current_commit(),
    }
    small = SmallTransformer(config, weights, book)
    splits = {split: data.tokens[split][task_id] for split in ("val", "test")}
    config["losses"] = {split: small.mean_loss(tokens) for split, tokens in splits.items() if len(tokens)}
    _write(folder, config, weights, book, small if onnx else None)
    return folder


def _member(run: Run, members: tuple[str, ...], width: str | int) -> str:
    """The member of that width or name; a small model comes before a source of the same width."""
    widths = {m: run.config.d_source if m == "source" else int(m[1:]) for m in sorted(members)}  # d… before source
    for member, size in widths.items():
        if str(width) in (member, str(size)):
            return member
    allowed = ", ".join(f"{size} ({m})" for m, size in sorted(widths.items(), key=lambda item: item[1]))
    raise ValueError(f"unknown width {width!r} of {run.folder.name}; allowed: {allowed}")


def _write(folder: Path, config: dict, weights: Weights, book: Codebook, onnx: SmallTransformer | None) -> None:
    """The folder under another name first; an old one is put back where that fails."""
    draft, old = (folder.with_name(f".{folder.name}.{os.getpid()}{end}") for end in ("", ".old"))
    tensors = {k: w.squeeze(0) if k in config["task_axis"] else w for k, w in weights.items()}
    try:
        save_tensors(draft / "model.safetensors", tensors | {"codes": torch.from_numpy(book.codes)}, config)
        write_atomically(draft / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        write_atomically(draft / "README.md", model_card(config))
        if onnx is not None:
            export_onnx(onnx, draft / "model.onnx")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def facts(config: dict) -> dict[str, str]:
    """What there is to know of a model, from its description, in words."""
    shape, run, data, book = Shape(**config["shape"]), config["run"], config["data"], config["codebook"]
    bits = bits_per_pixel(1.0, shape.length, book["height"] * book["width"])
    losses = {
        f"{split} loss": f"{loss:.4f} nats per token, {loss * bits:.4f} bits per pixel"
        for split, loss in config["losses"].items()
    }
    return {
        "task": f"{config['task']} of {config['data_name']}",
        "size": f"width {shape.d_model}, {shape.n_layers} layers, {shape.n_heads} heads",
        "images": f"{book['height']}×{book['width']} pixels in {shape.length} patches of {shape.vocab_size} codes",
        "parameters": f"{config['n_parameters']:,}",
        "multiply-adds": f"{config['n_operations']:,} a token",
        **losses,
        "made from": f"{config['member']} of run {run['name']} ({run['model']}, seed {run['seed']})",
        "commit": f"trained at {run['commit']}, written at {config['commit']}",
        "data": f"{data['dataset']}, tasks: {data['tasks']}; licence: {config['licence'] or 'not stated'}",
    }


def model_card(config: dict) -> str:
    """The README.md of an exported model."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts(config).items())
    return f"""# {config["task"]}, width {config["shape"]["d_model"]}

A small Transformer that models the images of one task. It stands alone: the model that it was made from is not needed.

| | |
|---|---|
{rows}

Losses are means over all images of this task in that split.

```python
import projectable

model = projectable.load(".")  # this folder
images = model.sample(8, seed=0)  # (8, height, width, channels), in [0, 1]
```
"""


def evaluate(model: SmallTransformer, split: str = "test") -> tuple[int, float, float]:
    """Number of images, nats per token and bits per pixel of a model on its own task's data.

    Raises ValueError for an unknown split, ModelError where the data here are not those that the model was made for.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    data, config, book = data_for(DataConfig(**model.config["data"])), model.config, model.codebook
    task_id, codes = config["task_id"], data.codebook.codes
    same = codes.shape == book.codes.shape and np.allclose(codes, book.codes, atol=1e-4)  # machines round differently
    if not same or data.task_names[task_id : task_id + 1] != (model.task,):
        raise ModelError(f"{config['data_name']} has other codes or tasks here than where the model was made")
    tokens = data.tokens[split][task_id]
    if not len(tokens):
        raise ModelError(f"{model.task} of {config['data_name']} has no {split} images")
    nats = model.mean_loss(tokens)
    return len(tokens), nats, bits_per_pixel(nats, book.length, book.height * book.width)


def write_grid(images: np.ndarray, path: str | Path, gap: int = 1, at_least: int = 56) -> Path:
    """Write images (n, H, W, C) in [0, 1] as one PNG, about as many rows as columns, pixels enlarged to be seen."""
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} is no PNG file; allowed: a name that ends in .png")
    n, height, width, channels = images.shape
    cols = int(np.ceil(np.sqrt(n)))
    rows = -(-n // cols)
    sheet = np.ones((rows, height + gap, cols, width + gap, channels))
    for i, image in enumerate(images):
        sheet[i // cols, :height, i % cols, :width] = image
    sheet = sheet.reshape(rows * (height + gap), cols * (width + gap), channels)[:-gap, :-gap]
    scale = -(-at_least // height)
    pixels = np.rint(sheet * 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    with draft_of(path) as draft:
        Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(draft, format="PNG")
    return path
