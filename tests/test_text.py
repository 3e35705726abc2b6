"""Kinds of writing as tasks: the alphabet, files on one side only, no text twice, errors that name what is missing."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from projectable import tasks
from projectable.config import DataConfig, get_profile
from projectable.evaluation import bits_per_pixel
from projectable.experiment import _data_for, data_for
from projectable.storage import code_behind
from projectable.tasks import SPLITS, Codebook, TaskData, few, make_tasks, text
from projectable.tasks.images import DataError
from projectable.tasks.text import LENGTH, UNKNOWN, Alphabet, Source, sequences

COUNTS = {"train": 100, "val": 10, "test": 20}


@pytest.fixture(scope="module")
def reference():
    """Sequences of Python's language reference."""
    return sequences("language reference", {"train": 1000, "val": 100, "test": 200})


@pytest.fixture(scope="module")
def made():
    """Two kinds of writing as task data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "KINDS", {kind: text.KINDS[kind] for kind in ("language reference", "type stubs")})
        return make_tasks("text", "kinds", vocab_size=60, val_per_class=10)


def test_text_of_ones_own_comes_back_from_the_disk_as_text(made, other_runs, monkeypatch):
    monkeypatch.setitem(tasks.MAKERS, "mine", lambda *about: made)
    data = data_for(DataConfig("mine", "kinds", vocab_size=60, val_per_class=10))
    tokens = made.tokens["test"][0][:2].numpy()
    assert isinstance(data.codebook, Alphabet) and data.codebook.decode(tokens) == made.codebook.decode(tokens)


@pytest.mark.parametrize(
    "changes, words",
    [
        (lambda made: {}, "has 60 codes; allowed: vocab_size=50 of them"),
        (
            lambda made: dict(codebook=Inverted.from_codes(made.codebook.codes, made.codebook.width)),
            "that is Inverted; allowed: Codebook, Alphabet, Captioned",
        ),
        (
            lambda made: dict(tokens=made.tokens | dict(train=[made.tokens["train"][0], made.tokens["train"][1][:0]])),
            "task 'type stubs' of .* has no training images",
        ),
    ],
)
def test_what_a_maker_of_ones_own_gives_is_looked_at(made, other_runs, monkeypatch, changes, words):
    monkeypatch.setitem(tasks.MAKERS, "mine", lambda *about: replace(made, **changes(made)))
    with pytest.raises(ValueError, match=words):
        data_for(DataConfig("mine", "kinds", vocab_size=60 if changes(made) else 50, val_per_class=10))


class Inverted(Alphabet):
    """A codebook of one's own."""


# ------------------------------------------------------------------------------------------------------- characters


def test_the_alphabet_is_the_most_frequent_characters():
    alphabet = Alphabet.fit(["aab", "b\nc", "b" + UNKNOWN * 9], 4, length=3)
    assert alphabet.characters == UNKNOWN + "\nab"  # \n and c come once each: the first in code order stays
    assert alphabet.encode(["ab\n", "cab"]).tolist() == [[2, 3, 1], [0, 2, 3]]
    assert alphabet.decode(np.array([[2, 3, 1], [0, 2, 3]])) == ["ab\n", UNKNOWN + "ab"]


def test_every_token_of_a_vocabulary_that_is_too_large_is_a_character():
    alphabet = Alphabet.fit(["ab"], 5, length=3)
    assert alphabet.decode(np.array([[4, 1, 3]])) == [UNKNOWN + "a" + UNKNOWN]
    assert alphabet.encode(["?ba", UNKNOWN * 3]).tolist() == [[0, 2, 1], [0, 0, 0]]


def test_an_alphabet_is_stored_as_a_codebook_is():
    alphabet = Alphabet.fit(["a𝄞→b"], 9, length=5)
    assert alphabet.codes.shape == (9, 1) and alphabet.codes.dtype == np.float32
    assert Alphabet.from_codes(alphabet.codes, alphabet.width) == alphabet
    assert (alphabet.height // alphabet.patch) * (alphabet.width // alphabet.patch) == alphabet.length == 5
    assert bits_per_pixel(math.log(2), alphabet.length, alphabet.height * alphabet.width) == 1  # bit a character


def test_a_text_of_another_length_and_no_room_for_characters():
    with pytest.raises(ValueError, match="a text of 3 characters; allowed: 64"):
        Alphabet.fit(["abc"], 9).encode(["abc"])
    with pytest.raises(ValueError, match="vocab_size=1 leaves no character; allowed: 2 or more"):
        Alphabet.fit(["abc"], 1)


# ------------------------------------------------------------------------------------------------ files and sequences


def files_of(folder, bodies, monkeypatch):
    """A kind of writing that consists of these files."""
    for i, body in enumerate(bodies):
        (folder / f"{i:03d}.txt").write_text(body)
    monkeypatch.setattr(text, "KINDS", {"notes": Source("prose", "", ())})
    monkeypatch.setattr(text, "_files", lambda kind: sorted(folder.glob("*.txt")))


def lines(i: int, n: int = 40) -> str:
    """Text that tells its file: no 64 characters without its number."""
    return "\n".join(f"file {i:03d} line {j} is one of its kind" for j in range(n))


def test_no_file_is_in_two_splits(tmp_path, monkeypatch):
    files_of(tmp_path, [lines(i) for i in range(40)], monkeypatch)
    found = sequences("notes", COUNTS)
    sides = [
        {piece[piece.index("file ") + 5 :][:3] for piece in found[split] if "file " in piece[:-7]} for split in SPLITS
    ]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert {split: len(found[split]) for split in SPLITS} == COUNTS
    assert all(len(piece) == LENGTH for split in SPLITS for piece in found[split])


def test_a_long_file_does_not_fill_a_split(tmp_path, monkeypatch):
    files_of(tmp_path, [lines(i, 2000) for i in range(9)], monkeypatch)
    found = sequences("notes", {"train": 2000, "val": 100, "test": 200})
    per_file = [sum(f"file {i:03d}" in piece for piece in found["train"]) for i in range(9)]
    assert 100 < max(per_file) <= text.PER_FILE["train"]


def test_a_paragraph_in_every_file_is_taken_once(tmp_path, monkeypatch):
    header = "# Licensed under the terms of whoever wrote this, without warranty of any kind whatsoever."
    files_of(tmp_path, [f"{header}\n\n{lines(i)}" for i in range(40)], monkeypatch)
    found = sequences("notes", COUNTS)
    assert sum(piece.count("of any kind whatsoever") for split in SPLITS for piece in found[split]) <= 1


def test_what_is_copied_into_training_text_is_no_test_text(tmp_path, monkeypatch):
    copied = "\n".join(f"copied line {j}, to be found in two files of the kind" for j in range(30))
    files_of(tmp_path, [f"{lines(i)}\n{'x' * i}{copied}" for i in range(40)], monkeypatch)  # never at the same place
    found = sequences("notes", {"train": 900, "val": 10, "test": 20})
    assert any(piece in copied for piece in found["train"])
    for split in ("val", "test"):
        assert found[split] and not any(piece in copied[:-LENGTH] for piece in found[split])


def test_real_text_is_in_one_split_and_once(reference):
    pieces = [piece for split in SPLITS for piece in reference[split]]
    assert len(set(pieces)) == len(pieces) == 1300
    training = "".join(reference["train"])
    assert not any(piece in training for split in ("val", "test") for piece in reference[split])


def test_sequences_are_mixed_and_always_the_same(reference):
    again = sequences("language reference", {"train": 1000, "val": 100, "test": 200})
    assert again == reference
    topics = list(text.documents("language reference"))
    places = [next(i for i, topic in enumerate(topics) if piece in topic) for piece in reference["train"][:50]]
    assert places != sorted(places) and len(set(places)) > 5, "neither in the order of the texts, nor all of a few"
    fewer = sequences("language reference", {"train": 1000, "val": 50, "test": 200})
    assert len(set(fewer["test"]) & set(reference["test"])) > 150  # test files do not depend on the others' number


def test_docstrings_alone(tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text('"""Of the module."""\nx = "no"\ndef f():\n    """Of f.\n\n    More.\n    """\n    return "no"\n')
    bad.write_text("print 'Python 2'\n")
    assert text._docstrings(good) == "Of the module.\n\nOf f.\n\nMore." and text._docstrings(bad) == ""


# ----------------------------------------------------------------------------------------------------------- tasks


def test_ten_kinds_of_code_and_prose():
    assert len(text.KINDS) == 10 and {source.family for source in text.KINDS.values()} == {"code", "prose"}
    for kind in text.KINDS:
        assert any(islice(text.documents(kind), 30))
    assert all(name in text.versions() for name in ("Python 3.", "torch 2.", "scikit-learn 1."))


def test_text_as_task_data(made):
    assert made.name == "text/kinds" and made.task_names == ("language reference", "type stubs")
    assert made.families == ("prose", "code") and made.codebook.length == LENGTH and "numpy 2." in made.licence
    assert [x.shape for x in made.tokens["train"]] == [(COUNTS["train"], LENGTH)] * 2
    assert max(x.max() for s in SPLITS for x in made.tokens[s]) == 59
    stubs = "".join(made.codebook.decode(made.tokens["train"][1]))
    assert "def " in stubs and "Any" in stubs and stubs.count(UNKNOWN) < 0.01 * len(stubs)
    assert [len(x) for x in few(made, 10).tokens["val"]] == [2, 2]


def test_the_alphabet_sees_training_text_only(monkeypatch):
    pieces = {"train": ["a" * LENGTH] * 10, "val": ["v" * LENGTH], "test": ["z" * LENGTH] * 2}
    monkeypatch.setattr(text, "sequences", lambda *about: pieces)
    data = text.make_text("kinds", 128, 2)
    assert data.codebook.characters == UNKNOWN + "a" + UNKNOWN * 126  # as many as the model has
    assert data.tokens["test"][0].sum() == 0 and (data.tokens["train"][0] == 1).all()


def test_a_missing_package_or_text_is_named(monkeypatch):
    monkeypatch.setattr(text, "KINDS", {"songs": Source("prose", "no-such-package", ("*.txt",))})
    with pytest.raises(
        DataError, match="'songs' is text of the package no-such-package, .* pip install no-such-package"
    ):
        make_tasks("text", "kinds")
    monkeypatch.setattr(text, "KINDS", {"zen": Source("prose", "", ("this.py",))})
    with pytest.raises(
        DataError, match="'zen' has 0 train sequences, 4000 are wanted: install Python with all its source"
    ):
        make_tasks("text", "kinds")


def test_where_texts_come_from_is_part_of_their_key():
    code, *_ = code_behind([make_tasks], ["text"])
    assert any("pydoc_data/topics.py" in piece for piece in code)


def test_unknown_text_tasks():
    with pytest.raises(ValueError, match="unknown tasks 'classes'; allowed: kinds"):
        make_tasks("text", "classes")


# ------------------------------------------------------------------------------------------------ captions and images

LETTERS, CAPTION = text.LETTERS, text.CAPTION


@pytest.fixture(scope="module")
def captioned():
    """Digits with a caption before each: 32 codes and the letters."""
    return make_tasks("captioned_digits", vocab_size=32 + len(LETTERS), patch=2, val_per_class=20)


def test_captions_by_hand():
    """Images of 1 × 2 pixels, a token each."""
    book = Codebook(np.array([[0], [0.05], [0.4], [0.8]], np.float32), patch=1, height=1, width=2)
    images = torch.tensor([[0, 2], [2, 2], [3, 3]])  # half of the pixels at 0.4; all at 0.4; all at 0.8
    tokens = {split: [images, images[:1]] for split in SPLITS}
    data = text.caption(TaskData("things", ("thing", "Ünö_2"), tokens, book))
    both, rows = data.codebook, data.tokens["train"]
    assert both.middle.tolist() == [pytest.approx([1.0, 0.4]), pytest.approx([0.5, 0.4])]
    assert both.captions(rows[0]) == ["small dark thing", "small dark thing", "small bright thing"]
    assert both.captions(rows[1]) == ["small dark -n--2"]  # what is no letter is a dash
    assert both.length == CAPTION + 2 and rows[0].shape == (3, CAPTION + 2)
    assert torch.equal(rows[0][:, CAPTION:], images)
    assert rows[0][0, :5].tolist() == [4 + LETTERS.index(c) for c in "small"]  # letters come behind the four codes
    assert both.decode(rows[0]).reshape(3, 2).tolist() == [pytest.approx(x) for x in ([0, 0.4], [0.4, 0.4], [0.8, 0.8])]


def test_captions_say_what_is_true(captioned):
    book = captioned.codebook
    assert book.length == CAPTION + 16 and captioned.n_tasks == 10
    assert book.n_codes == 32 and len(book.codes) == 32 + len(LETTERS)
    for split in SPLITS:
        rows = [x.numpy() for x in captioned.tokens[split]]
        own, others = book.agreement(rows).T
        assert (own == 1).all() and (others < 0.9).all()
        words = {caption for caption in book.captions(rows[3])}
        assert words == {f"{size} {shade} 3" for size in ("small", "large") for shade in ("dark", "bright")}
    halves = [caption.startswith("large") for x in captioned.tokens["train"] for caption in book.captions(x.numpy())]
    assert 0.4 < np.mean(halves) <= 0.5  # above the median


def test_agreement_counts_words_that_are_wrong(captioned):
    rows = captioned.tokens["test"][3][:1].numpy().copy()
    size, shade, name = captioned.codebook.captions(rows)[0].split()
    other = {"small": "large", "large": "small", "dark": "bright", "bright": "dark"}
    for words, share in (
        (f"{other[size]} {shade} {name}", 0.5),
        (f"{other[size]} {other[shade]}", 0),
        (f"{shade} {size}", 0),
        (size, 0.5),
        ("", 0),
    ):
        rows[:, :CAPTION] = captioned.codebook.write([words])
        found = replace(captioned.codebook, middle=captioned.codebook.middle[3:4]).agreement([rows])
        assert found.tolist() == [[share, 0]], words  # one image has no others


def test_words_that_have_nothing_to_do_with_their_image_agree_by_chance(captioned):
    """Captions that mostly say large and bright, whatever they stand before: more than half of the words are true."""
    rows, book = captioned.tokens["train"][1].numpy().copy(), captioned.codebook
    large = [row for row, words in zip(rows, book.captions(rows), strict=True) if words.startswith("large")]
    rows = np.stack(large * 4 + list(rows))  # drawings that mostly are large, too
    rng = np.random.default_rng(0)
    words = [f"{size} {shade}" for size, shade in zip(*rng.choice([0, 1, 1, 1], (2, len(rows))), strict=True)]
    words = [
        w.replace("0 ", "small ").replace("1 ", "large ").replace(" 0", " dark").replace(" 1", " bright") for w in words
    ]
    rows[:, :CAPTION] = book.write(words)
    ((own, others),) = replace(book, middle=book.middle[1:2]).agreement([rows])
    assert others > 0.53 and abs(own - others) < 0.03


def test_the_images_below_captions_are_part_of_their_key():
    for images, loader in (("fashion", "load_fashion_mnist"), ("digits", "load_digits")):
        code, *_ = code_behind([make_tasks], [f"captioned_{images}"])
        assert any(f"def {loader}(" in piece for piece in code) and any("def caption(" in piece for piece in code)


def test_a_vocabulary_without_room_for_images():
    with pytest.raises(ValueError, match=r"vocab_size=38 with captions; allowed: 39 or more"):
        make_tasks("captioned_digits", vocab_size=38, patch=2)


def test_the_captioned_profile_has_the_same_images():
    for name in ("smoke", "laptop"):
        plain, both = get_profile(name).data, get_profile(name).captioned.data
        assert both.dataset == f"captioned_{plain.dataset}" and both.vocab_size == plain.vocab_size + len(LETTERS)
        assert replace(both, dataset=plain.dataset, vocab_size=plain.vocab_size) == plain


def test_letters_among_an_images_tokens_and_codes_among_letters_are_no_errors(captioned):
    book, rows = captioned.codebook, captioned.tokens["test"][0][:2].numpy().copy()
    rows[0, CAPTION:], rows[1, :CAPTION] = book.n_codes + 3, 0
    assert (book.decode(rows)[0] == 0).all()
    assert book.captions(rows)[1] == UNKNOWN * CAPTION


def test_captioned_images_are_the_same_images_and_are_kept_with_the_runs(captioned, digits, session_runs):
    config = DataConfig("captioned_digits", vocab_size=32 + len(LETTERS), patch=2, val_per_class=20)
    for data in (captioned, data_for(config), data_for(config)):
        assert np.array_equal(data.codebook.middle, captioned.codebook.middle)
        for split in SPLITS:
            for ours, plain in zip(data.tokens[split], digits.tokens[split], strict=True):
                assert torch.equal(ours[:, CAPTION:], plain)
    _data_for.cache_clear()  # as another process reads it
    again = data_for(config)
    assert np.array_equal(again.codebook.middle, captioned.codebook.middle)
    assert again.codebook.captions(again.tokens["val"][7]) == captioned.codebook.captions(captioned.tokens["val"][7])
