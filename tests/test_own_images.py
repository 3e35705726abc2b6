"""Images of one's own, in folders, and torchvision's data sets: found, read, refused, and modelled in colour."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock, call
from urllib.error import URLError

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny, tiny_projectable, tiny_source
from PIL import Image

from projectable import experiment, reporting, tasks
from projectable.__main__ import check_current, cli, find_run
from projectable.config import ConfigError, DataConfig
from projectable.experiment import data_for, folder_of, run
from projectable.export import ModelError, evaluate, export, facts, load, write_grid
from projectable.plotting import image_grid
from projectable.storage import code_behind, locked
from projectable.tasks import images, make_tasks, split_images
from projectable.tasks.images import (
    LOADERS,
    DataError,
    Images,
    content_key,
    load_digits,
    load_folder,
    load_images,
    read_folder,
)

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "15_your_own_data.ipynb"
TINTS = np.array([[1, 0.4, 0.2], [0.2, 1, 0.5], [0.3, 0.4, 1]], np.float32)  # of the classes


def write_images(folder, n=10, colour=False, end="png", names=("cats", "dogs", "owls")):
    """The first n digits 0, 1 and 2 as files in folders of such names; in colour, each class in its own."""
    x, y = load_digits().train
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i, pixels in enumerate(x[y == label][:n]):
            if colour:
                pixels = pixels * TINTS[label]
            Image.fromarray(np.rint(pixels * 255).astype(np.uint8).squeeze()).save(folder / name / f"{i}.{end}")
    return folder


@pytest.fixture
def pets(tmp_path):
    return write_images(tmp_path / "pets")


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


# ------------------------------------------------------------------------------------------------ what is read


def test_small_images_of_one_size_stay_as_they_are(pets, capsys):
    found, parts = read_folder(pets, patch=2)
    assert (found.classes, found.counts, found.broken) == (("cats", "dogs", "owls"), {"all": [10, 10, 10]}, ())
    assert (found.height, found.width, found.channels, found.sizes) == (8, 8, 1, {(8, 8): 30})
    x, y = load_digits().train
    expected = np.concatenate([x[y == label][:10] for label in range(3)])
    assert np.array_equal(parts["all"][0], np.rint(expected * 255)) and parts["all"][0].dtype == np.uint8
    assert parts["all"][1].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    loaded = load_images(f"folder:{pets}", 2)
    assert capsys.readouterr().err == "pets: 30 images of 3 classes (cats, dogs, owls), grey, 8×8 pixels\n"
    assert loaded.name == "pets" and loaded.train[0].dtype == np.float32 and loaded.train[0].max() == 1


@pytest.mark.parametrize("patch, size", [(2, 8), (4, 8), (5, 30), (3, 30), (16, 32), (40, 40)])
def test_images_are_resized_where_patches_do_not_fit(pets, patch, size, capsys):
    loaded = load_folder(pets, patch)
    assert loaded.train[0].shape[1:] == (size, size, 1)
    resized = f"{size}×{size} pixels (cut to that shape and resized; they had 8×8)"
    assert (resized in capsys.readouterr().err) == (size != 8)


@pytest.mark.parametrize("names", [("Train", "TEST"), ("train", "Val", "test")])
def test_parts_may_be_written_in_large_letters(tmp_path, names):
    for name in names:
        write_images(tmp_path / "pets" / name)
    assert set(read_folder(tmp_path / "pets", 2)[0].counts) == set(map(str.lower, names))


def test_a_part_may_be_there_once_only(tmp_path):
    for name in ("Train", "train"):
        write_images(tmp_path / "pets" / name)
    with pytest.raises(DataError, match="pets holds a part twice: Train, train; allowed: each once"):
        read_folder(tmp_path / "pets", 2)


def test_files_of_other_kinds_are_counted_and_pipes_passed_by(pets, capsys):
    before = content_key(f"folder:{pets}")
    for name in ("a.heic", "b.heic", "notes", ".hidden.tga"):
        (pets / "cats" / name).write_text("x")
    os.mkfifo(pets / "cats" / "pipe.png")
    load_folder(pets, 2)
    assert capsys.readouterr().err.endswith("8×8 pixels; 3 of other kinds left out: .heic, no suffix\n")
    assert content_key(f"folder:{pets}") == before


PIXELS, LABELS = np.zeros((4, 8, 8, 1), np.float32), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    "x, y, said",
    [
        (PIXELS[..., 0], LABELS, r"pixels of shape \(4, 8, 8\); allowed: \(n, H, W, C\)"),
        (PIXELS.repeat(2, -1), LABELS, r"pixels of shape \(4, 8, 8, 2\); allowed: .*, with one colour or three"),
        (PIXELS[:0], LABELS[:0], r"pixels of shape \(0, 8, 8, 1\); allowed"),
        (PIXELS.astype(np.uint8), LABELS, r"pixels are uint8; allowed: floats from 0 to 1 \(bytes divided by 255\)"),
        (PIXELS + 255, LABELS, "pixels from 255 to 255; allowed: finite numbers from 0 to 1"),
        (PIXELS - 0.5, LABELS, "pixels from -0.5 to -0.5; allowed"),
        (PIXELS + np.nan, LABELS, "pixels from nan to nan; allowed"),
        (PIXELS, LABELS[:3], r"labels of shape \(3,\), int64; allowed: 4 whole numbers, one an image"),
        (PIXELS, LABELS / 2, r"labels of shape \(4,\), float64; allowed"),
        (PIXELS, LABELS + 1, "labels from 1 to 2; allowed: 0 to 1, one a name"),
        (PIXELS, LABELS - 1, "labels from -1 to 0; allowed"),
        (torch.from_numpy(PIXELS), LABELS, "pixels are a Tensor; allowed: an array of numpy"),
        (PIXELS, torch.from_numpy(LABELS), "labels are a Tensor; allowed: an array of numpy"),
    ],
)
def test_arrays_that_are_no_images_are_refused(x, y, said):
    good = PIXELS, LABELS
    for split, pairs in (("train", ((x, y), good)), ("test", (good, (x, y))), ("val", (good, good, (x, y)))):
        with pytest.raises(DataError, match=f"^{split} images of 'mine': {said}"):
            images.Images("mine", "", ("a", "b"), *pairs)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(test=(PIXELS[:, :4], LABELS)), r"^test images of 'mine' have the shape \(4, 8, 1\); allowed: .* \(8, 8"),
        (
            dict(val=(PIXELS[..., :4, :], LABELS)),
            r"^val images of 'mine' have the shape \(8, 4, 1\); allowed: .* \(8, 8",
        ),
        (dict(label_names=(0, 1)), "label_names of 'mine': 0; allowed: str"),
        (dict(licence=None), "licence of 'mine': None; allowed: str"),
        (dict(label_names=("a", "a")), "label_names of 'mine' hold 'a' twice; allowed: each once"),
    ],
)
def test_images_that_do_not_go_together_are_refused(changes, said):
    good = Images("mine", "", ("a", "b"), (PIXELS, LABELS), (PIXELS, LABELS))
    with pytest.raises(DataError, match=said):
        replace(good, **changes)


def test_classes_may_be_sorted_into_folders(tmp_path):
    for name in ("2023", "2024"):
        write_images(tmp_path / "pets" / name)
    (tmp_path / "pets" / "2024" / "cats").rename(tmp_path / "pets" / "2024" / "lions")
    assert read_folder(tmp_path / "pets")[0].classes == ("2023", "2024"), "nothing says that these are no classes"


def test_images_of_several_sizes_are_cut_in_the_middle_and_resized(tmp_path):
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 200  # the middle is grey, above and below it is black
    save(tall, tmp_path / "a" / "tall.jpg", quality=95)
    save(tall.swapaxes(0, 1), tmp_path / "a" / "deeper" / "wide.JPEG", quality=95)
    save(np.full((600, 400, 3), 200), tmp_path / "b" / "large.png")
    save(np.full((600, 400, 3), 200), tmp_path / "b" / "large.jpg")
    found, parts = read_folder(tmp_path)
    x, y = parts["all"]
    assert x.shape == (4, 32, 32, 1) and y.tolist() == [0, 0, 1, 1]
    assert (abs(x[:, 3:-3, 3:-3].astype(int) - 200) <= 3).all()
    assert "32×32 pixels (cut to that shape and resized; they had 30×90 to 600×400)" in str(found)


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
RGB = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def odd_files():
    """Files of unusual kinds, and the pixels (8, 8, 3) to be read from them."""
    grey = np.repeat(GREY[..., None], 3, -1)
    yield "16 bits.png", Image.fromarray(GREY.astype(np.uint16) * 257), {}, grey
    yield "one bit.png", Image.fromarray(GREY > 90), {}, 255 * np.repeat(GREY[..., None] > 90, 3, -1)
    yield "palette.gif", Image.fromarray(RGB).quantize(64), {}, RGB
    clear = np.dstack([RGB, np.where(GREY > 90, 255, 0).astype(np.uint8)])
    yield "clear.png", Image.fromarray(clear), {}, np.where(GREY[..., None] > 90, RGB, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # as a camera held upright writes it: to be turned clockwise
    yield "turned.png", Image.fromarray(RGB), {"exif": turned}, np.rot90(RGB, -1)
    yield "plain.webp", Image.fromarray(RGB), {"lossless": True}, RGB


@pytest.mark.parametrize("name, image, options, expected", [pytest.param(*f, id=f[0]) for f in odd_files()])
def test_unusual_kinds_of_files(tmp_path, name, image, options, expected):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / name, **options)
    save(RGB, tmp_path / "b" / "zebra.png")  # in colour: all are read so
    found, parts = read_folder(tmp_path)
    assert found.channels == 3 and found.broken == ()
    np.testing.assert_allclose(parts["all"][0][0], expected, atol=2)


def test_links_to_folders_are_followed_once(pets, tmp_path):
    more = write_images(tmp_path / "more", names=("elsewhere",))
    (pets / "cats" / "linked").symlink_to(more / "elsewhere")
    (pets / "cats" / "again").symlink_to(more / "elsewhere")
    (pets / "cats" / "round").symlink_to(pets / "cats")
    (pets / "cats" / "up").symlink_to(pets)  # which holds the dogs, too
    assert read_folder(pets, patch=2)[0].counts == {"all": [20, 10, 10]}


def test_a_folder_that_cannot_be_read_is_named(pets, monkeypatch):
    def walk(folder, onerror, **how):
        onerror(PermissionError(13, "Permission denied", f"{folder}/private"))
        yield from ()

    monkeypatch.setattr(images.os, "walk", walk)
    with pytest.raises(DataError, match="cats/private can't be read .Permission denied.: make it readable, or take it"):
        load_folder(pets, patch=2)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_values_of_no_known_range_are_listed_as_broken(pets, kind):
    Image.fromarray(GREY.astype(kind)).save(pets / "cats" / "wide.tiff")
    found, _ = read_folder(pets)
    assert len(found.broken) == 1 and "wide.tiff" in str(found.broken[0])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_image_that_is_to_be_turned_keeps_its_pixels(tmp_path, suffix):
    turned = Image.Exif()
    turned[0x0112] = 6
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.fromarray(GREY[:4]).save(tmp_path / folder / f"x.{suffix}", exif=turned)
    found, parts = read_folder(tmp_path)
    assert (found.height, found.width) == (8, 4)
    np.testing.assert_array_equal(parts["all"][0][0, ..., 0], np.rot90(GREY[:4], -1))


def test_a_patch_larger_than_images_stay_is_refused(pets):
    with pytest.raises(DataError, match="patch=65 for images of .*pets; allowed: 1 to 64"):
        read_folder(pets, patch=65)


def test_a_folder_is_walked_once_where_it_is_looked_at_once(pets, monkeypatch):
    walks, find = [], images._image_files
    monkeypatch.setattr(images, "_image_files", lambda path: walks.append(path) or find(path))
    name = f"folder:{pets}"
    with images.looked_at_once():
        before = {content_key(name) for _ in range(3)}
        with images.looked_at_once():
            before.add(content_key(name))
        assert len(before) == len(walks) == 1
    (pets / "cats" / "0.png").unlink()
    assert content_key(name) not in before and len(walks) == 2


def test_a_folder_may_have_the_longest_name_there_is(tmp_path, other_runs):
    folder = write_images(tmp_path / ("猫" * 80))
    assert data_for(DataConfig(f"folder:{folder}", patch=2, vocab_size=16)).n_tasks == 3


def test_one_image_in_colour_makes_all_so_and_grey_in_three_channels_is_grey(tmp_path):
    folder = write_images(tmp_path / "pets")
    save(np.repeat(GREY[..., None], 3, -1), folder / "cats" / "10.png")
    assert read_folder(folder)[0].channels == 1
    save(RGB, folder / "cats" / "11.png")
    found, parts = read_folder(folder)
    assert found.channels == 3 and parts["all"][0].shape == (32, 8, 8, 3)


# ------------------------------------------------------------------------------------- what is wrong with a folder


def test_broken_files_are_listed_and_left_out(pets, capsys):
    whole = read_folder(pets)[1]["all"][0]
    good = (pets / "cats" / "3.png").read_bytes()
    broken = {"cut.png": good[:60], "empty.png": b"", "text.jpg": b"hello", "x.gif": b"GIF89a" + bytes(9)}
    for name, content in broken.items():
        (pets / "cats" / name).write_bytes(content)
    (pets / "dogs" / "gone.png").symlink_to("nowhere.png")
    (pets / "dogs" / "notes.txt").write_text("not an image, and not meant to be one")
    (pets / "dogs" / "._0.png").write_bytes(b"a Macintosh's")
    found, parts = read_folder(pets)
    assert found.broken == ("cats/cut.png", "cats/empty.png", "cats/text.jpg", "cats/x.gif", "dogs/gone.png")
    assert found.counts == {"all": [10, 10, 10]} and np.array_equal(parts["all"][0], whole)
    load_folder(pets)
    said = capsys.readouterr().err
    assert said.endswith(
        f"; 5 left out that can't be read: {', '.join(found.broken)}; 1 of other kinds left out: .txt\n"
    )
    many = replace(found, broken=tuple(f"{i}.png" for i in range(17)), classes=tuple("abcde"))
    assert "8.png, 9.png and 7 more" in str(many) and "5 classes (a, b, c and 2 more)" in str(many)
    assert content_key(f"folder:{pets}")


def spoil(folder, how):
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "file":
        shutil.rmtree(folder)
        folder.write_bytes(b"")
    elif how == "no class":
        for name in ("cats", "dogs", "owls"):
            for file in (folder / name).iterdir():
                file.rename(folder / f"{name}{file.name}")
            (folder / name).rmdir()
    elif how == "one class":
        shutil.rmtree(folder / "cats")
        shutil.rmtree(folder / "owls")
    elif how == "empty class":
        shutil.rmtree(folder / "dogs")
        (folder / "dogs").mkdir()
    elif how == "only broken":
        for file in (folder / "dogs").iterdir():
            file.write_bytes(b"no")
    elif how == "two images":
        for i in range(2, 10):
            (folder / "dogs" / f"{i}.png").unlink()
    elif how == "unknown part":
        shutil.copytree(folder, folder / "train")
    elif how == "parts of other names":
        for name in ("testing", "training"):
            shutil.copytree(folder, folder.parent / "new" / name)
        shutil.rmtree(folder)
        (folder.parent / "new").rename(folder)
    elif how == "no letters":
        os.rename(os.fsencode(folder / "cats"), os.fsencode(folder) + b"/caf\xe9")


WRONG = {
    "missing": "pets does not exist; allowed: a folder with a folder of images for each class",
    "file": "pets is a file; allowed: a folder with a folder of images for each class",
    "no class": "class folders in .*pets: none; needed: two or more; allowed: a folder .*; is .* meant?",
    "one class": "class folders in .*pets: dogs; needed: two or more; allowed: a folder",
    "empty class": r"class 'dogs' is empty: .*pets/dogs holds no image \(allowed: .png, .jpg",
    "only broken": r"class 'dogs' is empty: .*pets/dogs holds no image \(can't be read: dogs/0.png, dogs/1.png, dogs/2",
    "two images": r"class 'dogs' of .*pets has 2 images to train with; needed: 3 \(train, val and test images",
    "parts of other names": "pets: testing, training, which sound like parts; allowed: a folder",
    "no letters": r"the name of a folder, 'caf\\udce9', is not UTF-8: rename it",
    "unknown part": "pets holds train/ and 'cats'; allowed beside train/: val/, test/",
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_a_folder_is_one_line_that_names_it(pets, how):
    spoil(pets, how)
    with pytest.raises(DataError, match=WRONG[how]) as error:
        make_tasks(f"folder:{pets}", patch=2)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- the splits


def in_rows(x):
    return {row.tobytes() for row in x}


def test_splits_are_drawn_from_every_class_and_always_the_same(pets):
    first, again = (split_images(load_folder(pets), 600) for _ in range(2))
    counts = {split: np.bincount(y).tolist() for split, (_, y) in first.items()}
    assert counts == {"train": [6] * 3, "val": [2] * 3, "test": [2] * 3}
    for split in first:
        assert all(np.array_equal(a, b) for a, b in zip(first[split], again[split], strict=True))
    rows = [in_rows(x) for x, _ in first.values()]
    assert len(set.union(*rows)) == sum(map(len, rows)) == 30
    assert len(set(first["train"][1][:6])) == 3  # the codebook's first images are of all classes


def test_three_images_a_class_are_enough(tmp_path):
    data = make_tasks(f"folder:{write_images(tmp_path / 'few', n=3)}", vocab_size=8, patch=2)
    assert {split: [len(t) for t in ts] for split, ts in data.tokens.items()} == {
        split: [1] * 3 for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test"), ("train",)])
def test_sub_folders_are_splits(tmp_path, parts):
    whole = write_images(tmp_path / "whole", n=20)
    for i, part in enumerate(parts):
        for name in ("cats", "dogs", "owls"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for file in sorted((whole / name).iterdir())[5 * i : 5 * i + 5]:
                shutil.copy(file, tmp_path / "pets" / part / name)
    found, arrays = read_folder(tmp_path / "pets")
    assert found.counts == {part: [5] * 3 for part in sorted(parts)}
    splits = split_images(load_folder(tmp_path / "pets"), 600)
    for part in parts[1:]:
        assert in_rows(splits[part][0]) == in_rows(arrays[part][0] / np.float32(255))
    drawn = [split for split in ("train", "val", "test") if split not in parts[1:]]
    rows = [in_rows(splits[split][0]) for split in drawn]
    assert set.union(*rows) == in_rows(arrays["train"][0] / np.float32(255)) and len(set.union(*rows)) == 15
    assert sum(map(len, rows)) == 15 and all(np.bincount(splits[split][1]).all() for split in drawn)


def test_a_class_of_one_sub_folder_only(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", names=("cats", "dogs", "wolves"))
    with pytest.raises(DataError, match="class 'owls' has to be in train/ and test/, or in neither"):
        load_folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for folder, name in (("vehicles", "train"), ("toys", "Train")):
        write_images(tmp_path / folder, names=("boat", "plane", name))
        assert sorted(load_folder(tmp_path / folder).label_names) == sorted(("boat", "plane", name))


# ------------------------------------------------------------------------------------------- never a stale run


def test_the_key_is_that_of_names_and_contents(pets, tmp_path):
    key = content_key(f"folder:{pets}")
    shutil.copytree(pets, tmp_path / "copy" / "pets", copy_function=shutil.copy)  # other times, inodes and place
    assert content_key(f"folder:{tmp_path / 'copy' / 'pets'}") == key == content_key(f"folder:{pets}")
    (pets / "notes.txt").write_text("no image")
    assert content_key(f"folder:{pets}") == key

    file = pets / "cats" / "0.png"
    before, stat = file.read_bytes(), file.stat()
    file.write_bytes(before[:-1] + b"\0")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as large and as old as it was
    keys = {key, content_key(f"folder:{pets}")}
    file.write_bytes(before)
    assert content_key(f"folder:{pets}") == key
    file.rename(pets / "dogs" / "zero.png")
    keys.add(content_key(f"folder:{pets}"))
    (pets / "dogs" / "zero.png").unlink()
    keys.add(content_key(f"folder:{pets}"))
    assert len(keys) == 4
    assert content_key("digits") == ""


def test_editing_how_folders_are_read_leaves_other_runs_as_they_are():
    def code(dataset):
        return "\n".join(code_behind([make_tasks], [dataset])[0])

    assert "def read_folder" in code("folder:pets") and "def load_torchvision" in code("CIFAR10")
    for dataset in ("digits", "fashion"):
        assert "def read_folder" not in code(dataset) and "def load_torchvision" not in code(dataset)
        assert str(images.BESIDE.parent) not in code(dataset)


def test_changed_images_are_new_data_and_a_new_run(pets):
    config = tiny(data=DataConfig(f"folder:{pets}", "classes", 16, 2, 2))
    before, run = experiment.data_for(config.data), experiment.folder_of(config)
    assert experiment.data_for(config.data) is before
    save(255 - GREY, pets / "owls" / "new.png")
    after = experiment.data_for(config.data)
    assert sum(map(len, after.tokens["train"])) == sum(map(len, before.tokens["train"])) + 1
    assert experiment.folder_of(config) != run


# ------------------------------------------------------------------------------------------------------- colour


def test_from_a_folder_in_colour_to_a_small_model_that_samples_in_colour(tmp_path):
    folder = write_images(tmp_path / "pets", n=40, colour=True)
    data = DataConfig(f"folder:{folder}", "classes", vocab_size=32, patch=2, val_per_class=8)
    source = tiny_source(data=data, steps=150)
    run = experiment.run(tiny_projectable(source, data=data, steps=150))
    model = load(export(run, 8, "dogs", tmp_path / "dogs8"))
    assert model.config["data_name"] == "pets/classes" and model.codebook.codes.shape == (32, 12)
    assert str(tmp_path) not in "".join(f.read_bytes().decode(errors="ignore") for f in (tmp_path / "dogs8").iterdir())
    with pytest.raises(ValueError, match=r"no images for a model of pets.*the folder 'pets' \(--images PATH\)"):
        evaluate(model)
    with pytest.raises(
        ModelError, match="others gives other images or tasks than .*: images were added, removed or changed"
    ):
        evaluate(model, images=write_images(tmp_path / "others", n=41, colour=True))
    n, nats, _ = evaluate(model, images=folder)
    assert "pets, tasks: classes" in facts(model.config)["data"] and "folder:" not in facts(model.config)["data"]
    told = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "dogs8"), "--images", str(folder)])
    assert told.exit_code == 0 and told.output.startswith(f"dogs of pets/classes, 8 test images: {nats:.4f} nats"), told
    assert n == 8 and nats == pytest.approx(model.config["losses"]["test"]) and nats < np.log(32)
    drawn = model.sample(20, seed=0)
    assert drawn.shape == (20, 8, 8, 3)
    red, green, blue = drawn.mean((0, 1, 2))
    assert green > 1.2 * blue > 1.2 * red  # the colour of the dogs
    sheet = np.asarray(Image.open(write_grid(drawn, tmp_path / "dogs.png", at_least=8)))
    assert sheet.shape == (4 * 9 - 1, 5 * 9 - 1, 3)
    assert np.array_equal(sheet[:8, 9:17], np.rint(drawn[1] * 255))


def test_a_grid_of_images_in_colour():
    images = np.zeros((2, 3, 8, 8, 3))
    images[1, 2] = TINTS[0]
    sheet = image_grid(images, ["a", "b"]).axes[0].images[0].get_array()
    assert sheet.shape == (17, 26, 3)
    assert np.allclose(sheet[9:, 18:], TINTS[0]) and (sheet[:8, 18:] == 0).all() and (sheet[8] == 1).all()


def test_a_folder_that_was_moved_has_its_runs(tmp_path, other_runs, monkeypatch):
    config = tiny(data=DataConfig(f"folder:{write_images(tmp_path / 'pets')}", patch=2, vocab_size=16), steps=2)
    losses = run(config).test_losses()["d8"]
    (tmp_path / "pets").rename(tmp_path / "animals")
    moved = config.with_(data=replace(config.data, dataset=f"folder:{tmp_path / 'animals'}"))
    monkeypatch.setattr(experiment, "_train", lambda *_: pytest.fail("trained again"))
    found = run(moved)
    assert found.folder == folder_of(moved) and torch.equal(found.test_losses()["d8"], losses)
    with torch.no_grad():
        again = found.model().losses(torch.arange(3), data_for(moved.data).first("test", 2))["d8"]
    assert again.isfinite().all()


def trained_on(folder, tmp_path, steps=2):
    """The config file of a run on these images, and what the command line says when it trains it."""
    config = tiny(data=DataConfig(f"folder:{folder}", patch=2, vocab_size=16), steps=steps)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    return config, CliRunner().invoke(cli, ["train", str(tmp_path / "config.json")], catch_exceptions=False)


def test_a_run_knows_where_its_images_were_moved(pets, tmp_path, other_runs):
    _, said = trained_on(pets, tmp_path)
    name = Path(said.stdout.strip()).name
    pets.rename(tmp_path / "animals")
    with pytest.raises(ConfigError, match=f"pets does not exist; .* with their new path finds {name} again"):
        check_current(find_run(name))
    moved, again = trained_on(tmp_path / "animals", tmp_path)
    assert again.stdout == said.stdout and check_current(find_run(name)).config == moved


def test_images_that_change_while_a_run_trains_are_said_to(pets, tmp_path, other_runs, monkeypatch):
    train = experiment._train

    def changing(*about):
        train(*about)
        (pets / "cats" / "0.png").unlink()

    monkeypatch.setattr(experiment, "_train", changing)
    config, said = trained_on(pets, tmp_path)
    folder = Path(said.stdout.strip())
    assert folder != folder_of(config) and (folder / "result.json").exists()
    assert f"images in folder:{pets} changed while this trained: run again" in said.stderr


def test_a_run_of_images_registered_in_python_is_exported_there(other_runs, monkeypatch):
    monkeypatch.setitem(LOADERS, "mine", load_digits)
    finished = run(tiny(data=DataConfig("mine", patch=2, vocab_size=16), steps=2))
    assert check_current(find_run(finished.folder))
    monkeypatch.delitem(LOADERS, "mine")
    with pytest.raises(ConfigError, match=r"images 'mine' were registered from Python: `projectable.export.export` "):
        check_current(find_run(finished.folder))


@pytest.mark.slow
@pytest.mark.notebook
def test_the_notebook_takes_a_folder(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "pets", n=40, colour=True)
    (folder / "owls" / "broken.png").write_bytes(b"no")
    (tmp_path / "notebooks").mkdir()
    nb = nbformat.read(NOTEBOOK, as_version=4)  # without ONNX, which its run in test_notebooks.py has
    nb.cells = [cell for cell in nb.cells if not cell.id.startswith("onnx")]
    for cell in nb.cells:
        cell.source = cell.source.replace(", onnx=True", "")
    nbformat.write(nb, notebook := tmp_path / "notebooks" / NOTEBOOK.name)
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))
    monkeypatch.setenv("PROJECTABLE_WORKERS", "1")  # starting others takes longer than these runs
    monkeypatch.setenv("PYTHONPATH", str(Path(reporting.__file__).parents[1]))
    own = tmp_path / "build" / "smoke" / "own_report"
    monkeypatch.setenv("PROJECTABLE_REPORTS", str(own))  # as `reproduce -p` does
    status = reporting.run_notebook(Path(notebook), "smoke", {"folder": str(folder), "d_s": 8})
    assert (status.status, status.error) == ("ok", "")
    results = own / "results"
    assert not (tmp_path / "reports").exists(), "own pictures stay out of what git keeps"
    assert (own / "15_your_own_data.html").exists() and (own / "15_your_own_data.ipynb").exists()
    found = json.loads((results / "15_your_own_data.json").read_text())
    assert (found["images"], found["broken"], found["size"]) == (120, 1, [8, 8, 3])
    losses = pd.read_csv(results / "own_losses.csv").set_index("class")
    assert list(losses.index) == ["cats", "dogs", "owls", "mean"]
    for arm in ("projected", "specialists", "universal_additive", "hypernetwork", "source"):
        assert losses[arm]["mean"] == pytest.approx(losses[arm][:3].mean(), abs=1e-4)
        assert losses[arm]["mean"] == pytest.approx(found[f"test_{arm}"], abs=1e-4) and losses[arm]["mean"] < np.log(32)
    ways = pd.read_csv(results / "own_ways.csv").set_index("arm")
    assert ways.loss["hypernetwork"] == pytest.approx(losses.hypernetwork["mean"], abs=1e-4)
    assert ways.compute["projected"] == 1 > ways.compute["hypernetwork"] > ways.compute["universal_additive"] > 0
    counts = pd.read_csv(results / "own_counts.csv")
    assert counts["left out"].tolist() == [0, 0, 1] and counts["images (all)"].tolist() == [40, 40, 40]
    model = load(own / "own_model")
    assert model.task == "cats" and model.config["losses"]["test"] == pytest.approx(losses.projected["cats"], abs=1e-4)
    shown = np.asarray(Image.open(own / "figures" / "own_samples.png").convert("RGB"))
    assert np.ptp(shown.astype(int), axis=-1).max() > 50  # in colour


# -------------------------------------------------------------------------------------------------- torchvision


def refuse(*args, **kwargs):
    raise URLError("no network today")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder for torchvision's files; no downloads."""
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("PROJECTABLE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def planes(name):
    """What a batch of that name holds: 20 images as planes of red, green, blue."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (20, 3072), np.uint8)


@pytest.fixture
def cifar(offline, monkeypatch):
    """A stand-in for CIFAR-10: 40 + 20 images in pickled batches, whose checksums torchvision is made to know."""
    from torchvision.datasets import CIFAR10

    folder = offline / CIFAR10.base_folder
    folder.mkdir(parents=True)
    lists = {"train_list": ["data_batch_1", "data_batch_2"], "test_list": ["test_batch"]}
    for which, names in lists.items():
        for name in names:
            batch = {"data": planes(name), "labels": [i % 10 for i in range(20)]}
            (folder / name).write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(CIFAR10, which, [[name, md5(folder / name)] for name in names])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder


def test_other_images_of_a_loader_of_ones_own_are_other_data(monkeypatch, other_runs):
    y = np.arange(40) % 2
    x = np.random.default_rng(0).random((40, 8, 8, 1), np.float32)

    def mine(pixels, labels, names=("cat", "dog")):
        return lambda: Images("mine", "", names, (pixels, labels), (pixels[:4], labels[:4]))

    folders, about = [], tiny(data=DataConfig("mine", vocab_size=16, patch=4, val_per_class=4))
    for given in ((x, y), (1 - x, y), (x, 1 - y), (x, y, ("cat", "cow")), (x.copy(), y)):
        monkeypatch.setitem(LOADERS, "mine", mine(*given))
        folders.append(experiment.folder_of(about))
    assert len(set(folders)) == 4 and folders[0] == folders[-1]
    ours = content_key("digits")
    monkeypatch.setitem(LOADERS, "digits", LOADERS["mine"])
    assert ours == "" and content_key("digits") == content_key("mine"), "one of ours that was put in place of"


@pytest.mark.parametrize(
    "loader, said",
    [
        (lambda: (PIXELS, LABELS), "the loader 'mine' gives a tuple; allowed: Images"),
        (
            images.Images("mine", "", ("a", "b"), *[(PIXELS, LABELS)] * 2),
            r"LOADERS\['mine'\] is a Images; allowed: a f",
        ),
        (
            lambda: images.Images("mine", "", ("a", "b"), PIXELS, PIXELS),
            r"train of 'mine' is a ndarray; allowed: \(pix",
        ),
    ],
)
def test_a_loader_that_gives_no_images_is_refused(monkeypatch, loader, said):
    monkeypatch.setitem(LOADERS, "mine", loader)
    for ask in (content_key, images.load_images):
        if ask is images.load_images or not said.startswith("the"):
            with pytest.raises(DataError, match=said):
                ask("mine")


def test_images_of_ones_own_may_take_the_place_of_ours(monkeypatch, other_runs):
    monkeypatch.setitem(LOADERS, "digits", lambda: Images("mine", "", ("cat", "dog"), *[(PIXELS, LABELS)] * 2))
    assert data_for(DataConfig("digits", vocab_size=1, val_per_class=1)).task_names == ("cat", "dog")


def test_a_loader_entered_in_the_file_is_asked_for_its_images():
    source = Path(images.__file__).read_text()
    entry = '    "digits": load_digits,\n'
    assert source.count(entry) == 1
    space = {"__name__": images.__name__, "__package__": images.__package__, "__file__": images.__file__}
    exec(source.replace(entry, entry + '    "mine": lambda: load_digits(),\n'), space)
    assert space["content_key"]("mine") and not space["content_key"]("digits")


def test_what_a_maker_of_ones_own_gives_is_part_of_the_key(monkeypatch, digits):
    file = Mock()  # which a maker reads
    about, scarce = (
        tiny(data=DataConfig("mine", f"kinds{few}", vocab_size=16, patch=4, val_per_class=4))
        for few in ("", "-few9-s1")
    )
    tokens = digits.tokens | {"val": [x.flip(0) for x in digits.tokens["val"]]}
    codebook = replace(digits.codebook, codes=1 - digits.codebook.codes)
    names, copy = digits.task_names[::-1], {split: [x.clone() for x in xs] for split, xs in digits.tokens.items()}
    folders = []
    for change in ({}, {"tokens": tokens}, {"codebook": codebook}, {"task_names": names}, {"tokens": copy}):
        file.return_value = replace(digits, **change)
        monkeypatch.setitem(tasks.MAKERS, "mine", lambda *about: file(*about))
        folders.append(experiment.folder_of(about))
        assert experiment.folder_of(about) == folders[-1] != experiment.folder_of(scarce)
    assert len(set(folders)) == 4 and folders[0] == folders[-1]
    assert file.mock_calls == 5 * [call("kinds", 16, 4, 4)], "once each"


def test_a_data_set_in_colour_by_name(cifar):
    found = load_images("CIFAR10")
    (x, y), (x_test, y_test) = found.train, found.test
    assert x.shape == (40, 32, 32, 3) and x_test.shape == (20, 32, 32, 3) and x.dtype == np.float32
    assert x[20, 1, 2, 1] == np.float32(planes("data_batch_2")[0, 1024 + 32 + 2] / 255)
    assert y.dtype == np.int64 and y_test.tolist() == [i % 10 for i in range(20)]
    data = experiment.data_for(DataConfig("CIFAR10", "classes", vocab_size=16))
    assert data.task_names[3] == "thing 3" and data.codebook.codes.shape == (16, 48)
    assert [len(t) for t in data.tokens["train"]] == [3] * 10  # of four, one is held back


def test_one_process_at_a_time_downloads_a_data_set(cifar, offline):
    with ThreadPoolExecutor(1) as pool:
        with locked(offline / ".lock"):  # another one is at it
            waiting = pool.submit(load_images, "CIFAR10")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert len(waiting.result(timeout=30).train[0]) == 40


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["PROJECTABLE_DATA"] + "/trapped",)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_pickle_that_is_not_torchvisions_is_never_opened(cifar, name, offline):
    (cifar / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="CIFAR10 could not be read .* delete a damaged file first"):
        load_images("CIFAR10")
    assert not (offline / "trapped").exists()


@pytest.mark.parametrize("name", images.TORCHVISION)
def test_a_failed_download_is_one_line_that_says_what_to_do(name, offline):
    with pytest.raises(DataError) as error:
        load_images(name)
    message = str(error.value)
    for part in (f"{name} could not be read (", "no network today", "Be online once", f"into {offline} (PROJECTABLE_D"):
        assert part in message
    assert images.TORCHVISION[name][0] in message and "\n" not in message


def idx(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def letters():
    """Pixels and labels, training and test, of 47 classes."""
    rng = np.random.default_rng(0)
    x, x_test = (rng.integers(0, 256, (n, 28, 28), np.uint8) for n in (94, 47))
    return x, np.arange(94) % 47, x_test, np.arange(47)


def test_mnist_is_read_from_its_checked_archives(offline, letters, monkeypatch):
    from torchvision.datasets import MNIST

    raw = offline / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = [a % 10 if a.ndim == 1 else a for a in letters]
    for (name, _), array in zip(MNIST.resources, arrays, strict=True):
        (raw / name).write_bytes(gzip.compress(idx(array)))
        (raw / name[:-3]).write_bytes(idx(np.zeros_like(array)))  # unpacked, and then damaged
    monkeypatch.setattr(MNIST, "resources", [(name, md5(raw / name)) for name, _ in MNIST.resources])
    found = load_images("MNIST")
    assert np.array_equal(found.train[0][..., 0], arrays[0] / np.float32(255)) and len(found.label_names) == 10
    assert np.array_equal(found.test[1], arrays[3])
    (raw / MNIST.resources[2][0]).write_bytes(gzip.compress(idx(arrays[2])[:-1] + b"\7"))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz is missing or damaged: delete .*MNIST"):
        load_images("MNIST")


def test_emnist_letters_stand_upright(offline, letters, monkeypatch):
    from torchvision.datasets import EMNIST

    raw = offline / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    parts = [(f"{split}-{what}") for split in ("train", "test") for what in ("images-idx3", "labels-idx1")]
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        for part, array in zip(parts, letters, strict=True):
            archive.writestr(f"gzip/emnist-balanced-{part}-ubyte.gz", gzip.compress(idx(array)))
            (raw / f"emnist-balanced-{part}-ubyte").write_bytes(idx(array))
    monkeypatch.setattr(EMNIST, "md5", md5(raw / "gzip.zip"))
    found = load_images("EMNIST")
    assert np.array_equal(found.train[0][5, :, :, 0], letters[0][5].T / np.float32(255))
    assert len(found.label_names) == 47 and found.label_names[11] == "B" and found.test[1].tolist() == list(range(47))


def test_house_numbers(offline, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    rng, known = np.random.default_rng(0), {}
    offline.mkdir()
    for split, n in (("train", 30), ("test", 20)):
        path = offline / f"{split}_32x32.mat"
        x, y = rng.integers(0, 256, (32, 32, 3, n), np.uint8), np.arange(n)[:, None] % 10 + 1  # 10 is the digit 0
        savemat(path, {"X": x, "y": y})
        known[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", known)
    found = load_images("SVHN")
    assert found.train[0].shape == (30, 32, 32, 3) and found.test[1].tolist() == [*range(1, 10), 0] * 2
    assert np.array_equal(found.test[0][4], x[..., 4] / np.float32(255)) and found.label_names[0] == "0"


def test_fashion_mnist_goes_by_torchvisions_name_too():
    assert images.LOADERS["FashionMNIST"] is images.LOADERS["fashion"]
