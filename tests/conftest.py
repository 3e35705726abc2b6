"""Small real data and small trained models that the tests share; every run goes to a folder of this session."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from projectable import experiment
from projectable.config import DataConfig, RunConfig
from projectable.storage import load_tensors
from projectable.tasks import images, make_tasks
from projectable.training import train
from projectable.transformer import Shape

sys.modules.setdefault("rfc3987_syntax", None)  # of jsonschema: a grammar of IRIs that takes a second to import
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup: what tests start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

DIGITS = DataConfig("digits", "classes", vocab_size=32, patch=2, val_per_class=20)


def pytest_collection_modifyitems(items):
    """What is fast comes first, what waits for the notebooks last."""
    items.sort(key=lambda item: ("reports" in item.fixturenames, item.get_closest_marker("slow") is not None))


@pytest.fixture(scope="session", autouse=True)
def session_runs(tmp_path_factory, request):
    """One thread and no GPU, so that numbers can be compared bit by bit; a folder for runs that no notebook reads."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    if "gpu" not in request.config.option.markexpr:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path_factory.mktemp("runs")
    patch.setenv("PROJECTABLE_RUNS", str(folder))
    patch.delenv("PROJECTABLE_REPORTS", raising=False)
    yield folder
    patch.undo()


class ToyNotebooks:
    """All notebooks at the smoke setting, in a project folder of their own, started before any test.

    They take as long as the other tests; what needs them comes last. Where tests go side by side (pytest-xdist), the
    process that hands them out starts these: the others know the folder from the environment.
    """

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="projectable-tests-")
        os.environ["PROJECTABLE_TOY_NOTEBOOKS"] = self.folder.name
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        if self.process is None:
            root, here = Path(self.folder.name), Path(__file__).parents[1] / "notebooks"
            shutil.copytree(here, root / "notebooks", ignore=shutil.ignore_patterns(".*"))
            ours = dict(
                PROJECTABLE_ROOT=str(root),
                PROJECTABLE_RUNS=str(root / "runs"),
                CUDA_VISIBLE_DEVICES="",
                PROJECTABLE_REPORTS="",
            )
            command = [sys.executable, "-m", "projectable", "reproduce", "--profile", "smoke"]
            shell = ["sh", "-c", '"$@" >said.txt 2>&1; echo $? >status.new; mv status.new status', "sh", *command]
            self.process = subprocess.Popen(shell, cwd=root, env=os.environ | ours, start_new_session=True)

    def end(self) -> None:
        for sign in (signal.SIGINT, signal.SIGKILL):  # where tests ended early: first as Ctrl-C does, then for good
            if self.process is not None and self.process.poll() is None:
                os.killpg(self.process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=30)
        self.folder.cleanup()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.toy_notebooks = ToyNotebooks()


def pytest_collection_finish(session):
    needed = any("reports" in getattr(item, "fixturenames", ()) for item in session.items)
    if needed and not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        session.config.toy_notebooks.start()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    if any("test_notebooks.py" in name for name in ids):
        node.config.toy_notebooks.start()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.toy_notebooks.end()


@pytest.fixture
def other_runs(tmp_path, monkeypatch):
    """Another, empty folder for runs: what was trained before has to be trained again."""
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def keep_data(data: DataConfig = DIGITS) -> None:
    """Write them to the present folder of runs: a process that makes them anew imports scikit-learn, for a second."""
    experiment._data_for.__wrapped__(data, experiment._data_code(data))


def tiny(**changes) -> RunConfig:
    """A universal model of width 8 on the digits, 40 steps: 0.3 s."""
    config = RunConfig(
        model="universal",
        data=DIGITS,
        d_source=16,
        n_layers=1,
        sizes=(8,),
        lr=(1e-2,),
        steps=40,
        seed=0,
        warmup=5,
        eval_every=10,
        val_images=10,
        checkpoint_every=10,
    )
    return config.with_(**changes)


def tiny_source(**changes) -> RunConfig:
    """A source of width 16."""
    return tiny(model="source", sizes=(), lr=(), source_lr=1e-2, **changes)


def tiny_projectable(start: RunConfig | None = None, **changes) -> RunConfig:
    """Projections of that source; `options` as keywords of `Projectable` in a dict."""
    options = tuple(changes.pop("options", {}).items())
    return tiny(
        **dict(model="projectable", start=start or tiny_source(), source_lr=1e-3, lr=(2e-3,), options=options) | changes
    )


def train_until(step, model, data, config, checkpoint):
    """Train up to that step, as Ctrl-C ends it; what the checkpoint says, and the model as it is then."""
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(model, data, config, checkpoint, lambda now, *_: seen.append(now), stop=lambda: seen[-1:] == [step])
    return load_tensors(checkpoint)[1], model


@pytest.fixture(scope="session")
def digits():
    """Ten tasks of real 8×8 digits, 16 tokens of 32 codes each."""
    return make_tasks("digits", vocab_size=32, patch=2, val_per_class=20)


@pytest.fixture(scope="session")
def source(session_runs):
    """The tiny source, trained once."""
    return experiment.run(tiny_source())


@pytest.fixture(scope="session")
def universal(session_runs):
    """The tiny universal model, trained once."""
    return experiment.run(tiny())


@pytest.fixture
def shape():
    """A model for the digits with two layers and two heads."""
    return Shape(16, n_layers=2, vocab_size=32, length=16)


@pytest.fixture
def fashion():
    """Fashion-MNIST, where it lies on this machine: tests never download."""
    try:
        images._find_fashion()
    except images.DataError as error:
        pytest.skip(str(error))
    return images.load_fashion_mnist()


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright; skips where either is missing."""
    api = pytest.importorskip("playwright.sync_api", exc_type=ImportError, reason="no playwright: the extra `test`")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def submitit():
    """The package of the extra `cluster`; skips without it."""
    return pytest.importorskip("submitit", reason="submitit is not installed (extra: cluster)")


def randomise(module: torch.nn.Module, std: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, so that no term is zero only because it starts there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module
