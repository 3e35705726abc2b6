"""Whatever happens to a run or its files, the end is right numbers or a clear error: never wrong ones in silence."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, keep_data, tiny, train_until

from projectable import experiment
from projectable.__main__ import find_run
from projectable.config import ConfigError
from projectable.experiment import Run, data_for, folder_of, is_done, run, runs_dir
from projectable.export import ModelError, export
from projectable.export import load as load_model
from projectable.storage import DamagedFile, WriteError, load_tensors, locked, root, save_tensors, write_json
from projectable.tasks import images


def forked(work) -> int:
    """Do that in a copy of this process, which ends with it; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


# ------------------------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_five_random_moments_a_run_ends_where_an_unbroken_one_does(universal, other_runs, seed):
    """Each time a moment after a random step: within a step, an evaluation, a checkpoint."""
    rng = np.random.default_rng(seed)
    folder = folder_of(tiny())
    data_for(DIGITS)
    for step in sorted(rng.integers(1, 37, 5)):
        reader, writer = os.pipe()

        def report(now, *_, writer=writer, last=step + 2):
            os.write(writer, bytes([now]))
            if now == last:  # so that it is never too late to kill it
                time.sleep(60)

        child = forked(lambda report=report: run(tiny(), report))
        os.close(writer)
        while os.read(reader, 1)[0] < step:
            pass
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        assert not is_done(tiny())
    seen = []
    finished = run(tiny(), lambda step, *_: seen.append(step))
    assert seen[0] > 1  # it went on
    assert finished.history == universal.history and finished.result["best_step"] == universal.result["best_step"]
    expected = universal.model().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in finished.model().state_dict().items())
    assert {p.name for p in folder.iterdir()} == {"config.json", "history.json", "model.safetensors", "result.json"}


@pytest.mark.slow
def test_ctrl_c_ends_the_step_and_says_how_to_go_on(other_runs, tmp_path):
    config = tiny(steps=100_000, checkpoint_every=100_000)
    keep_data()
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "projectable", "train", str(tmp_path / "config.json")]
    env = os.environ | dict(PYTHONPATH=str(root()), OMP_NUM_THREADS="1")
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        said = b""
        while b"loss=" not in said:  # the bar moves
            piece = os.read(child.stderr.fileno(), 1000)
            assert piece, said
            said += piece
        child.send_signal(signal.SIGINT)
        out, rest = child.communicate()
    last = rest.decode().splitlines()[-1]
    found = re.fullmatch(r"stopped after step ([\d,]+) of 100,000 of universal d8: .* goes on from there", last)
    assert child.returncode == 130 and out == b"" and found, rest
    _, about = load_tensors(folder_of(config) / "checkpoint.safetensors")
    assert about["step"] == int(found[1].replace(",", "")) and not is_done(config)


# ------------------------------------------------------------------------------------------------------- can't write


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(WriteError, match=r"^.*/file/runs can't be written to \(Not a directory\): .* PROJECTABLE_RUNS"):
        run(tiny())


def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    for place in (tmp_path, *list(tmp_path.parents)[:2]):
        place.chmod(0o755)
    reader, writer = os.pipe()

    def write_as_nobody():
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        for write in (
            lambda: save_tensors(tmp_path / "runs/a/model.safetensors", {}, {}),
            lambda: write_json(tmp_path / "runs/result.json", {}),
            lambda: locked(tmp_path / "runs/x.lock").__enter__(),
        ):
            try:
                write()
                os.write(writer, b"written!\n")
            except OSError as error:
                os.write(writer, f"{type(error).__name__}: {error}\n".encode())

    os.waitpid(forked(write_as_nobody), 0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read().splitlines()
    assert len(said) == 3
    for line, folder in zip(said, ("runs/a", "runs", "runs"), strict=True):
        assert line.startswith(f"WriteError: {tmp_path / folder} can't be written to (Permission denied): choose")


def test_what_is_finished_is_read_where_nothing_can_be_written(universal, digits, monkeypatch):
    universal.test_losses()
    monkeypatch.setattr("projectable.storage._touch", lambda path: pytest.fail(f"{path} was written"))
    experiment._data_for.cache_clear()
    again = run(tiny())
    assert again.result == universal.result and again.model() and again.test_losses()


# ------------------------------------------------------------------------------------------------------- two at once


def test_two_processes_that_want_the_same_data_make_them_once(other_runs, tmp_path, monkeypatch):
    made, make_tasks = tmp_path / "made", experiment.make_tasks

    def counted(**arguments):
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.05)
        return make_tasks(**arguments)

    monkeypatch.setattr(experiment, "_data_code", lambda config: "")
    monkeypatch.setattr(experiment, "make_tasks", counted)
    experiment._data_for.cache_clear()
    for child in [forked(lambda: data_for(DIGITS)) for _ in range(2)]:
        os.waitpid(child, 0)
    assert made.read_text() == "x" and data_for(DIGITS).n_tasks == 10
    experiment._data_for.cache_clear()


# -------------------------------------------------------------------------------------------------------------- fuzz


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file after an accident: some bytes changed, the end or a part lost, a block of zeros, rubbish behind it."""
    n, kind = len(content), rng.integers(6)
    start, length = int(rng.integers(n)), int(rng.integers(1, 512))
    if kind <= 2:  # one byte, or a few
        changed = bytearray(content)
        for place in rng.integers(n, size=1 if kind < 2 else 5):
            changed[place] ^= int(rng.integers(1, 256))
        return bytes(changed)
    if kind == 3:
        return content[:start]
    if kind == 4:
        return content[:start] + bytes(min(length, n - start)) + content[start + length :]
    return content[:start] + content[start + length :] if rng.integers(2) else content + rng.bytes(length)


@pytest.fixture(scope="module")
def whole(universal, digits, tmp_path_factory):
    """A folder of runs with a finished one, the checkpoint of another, data, and an exported model."""
    folder = tmp_path_factory.mktemp("whole")
    universal.test_losses()
    shutil.copytree(runs_dir(), folder / "runs", ignore=lambda _, names: [n for n in names if n.endswith(".lock")])
    export(universal, 8, 3, folder / "model")
    train_until(10, experiment.build(tiny(seed=1), digits), digits, tiny(seed=1), folder / "checkpoint")
    return folder


def state_of(model) -> list:
    return [(k, v.tolist()) for k, v in model.state_dict().items()]


def resumed(path: Path, digits) -> list:
    model = experiment.untrained(tiny(seed=1), digits, None)
    about, model = train_until(11, model, digits, tiny(seed=1), path)
    return [about["history"], *state_of(model)]


def tokens_of(data) -> list:
    return [data.codebook.codes.tolist(), data.task_names, *(t.tolist() for ts in data.tokens.values() for t in ts)]


KINDS = {  # what is damaged, and how a user would meet it
    "checkpoint": ("checkpoint", lambda path, digits: resumed(path, digits)),
    "weights": ("runs/{run}/model.safetensors", lambda path, _: state_of(Run(tiny(), path.parent).model())),
    "result": ("runs/{run}/result.json", lambda path, _: Run(tiny(), path.parent).result),
    "history": ("runs/{run}/history.json", lambda path, _: Run(tiny(), path.parent).history),
    "test losses": ("runs/{run}/test.json", lambda path, _: Run(tiny(), path.parent).test_losses()["d8"].tolist()),
    "config": ("runs/{run}/config.json", lambda path, _: find_run(path.parent).config),
    "data and codebook": ("runs/{data}", lambda path, _: tokens_of(data_for(DIGITS))),
    "exported weights": ("model/model.safetensors", lambda path, _: state_of(load_model(path.parent))),
    "exported config": ("model/config.json", lambda path, _: load_model(path.parent).config),
}
CLEAR = (DamagedFile, ConfigError, ModelError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_or_means_what_it_meant(whole, universal, digits, tmp_path, monkeypatch, kind):
    """9 kinds of files, 30 accidents each."""
    name, use = KINDS[kind]
    key = hashlib.sha256((json.dumps(asdict(DIGITS)) + experiment._data_code(DIGITS)).encode()).hexdigest()[:12]
    data = f"data-digits-classes-{key}.safetensors"
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / name.format(run=universal.folder.name, data=data)
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path / "copy/runs"))
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    content, refused = path.read_bytes(), 0

    def outcome():
        if path.name == data:
            experiment._data_for.cache_clear()
        found = use(path, digits)
        path.write_bytes(content) if kind == "checkpoint" else None  # it was written anew
        return found

    try:
        expected = outcome()
        for _ in range(30):
            path.write_bytes(damaged(content, rng))
            try:
                found = outcome()
            except CLEAR as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert found == expected, "damage was read as something else"
        assert refused >= 28  # a blank may have become another blank
    finally:
        experiment._data_for.cache_clear()


def test_a_damaged_data_set_is_named(tmp_path, fashion, monkeypatch):
    name = "t10k-labels-idx1-ubyte.gz"
    content, rng = (images._find_fashion() / name).read_bytes(), np.random.default_rng(0)
    expected, refused = images._read_checked(images._find_fashion() / name), 0
    for _ in range(30):
        (tmp_path / name).write_bytes(damaged(content, rng))
        try:
            assert images._read_checked(tmp_path / name) == expected  # the archive's own words may change
        except images.DataError as error:
            assert str(tmp_path / name) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 20
