"""Beyond one process: a team trains what one process does, jobs give the runs that workers give, signals are heard."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import DIGITS, tiny_projectable, tiny_source

from projectable import experiment
from projectable.experiment import data_for, folder_of, run
from projectable.storage import root
from projectable.training import train

ENV = dict(PYTHONPATH=os.pathsep.join([str(root()), str(root() / "tests")]), OMP_NUM_THREADS="1")


def weights_of(run) -> dict[str, torch.Tensor]:
    return run.model().state_dict()


# ------------------------------------------------------------------------------------------------------- one training

UNEVEN = dict(tasks_per_step=7, steps=20, eval_every=10)  # 3 tasks and 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Linear", "Static"])  # beside Static maps, no loss reaches the IDs
def test_two_processes_under_torchrun_train_what_one_does(other_runs, tmp_path, monkeypatch, family):
    """The source from nothing, the projections from a checkpoint of one process; then compared with one process."""
    source = tiny_source(**UNEVEN)
    config = tiny_projectable(source, sizes=(8, 16), lr=(2e-3, 2e-3), options=dict(family=family), **UNEVEN)
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path / "one"))
    one = [run(source), run(config)]
    monkeypatch.setenv("PROJECTABLE_RUNS", str(other_runs))
    data, folder = data_for(DIGITS), folder_of(config)
    begun = experiment.untrained(config, data, one[0].model())
    train(begun, data, config, folder / "checkpoint.safetensors", stop_after=8)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = subprocess.run(
        [*command, "-m", "projectable", "train", str(path)],
        env=os.environ | ENV,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [str(folder)]  # one process speaks
    two = [run(source), run(config)]  # found, both of them
    assert all(r.result["device"].startswith("2 × ") for r in two)
    assert not (folder / "checkpoint.safetensors").exists()
    for mine, theirs in zip(one, two, strict=True):
        assert mine.result["best_step"] == theirs.result["best_step"]
        for a, b in zip(mine.history, theirs.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        print(max((weights_of(theirs)[n] - w).abs().max().item() for n, w in weights_of(mine).items()))
        for name, weight in weights_of(mine).items():
            torch.testing.assert_close(weights_of(theirs)[name], weight, atol=2e-4, rtol=1e-3, msg=name)
