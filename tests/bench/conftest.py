"""Collects what the benchmarks compared, and writes it as a table that the index shows."""

import time
from statistics import median

import pandas as pd
import pytest
import torch

from projectable import reporting, training
from projectable.storage import current_commit, device

ROWS: list[dict] = []
PEAK: list[float] = []  # GFLOP/s


def seconds(function) -> float:
    """CPU seconds: with one thread those of the clock, less what other processes take from it."""
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.fixture(scope="session", autouse=True)
def matmul_peak() -> None:
    """A 1024³ product in float32 on one thread, at the start and at the end: what the machine can do."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training.keep_freed_memory()  # as in training
    a = torch.randn(1024, 1024)

    @training.FastProducts()
    def measure():
        PEAK.append(max(2 * 1024**3 / seconds(lambda: a @ a) / 1e9 for _ in range(20)))

    measure()
    yield
    measure()


@pytest.fixture
def compare(benchmark):
    """`compare(what, ours, other_name, other, target)`: the two in turn, so that the ratio other / ours holds where
    the machine's speed drifts. `target` is the least ratio that was aimed at."""

    def run(what, ours, other_name, other, target=None, rounds=15):
        for _ in range(2):
            ours(), other()
        pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
        a, b = median([p[0] for p in pairs]), median([p[1] for p in pairs])
        ratio = median([p[1] / p[0] for p in pairs])
        row = dict(what=what, ours_ms=a * 1e3, other=other_name, other_ms=b * 1e3, ratio=ratio)
        if target is not None:
            row |= dict(target=f"≥ {target:.2f}", met="yes" if ratio >= target else "no")
        ROWS.append(row)
        benchmark.extra_info.update(row)
        benchmark.pedantic(ours, rounds=3)

    return run


def pytest_sessionfinish(session):
    """Write the table, and the index that shows it."""
    if not ROWS:
        return
    table = pd.DataFrame(ROWS)
    table["matmul_gflops"] = max(PEAK)
    table["device"], table["commit"], table["torch"] = device(), current_commit(), torch.__version__
    path = reporting.reports_dir("laptop") / "results" / "bench.csv"
    reporting.write_atomically(path, table.to_csv(index=False, float_format="%.4g"))
    reporting.build_index("laptop")
    print("\n" + table.drop(columns=["device", "commit", "torch"]).to_string(index=False, na_rep=""))
