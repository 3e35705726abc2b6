"""Glyphs: hundreds of related tasks, a letter each, drawn with the DejaVu fonts that matplotlib ships.

What is notable:

- Font faces are split, not images: the faces of test images are never drawn for training or validation.
- Whole scripts are held out before any codebook, source or basis is fitted; the codebook sees training letters only.
- Letters of one shape are one task. Shapes are compared as bitmaps of one size, so that A, Α and А are found without
  a list, and so are C and c. The training scripts come first: what looks like their letters is no held-out letter.
- Letters that Unicode decomposes (accented copies, ligatures) are no tasks.
- An image is a pure function of letter, split and number.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import SPLITS, Codebook, TaskData
from .images import SEED, DataError

SIZE = 20  # pixels, both ways
FINE = 3  # letters are drawn and moved at FINE times that size, then averaged
EM = 18 * FINE  # font size
CANVAS = 28 * FINE  # of a letter before it is moved; wider ones are made narrower
PER_TASK = {"train": 120, "test": 60}  # images at most …
PER_VAL = {"train": 6, "test": 3}  # … and for each of validation, whose number is an argument
FACES = {  # of every family two faces to train on, one to validate, one to test; every style is in every role but once
    "Sans": dict(
        train=("DejaVuSans", "DejaVuSans-BoldOblique"), val=("DejaVuSans-Bold",), test=("DejaVuSans-Oblique",)
    ),
    "Serif": dict(
        train=("DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"), val=("DejaVuSerif",), test=("DejaVuSerif-Bold",)
    ),
    "Mono": dict(
        train=("DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
        val=("DejaVuSansMono-BoldOblique",),
        test=("DejaVuSansMono",),
    ),
}
TRAIN_SCRIPTS = ("Latin", "Cyrillic")
HELD_OUT_LETTERS = (10, 40)  # of a held-out script: with fewer it is left out, more are not taken
SAME_SHAPE = 0.25  # share of the ink by which two letters differ, in the face in which they are most alike


def _font_file(face: str) -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.exists():
        raise DataError(f"{path} is not there: install matplotlib from PyPI, whose wheels ship the DejaVu fonts")
    return path


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(face)), EM, layout_engine=ImageFont.Layout.BASIC)


@cache
def families_of() -> dict[str, tuple[str, ...]]:
    """Every letter that can be a task, in code order, with the font families that have it in all their faces."""
    from matplotlib.ft2font import FT2Font

    families: dict[str, tuple[str, ...]] = {}
    for family, faces in FACES.items():
        maps = [FT2Font(str(_font_file(face))).get_charmap() for split in SPLITS for face in faces[split]]
        for letter in map(chr, set.intersection(*map(set, maps))):
            is_one = unicodedata.category(letter) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(letter)
            if is_one and script(letter):
                families[letter] = families.get(letter, ()) + (family,)
    return dict(sorted(families.items()))


def script(letter: str) -> str:
    """The script of a letter by its Unicode name (Latin, Old Italic …); empty where the name tells none."""
    match = re.match(r"(.+?) (?:CAPITAL|SMALL|LETTER|SYLLABICS)\b", unicodedata.name(letter, ""))
    return match[1].title() if match else ""


# ------------------------------------------------------------------------------------------------------- drawing


@cache
def _master(letter: str, face: str, stroke: int = 0) -> Image.Image:
    """The letter in the middle of a canvas, (CANVAS, CANVAS), white on black, `stroke` pixels fatter on each side."""
    font = _font(face)
    left, top, right, bottom = map(int, font.getbbox(letter, stroke_width=stroke))
    image = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), letter, 255, font, stroke_width=stroke)
    room = (SIZE - 2) * FINE
    image = image.resize([min(n, room) for n in image.size], Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return canvas


def draw(letter: str, split: str, n: int) -> np.ndarray:
    """The first n images of a letter, (n, SIZE, SIZE, 1) float32 in [0, 1]; the faces of the split take turns.

    Size, stroke, rotation, shear and place differ from image to image.
    """
    faces = [face for family in families_of()[letter] for face in FACES[family][split]]
    rng = np.random.default_rng([SEED, SPLITS.index(split), ord(letter)])
    out = np.empty((n, SIZE, SIZE), np.uint8)
    # a row an image, so that the first images stay the same whatever n is
    for i, (size, stroke, turn, shear, dx, dy) in enumerate(rng.random((n, 6))):
        scale, angle, lean = 0.8 + 0.3 * size, np.deg2rad(20 * turn - 10), 0.3 * shear - 0.15
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        a, b, c, d = cos, lean * cos - sin, sin, lean * sin + cos  # output → input
        half_in, half_out = CANVAS / 2, SIZE * FINE / 2
        x, y = half_out + FINE * (2 * dx - 1), half_out + FINE * (2 * dy - 1)
        matrix = (a, b, half_in - a * x - b * y, c, d, half_in - c * x - d * y)
        image = _master(letter, faces[i % len(faces)], int(2 * stroke))
        moved = image.transform((SIZE * FINE,) * 2, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        out[i] = np.asarray(moved.reduce(FINE))
    return out[..., None] / np.float32(255)


# ----------------------------------------------------------------------------------------- which letters, which side


def shapes(letters: list[str], family: str, size: int = 16) -> np.ndarray:
    """Ink of the letters in each face of a family, cut out and brought to one size: (n, faces, size·size) in [0, 1]."""
    faces = [face for split in SPLITS for face in FACES[family][split]]
    out = np.zeros((len(letters), len(faces), size, size), np.float32)
    for i, letter in enumerate(letters):
        for j, face in enumerate(faces):
            image = _master(letter, face)
            if (box := image.getbbox()) is None:
                continue
            image = image.crop(box)
            longest = max(image.size)
            width, height = (max(1, round(size * n / longest)) for n in image.size)
            image = image.resize((width, height), Image.Resampling.BOX)
            top, left = (size - height) // 2, (size - width) // 2
            out[i, j, top : top + height, left : left + width] = np.asarray(image) / np.float32(255)
    return out.reshape(len(letters), len(faces), size * size)


def differences(letters: list[str]) -> np.ndarray:
    """(n, n): the share of the ink by which two letters differ, |a − b| / max(a, b), in the face in which it is least.

    Infinite where no family has both.
    """
    from scipy.spatial.distance import pdist, squareform

    out = np.full((len(letters), len(letters)), np.inf)
    for family in FACES:
        mine = [i for i, letter in enumerate(letters) if family in families_of()[letter]]
        ink = shapes([letters[i] for i in mine], family).astype(np.float64)
        for face in range(ink.shape[1]):
            x = ink[:, face]
            apart, total = squareform(pdist(x, "cityblock")), x.sum(1)
            both = (total[:, None] + total[None] + apart) / 2  # Σ max(a, b)
            at = np.ix_(mine, mine)
            out[at] = np.minimum(out[at], apart / np.maximum(both, 1e-9))
    return out


@cache
def letters() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The letters to train on, in a shuffled order, and the held-out ones, script by script."""
    known = sorted(families_of(), key=lambda letter: script(letter) not in TRAIN_SCRIPTS)
    near = differences(known) < SAME_SHAPE
    kept: list[int] = []
    for i in range(len(known)):
        if not near[i][kept].any():
            kept.append(i)
    rng = np.random.default_rng([SEED, 2])
    train = [known[i] for i in kept if script(known[i]) in TRAIN_SCRIPTS]
    held_out: dict[str, list[str]] = {}
    for letter in (known[i] for i in kept[len(train) :]):
        held_out.setdefault(script(letter), []).append(letter)
    least, most = HELD_OUT_LETTERS
    chosen = [sorted(rng.permutation(x)[:most]) for x in held_out.values() if len(x) >= least]
    return tuple(rng.permutation(train).tolist()), tuple(str(letter) for x in chosen for letter in x)


@cache
def _codebook(patch: int, size: int) -> Codebook:
    """Fitted on 12 training images of every training letter: one and the same for all sets of glyph tasks."""
    return Codebook.fit(np.concatenate([draw(x, "train", 12) for x in letters()[0]]), patch, size)


def make_glyphs(tasks: str, vocab_size: int, patch: int, val_per_class: int) -> TaskData:
    """Letters as tasks: `train`, or those of the `heldout` scripts; with a number N, the first N in a shuffled order.

    Six training and three test images for each of validation, up to PER_TASK of a letter.
    Raises ValueError naming the allowed values, DataError where the fonts are missing.
    """
    train, held_out = letters()
    sides = {"train": train, "heldout": tuple(np.random.default_rng([SEED, 4]).permutation(held_out).tolist())}
    side = tasks.rstrip("0123456789")
    n = int(tasks[len(side) :] or 0)
    if side not in sides or not (tasks == side or 1 <= n <= len(sides[side])):
        words = ", ".join(f"{name}, {name}N with N from 1 to {len(them)}" for name, them in sides.items())
        raise ValueError(f"unknown tasks {tasks!r}; allowed: {words}")
    chosen = sides[side][:n] if n else held_out if side == "heldout" else train
    book = _codebook(patch, vocab_size)
    counts = {s: min(PER_TASK[s], n * val_per_class) for s, n in PER_VAL.items()} | {"val": val_per_class}
    tokens = {s: [torch.from_numpy(book.encode(draw(x, s, counts[s]))) for x in chosen] for s in SPLITS}
    names = tuple(unicodedata.name(x) for x in chosen)
    licence = "DejaVu fonts (Bitstream Vera and Arev licences, changes in the public domain)"
    return TaskData(f"glyphs/{tasks}", names, tokens, book, licence, tuple(script(x) for x in chosen))
