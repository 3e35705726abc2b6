"""A small model stands alone: one task's model of a finished run as a folder that needs neither source nor run.

    model.safetensors   weights, codebook and description, with a checksum
    config.json         the description again, for people and tools; it has to agree
    README.md           a model card
    model.onnx          on demand: the same model for onnxruntime (`projectable.sample_onnx` needs no torch)

What is notable:

- Logits are bit for bit those of the model in memory: the file holds plain weights (in × out), and the description says
  which of them were multiplied transposed or with a task axis, since that decides how sums are rounded.
- Nothing is unpickled. What is damaged, or does not belong together, is refused: the file's checksum covers weights and
  description.
- A folder appears whole or not at all. Reading it imports nothing of training: what writing needs is imported there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ONNX_EXTRA, ONNX_KEY, ONNX_SEAL, OnnxError, transformer
from .config import DataConfig
from .storage import DamagedFile, WriteError, current_commit, draft_of, load_tensors, save_tensors, write_atomically
from .tasks import MAKERS, SPLITS, Codebook, TaskData, make_tasks
from .tasks.images import FOLDER
from .transformer import PLAIN_AXES, Shape, Weights, forward, sample

if TYPE_CHECKING:
    from .experiment import Run

FORMAT, VERSION = "projectable model", 1
FILES = {"model.safetensors", "config.json", "README.md", "model.onnx"}
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")


class ModelError(RuntimeError):
    """A folder or file is no model that this package can read or write; the message names it and what is wrong."""


# -------------------------------------------------------------------------------------------------------------- reading


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
        """Logits (B, N, V) of tokens (B, N), int64; row i sees tokens before i only. ValueError for other shapes."""
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.shape.length:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; allowed: (images, 1 to {self.shape.length})")
        return forward(dict(self.weights.items()), tokens.unsqueeze(0), self.shape.d_head).squeeze(0)

    def losses(self, tokens: Tensor) -> Tensor:
        """Nats per token of each image: tokens (B, N), int64 → (B,). Raises ValueError for tokens that are none."""
        tokens = torch.as_tensor(tokens)
        if tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError(f"tokens {tuple(tokens.shape)}, {tokens.dtype}; allowed: one image or more, torch.int64")
        if not 0 <= tokens.min() <= tokens.max() < self.shape.vocab_size:
            found = f"tokens from {tokens.min()} to {tokens.max()}"
            raise ValueError(f"{found}; allowed: 0 to {self.shape.vocab_size - 1}")
        return F.cross_entropy(self(tokens).transpose(1, 2), tokens, reduction="none").mean(1)

    @torch.no_grad()
    def mean_loss(self, tokens: Tensor, block: int = 200) -> float:
        """Nats per token of all these images (B, N), `block` of them at a time. Raises ValueError as `losses` does."""
        return torch.cat([self.losses(part).double() for part in torch.as_tensor(tokens).split(block)]).mean().item()

    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None) -> np.ndarray:
        """n new images (n, H, W, C) in [0, 1]; the same seed gives the same images (None: torch's own state).

        Raises ValueError for n below 1 or above a million, or a temperature or seed that is none.
        """
        if n > 1_000_000:
            raise ValueError(f"n={n}; allowed: 1 to 1,000,000")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}; allowed: up to {2**63 - 1}, not negative")
        device = self.weights["embedding"].device
        generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
        weights = dict(self.weights.items())
        tokens = sample(weights, n, self.shape.length, self.shape.d_head, temperature, generator)
        return self.codebook.decode(tokens[0].cpu().numpy())


def load(folder: str | Path) -> SmallTransformer:
    """The model in a folder written by `export`, on the CPU. Raises ModelError naming what is wrong with which file."""
    folder = Path(folder)
    config_path, path = folder / "config.json", folder / "model.safetensors"
    config = read_description(folder)
    try:
        tensors, about = load_tensors(path)
    except DamagedFile as error:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\3\4" or head[:1] == b"\x80":
            raise ModelError(f"{path} is a pickle, which can run code when it is opened: refused") from None
        raise ModelError(f"{str(error).rpartition(': ')[0]}: export the model again") from None
    if config != about:
        differ = [key for key in config | about if config.get(key) != about.get(key)]
        raise ModelError(f"{config_path} does not belong to {path.name}: they differ in {', '.join(differ)}")
    codebook = Codebook(tensors.pop("codes").numpy(), **config["codebook"])
    weights = {k: w.mT.contiguous().mT if k in config["transposed"] else w for k, w in tensors.items()}
    weights = {k: w.unsqueeze(0) if k in config["task_axis"] else w for k, w in weights.items()}
    return SmallTransformer(config, weights, codebook).eval()


def read_description(folder: Path) -> dict:
    """The description in the folder of a model. Raises ModelError naming what is wrong with which file."""
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
    return config


def looks_like_model(folder: Path) -> bool:
    """Whether the folder was meant as such a model, whole or not; a run's folder was not, finished or just begun."""
    of_runs = ("history.json", "result.json", "checkpoint.safetensors", "diverged.json")
    begun = "steps" in (found := _described(folder)) and "format" not in found
    return folder.exists() and not begun and not any((folder / name).exists() for name in of_runs)


def _described(folder: Path) -> dict:
    """What the folder's config.json says; nothing where there is none, or a damaged one."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# -------------------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def export(
    run: Run, width: str | int, task: str | int, folder: str | Path, overwrite: bool = False, onnx: bool = False
) -> Path:
    """Write one task's model of a finished run as a folder (with `onnx`, model.onnx in it, too); returns the folder.

    `width` is a number (16) or a member's name ("d16", "source"), `task` a name or number. Raises ValueError naming the
    allowed ones; ModelError where the folder exists (with `overwrite`: where it holds anything but such a model).
    """
    from .experiment import content_of, data_for

    task = task.item() if isinstance(task, np.integer) else task  # no name, of tasks that are named by numbers
    folder = Path(folder).resolve()
    _check_place(folder, overwrite)
    if run.config.model.startswith("masked_"):
        raise ValueError(f"{run.folder.name} fills in masked tokens; allowed: models that sample token by token")
    data = data_for(run.config.data)
    if not isinstance(data.codebook, Codebook):
        raise ValueError(f"{run.folder.name} models text; allowed: runs on images")
    model = run.model()
    task_id, member = data.task_id(task), _member(run, model.members, width)
    weights = model.weights(member, torch.tensor([task_id]))
    n_layers, d_model = weights["qkv"].shape[-3:-1]
    shape, book = replace(model.shape, d_model=d_model, n_layers=n_layers), data.codebook
    if (dataset := run.config.data.dataset).startswith(FOLDER):  # others, to whom it may go, need not know its place
        dataset = FOLDER + Path(dataset.removeprefix(FOLDER)).name
    config = {
        "format": FORMAT,
        "version": VERSION,
        "task": data.task_names[task_id],
        "task_id": task_id,
        "member": member,
        "shape": {name: size for name, size in asdict(shape).items() if name != "masked"},
        "codebook": dict(patch=book.patch, height=book.height, width=book.width),
        "transposed": [k for k, w in weights.items() if not w.is_contiguous()],
        "task_axis": [k for k, w in weights.items() if w.dim() > PLAIN_AXES[k]],
        "data": asdict(run.config.data) | dict(dataset=dataset),
        "data_name": data.name,
        "content": content_of(run.config.data),  # of images in a folder, wherever it lies
        "n_images": {split: len(tokens[task_id]) for split, tokens in data.tokens.items()},  # of the task
        "licence": data.licence,
        "run": dict(name=run.folder.name, model=run.config.model, seed=run.config.seed, commit=run.result["commit"]),
        "n_parameters": sum(w.numel() for w in weights.values()),
        "n_operations": shape.n_operations(),
        "commit": current_commit(),
    }
    small = SmallTransformer(config, weights, book)
    splits = {split: data.tokens[split][task_id] for split in ("val", "test")}
    config["losses"] = {split: small.mean_loss(tokens) for split, tokens in splits.items() if len(tokens)}
    _write(folder, config, weights, book, small if onnx else None, overwrite)
    return folder


def _member(run: Run, members: tuple[str, ...], width: str | int) -> str:
    """The member of that width or name; a small model comes before a source of the same width."""
    widths = {m: run.config.d_source if m == "source" else int(m[1:]) for m in sorted(members)}  # d… before source
    for member, size in widths.items():
        if str(width) in (member, str(size)):
            return member
    allowed = ", ".join(f"{size} ({m})" for m, size in sorted(widths.items(), key=lambda item: item[1]))
    raise ValueError(f"unknown width {width!r} of {run.folder.name}; allowed: {allowed}")


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists():
        if not overwrite:
            raise ModelError(f"{folder} exists: choose another folder, or pass overwrite (--overwrite)")
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else {""}
        if names - FILES:
            raise ModelError(f"{folder} holds more than an exported model: it is left alone")
        if names and _described(folder).get("format") != FORMAT:
            raise ModelError(f"{folder} holds no exported model (by its config.json): it is left alone")


def _write(
    folder: Path, config: dict, weights: Weights, book: Codebook, onnx: SmallTransformer | None, overwrite: bool
) -> None:
    """The folder under another name first; an old one is put back where that fails."""
    draft, old = (folder.with_name(f".{folder.name}.{os.getpid()}{end}") for end in ("", ".old"))
    tensors = {k: w.squeeze(0) if k in config["task_axis"] else w for k, w in weights.items()}
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder} can't be written ({error.strerror})") from None
    try:
        save_tensors(draft / "model.safetensors", tensors | {"codes": torch.from_numpy(book.codes)}, config)
        write_atomically(draft / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        write_atomically(draft / "README.md", model_card(config))
        if onnx is not None:
            export_onnx(onnx, draft / "model.onnx")
        _check_place(folder, overwrite)  # somebody may have been there meanwhile
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
    from .evaluation import bits_per_pixel

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
        "data": f"{Path(data['dataset'].rpartition(':')[2]).name}, tasks: {data['tasks']}; "
        f"licence: {config['licence'] or 'not stated'}",
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


def export_onnx(model: SmallTransformer, path: str | Path) -> Path:
    """Write a model as one ONNX file: tokens (batch, length) → logits (batch, length, codes); returns the path.

    Any batch, any length up to the model's own. It is the one Transformer that is traced; only its attention,
    hand-written for training on CPUs, is replaced by torch's own for the time of the export. The file also holds the
    codebook, and a seal: the SHA-256 of the file with the seal's own digits as zeros. There is no cache in the graph.
    Raises OnnxError where the extra is not installed.
    """
    from unittest import mock

    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise OnnxError(f"export to ONNX {ONNX_EXTRA} ({error})") from None

    def attention(qkv, d_head, batch, causal):  # (1, B·N, 3·d) → (1, B·N, d)
        q, k, v = qkv.view(batch, -1, 3, qkv.shape[-1] // (3 * d_head), d_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return y.transpose(1, 2).reshape(1, -1, qkv.shape[-1] // 3)

    path, book = Path(path), model.codebook
    tokens = torch.zeros(2, min(3, model.shape.length), dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch")}
    if model.shape.length > 1:
        sizes[1] = torch.export.Dim("length", max=model.shape.length)
    with mock.patch.object(transformer, "attention", attention), torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (tokens,),
            input_names=["tokens"],
            output_names=["logits"],
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # with dynamo
    about = dict(patch=book.patch, height=book.height, width=book.width, length=model.shape.length, task=model.task)
    codes = np.ascontiguousarray(book.codes, "<f4")
    about |= dict(codes=base64.b64encode(codes.tobytes()).decode(), n_codes=len(codes))
    for node in program.model.graph:
        node.metadata_props.clear()  # where each operation stands in the code, with the paths of this machine
    program.model.metadata_props[ONNX_KEY] = json.dumps(about)
    program.model.metadata_props["seal"] = ONNX_SEAL.decode() + "0" * 64
    with draft_of(path) as draft:
        program.save(str(draft), external_data=False)
        content = draft.read_bytes()
        digest = hashlib.sha256(content).hexdigest().encode()
        draft.write_bytes(content.replace(ONNX_SEAL + b"0" * 64, ONNX_SEAL + digest))
    return path


# ------------------------------------------------------------------------------------------------------------------ use


def evaluate(
    model: SmallTransformer, split: str = "test", images: str | Path | None = None
) -> tuple[int, float, float]:
    """Number of images, nats per token and bits per pixel of a model on its own task's data.

    `images`: where the folder lies, for a model of somebody's own. Raises ValueError for an unknown split, or for a
    folder where none is asked for or none where one is; ModelError where the data here are not those that the model
    was made for.
    """
    from .evaluation import bits_per_pixel

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    tokens, book = _data_of(model, images).tokens[split][model.config["task_id"]], model.codebook
    if not len(tokens):
        raise ModelError(f"{model.task} of {model.config['data_name']} has no {split} images")
    nats = model.mean_loss(tokens)
    return len(tokens), nats, bits_per_pixel(nats, book.length, book.height * book.width)


def _data_of(model: SmallTransformer, images: str | Path | None) -> TaskData:
    """The data that a model was made for, made here, in tokens of its own codebook. Raises as `evaluate` does."""
    from .experiment import content_of, data_for

    config, book, dataset = model.config, model.codebook, model.config["data"]["dataset"]
    of_folder = dataset.startswith(FOLDER)
    if of_folder != (images is not None):
        given = "no images" if images is None else f"images={images}"
        name = Path(dataset.removeprefix(FOLDER)).name
        allowed = f"the path of the folder {name!r} (--images PATH)" if of_folder else f"none, for {dataset}"
        raise ValueError(f"{given} for a model of {config['data_name']}; allowed: {allowed}")
    about = DataConfig(**config["data"] | dict(dataset=f"{FOLDER}{images}" if of_folder else dataset))
    if "content" not in config:
        raise ModelError(f"the model {model.task!r} does not say what images it was made of: export it again")
    task_id, data, same_images = config["task_id"], data_for(about), content_of(about) == config["content"]
    if same_images and dataset not in MAKERS and not np.array_equal(data.codebook.codes, book.codes):
        data = make_tasks(**asdict(about), codebook=book)  # machines round differently: another was fitted here
    codes = data.codebook.codes
    if not (
        same_images
        and codes.shape == book.codes.shape
        and np.allclose(codes, book.codes, atol=1e-4)
        and data.task_names[task_id : task_id + 1] == (model.task,)
        and {s: len(tokens[task_id]) for s, tokens in data.tokens.items()} == config["n_images"]
    ):
        where = images or config["data_name"]
        words = "images were added, removed or changed since" if of_folder else "the data are not the same here"
        raise ModelError(
            f"{where} gives other images or tasks than the model was made with: {words}, and test images might be "
            "among those that it was trained on"
        )
    return data


def png_path(path: str | Path) -> Path:
    """The path, of a file to come. Raises ValueError for a name that does not end in .png."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} is no PNG file; allowed: a name that ends in .png")
    return Path(path)


def write_grid(images: np.ndarray, path: str | Path, at_least: int = 56) -> Path:
    """Write images (n, H, W, C) in [0, 1] as one PNG, about as many rows as columns, pixels enlarged to be seen.

    Raises ValueError for another suffix, or for what is no such array.
    """
    from PIL import Image

    path = png_path(path)
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images of shape {images.shape}; allowed: (n, height, width, 1 or 3), n of 1 or more")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"pixels from {images.min():g} to {images.max():g}; allowed: 0 to 1")
    n, height, width, channels = images.shape
    cols = int(np.ceil(np.sqrt(n)))
    rows = -(-n // cols)
    room = ((0, rows * cols - n), (0, 1), (0, 1), (0, 0))  # a white line between images
    sheet = np.pad(images, room, constant_values=1).reshape(rows, cols, height + 1, width + 1, channels)
    sheet = sheet.swapaxes(1, 2).reshape(rows * (height + 1), cols * (width + 1), channels)[:-1, :-1]
    scale = -(-at_least // height)
    pixels = np.rint(sheet * 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    with draft_of(path) as draft:
        Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(draft, format="PNG")
    return path
