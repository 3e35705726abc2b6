"""Beyond one process: a team trains what one process does, jobs give the runs that workers give, signals are heard."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from dataclasses import asdict

import pytest
import torch
from conftest import DIGITS, keep_data, tiny, tiny_projectable, tiny_source, train_until
from test_kernels import there, within
from torch import distributed

from projectable import experiment, training
from projectable.experiment import Run, data_for, folder_of, is_done, run, run_many
from projectable.storage import load_tensors, root
from projectable.training import Jobs, Stop, Team, Torchrun, train

ENV = dict(PYTHONPATH=os.pathsep.join([str(root()), str(root() / "tests")]), OMP_NUM_THREADS="1")


# ------------------------------------------------------------------------------------------------------- one training

UNEVEN = dict(tasks_per_step=7, steps=20, eval_every=10)  # 3 tasks and 4


@pytest.mark.slow
def test_two_processes_under_torchrun_train_what_one_does(other_runs, tmp_path, monkeypatch):
    """The source from nothing, the projections from a checkpoint of one process; then compared with one process."""
    source = tiny_source(**UNEVEN)
    config = tiny_projectable(source, sizes=(8, 16), lr=(2e-3, 2e-3), **UNEVEN)
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path / "one"))
    one = [run(source), run(config)]
    monkeypatch.setenv("PROJECTABLE_RUNS", str(other_runs))
    keep_data()
    data, folder = data_for(DIGITS), folder_of(config)
    begun = experiment.untrained(config, data, one[0].model())
    train_until(8, begun, data, config, folder / "checkpoint.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(config)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = subprocess.run(
        [*torchrun, "-m", "projectable", "train", str(path)],
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
        assert mine.result["best_step"] == theirs.result["best_step"] == 20
        for a, b in zip(mine.history, theirs.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        found = theirs.model().state_dict()
        for name, weight in mine.model().state_dict().items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=name)  # found: 1.2e-7


@pytest.fixture
def team_of_one(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Torchrun()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Linear", "Static"])
def test_wrapped_for_a_team_a_model_learns_the_same(team_of_one, digits, source, family):
    """Bit by bit; also where parameters have no gradient, as the task vectors beside Static maps."""
    config, states = tiny_projectable(options=dict(family=family), steps=10), []
    for team in (Team(), team_of_one):
        model = experiment.build(config, digits)
        outcome = train(model, digits, config, team=team)
        states.append((model.state_dict(), outcome.history))
    assert states[0][1] == states[1][1] and all(torch.equal(states[1][0][k], x) for k, x in states[0][0].items())


def test_an_error_of_the_first_process_is_everybodys(team_of_one):
    assert team_of_one.first(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="no such run"):
        team_of_one.first(lambda: (_ for _ in ()).throw(ValueError("no such run")))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [7, 10, 64])
def test_shares_are_even_and_leave_nothing_out(size, n):
    shares = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        shares.append(list(range(n))[team.share(n)])
    assert sum(shares, []) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_tasks_are_refused(digits):
    team = Team()
    team.size = 11
    with pytest.raises(ValueError, match="11 processes for 10 tasks a step; allowed: 1 to 10"):
        train(experiment.build(tiny(), digits), digits, tiny(), team=team)


# ------------------------------------------------------------------------------------------------------------- jobs


@pytest.mark.slow
def test_jobs_give_the_runs_that_this_process_gives(other_runs, universal, monkeypatch, submitit):
    """Two jobs, of which one is wrong: that is said after the other is saved."""
    monkeypatch.setenv("PYTHONPATH", ENV["PYTHONPATH"])
    monkeypatch.setenv("PROJECTABLE_EXECUTOR", "local")
    monkeypatch.setattr(experiment, "workers", lambda: 2)
    bad = tiny(options=(("conditioning", "telepathy"),))
    keep_data()
    try:
        with pytest.raises(RuntimeError, match=r"^job \d+: ValueError: unknown conditioning 'telepathy'"):
            run_many([tiny(), bad], test=True)
        mine = Run(tiny(), folder_of(tiny()))
        assert is_done(tiny()) and not is_done(bad) and mine.folder.parent == other_runs != universal.folder.parent
        assert mine.history == universal.history and (mine.folder / "test.json").exists()
    finally:
        experiment._pool.cache_clear()


@pytest.mark.slow
def test_ctrl_c_ends_jobs(other_runs, tmp_path, submitit):
    config = tiny(steps=100_000, checkpoint_every=20)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "projectable", "train", str(tmp_path / "config.json"), "--executor", "local"]
    checkpoint = folder_of(config) / "checkpoint.safetensors"
    keep_data()
    with subprocess.Popen(command, env=os.environ | ENV, stderr=subprocess.PIPE, text=True) as child:
        while not checkpoint.exists() and child.poll() is None:
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1]
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "stopped: the same command goes on from the last checkpoint"
    (pid,) = {int(path.name.partition("_")[0]) for path in (other_runs / "jobs").iterdir()}  # by which jobs are named
    assert within(15, lambda: not there(pid)), "the job still trains"
    step = load_tensors(checkpoint)[1]["step"]
    time.sleep(0.5)  # twenty steps take less
    assert load_tensors(checkpoint)[1]["step"] == step >= 20 and not is_done(config)


def test_unknown_executors_are_named(other_runs, monkeypatch, submitit):
    with pytest.raises(ValueError, match="unknown executor 'moon'; allowed: local, slurm"):
        run_many([tiny()], executor="moon")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"needs submitit: pip install 'projectable\[cluster\]'"):
        Jobs("local", other_runs, 1)


def test_what_slurm_is_told_has_to_be_json(other_runs, monkeypatch, submitit):
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    monkeypatch.setenv("PROJECTABLE_SLURM", "partition=gpu")
    with pytest.raises(ValueError, match="PROJECTABLE_SLURM='partition=gpu'; allowed: a JSON object"):
        Jobs("slurm", other_runs, 1)


def test_local_jobs_see_the_gpus(other_runs, monkeypatch, submitit):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    jobs = Jobs("local", other_runs, 1)
    assert jobs.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=60) == "0,1"


def test_slurm_gets_what_the_user_says(other_runs, monkeypatch, submitit):
    """As submitit would send it: no cluster is needed to see the script."""
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    monkeypatch.setenv("PROJECTABLE_SLURM", json.dumps(dict(slurm_partition="night", timeout_min=90, mem_gb=8)))
    executor = Jobs("slurm", other_runs, 1).executor._executor
    assert isinstance(executor, submitit.SlurmExecutor)
    script = executor._make_submission_file_text("python x.py", "1")
    for line in ("--partition=night", "--time=90", "--mem=8GB", "--cpus-per-task=1", "--job-name=projectable"):
        assert f"#SBATCH {line}" in script, script


class Job:
    """In place of one of submitit's, and of what hands it in, after a while."""

    job_id, cancelled = "7", False

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error = seconds, error

    def submit(self, function, *arguments):
        time.sleep(self.seconds)
        return self

    def done(self):
        return self.cancelled or self.error is not None

    def result(self):
        raise self.error

    def cancel(self):
        self.cancelled = True


def test_a_job_that_was_being_handed_in_at_ctrl_c_is_cancelled_too(other_runs, submitit):
    jobs = Jobs("local", other_runs, 1)
    jobs.executor = Job(0.5)
    future = jobs.submit(print)
    time.sleep(0.2)
    jobs.cancel()
    assert isinstance(future.exception(timeout=10), CancelledError) and jobs.executor.cancelled


def test_a_job_that_was_lost_says_what_is_known(other_runs, submitit):
    jobs = Jobs("local", other_runs, 1)
    words = "Job 7 has not produced any output (state: NODE_FAIL)\n-----\n"
    jobs.executor = Job(error=submitit.core.utils.UncompletedJobError(words))
    with pytest.raises(RuntimeError, match=r"^job 7: Job 7 has not produced any output \(state: NODE_FAIL\)"):
        jobs.submit(print).result(timeout=10)


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_worker_does_not_outlive_a_killed_parent():
    code = """
import os, time
from projectable.storage import end_with_parent
if os.fork() == 0:
    end_with_parent()
    print(os.getpid(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | ENV, stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = int(parent.stdout.readline())
        assert os.path.exists(f"/proc/{worker}")
        parent.kill()
        killed = time.monotonic()
        assert parent.stdout.read() == "" and time.monotonic() - killed < 30, "what it would sleep on is twice as long"


def test_a_signal_ends_a_step_in_training_and_anything_else_at_once():
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        with Stop(Team()) as stop:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
            assert not stop.cut
        with Stop(Team()) as stop:
            assert not stop()  # asked after a step: from now on, steps are ended first
            os.kill(os.getpid(), number)
            assert stop() and stop.signal == number
            with pytest.raises(KeyboardInterrupt):  # the second time: now
                os.kill(os.getpid(), number)
                time.sleep(1)
            assert stop.cut, "what was trained since the last checkpoint is lost"
            with pytest.raises(KeyboardInterrupt):
                stop.end()
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_team_signals_may_come_twice():
    team = Team()
    team.size = 2
    with Stop(team) as stop:
        stop()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with training.team() as team:
        assert (team.rank, team.size, team.first(lambda: 3)) == (0, 1, 3)
    for said in ("2", "many"):  # a cluster may set it
        monkeypatch.setenv("WORLD_SIZE", said)
        with pytest.raises(ValueError, match=f"WORLD_SIZE='{said}' without .*; allowed: unset, or under torchrun"):
            training.team().__enter__()
