"""Text: ten kinds of writing as tasks, from what Python and the required packages bring along: no download.

What is notable:

- A token is a character. The alphabet is what training text has most of; the rest is one unknown character.
- Files are split, not sequences: no file is in two splits, and no sequence of validation or test text occurs anywhere
  in its task's training text.
- Texts change with the versions of their packages: `versions` names them and belongs to whatever names the data.
- Text and images in one sequence: `caption` writes a caption before every image of other tasks.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from . import SPLITS, Codebook, TaskData
from .images import SEED, DataError

LENGTH = 64  # characters of a sequence
PER_TASK = {"train": 4000, "test": 500}  # sequences at most …
PER_VAL = {"train": 10, "test": 2}  # … and for each of validation, whose number is an argument
PER_FILE = {"train": 512, "val": 128, "test": 128}  # sequences of a file at most: many files, not a few long ones
MODULES = {"scikit-learn": "sklearn"}  # where a package's name is not that of its module
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Source(NamedTuple):
    """Where a kind of writing is found: files of an installed package (of Python itself where it is empty)."""

    family: str
    package: str
    patterns: tuple[str, ...]
    without: tuple[str, ...] = ()  # folders and files that are left out
    docstrings: bool = False  # these alone


KINDS = {
    "Python": Source(
        "code",
        "",
        ("**/*.py",),
        # what not every installation has, tables, and what is a task of its own
        ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils")
        + ("ensurepip", "encodings", "pydoc_data"),
    ),
    "Python tests": Source("code", "pandas", ("tests/**/*.py",)),
    "type stubs": Source("code", "numpy", ("**/*.pyi",)),
    "Cython": Source("code", "scikit-learn", ("**/*.pyx", "**/*.pxd")),
    "C++": Source("code", "torch", ("include/c10/**/*.h", "include/torch/csrc/**/*.h")),
    "JavaScript": Source("code", "jupyterlab", ("static/*.js",)),
    "language reference": Source("prose", "", ("pydoc_data/topics.py",)),
    "SciPy docstrings": Source("prose", "scipy", ("**/*.py",), ("tests", "_lib"), docstrings=True),
    "PyTorch docstrings": Source("prose", "torch", ("**/*.py",), ("testing", "test"), docstrings=True),
    "pandas docstrings": Source("prose", "pandas", ("**/*.py",), ("tests", "_testing"), docstrings=True),
}


@dataclass(frozen=True)
class Alphabet:
    """Characters ↔ tokens, with the interface of a `Codebook`: a text is an image one character high.

    `characters[i]` is token i; the first stands for all characters that are not in it, and so do those at the end that
    fill it up to the size of the vocabulary.
    """

    characters: str
    length: int = LENGTH
    patch: int = 1
    height: int = 1

    @classmethod
    def fit(cls, texts: list[str], size: int, length: int = LENGTH) -> Alphabet:
        """The size − 1 most frequent characters of training texts, in code order; raises ValueError for size < 2."""
        if size < 2:
            raise ValueError(f"vocab_size={size} leaves no character; allowed: 2 or more")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        counts.pop(UNKNOWN, None)
        kept = sorted(counts, key=lambda c: (-counts[c], c))[: size - 1]
        return cls((UNKNOWN + "".join(sorted(kept))).ljust(size, UNKNOWN), length)

    @classmethod
    def from_codes(cls, codes: np.ndarray, length: int) -> Alphabet:
        """The alphabet that has these `codes`."""
        return cls("".join(map(chr, codes[:, 0].astype(int))), length)

    @property
    def codes(self) -> np.ndarray:
        """Unicode numbers of the characters, (V, 1) float32: exact, and stored as the codes of a codebook are."""
        return np.array([[ord(c)] for c in self.characters], np.float32)

    @property
    def width(self) -> int:
        """Characters of a sequence: `bits_per_pixel` is bits per character."""
        return self.length

    def encode(self, texts: list[str]) -> np.ndarray:
        """n texts of `length` characters → tokens (n, length) int64; raises ValueError for another length."""
        if wrong := [text for text in texts if len(text) != self.length]:
            raise ValueError(f"a text of {len(wrong[0])} characters; allowed: {self.length}")
        numbers = {c: i for i, c in enumerate(self.characters) if c != UNKNOWN}
        flat = np.fromiter((numbers.get(c, 0) for text in texts for c in text), np.int64, len(texts) * self.length)
        return flat.reshape(len(texts), self.length)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens (n, N) → n texts."""
        return ["".join(self.characters[i] for i in row) for row in np.asarray(tokens).tolist()]


def versions() -> str:
    """The texts' origins with their versions."""
    packages = sorted({source.package for source in KINDS.values() if source.package and _folder(source)})
    names = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *names])


# --------------------------------------------------------------------------------------------------- finding texts


def _folder(source: Source) -> Path | None:
    """Where the package lies; it is found, not imported."""
    if not source.package:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(MODULES.get(source.package, source.package))
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _files(kind: str) -> list[Path]:
    source = KINDS[kind]
    if (folder := _folder(source)) is None:
        raise DataError(
            f"{kind!r} is text of the package {source.package}, which is not there: pip install {source.package}"
        )
    files = {path for pattern in source.patterns for path in folder.glob(pattern)}
    return sorted(p for p in files if p.is_file() and not set(p.relative_to(folder).parts) & set(source.without))


def _tree(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's files
        return ast.parse(path.read_bytes())


def _docstrings(path: Path) -> str:
    """All docstrings of a Python file; nothing where it is not Python."""
    try:
        tree = _tree(path)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def documents(kind: str) -> Iterator[str]:
    """The texts of a kind, a file each, in a shuffled order; read only as they are asked for.

    Tabs are four spaces; ends of lines and of files are bare. Raises DataError where the package is missing.
    """
    files = _files(kind)
    if kind == "language reference":  # one file of many topics, each a text
        texts = [node.value for path in files for node in ast.walk(_tree(path)) if isinstance(node, ast.Constant)]
        items: list = [text for text in texts if isinstance(text, str) and "\n" in text]
    else:
        items = files
    for i in np.random.default_rng([SEED, 3]).permutation(len(items)):
        item = items[i]
        if isinstance(item, Path):
            item = _docstrings(item) if KINDS[kind].docstrings else item.read_text("utf-8", errors="replace")
        yield re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", item.expandtabs(4), flags=re.MULTILINE)).strip()


def sequences(kind: str, counts: dict[str, int]) -> dict[str, list[str]]:
    """At most counts[split] sequences of a kind by split, in a shuffled order.

    Files go to test first, then to validation, the rest to training, as far as they are needed. A paragraph that came
    before (licence headers, copied functions) is left out.
    """
    order = ("test", "val", "train")
    room = {"train": 1.0, "val": 1.4, "test": 1.4}  # for those that training text holds, too
    found: dict[str, list[str]] = {split: [] for split in order}
    seen: set[str] = set()
    for text in documents(kind):
        split = next((s for s in order if len(found[s]) < room[s] * counts[s]), None)
        if split is None:
            break
        paragraphs = text.split("\n\n")
        text = "\n\n".join(p for p in paragraphs if len(p) < LENGTH or p not in seen)
        seen.update(paragraphs)
        pieces = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH + 1, LENGTH)]
        found[split] += pieces[: PER_FILE[split]]
    before: set[str] = set()
    out = {}
    for split in SPLITS:
        new = [piece for piece in dict.fromkeys(found[split]) if piece not in before]
        text = "".join(found[split])
        before.update(text[i : i + LENGTH] for i in range(len(text) - LENGTH + 1))  # at every place, not only the cuts
        chosen = np.random.default_rng([SEED, SPLITS.index(split)]).permutation(len(new))[: counts[split]]
        out[split] = [new[i] for i in chosen]
    return out


def make_text(tasks: str, vocab_size: int, val_per_class: int) -> TaskData:
    """Kinds of writing as tasks (`kinds`), LENGTH characters a sequence; `codebook` is an `Alphabet`.

    Ten training and two test sequences for each of validation, up to PER_TASK of a kind.
    Raises ValueError naming the allowed values, DataError where a package is missing or has too little text.
    """
    if tasks != "kinds":
        raise ValueError(f"unknown tasks {tasks!r}; allowed: kinds")
    counts = {s: min(PER_TASK[s], n * val_per_class) for s, n in PER_VAL.items()} | {"val": val_per_class}
    found = {kind: sequences(kind, counts) for kind in KINDS}
    for kind, by_split in found.items():
        for split, texts in by_split.items():
            if len(texts) < counts[split] / 2:
                raise DataError(
                    f"{kind!r} has {len(texts)} {split} sequences, {counts[split]} are wanted: "
                    f"install {KINDS[kind].package or 'Python'} with all its source files"
                )
    alphabet = Alphabet.fit([text for by_split in found.values() for text in by_split["train"]], vocab_size)
    tokens = {s: [torch.from_numpy(alphabet.encode(found[kind][s])) for kind in KINDS] for s in SPLITS}
    families = tuple(source.family for source in KINDS.values())
    licence = f"the packages' own; texts of {versions()}"
    return TaskData(f"text/{tasks}", tuple(KINDS), tokens, cast(Codebook, alphabet), licence, families)


# ---------------------------------------------------------------------------------- captions and images in one sequence

CAPTION = 24  # characters before an image
LETTERS = " -abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = (("small", "large"), ("dark", "bright"))  # above the middle of its task is the second
INK = 0.1  # a pixel from there on belongs to the thing


@dataclass(frozen=True)
class Captioned:
    """A caption's characters, then its image's tokens, with the interface of a `Codebook`.

    The vocabulary: the codes of `book`, then LETTERS. `middle` (T, 2) is the median of each task's training images in
    the two measures that captions speak of.
    """

    book: Codebook
    middle: np.ndarray

    @property
    def codes(self) -> np.ndarray:
        """The images' codes, then a blank one for every letter."""
        codes = self.book.codes
        return np.concatenate([codes, np.zeros((len(LETTERS), codes.shape[1]), codes.dtype)])

    @property
    def n_codes(self) -> int:
        """Codes of images: letters have the numbers from there on."""
        return len(self.book.codes)

    patch = property(lambda self: self.book.patch)
    height = property(lambda self: self.book.height)
    width = property(lambda self: self.book.width)

    @property
    def length(self) -> int:
        """Tokens of caption and image."""
        return CAPTION + self.book.length

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (n, length) → images (n, H, W, C); a letter among an image's tokens is blank."""
        return replace(self.book, codes=self.codes).decode(np.asarray(tokens)[:, CAPTION:])

    def captions(self, tokens: np.ndarray) -> list[str]:
        """Tokens (n, length) → n captions; a code among the letters is an unknown character."""
        rows = np.asarray(tokens)[:, :CAPTION] - self.n_codes
        return ["".join(LETTERS[i] if i >= 0 else UNKNOWN for i in row).rstrip() for row in rows.tolist()]

    def write(self, captions: list[str]) -> np.ndarray:
        """Captions → tokens (n, CAPTION), cut or filled up with blanks; what is no letter becomes a dash."""
        numbers = {c: self.n_codes + i for i, c in enumerate(LETTERS)}
        rows = [
            [numbers.get(c, numbers["-"]) for c in caption.lower().ljust(CAPTION)[:CAPTION]] for caption in captions
        ]
        return np.array(rows, np.int64).reshape(len(rows), CAPTION)

    def describe(self, images: np.ndarray, task: int) -> list[tuple[str, str]]:
        """The words of WORDS that are true of images (n, H, W, C) of a task."""
        above = measures(images) > self.middle[task]
        return [(WORDS[0][int(large)], WORDS[1][int(bright)]) for large, bright in above]

    def agreement(self, tokens) -> np.ndarray:
        """How often images are what captions say, the share of the two words: tokens, T of (n, length) → (T, 2).

        First of an image's own caption, then of those of the task's other images: what chance gives.
        """
        shares = []
        for task, rows in enumerate(tokens):
            said = np.array([(*caption.split(), "", "")[:2] for caption in self.captions(rows)])  # (n, 2)
            true = np.array(self.describe(self.decode(rows), task))
            pairs = (said[:, None] == true).mean(-1)  # (captions, images)
            own = pairs.trace() / len(pairs)
            shares.append((own, (pairs.sum() - pairs.trace()) / max(1, len(pairs) * (len(pairs) - 1))))
        return np.array(shares)


def measures(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) → (n, 2): the share of pixels that belong to the thing, and their mean."""
    flat = images.reshape(len(images), -1)
    ink = flat > INK
    return np.stack([ink.mean(1), (flat * ink).sum(1) / np.maximum(ink.sum(1), 1)], axis=1)


def caption(data: TaskData) -> TaskData:
    """The same tasks with a caption before every image: whether it is small or large, dark or bright *for its task*
    (above the median of the task's training images as their codes show them, or not), and the task's name.
    """
    book = data.codebook
    images = [[book.decode(x.numpy()) for x in data.tokens[split]] for split in SPLITS]
    middle = np.stack([np.median(measures(x), axis=0) for x in images[SPLITS.index("train")]])
    both = Captioned(book, middle)
    tokens: dict[str, list[torch.Tensor]] = {}
    for split, of_split in zip(SPLITS, images, strict=True):
        tokens[split] = []
        for task, x in enumerate(of_split):
            words = [f"{large} {bright} {data.task_names[task]}" for large, bright in both.describe(x, task)]
            parts = [torch.from_numpy(both.write(words)), data.tokens[split][task]]
            tokens[split].append(torch.cat(parts, dim=1))  # (n, CAPTION + N)
    return replace(data, name=f"captioned {data.name}", tokens=tokens, codebook=cast(Codebook, both))
