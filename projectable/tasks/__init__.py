"""Tasks as token sequences: which images belong to which task, split, encoded, and drawn in a fixed order.

Images ↔ tokens: patches, a k-means codebook, raster order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from unicodedata import normalize

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from .images import SEED, Images, load_images

SPLITS = ("train", "val", "test")
FEW = r"(.+)-few(\d+)(?:-s(\d+))?"  # tasks with few images: the tasks, how many, the seed that draws them
HELD_OUT_CLASSES = {  # of `seen7` and `unseen3`: fixed before anything was trained
    "fashion": ("sandal", "shirt", "bag"),
    "digits": ("2", "5", "8"),
}


def to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Images (n, H, W, C) in [0, 1] → patches (n, N, patch·patch·C), N = (H/patch)·(W/patch), in raster order.

    Raises ValueError where patch does not divide H and W.
    """
    n, height, width, channels = images.shape
    if height % patch or width % patch:
        allowed = ", ".join(str(p) for p in range(1, height + 1) if height % p == width % p == 0)
        raise ValueError(f"patch={patch} does not divide images of {height}×{width} pixels; allowed: {allowed}")
    rows, cols = height // patch, width // patch
    x = images.reshape(n, rows, patch, cols, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * cols, patch * patch * channels)


def from_patches(patches: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """The inverse of `to_patches`: (n, N, patch·patch·C) → (n, H, W, C)."""
    rows, cols = height // patch, width // patch
    x = patches.reshape(len(patches), rows, cols, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(patches), height, width, -1)


@dataclass(frozen=True)
class Codebook:
    """Patch vectors `codes` (V, patch·patch·C) in [0, 1] for images of height × width pixels."""

    codes: np.ndarray
    patch: int
    height: int
    width: int

    @classmethod
    def fit(cls, images: np.ndarray, patch: int, size: int, max_patches: int = 50_000) -> Codebook:
        """k-means on patches of `images` (n, H, W, C): training images only. Codes are sorted by brightness.

        Raises ValueError where `patch` does not divide the images, or there are fewer patches than codes.
        """
        from sklearn.cluster import KMeans

        patches = to_patches(images, patch).reshape(-1, patch * patch * images.shape[-1])
        rng = np.random.default_rng(SEED)
        if len(patches) > max_patches:
            patches = patches[rng.choice(len(patches), max_patches, replace=False)]
        if len(patches) < size:
            raise ValueError(f"a codebook of {size} codes needs as many patches; these images have {len(patches)}")
        with threadpool_limits(1):  # more threads round otherwise, and other codes come out
            fit = KMeans(size, n_init=1, max_iter=20, random_state=SEED).fit(patches)
        codes = np.clip(fit.cluster_centers_, 0, 1).astype(np.float32)
        return cls(codes[np.argsort(codes.mean(1), kind="stable")], patch, images.shape[1], images.shape[2])

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return (self.height // self.patch) * (self.width // self.patch)

    def encode(self, images: np.ndarray, block: int = 4096) -> np.ndarray:
        """Images (n, H, W, C) in [0, 1] → tokens (n, N) int64: the nearest code of every patch. Raises ValueError."""
        size = (self.height, self.width, self.codes.shape[1] // self.patch**2)
        if images.shape[1:] != size or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(
                f"images {images.shape}, {images.dtype}; allowed: (n, {', '.join(map(str, size))}), floats"
            )
        if len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"pixels from {images.min():g} to {images.max():g}; allowed: 0 to 1")
        tokens = np.empty((len(images), self.length), np.int64)
        norms = 0.5 * (self.codes**2).sum(1)
        for i in range(0, len(images), block):
            patches = to_patches(images[i : i + block], self.patch)
            tokens[i : i + block] = (patches @ self.codes.T - norms).argmax(-1)
        return tokens

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (n, N) → images (n, H, W, C) in [0, 1]."""
        return from_patches(self.codes[np.asarray(tokens)], self.patch, self.height, self.width)

    def psnr(self, images: np.ndarray) -> float:
        """Peak signal-to-noise ratio of decode(encode(images)), in dB."""
        error = np.mean((self.decode(self.encode(images)) - images) ** 2, dtype=np.float64)
        return float(-10 * np.log10(error))


@dataclass(frozen=True)
class TaskData:
    """Token sequences of T tasks. `tokens[split]` (train, val, test) is a list of T tensors (n_t, N), int64.

    Raises ValueError where they are anything else.
    """

    name: str
    task_names: tuple[str, ...]
    tokens: dict[str, list[Tensor]]
    codebook: Codebook
    licence: str = ""
    families: tuple[str, ...] = ()  # of each task, where tasks come in families (scripts)

    def __post_init__(self):
        if len(set(self.task_names)) < self.n_tasks:
            raise ValueError(f"task_names of {self.name!r} are not all different")
        for split in ("train", "val", "test"):
            found = self.tokens.get(split, [])
            if len(found) != self.n_tasks:
                raise ValueError(f"{split} sequences of {len(found)} tasks in {self.name!r}; allowed: {self.n_tasks}")
            for x in found:
                if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.shape[1:] != (self.codebook.length,):
                    words = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                    allowed = f"tensors (n, {self.codebook.length}), int64"
                    raise ValueError(f"{split} sequences of {self.name!r} are {words}; allowed: {allowed}")

    @property
    def n_tasks(self) -> int:
        return len(self.task_names)

    def task_id(self, task: str | int) -> int:
        """The number of a task given by name or number; raises ValueError naming the allowed ones."""
        names = [str(i) for i in range(self.n_tasks)]
        for known in (names,) if isinstance(task, int) else (self.task_names, names):
            for form in (str, partial(normalize, "NFC")):  # a file system may take accents apart
                if (wanted := form(str(task))) in (own := [form(name) for name in known]):
                    return own.index(wanted)
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(self.task_names)} (or 0 to {self.n_tasks - 1})")

    def first(self, split: str, n: int) -> Tensor:
        """The first n sequences of every task, (T, n, N); fewer where the smallest task has fewer."""
        n = min(n, min(len(t) for t in self.tokens[split]))
        return torch.stack([t[:n] for t in self.tokens[split]])

    def draw(
        self, n_steps: int, tasks_per_step: int, per_task: int, seed: int, before: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The whole order of training: task_ids (steps, T'), index (steps, T', B) into each task's images.

        Tasks take turns; each task's images come in a new random order every time that it has been through.
        A pure function of its arguments: a resumed run, and every arm of one seed and number of steps, sees the same.
        `before`: how often the same order was drawn already, by runs that this one goes on from.
        """
        rng = np.random.default_rng([seed, 1, before])  # with a zero as without it
        n_tasks = self.n_tasks
        tasks_per_step = min(tasks_per_step, n_tasks)
        rounds = -(-n_steps * tasks_per_step // n_tasks)
        turns = np.concatenate([rng.permutation(n_tasks) for _ in range(rounds)])
        task_ids = np.sort(turns[: n_steps * tasks_per_step].reshape(n_steps, tasks_per_step), axis=1)
        index = np.empty((n_steps, tasks_per_step, per_task), np.int64)
        for task in range(n_tasks):
            mine = np.nonzero(task_ids == task)
            n_draws, n_images = len(mine[0]) * per_task, len(self.tokens["train"][task])
            epochs = -(-n_draws // n_images) or 1
            order = np.concatenate([rng.permutation(n_images) for _ in range(epochs)])[:n_draws]
            index[mine] = order.reshape(-1, per_task)
        return torch.from_numpy(task_ids), torch.from_numpy(index)

    def batch(self, task_ids: Tensor, index: Tensor) -> Tensor:
        """Training sequences (T', B, N) of the given tasks."""
        return torch.stack([self.tokens["train"][t][i] for t, i in zip(task_ids.tolist(), index, strict=True)])


def split_images(images: Images, val_per_class: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training images less `val_per_class` of each class (a quarter of it at most) for validation; the test images.

    An image set that comes with validation images keeps them.
    """
    if images.val is not None:
        return {"train": images.train, "val": images.val, "test": images.test}
    x, y = images.train
    rng = np.random.default_rng(SEED)
    val = np.zeros(len(x), bool)
    for label in range(len(images.label_names)):
        mine = np.nonzero(y == label)[0]
        val[rng.permutation(mine)[: min(val_per_class, max(1, len(mine) // 4))]] = True
    return {"train": (x[~val], y[~val]), "val": (x[val], y[val]), "test": images.test}


def cluster_labels(splits: dict[str, tuple[np.ndarray, np.ndarray]], n_clusters: int):
    """Another definition of tasks: k-means clusters of PCA'd pixels, fitted on training images only.

    Raises ValueError for no cluster, or more of them than images to fit them on.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    flat = {name: x.reshape(len(x), -1) for name, (x, _) in splits.items()}
    some = flat["train"][:20_000]
    if not 1 <= n_clusters <= len(some):
        raise ValueError(
            f"clusters{n_clusters} of {len(some)} training images; allowed: clusters1 to clusters{len(some)}"
        )
    with threadpool_limits(1):  # as `Codebook.fit`
        pca = PCA(min(32, *some.shape), random_state=SEED).fit(some)
        kmeans = KMeans(n_clusters, n_init=1, max_iter=50, random_state=SEED).fit(pca.transform(some))
        return {name: kmeans.predict(pca.transform(x)).astype(np.int64) for name, x in flat.items()}


def few(data: TaskData, n: int, seed: int = 0) -> TaskData:
    """The same tasks with n images each: about a fifth, at least one, of validation, the rest of training.

    Test images stay. For one seed a smaller n takes a part of what a larger one takes. Raises ValueError.
    """
    n_val = max(1, round(n / 5))
    counts = {"train": n - n_val, "val": n_val}
    tokens = dict(data.tokens)
    for number, (split, count) in enumerate(counts.items()):
        least = min(map(len, data.tokens[split]))
        if not 1 <= count <= least:
            raise ValueError(f"few={n} means {count} {split} images of each task; {data.name} allows 1 to {least}")
        rng = [np.random.default_rng([seed, number, t]) for t in range(data.n_tasks)]
        tokens[split] = [x[r.permutation(len(x))[:count]] for r, x in zip(rng, data.tokens[split], strict=True)]
    return replace(data, name=f"{data.name}-few{n}-s{seed}", tokens=tokens)


def make_tasks(
    dataset: str,
    tasks: str = "classes",
    vocab_size: int = 256,
    patch: int = 4,
    val_per_class: int = 600,
    codebook: Codebook | None = None,
) -> TaskData:
    """Tasks of an image set: `classes`, or `clustersK` (e.g. clusters64). The codebook sees training images only.

    `dataset` is a name or `folder:PATH`, see `tasks.images`; `glyphs` and `text` have tasks of their own (see these
    modules), `captioned_fashion` and `captioned_digits` a caption before every image (`text.caption`);
    `featured_fashion` and `featured_digits` have clusters of what a frozen encoder sees in images, not of pixels.
    `unseen3` are the classes in `HELD_OUT_CLASSES`, `seen7` the others, which alone the codebook sees. Any
    tasks with `-fewN` or `-fewN-sS` behind them: N images of each, drawn with seed S (see `few`). `codebook`, of images
    of a set without tasks of its own, is taken in place of one that is fitted.

    Raises ValueError naming the allowed values; DataError where images are missing or too few.
    """
    for name, value, least in (
        ("vocab_size", vocab_size, 1),
        ("patch", patch, 1),
        ("val_per_class", val_per_class, int(dataset in MAKERS)),
    ):
        if value < least:
            raise ValueError(f"{name}={value}; allowed: {least} or more")
    if scarce := re.fullmatch(FEW, tasks):
        whole = make_tasks(dataset, scarce[1], vocab_size, patch, val_per_class, codebook)
        return few(whole, int(scarce[2]), int(scarce[3] or 0))
    if dataset in MAKERS:
        return MAKERS[dataset](tasks, vocab_size, patch, val_per_class)
    images = load_images(dataset, patch)
    splits = split_images(images, val_per_class)
    held_out = [images.label_names.index(c) for c in HELD_OUT_CLASSES.get(dataset, ()) if c in images.label_names]
    one_side = bool(held_out) and tasks in ("seen7", "unseen3")
    x, y = splits["train"]
    if one_side:
        x = x[~np.isin(y, held_out)]
    codebook = codebook or Codebook.fit(x[:10_000], patch, vocab_size)
    if tasks == "classes" or one_side:
        labels, names = {name: y for name, (_, y) in splits.items()}, images.label_names
    elif re.fullmatch("clusters[0-9]+", tasks):
        n_tasks = int(tasks[8:])
        labels, names = cluster_labels(splits, n_tasks), tuple(f"cluster {i}" for i in range(n_tasks))
    else:
        more = f", seen7, unseen3 ({', '.join(HELD_OUT_CLASSES[dataset])})" if held_out else ""
        raise ValueError(f"unknown tasks {tasks!r}; allowed: classes, clustersK with a number K (clusters64){more}")
    chosen = [t for t in range(len(names)) if not one_side or (t in held_out) == (tasks == "unseen3")]
    tokens = {}
    for split, (x, _) in splits.items():
        encoded = torch.from_numpy(codebook.encode(x))
        tokens[split] = [encoded[torch.from_numpy(labels[split] == t)] for t in chosen]
        for t, mine in zip(chosen, tokens[split], strict=True):
            if not len(mine):
                split += f" images with val_per_class={val_per_class}" if split == "val" else " images"
                raise ValueError(f"{names[t]!r} of {dataset}/{tasks} has no {split}: fewer tasks or more are needed")
    return TaskData(f"{images.name}/{tasks}", tuple(names[t] for t in chosen), tokens, codebook, images.licence)


def _glyphs(tasks: str, vocab_size: int, patch: int, val_per_class: int) -> TaskData:
    from .glyphs import make_glyphs

    return make_glyphs(tasks, vocab_size, patch, val_per_class)


def _text(tasks: str, vocab_size: int, patch: int, val_per_class: int) -> TaskData:
    from .text import make_text

    return make_text(tasks, vocab_size, val_per_class)


def _captioned(images: str, tasks: str, vocab_size: int, patch: int, val_per_class: int) -> TaskData:
    from .text import LETTERS, caption

    if vocab_size <= len(LETTERS):
        raise ValueError(f"vocab_size={vocab_size} with captions; allowed: {len(LETTERS) + 1} or more")
    return caption(make_tasks(images, tasks, vocab_size - len(LETTERS), patch, val_per_class))


@cache
def _seen(dataset: str, patch: int, val_per_class: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each split's images (n, H, W, C), of training 15,000 at most, and what a frozen encoder sees in them (n, K)."""
    from .images import image_features

    splits = {name: x for name, (x, _) in split_images(load_images(dataset, patch), val_per_class).items()}
    splits["train"] = splits["train"][:15_000]
    every = np.concatenate(list(splits.values()))
    features = image_features(every, size=64 if every.shape[1] > 16 else 32)
    ends = np.cumsum([len(x) for x in splits.values()])[:-1]
    parts = np.split(features.numpy(), ends)
    return {name: (x, part) for (name, x), part in zip(splits.items(), parts, strict=True)}


def _featured(dataset: str, tasks: str, vocab_size: int, patch: int, val_per_class: int) -> TaskData:
    if not re.fullmatch("clusters[0-9]+", tasks):
        raise ValueError(
            f"unknown tasks {tasks!r} of featured_{dataset}; allowed: clustersK with a number K (clusters64)"
        )
    images, seen, n_tasks = load_images(dataset, patch), _seen(dataset, patch, val_per_class), int(tasks[8:])
    labels = cluster_labels({name: (features, x) for name, (x, features) in seen.items()}, n_tasks)
    codebook = Codebook.fit(seen["train"][0][:10_000], patch, vocab_size)
    tokens = {}
    for split, (x, _) in seen.items():
        encoded = torch.from_numpy(codebook.encode(x))
        tokens[split] = [encoded[torch.from_numpy(labels[split] == t)] for t in range(n_tasks)]
        if not all(map(len, tokens[split])):
            raise ValueError(f"featured_{dataset}/{tasks}: a cluster has no {split} images; allowed: fewer clusters")
    names = tuple(f"cluster {i}" for i in range(n_tasks))
    return TaskData(f"featured {images.name}/{tasks}", names, tokens, codebook, images.licence)


# data sets with tasks of their own; a run's key follows the one it names
MAKERS: dict[str, Callable[..., TaskData]] = {
    "glyphs": _glyphs,
    "text": _text,
    "captioned_fashion": lambda *about: _captioned("fashion", *about),
    "captioned_digits": lambda *about: _captioned("digits", *about),
    "featured_fashion": lambda *about: _featured("fashion", *about),
    "featured_digits": lambda *about: _featured("digits", *about),
}
# whose data change with code and packages only, as `images.OURS`
OURS = {name: MAKERS[name] for name in ("glyphs", "text", "captioned_fashion", "captioned_digits")}
OURS |= {name: MAKERS[name] for name in ("featured_fashion", "featured_digits")}
