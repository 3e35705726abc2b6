"""Kernels of notebooks that are run: one that dies is told of, and none stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_reporting import write_notebook

from projectable import reporting

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")]

ASLEEP = """
import os, time
pids = [os.getpid()]
if profile != "smoke":
    from projectable import experiment
    pool, _ = experiment._pool(experiment.runs_dir(), "", "2", ())
    pids.append(pool.submit(os.getpid).result())
with open(f"{os.environ['PROJECTABLE_ROOT']}/{pids[0]}.new", "w") as file:
    file.write(" ".join(map(str, pids)))
os.rename(file.name, file.name.replace(".new", ".pids"))
time.sleep(600)
"""


def there(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, holds) -> bool:
    last = time.monotonic() + seconds
    while not holds() and time.monotonic() < last:
        time.sleep(0.1)
    return holds()


@pytest.mark.parametrize(
    "profile, end",
    [("smoke", signal.SIGINT), ("laptop", signal.SIGKILL)],
    ids=["Ctrl-C, side by side", "killed, in turn"],
)
def test_nothing_stays_behind(tmp_path, profile, end):
    package = str(Path(reporting.__file__).parents[1])
    ours = dict(PROJECTABLE_ROOT=str(tmp_path), PROJECTABLE_RUNS=str(tmp_path / "runs"), PYTHONPATH=package)
    command = [sys.executable, "-m", "projectable", "reproduce", "--profile", profile]
    asleep = 2 if profile == "smoke" else 1
    if profile == "laptop":
        write_notebook(tmp_path, "00_lost", "import os; os._exit(3)")
    for place in range(1, asleep + 1):
        write_notebook(tmp_path, f"0{place}_asleep", ASLEEP)
    with open(tmp_path / "said.txt", "wb") as said:
        ours["PROJECTABLE_WORKERS"] = "2"
        process = subprocess.Popen(command, env=os.environ | ours, stdout=said, stderr=said, start_new_session=True)
    try:
        assert within(90, lambda: len(list(tmp_path.glob("*.pids"))) == asleep), (tmp_path / "said.txt").read_text()
        pids = [int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()]
        assert len(pids) == 2 and all(map(there, pids)), "two kernels, or one and its worker"
        os.killpg(process.pid, end) if end == signal.SIGINT else os.kill(process.pid, end)
        assert process.wait(timeout=30) == (130 if end == signal.SIGINT else -end)
        assert within(15, lambda: not any(map(there, pids))), "kernels, or their workers, go on"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if end == signal.SIGINT:
        assert (
            (tmp_path / "said.txt")
            .read_text()
            .endswith("stopped: the same command goes on from what has been trained\n")
        )
    else:
        status = json.loads((tmp_path / "reports" / "results" / "status" / "00_lost.json").read_text())
        assert status["status"] == "failed" and "DeadKernelError" in status["error"]
