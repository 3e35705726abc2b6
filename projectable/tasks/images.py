"""Where images come from: Fashion-MNIST (three ways to get it) and scikit-learn's digits (no download at all)."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FASHION_FILES = {  # SHA-256 of the unzipped files: the archives differ from place to place, their contents do not
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
HELP = (
    "To get it: be online once (torchvision's download, or Debian's package dataset-fashion-mnist); "
    "or set PROJECTABLE_DATA to a folder that holds FashionMNIST/raw/ with the four .gz files."
)


class DataError(RuntimeError):
    """A data file is missing or damaged; the message says which and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled image set. Pixels are float32 in [0, 1], (n, H, W, C); labels are int64, (n,)."""

    name: str
    licence: str
    label_names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def data_dir() -> Path:
    """Where downloads go: PROJECTABLE_DATA, or data/ beside the package."""
    return Path(os.environ.get("PROJECTABLE_DATA") or Path(__file__).parents[2] / "data")


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
    tried = []
    for way in (None, _download_with_torchvision, _download_with_apt):
        try:
            if way is not None:
                way(data_dir())
            return _find_fashion()
        except Exception as error:  # whatever a downloader raises: the next way is tried, and all are reported
            name = way.__name__.removeprefix("_download_with_") if way else "on disk"
            tried.append(f"{name}: {str(error).removesuffix(HELP).strip()[:200]}")
    raise DataError(f"Fashion-MNIST could not be fetched. {' | '.join(tried)} | {HELP}")


def _download_with_torchvision(root: Path) -> None:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(root), train=True, download=True)


def _download_with_apt(root: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise DataError("no apt-get and dpkg on this machine")
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(
            ["apt-get", "download", "dataset-fashion-mnist"],
            cwd=tmp,
            check=True,
            capture_output=True,
            timeout=300,
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


def _read_idx(path: Path) -> np.ndarray:
    """A checked IDX file of unsigned bytes → an array of its shape."""
    content = _read_checked(path)
    n_dims = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def load_fashion_mnist() -> Images:
    """Fashion-MNIST, 60,000 + 10,000 grey images of 28×28 pixels, MIT licence; fetched where it is not there yet."""
    folder = fetch_fashion_mnist()
    arrays = [_read_idx(folder / f"{name}.gz") for name in FASHION_FILES]
    x, y, x_test, y_test = arrays
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


LOADERS = {"fashion": load_fashion_mnist, "digits": load_digits}


def load_images(name: str) -> Images:
    """The image set of that name; raises ValueError naming the allowed ones."""
    if name not in LOADERS:
        raise ValueError(f"unknown dataset {name!r}; allowed: {', '.join(LOADERS)}")
    return LOADERS[name]()
