"""Files are whole or refused: damage is never read as data, an interrupted write leaves the old content."""

import os
import subprocess
import sys
import threading
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from projectable import storage
from projectable.storage import (
    DamagedFile,
    WriteError,
    draft_of,
    load_tensors,
    locked,
    read_json,
    root,
    save_tensors,
    write_atomically,
    write_json,
)

TENSORS = {
    "weights": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "steps": torch.arange(4),
    "state": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}
ABOUT = {"step": 7, "words": "größer", "losses": [1.5, None]}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run" / "model.safetensors"
    save_tensors(path, TENSORS, ABOUT)
    return path


def same(found, about) -> bool:
    return (
        about == ABOUT
        and found.keys() == TENSORS.keys()
        and all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in TENSORS.items())
    )


def test_what_is_saved_is_loaded(saved):
    assert same(*load_tensors(saved))


def test_views_and_strides_are_saved_as_they_look(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "x", {"turned": x.T, "row": x[1], "grad": x.clone().requires_grad_()}, {})
    found, _ = load_tensors(tmp_path / "x")
    assert torch.equal(found["turned"], x.T) and torch.equal(found["row"], x[1]) and torch.equal(found["grad"], x)


def test_tensors_that_share_memory_are_saved(tmp_path):
    x = torch.arange(3.0)
    save_tensors(tmp_path / "x", {"a": x, "b": x, "part": x[1:]}, {})
    found, _ = load_tensors(tmp_path / "x")
    assert torch.equal(found["a"], x) and torch.equal(found["b"], x) and torch.equal(found["part"], x[1:])


def damaged(path: Path, content: bytes) -> bool:
    """Whether that content is refused; where it is not, it must mean what was saved."""
    path.write_bytes(content)
    try:
        loaded = load_tensors(path)
    except DamagedFile as error:
        assert str(path) in str(error) and "delete it and run again" in str(error)
        return True
    assert same(*loaded), "a damaged file was read as other data"
    return False


def test_a_changed_byte_is_never_read_as_data(saved):
    content, rng = saved.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *rng.integers(8, header, 24), *rng.integers(header, len(content), 24)]
    refused = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        refused += damaged(saved, bytes(changed))
    assert refused >= len(places) - 3  # a changed blank in the header may mean the same


def test_a_cut_or_lengthened_file_is_refused(saved):
    content = saved.read_bytes()
    cuts = [0, 1, 7, 8, 9, *np.linspace(10, len(content) - 1, 20, dtype=int)]
    assert all(damaged(saved, content[:cut]) for cut in cuts)
    assert damaged(saved, content + b"\0")
    assert damaged(saved, content[:-4] + bytes(4)) and damaged(saved, bytes(len(content)))


def test_a_file_of_somebody_else_is_refused(saved):
    from safetensors.torch import save_file

    save_file({"weights": torch.ones(2)}, saved)
    with pytest.raises(DamagedFile, match=r"model\.safetensors is damaged"):
        load_tensors(saved)


def test_where_the_disk_is_full_the_folder_is_named_and_the_old_file_kept(tmp_path):
    write_atomically(tmp_path / "a.txt", "old")
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
        with pytest.raises(WriteError, match=f"{tmp_path} is full: make room"), draft_of(tmp_path / "a.txt"):
            raise error
    for error in (OSError(27, "File too large"), SafetensorError("I/O error: File too large")):
        with pytest.raises(WriteError, match="a.txt can't be written .*File too large"), draft_of(tmp_path / "a.txt"):
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def interrupted(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_reader_sees_the_old_content_or_the_new(tmp_path):
    """Two long texts are written in turn, over and over; every read finds one of them, whole."""
    path, texts, stop = tmp_path / "deep" / "file.json", {"a" * 300_000, "b" * 300_000}, threading.Event()
    write_atomically(path, min(texts))

    def write():
        while not stop.is_set():
            for text in texts:
                write_atomically(path, text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set()
        for count in range(2000):
            seen.add(path.read_text())
            if seen == texts and count > 100:
                break
    finally:
        stop.set()
        writer.join()
    assert seen == texts


RESULT = {"val": {"d8": 1.5, "größe": 2.25e-3}, "step": 40, "rows": [None, True, [1, 2]]}


def test_a_changed_byte_of_json_is_never_read_as_another_number(tmp_path):
    path, rng = tmp_path / "result.json", np.random.default_rng(0)
    write_json(path, RESULT)
    assert read_json(path) == RESULT
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert read_json(path) == RESULT, bytes(changed)  # a blank may turn into another blank
        except DamagedFile as error:
            assert str(path) in str(error) and "delete it and run again" in str(error)
            refused += 1
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"1", b"{}", b'{"val": 1.5}', b"[" * 100_000, b"\xff"])
def test_json_of_somebody_else_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"result\.json is damaged"):
        read_json(tmp_path / "result.json")


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a", TENSORS, ABOUT)
        write_json(tmp_path / "b", RESULT)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_a_lock_is_waited_for_and_freed_by_a_killed_process(tmp_path):
    path = tmp_path / "run.lock"
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    waited = []
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with locked(path, waiting=lambda: (waited.append(True), holder.kill())):
                assert waited == [True] and holder.wait() != 0
        finally:
            holder.kill()
    with locked(path, waiting=lambda: waited.append("again")):
        pass
    assert waited == [True]


def test_an_error_frees_the_lock(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a.lock"):
        raise RuntimeError
    with locked(tmp_path / "a.lock", waiting=lambda: pytest.fail("still held")):
        pass


def test_the_projects_folder_can_be_set(tmp_path, monkeypatch):
    monkeypatch.delenv("PROJECTABLE_ROOT", raising=False)
    assert (root() / "projectable" / "storage.py").exists()
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))
    assert root() == tmp_path and storage.current_commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of another project"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    assert storage.current_commit() == "unknown"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_mine.ipynb").touch()
    subprocess.run([*git, "add", "notebooks"], cwd=tmp_path, check=True)
    assert storage.current_commit().endswith("+")
    assert os.environ["PROJECTABLE_RUNS"]  # tests never write where notebooks read


class Mode(Enum):
    SLOW, FAST = 1, 2


def test_members_of_enumerations_slices_and_fractions_have_words():
    words = [storage.in_words(value) for value in (Mode.SLOW, Mode.FAST, slice(3), Fraction(1, 2))]
    assert len(set(words)) == 4 and all(words)
