"""Letters as tasks: which are drawn on which side, with which fonts; classes held out; a few images of each task."""

import unicodedata

import numpy as np
import pytest
import torch

from projectable import tasks
from projectable.tasks import SPLITS, Images, few, glyphs, make_tasks
from projectable.tasks.images import DataError, load_digits

ARGUMENTS = dict(vocab_size=32, patch=4, val_per_class=1)


@pytest.fixture(scope="module")
def sides():
    """The letters to train on and those held out."""
    return glyphs.letters()


@pytest.fixture(scope="module")
def made():
    """Small sets of glyph tasks, by name."""
    return {name: make_tasks("glyphs", name, **ARGUMENTS) for name in ("train8", "train20", "heldout")}


# ------------------------------------------------------------------------------------------------ letters and sides


def test_hundreds_of_letters_of_many_scripts(sides):
    train, held_out = sides
    assert len(train) >= 256 and len(held_out) >= 150 and not set(train) & set(held_out)
    assert {glyphs.script(x) for x in train} == {"Latin", "Cyrillic"}
    scripts = [glyphs.script(x) for x in held_out]
    assert {"Greek", "Armenian", "Georgian", "Hebrew"} <= set(scripts) and not {"Latin", "Cyrillic"} & set(scripts)
    assert all(10 <= scripts.count(x) <= 40 for x in set(scripts))


def test_accented_copies_are_no_tasks(sides):
    assert not [x for side in sides for x in side if unicodedata.decomposition(x)]
    assert "é" not in glyphs.families_of() and "ά" not in glyphs.families_of() and "ω" in glyphs.families_of()


def test_shapes_are_compared_whatever_their_size_and_script():
    apart = glyphs.differences(["A", "Α", "А", "C", "c", "W", "ש"])
    assert (apart[:3, :3] < 0.02).all() and apart[3, 4] < 0.2  # Latin, Greek, Cyrillic; capital and small
    assert (apart[[0, 0, 3, 5], [3, 5, 5, 6]] > 0.3).all()
    np.testing.assert_allclose(apart, apart.T)


def test_the_share_of_differing_ink_by_hand(monkeypatch):
    ink = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 1]], [[1, 1, 0, 0]]], np.float32)  # 3 letters, one face
    monkeypatch.setattr(glyphs, "shapes", lambda letters, family: ink[: len(letters)])
    monkeypatch.setattr(glyphs, "families_of", lambda: dict(A=("Sans",), B=("Sans",), C=("Sans",)))
    assert glyphs.differences(["A", "B", "C"]).round(6).tolist() == [
        [0, 0.666667, 0],
        [0.666667, 0, 0.666667],
        [0, 0.666667, 0],
    ]


def test_nothing_held_out_looks_like_a_letter_to_train_on(sides):
    train, held_out = sides
    assert not set("ΑΒΕΖΗΙΚΜΝΟΡΤΥοΠΦГՕՏօվ") & set(held_out)  # Greek and Armenian letters that Latin or Cyrillic has
    assert set("ΞΨξב") <= set(held_out)
    some = list(train[::3])
    apart = glyphs.differences(some + list(held_out[::3]))[: len(some), len(some) :]
    assert apart.min() >= glyphs.SAME_SHAPE


# ---------------------------------------------------------------------------------------------------------- images


def test_no_face_is_in_two_splits(monkeypatch):
    drawn, master = {}, glyphs._master
    for split in SPLITS:
        seen = drawn.setdefault(split, set())
        monkeypatch.setattr(
            glyphs, "_master", lambda x, face, stroke=0, seen=seen: seen.add(face) or master(x, face, stroke)
        )
        for letter in "Qж":
            glyphs.draw(letter, split, 12)
    assert [len(drawn[split]) for split in SPLITS] == [6, 3, 3]
    assert len(set.union(*drawn.values())) == 12


def test_an_image_depends_on_letter_split_and_number_only():
    first = glyphs.draw("Ж", "train", 12)
    assert first.shape == (12, glyphs.SIZE, glyphs.SIZE, 1) and first.dtype == np.float32
    assert first.min() == 0 and 0.9 < first.max() <= 1
    assert np.array_equal(glyphs.draw("Ж", "train", 5), first[:5])
    assert len(np.unique(first, axis=0)) == 12
    for other in (glyphs.draw("Ж", "val", 12), glyphs.draw("Д", "train", 12)):
        assert not np.array_equal(other, first)


def test_letters_are_whole_and_legible(sides):
    """Of 40 letters the nearest mean training image names most test images, whose faces it has not seen."""
    some = sides[0][:20] + sides[1][::10][:20]
    means = np.stack([glyphs.draw(x, "train", 30).mean(0).ravel() for x in some])
    test = np.stack([glyphs.draw(x, "test", 9).reshape(9, -1) for x in some])
    assert (test.sum(-1) > 5).all()
    named = ((test[:, :, None] - means) ** 2).sum(-1).argmin(-1)
    assert (named == np.arange(len(some))[:, None]).mean() > 0.7
    edge = np.concatenate([test.reshape(-1, 20, 20)[:, [0, -1]], test.reshape(-1, 20, 20)[:, :, [0, -1]].mT], 1)
    assert edge.sum() < 0.02 * test.sum()


# ----------------------------------------------------------------------------------------------------------- tasks


def test_glyphs_as_task_data(made):
    data = made["train8"]
    assert data.name == "glyphs/train8" and data.n_tasks == 8 and len(data.families) == 8
    assert all(unicodedata.lookup(name) for name in data.task_names)
    assert [len(data.tokens[s][0]) for s in SPLITS] == [6, 1, 3] and data.codebook.length == 25
    expected = data.codebook.encode(glyphs.draw(unicodedata.lookup(data.task_names[3]), "val", 1))
    assert np.array_equal(data.tokens["val"][3].numpy(), expected)


def test_sizes_nest(made):
    small, large = made["train8"], made["train20"]
    assert large.task_names[:8] == small.task_names
    assert all(torch.equal(a, b) for a, b in zip(small.tokens["test"], large.tokens["test"][:8], strict=True))


def test_the_codebook_sees_training_letters_and_training_images_only(made, sides, monkeypatch):
    held_out, drawn, draw = made["heldout"], set(), glyphs.draw
    assert set(held_out.families) == {glyphs.script(x) for x in sides[1]} and held_out.n_tasks == len(sides[1])
    assert np.array_equal(held_out.codebook.codes, made["train8"].codebook.codes)
    monkeypatch.setattr(glyphs, "draw", lambda x, split, *rest: drawn.add((x, split)) or draw(x, split, *rest))
    glyphs._codebook.__wrapped__(4, 16)
    assert drawn == {(x, "train") for x in sides[0]}


@pytest.mark.parametrize("wrong", ["classes", "train0", "train9999", "train-1", "unseen3"])
def test_unknown_glyph_tasks(wrong):
    with pytest.raises(
        ValueError, match=f"unknown tasks '{wrong}'; allowed: train, trainN with N from 1 to 3.., heldout"
    ):
        make_tasks("glyphs", wrong, **ARGUMENTS)


def test_missing_fonts_are_named(monkeypatch, tmp_path):
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="DejaVuSans.ttf is not there: install matplotlib from PyPI"):
        glyphs.families_of.__wrapped__()


# ----------------------------------------------------------------------------------------- classes held out, few images


def test_classes_on_two_sides():
    arguments = dict(vocab_size=32, patch=2, val_per_class=20)
    seen, unseen = (make_tasks("digits", side, **arguments) for side in ("seen7", "unseen3"))
    assert unseen.task_names == tasks.HELD_OUT_CLASSES["digits"] == ("2", "5", "8")
    assert seen.task_names == tuple("0134679")
    assert np.array_equal(seen.codebook.codes, unseen.codebook.codes)
    x, y = load_digits().test
    assert np.array_equal(unseen.tokens["test"][1].numpy(), seen.codebook.encode(x[y == 5]))
    assert np.array_equal(seen.tokens["test"][2].numpy(), seen.codebook.encode(x[y == 3]))


def test_held_out_classes_do_not_shape_the_codebook(monkeypatch):
    arguments = dict(vocab_size=32, patch=2, val_per_class=20)
    digits = load_digits()
    x, y = digits.train[0].copy(), digits.train[1]
    x[np.isin(y, (2, 5, 8))] = 1
    changed = Images("digits", "", digits.label_names, (x, y), digits.test)
    before = make_tasks("digits", "seen7", **arguments)
    monkeypatch.setattr(tasks, "load_images", lambda *_: changed)
    assert np.array_equal(before.codebook.codes, make_tasks("digits", "unseen3", **arguments).codebook.codes)
    assert not np.array_equal(before.codebook.codes, make_tasks("digits", "classes", **arguments).codebook.codes)


def test_fashion_holds_out_sandal_shirt_and_bag(monkeypatch, fashion):
    monkeypatch.setattr(tasks, "load_images", lambda *_: fashion)
    data = make_tasks("fashion", "unseen3", vocab_size=16, val_per_class=600)
    assert data.task_names == ("sandal", "shirt", "bag")
    assert [len(x) for x in data.tokens["train"]] == [5400] * 3


def test_few_images_of_each_task(digits):
    five, twenty = few(digits, 5), few(digits, 20)
    assert [[len(x.tokens[s][4]) for s in SPLITS[:2]] for x in (five, twenty)] == [[4, 1], [16, 4]]
    rows = [{tuple(row) for row in x.tokens["train"][4].tolist()} for x in (five, twenty, digits)]
    assert rows[0] <= rows[1] <= rows[2]
    assert all(torch.equal(a, b) for a, b in zip(five.tokens["test"], digits.tokens["test"], strict=True))
    again, other = few(digits, 5), few(digits, 5, seed=1)
    assert torch.equal(five.tokens["train"][0], again.tokens["train"][0])
    assert not torch.equal(five.tokens["train"][0], other.tokens["train"][0])


def test_few_images_by_name(digits):
    named = make_tasks("digits", "classes-few5-s1", vocab_size=32, patch=2, val_per_class=20)
    assert named.name == "digits/classes-few5-s1"
    for split in SPLITS:
        pairs = zip(named.tokens[split], few(digits, 5, seed=1).tokens[split], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("n", "words"), [(1, "0 train images of each task; digits/classes allows 1 to "), (500, "400 train")]
)
def test_too_few_or_too_many(digits, n, words):
    with pytest.raises(ValueError, match=f"few={n} means {words}"):
        few(digits, n)
