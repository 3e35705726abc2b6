"""Runs are trained once, by whoever comes first; their folders follow what decides their numbers; many side by side."""

import importlib
import linecache
import math
import shutil
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial, wraps
from multiprocessing import Pipe, get_context
from pathlib import Path
from queue import Queue
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import DIGITS, keep_data, tiny, tiny_projectable, tiny_source

from projectable import arms, experiment, generators, storage, transformer
from projectable.__main__ import facts
from projectable.config import DataConfig
from projectable.experiment import Run, build, data_for, folder_of, is_done, operations, run, run_many, runs_dir
from projectable.storage import DamagedFile, root
from projectable.tasks import images
from projectable.training import DivergedError, split_losses


def files(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------- one run


def test_a_run_is_trained_once(universal):
    before, seen = files(universal.folder), []
    again = run(tiny(), report=lambda *step: seen.append(step))
    assert seen == []
    assert files(universal.folder) == before and again.result == universal.result
    assert {"config.json", "history.json", "model.safetensors", "result.json"} <= before.keys()
    assert "checkpoint.safetensors" not in before


def test_a_run_says_what_it_found(universal, digits):
    result, model = universal.result, universal.model()
    assert result["val"].keys() == {"d8"} and result["best_step"] in range(10, 41, 10)
    assert result["n_parameters"] == sum(p.numel() for p in model.parameters())
    assert result["seconds"] > 0 and result["device"].startswith(("cpu", "cuda"))
    mine = split_losses(model, digits, "val", 10)["d8"].mean().item()
    assert mine == pytest.approx(result["val"]["d8"], abs=1e-6)
    assert {"step": result["best_step"], "member": "d8", "split": "val", "loss": result["val"]["d8"]} in (
        universal.history
    )


def test_a_run_without_its_result_is_finished_again(other_runs):
    """With the test losses of its new weights: on another machine, say, they may have come out otherwise."""
    first = run(tiny(steps=2))
    experiment.write_json(first.folder / "test.json", {"d8": [99.0] * 10})
    (first.folder / "result.json").unlink()
    before = first.model().state_dict()
    assert not is_done(tiny(steps=2))
    again = run(tiny(steps=2))
    assert again.is_done() and all(torch.equal(w, before[key]) for key, w in again.model().state_dict().items())
    assert again.test_losses()["d8"].max() < 9


def test_a_finished_model_is_loaded_without_what_it_started_from(source, other_runs, monkeypatch):
    configs = [
        *(tiny_projectable(options={"source_mode": mode}, steps=2) for mode in ("trained", "frozen", "random_frozen")),
        tiny(model="distilled", start=tiny_source(), options=(("conditioning", "film"), ("share", 0.3)), steps=2),
        tiny(model="distilled_specialists", start=tiny_source(), options=(("share", 0.3),), steps=2),
        tiny(model="distilled_cut", start=tiny_source(), options=(("p0", "pca"), ("share", 0.3)), steps=2),
        tiny_projectable(model="distilled_projectable", options={"share": 0.3}, steps=2),
        tiny(model="distilled_hypernetwork", start=tiny_source(), options=(("z_dim", 3), ("share", 0.3)), steps=2),
        tiny(model="specialists", start=tiny(steps=2), steps=2),
    ]
    finished = [run(config) for config in configs]
    before = [r.test_losses() for r in finished]
    for folder in {folder_of(config.start) for config in configs}:
        shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", lambda *_, **__: pytest.fail("trained in silence"))
        for r, losses in zip(finished, before, strict=True):
            (r.folder / "test.json").unlink()
            assert all(torch.equal(x, losses[member]) for member, x in r.test_losses().items())
            (r.folder / "test.json").unlink()
    monkeypatch.setenv("PROJECTABLE_WORKERS", "1")
    run_many(configs, test=True)
    assert all((r.folder / "test.json").exists() for r in finished)
    assert not any(folder_of(config.start).exists() for config in configs)


@pytest.mark.parametrize("copies, images", [(1, 20), (13, 9), (129, 1)])
def test_of_many_tasks_fewer_images_choose_the_start_of_maps(digits, copies, images):
    names = tuple(f"{name}, {i}" for i in range(copies) for name in digits.task_names)
    many = replace(digits, task_names=names, tokens={split: xs * copies for split, xs in digits.tokens.items()})
    tokens = experiment._typical(many)
    assert tokens.shape == (10 * copies, images, 16)
    assert all(torch.equal(mine, digits.tokens["train"][i][:images]) for i, mine in enumerate(tokens[-10:]))


def test_weights_of_another_run_are_refused(other_runs):
    one, two = run(tiny(steps=2)), run(tiny(steps=2, seed=1))
    shutil.copy(two.folder / "model.safetensors", one.folder)
    with pytest.raises(DamagedFile, match="holds the weights of another run: delete"):
        one.model()


def test_test_losses_are_computed_once(other_runs, digits, monkeypatch):
    finished = run(tiny(steps=10))
    assert not (finished.folder / "test.json").exists()  # test images are not looked at before somebody asks
    first = finished.test_losses()["d8"]
    assert torch.equal(first, split_losses(finished.model(), digits, "test")["d8"]) and first.shape == (10,)
    monkeypatch.setattr(experiment, "split_losses", lambda *a: pytest.fail("computed again"))
    assert torch.equal(Run(finished.config, finished.folder).test_losses()["d8"], first)


def test_task_data_come_back_from_the_disk_as_they_were(digits):
    data = data_for(DIGITS)
    assert (data.name, data.task_names, data.licence) == (digits.name, digits.task_names, digits.licence)
    assert (data.codebook.codes == digits.codebook.codes).all() and data.codebook.length == 16
    for split in digits.tokens:
        assert all(torch.equal(a, b) for a, b in zip(data.tokens[split], digits.tokens[split], strict=True))
    assert list(runs_dir().glob("data-digits-classes-*.safetensors"))


def test_an_error_of_a_run_leaves_nothing_that_looks_finished(other_runs):
    config = tiny(options=(("conditioning", "telepathy"),))
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown conditioning 'telepathy'"):
            run(config)
        assert not is_done(config)


def test_unknown_model(digits):
    with pytest.raises(ValueError, match="unknown model 'oracle'; allowed: source, universal, hypernetwork, support_"):
        build(tiny(model="oracle"), digits)


def test_every_model_can_be_built_trained_and_loaded(universal, source):
    for config in (
        tiny_projectable(steps=2, options={"family": "LowRank", "z_dim": 2, "layout": "per_matrix", "rank": 2}),
        tiny_source(start=tiny_source(), steps=2),
        tiny(model="told", lr=(0.0,), start=tiny(model="support_universal", steps=2), steps=1),
        tiny(model="adapted", start=tiny(model="hypernetwork", steps=2), steps=2, options=(("tune", "maps"),)),
    ):
        losses = run(config).test_losses()
        assert all(torch.isfinite(x).all() for x in losses.values()), config.model


def test_a_run_at_a_rate_of_zero_leaves_its_start_as_it_was(universal):
    start = tiny(model="support_universal", steps=2)
    told = run(tiny(model="told", lr=(0.0,), start=start, steps=1))
    assert told.result["val"] == pytest.approx(
        {"d8": split_losses(run(start).model(), data_for(start.data), "val", 10)["d8"].mean().item()}
    )
    assert facts(told)["learning rates"] == "d8 0"


# ---------------------------------------------------------------------------------------------- what decides a run


def test_the_folder_follows_everything_that_decides_the_numbers():
    configs = [
        tiny(),
        tiny(seed=1),
        tiny(lr=(2e-2,)),
        tiny(steps=41),
        tiny(data=DIGITS.__class__("digits", "clusters4", 32, 2, 20)),
        tiny(options=(("conditioning", "film"),)),
        tiny(model="specialists", start=tiny()),
        tiny(model="specialists", start=tiny(seed=1)),
    ]
    assert len({folder_of(config) for config in configs}) == len(configs)
    assert folder_of(tiny()) == folder_of(tiny(steps=40))


@pytest.fixture
def edit(monkeypatch):
    """edit(old, new, …): the keys of runs, and of data, as if the code of the package said so."""
    source_of = storage.source_of

    def keys(*changes: str) -> dict[str, str]:
        def edited(module):
            source = source_of(module)
            for old, new in zip(changes[::2], changes[1::2], strict=True):
                source = source.replace(old, new)
            return source

        for old in changes[::2]:
            assert any(old in source_of(m) for m in sys.modules if m.startswith("projectable.")), old
        monkeypatch.setattr(storage, "source_of", edited)
        return keys_now()

    yield keys
    storage._read.cache_clear()
    storage._known.clear()


def keys_now() -> dict[str, str]:
    """The keys of `KEYED` and of three data sets, from the code as it is read now."""
    storage._read.cache_clear()
    storage._known.clear()
    names = {name: folder_of(config).name for name, config in KEYED.items()}
    datasets = {"data": DIGITS, "fashion": DataConfig(), "glyphs": DataConfig("glyphs")}
    return names | {name: experiment._data_code(data) for name, data in datasets.items()}


@pytest.fixture(scope="module")
def before():
    """The keys of the code as it is."""
    return keys_now()


KEYED = {
    "source": tiny_source(),
    "universal": tiny(),
    "specialists": tiny(model="specialists"),
    "tuned": tiny(model="specialists", start=tiny()),
    "distilled": tiny(model="distilled", start=tiny_source()),
    "linear": tiny_projectable(options={"family": "Linear"}),
    "by default": tiny_projectable(),
    "low rank": tiny_projectable(options={"family": "LowRank", "rank": 2}),
    "from low rank": tiny(model="specialists", start=tiny_projectable(options={"family": "LowRank"})),
}
LOW_RANK, SPECIALISTS = {"low rank", "from low rank"}, {"specialists", "tuned", "from low rank"}
RUNS, PROJECTED, ALL = set(KEYED), {"linear", "by default", *LOW_RANK}, {*KEYED, "data", "fashion", "glyphs"}


def test_keys_stay_while_runs_train_and_after(monkeypatch, before):
    """Fast products are switched on and off meanwhile: a worker's second run once had another key than its first."""
    zen = dict(cpu_name="AMD EPYC", avx512_f=True, amx_tile=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: zen, raising=False)
    seen = []
    run(tiny_projectable(steps=2, seed=7), report=lambda *_: seen.append(keys_now()))
    assert seen and all(keys == before for keys in [*seen, keys_now()])


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("self.left * gate", "self.left * (2 * gate)", LOW_RANK),
        ("torch.addmm(self.base", "torch.addmm(2 * self.base", PROJECTED),  # for their gains, too
        ("def make_glyphs(", "def make_glyphs(a, ", {"glyphs"}),
        ("self.base = nn.Parameter(base.clone", "self.base = nn.Parameter(2 * base.clone", PROJECTED),
        ("torch.randn(n_tasks, z_dim)", "torch.zeros(n_tasks, z_dim)", PROJECTED),
        ("return x.reshape(n, rows * cols", "return -x.reshape(n, rows * cols", ALL),
        ("self.read_scale = math", "self.read_scale = 2 * math", PROJECTED),
        ("-((1 - share) * hit", "-((2 - share) * hit", {"distilled"}),
        ("w = w.unsqueeze(0).repeat", "w = 2 * w.unsqueeze(0).repeat", SPECIALISTS),
        ("start.weights(member", "start.weights(2 * member", SPECIALISTS),
        ("w[name] = scale[:, rows]", "w[name] = 2 * scale[:, rows]", RUNS),
        ('matmul.fp32_precision = "bf16"', 'matmul.fp32_precision = "ieee"', RUNS),
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.99)", RUNS),
        ("return rates | {", "return {} | rates | {", RUNS),
        ("np.arange(len(x)) % 5 == 4", "np.arange(len(x)) % 5 == 3", RUNS | {"data"}),  # digits only
        ("found = hashlib.sha256(content)", "found = hashlib.sha512(content)", {"fashion"}),
    ],
)
def test_a_run_follows_the_code_that_it_uses_and_no_other(before, edit, old, new, changed):
    after = edit(old, new)
    assert {name for name in before if before[name] != after[name]} == changed


CELL = """
class Fresh(Static):
    def forward(self, z):
        return FACTOR * super().forward(z)
"""


def test_a_family_of_a_notebook_counts_as_it_is_now(monkeypatch):
    def keys(factor):
        name = f"<cell {factor}>"
        code = CELL.replace("FACTOR", str(factor))
        monkeypatch.setitem(linecache.cache, name, (len(code), None, code.splitlines(True), name))
        space = {"__name__": "notebook", "Static": generators.Static}
        exec(compile(code, name, "exec"), space)
        monkeypatch.setitem(generators.FAMILIES, "Fresh", space["Fresh"])
        return [folder_of(tiny_projectable(options={"family": family})) for family in ("Fresh", "Static")]

    first, second = keys(2), keys(3)
    assert first[0] != second[0] and first[1] == second[1]


@pytest.fixture
def notebook(monkeypatch):
    """notebook(cell, name): run that cell in a kernel, and register what it calls `Fresh` as the family `name`."""
    module = ModuleType("notebook")
    vars(module).update(vars(generators), __name__="notebook", np=np, partial=partial, wraps=wraps)
    monkeypatch.setitem(sys.modules, "notebook", module)

    def ran(cell, family=None):
        name = f"<cell {hash(cell)}>"
        monkeypatch.setitem(linecache.cache, name, (len(cell), None, cell.splitlines(True), name))
        exec(compile(cell, name, "exec"), vars(module))
        if family:
            monkeypatch.setitem(generators.FAMILIES, family, module.Fresh)

    return ran


def of_family(name: str = "Fresh") -> Path:
    return folder_of(tiny_projectable(options={"family": name}))


STEPPED = """def f(z):
    return {0} * z
STEPS = {1}
class K(Linear):
    def forward(self, z):
        return super().forward(STEPS[0 if isinstance(STEPS, list) else 1]{2}(z))
K"""


@pytest.mark.parametrize(
    "cells",
    [
        ["class Fresh(Linear): pass", "class Fresh(Kronecker): pass"],
        ["class Fresh(Linear): scale = 1.0", "class Fresh(Linear): scale = 2.0"],
        ["class Fresh(Linear): w = np.arange(3)", "class Fresh(Linear): w = np.arange(1, 4)"],
        [f"class Fresh(Linear):\n  act = nn.{act}()\n  def f(self): pass" for act in ("GELU", "SiLU")],
        [f"class Fresh(Linear):\n  @property\n  def f(self): return {n}" for n in (1, 2)],
        [f"def make(c):\n class Fresh(Linear):\n  def f(self): return c\n return Fresh\nmake({n})" for n in (1, 2)],
        [f"def make(c):\n class Fresh(Linear):\n  w = c\n return Fresh\nmake(np.ones({n}))" for n in (1, 2)],
        ["partial(LowRank, rank=2)", "partial(LowRank, rank=3)", "partial(LowRank, rank=2, a='')"],
        ["partial(make_generator, 'LowRank')", "partial(make_generator, 'Linear')"],
        [f"[lambda *about, k=k: LowRank(*about, k) for k in (1, 2)][{n}]" for n in (0, 1)],
        [f"made = [\n lambda *about: LowRank\n (*about, rank={n}),\n]\nmade[0]" for n in (1, 2)],
        [STEPPED.format(n, "[(1, f)]", "[1]") for n in (1, 2)],
        [STEPPED.format(n, "{1: f}", "") for n in (1, 2)],
    ],
)
def test_a_family_of_a_notebook_counts_with_all_that_it_was_made_of(notebook, cells):
    def key(cell):
        *before, last = cell.splitlines(True)
        if not cell.startswith("class"):
            cell = "".join([*before, f"Fresh = {last}"])
        notebook(cell, "Fresh")
        return of_family()

    keys = [key(cell) for cell in [*cells, *cells]]
    assert keys[: len(cells)] == keys[len(cells) :] and len(set(keys)) == len(cells), "a cell run again changes nothing"


def test_a_family_registered_anew_counts_though_nothing_else_holds_the_one_before(monkeypatch):
    folders = set()
    for rank in range(1, 5):  # of which the next, where it may, takes the place in memory
        monkeypatch.setitem(generators.FAMILIES, "Fresh", partial(generators.LowRank, rank=rank))
        folders.add(of_family())
        monkeypatch.undo()
    assert len(folders) == 4


def test_what_others_wrap_around_a_method_does_not_count(notebook):
    """As torch does with the steps of an optimiser, when the first one is made."""
    notebook("class Fresh(Linear):\n  @torch.no_grad()\n  def f(self): pass\n  g = nn.Module.train", "Fresh")
    before = of_family()
    notebook("Fresh.f, Fresh.g = (wraps(f)(lambda *about, f=f: f(*about)) for f in (Fresh.f, Fresh.g))")
    storage._known.clear()
    assert of_family() == before


def test_what_a_family_is_made_of_by_name_counts_with_its_code(notebook):
    notebook("Fresh = partial(make_generator, 'Own')", "Fresh")
    keys = set()
    for n in (1, 2):
        notebook(f"class Fresh(Linear):\n  def f(self): return {n}", "Own")
        keys.add(of_family())
    assert len(keys) == 2


GLOBALS = """
FACTOR, TABLE, MORE = 2, np.ones(3), {"w": torch.ones(2), "s": {"a", "b"}}
def double(x): return 2 * x
MIXED = {"act": double, "n": 3, "w": np.ones(3)}
"""
USER = """
class Fresh(Static):
    def forward(self, z):
        for _ in range(2):
            z = z * 1
        return double(FACTOR) * TABLE[0] * MORE["w"][0] * MIXED["act"](MIXED["n"]) * MIXED["w"][0] * self.base
"""


def test_a_global_of_a_notebook_counts_as_it_is_now(notebook):
    """Without another word of the class that uses it, and by value."""
    notebook(GLOBALS + USER, "Fresh")
    first, static = of_family(), of_family("Static")
    changes = ["FACTOR = 3", "TABLE[1] = 2", "TABLE = TABLE.astype('f')", "MORE['w'][0] = 2", "MIXED['n'] = 4"]
    changes += ["MIXED['w'] = np.zeros(3)", "MIXED['w'][1] = 2", "def double(x): return 3 * x"]
    for change in changes:
        notebook(change)
        assert of_family() not in (first, static), change
        notebook(GLOBALS)
        assert of_family() == first, change
    notebook("TABLE = np.ones(10**6)")
    large = of_family()
    notebook("TABLE[7] = 2")
    assert of_family() not in (first, large) and of_family("Static") == static


def test_a_global_that_only_bears_the_name_of_a_local_does_not_count(notebook):
    """As `_`, which a notebook sets to what it showed last."""
    notebook(GLOBALS + USER, "Fresh")
    first = of_family()
    for other in ("_ = z = 3", "_ = np.ones(3)", "def z(): pass"):
        notebook(other)
        assert of_family() == first, other


HELPER = """
import torch
LAST = torch.float32, range(3)
SCALE = 2.0
TABLE = torch.ones(3)
def helped(x):
    return SCALE * x
def other(): pass
"""
FAMS = """
import helper
from helper import helped
from projectable.generators import Static
class Fresh(Static):
    def forward(self, z):
        import helper as inside
        from helper import TABLE
        return helped(self.base) + TABLE.sum() + inside.LAST
class Dotted(Static):
    def forward(self, z):
        return helper.helped(self.base) + helper.TABLE.sum() + helper.LAST
"""


def test_modules_of_ones_own_count_as_far_as_they_are_used(monkeypatch, tmp_path):
    def keys(*change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "fams.py").write_text(FAMS)
        (folder / "helper.py").write_text(HELPER.replace(*change))
        for name in ("fams", "helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(folder)
        fams = importlib.import_module("fams")
        for name in ("Fresh", "Dotted"):
            monkeypatch.setitem(generators.FAMILIES, name, getattr(fams, name))
        return [of_family("Fresh"), of_family("Dotted")]

    before = keys("", "")
    for change in ("* x", "+ x"), ("2.0", "3.0"), ("ones(3)", "ones(4)"), ("ones(3)", "zeros(3)"), ("32, r", "16, r"):
        after = keys(*change)
        assert before[0] != after[0] and before[1] != after[1], change
    assert keys("pass", "return 1") == keys("    return", "  # so\n    return") == before
    assert [storage._is_own(name) for name in ("fams", "json", "os", "torch.ops", "numpy", "sys")] == [True] + 5 * [
        False
    ]


def test_a_function_in_a_registry_counts_whatever_its_form(monkeypatch):
    def key(name, tell):
        monkeypatch.setitem(experiment.TELL, name, tell)
        return folder_of(tiny_projectable(options={"conditioning": "SupportSet"}))

    entry = {"support": lambda data: data.first("train", 8)}
    other = lambda data: data.first("train", 4)  # noqa: E731
    found = [key("support", experiment.TELL["support"]), key("support", entry["support"]), key("support", other)]
    assert len(set(found)) == 3 and key("names", other) == found[-1]


def test_a_constant_counts_with_its_value(before, edit, monkeypatch):
    monkeypatch.setattr(transformer, "EPS", 1e-5)
    after = edit()
    assert {name for name in before if before[name] != after[name]} == RUNS


@pytest.mark.parametrize(
    ("name", "other", "counts"),
    [
        ("numpy", "9.0.0", True),
        ("numpy", "2.99.9", False),
        ("torch", "2.99.0", True),
        ("scikit-learn", "1.99.0", True),
        ("pandas", "9.0.0", False),
    ],
)
def test_versions_count_as_far_as_they_can_change_numbers(before, edit, monkeypatch, name, other, counts):
    version = storage.version
    monkeypatch.setattr(storage, "version", lambda n: other if n == name else version(n))
    after = edit()
    assert all((before[key] != after[key]) == counts for key in before)


@pytest.mark.parametrize(("dataset", "counts"), [("glyphs", True), ("digits", False)])
def test_letters_follow_what_draws_them(monkeypatch, dataset, counts):
    def key():
        experiment._drawn_by.cache_clear()
        return folder_of(tiny(data=DataConfig(dataset, "train16", vocab_size=32, patch=4, val_per_class=20)))

    before = key()
    monkeypatch.setattr(experiment, "version", lambda name: f"{name} of tomorrow")
    assert (key() != before) == counts
    experiment._drawn_by.cache_clear()


def test_words_about_the_code_and_code_of_others_do_not_count(before, edit):
    new = "@family\nclass Fresh(Generator):\n    pass\n\n\n@family\nclass Slice(Generator)"
    changes = [
        ('"""P₀ + Σ_k z_k B_k: the simplest', '"""The simplest'),
        ("  # the loss itself stays in float32", ""),
        ("def schedule(step: int, steps: int, warmup: int) -> float:", "def schedule(step, steps, warmup):"),
        ("z_dim: int, rank: int = 4", "z_dim: int, rank: int | None = 4"),
        ("z @ self.gate).view", "z@self.gate).view"),
        ("class Kronecker(Generator):", "class Kronecker(Generator):\n    other = 1"),
        ("def load_folder(", "def load_folder(a, "),
        ("def save_tensors(", "def store("),  # files carry numbers, they do not make them
        ("@family\nclass Slice(Generator)", new),
    ]
    assert edit(*(word for change in changes for word in change)) == before


def test_operations_of_fewer_layers_than_the_source_has(monkeypatch):
    monkeypatch.setattr(experiment, "_generation", lambda *about: 0)
    two, one = (tiny_projectable(tiny_source(n_layers=2), n_layers=2, options=o) for o in ({}, {"n_layers": 1}))
    layer = tiny(n_layers=2).shape(16, 8).n_operations() - tiny().shape(16, 8).n_operations()
    assert operations(two) - operations(one) == 3 * layer * 40 * 10 * 4 * 16


def test_operations_by_hand(source):
    shape = tiny().shape(16, 8)
    tokens = 40 * 10 * 4 * 16  # steps, tasks, images, tokens
    assert operations(tiny()) == 3 * shape.n_operations() * tokens
    making = 8 * (shape.n_parameters() + 48)  # a hypernetwork's weights of a task, gains and shifts, from 8 numbers
    assert operations(tiny(model="hypernetwork")) == 3 * shape.n_operations() * tokens + 3 * 40 * 10 * making
    big = tiny().shape(16)
    assert operations(tiny_source()) == 3 * big.n_operations() * tokens
    for kind in ("distilled", "distilled_specialists", "distilled_cut"):  # the teacher answers, and learns nothing
        taught = tiny(model=kind, start=tiny_source())
        assert operations(taught) == operations(tiny()) + big.n_operations() * tokens + operations(tiny_source())
    maps = 8 * (128 + 256 + 2048 + 48)  # numbers in z; stream, heads, neurons, gains and shifts of a task
    reads, writes = 8 * 16 * (48 + 64 + 32 + 32 + 16), 8 * 16 * (16 + 64)  # Pᵀ W, head and embeddings; W P
    generating = maps + reads + writes + 4 * 8 * 16 * 8 + 2 * 8 * 64 * 32  # … and heads and neurons
    both = 3 * (shape.n_operations() + big.n_operations()) * tokens + 3 * 40 * 10 * generating
    assert operations(tiny_projectable()) == both + operations(tiny_source())
    assert operations(tiny_projectable(seed=3, lr=(1.0,), steps=80)) == 2 * both + operations(tiny_source())
    told = tiny_projectable(options={"conditioning": "NoID"})
    assert operations(told) == both + operations(tiny_source())  # what makes the task vectors is left out
    hyper, taught = (
        tiny(model=f"{kind}hypernetwork", start=s) for kind, s in (("", None), ("distilled_", tiny_source()))
    )
    assert operations(taught) == operations(hyper) + big.n_operations() * tokens + operations(tiny_source())
    taught = tiny_projectable(model="distilled_projectable", options={"share": 0.3})
    assert operations(taught) == both + operations(tiny_source())  # the source answers in any case
    torch.manual_seed(5)
    state = torch.get_rng_state()
    experiment._generation.cache_clear()
    frozen = tiny_projectable(options={"source_mode": "frozen"})
    assert operations(frozen) == both - 3 * big.n_operations() * tokens + operations(tiny_source())
    assert torch.equal(torch.get_rng_state(), state)  # asking for a cost draws no numbers


def test_operations_of_what_starts_from_projections():
    ours = tiny_projectable(tiny_source(n_layers=2), n_layers=2, options={"n_layers": 1})
    assert operations(tiny(model="tuned", n_layers=2, start=ours)) == operations(tiny()) + operations(ours)
    adapted = tiny(model="adapted", n_layers=2, start=ours)
    alone = tiny_projectable(ours.start, n_layers=2, source_lr=0.0, options={"n_layers": 1, "source_mode": "frozen"})
    assert operations(adapted) - operations(ours) == operations(alone) - operations(ours.start)  # and their generation
    for model in ("hypernetwork", "universal"):
        assert operations(tiny(model="adapted", start=tiny(model=model))) == 2 * operations(tiny(model=model))
    few = tiny(model="hypernetwork", data=replace(DIGITS, tasks="clusters4"))  # fewer tasks than the new ones
    assert operations(tiny(model="adapted", start=few)) - operations(few) == operations(tiny(model="hypernetwork"))


@pytest.mark.parametrize("mode, lr", [("frozen", 0.0), ("tuned", 1e-3)])
def test_a_source_that_answers_and_has_no_objective_costs_a_pass(mode, lr):
    ours = tiny_projectable(source_lr=lr, options={"source_mode": mode})
    one_pass = 40 * 10 * 4 * 16 * ours.shape(16).n_operations()
    assert operations(ours.with_(model="distilled_projectable")) == operations(ours) + one_pass


def test_operations_of_a_small_teacher():
    taught = tiny(model="distilled_specialists", start=tiny())
    answers = 40 * 10 * 4 * 16 * tiny().shape(16, 8).n_operations()
    assert operations(taught) == operations(tiny(model="specialists")) + operations(tiny()) + answers


def test_distilled_projections_take_the_encoder_that_others_take():
    options = {"encoder": ("efficientnet_lite0",), "conditioning": "Features"}
    assert experiment._check_options(tiny_projectable(model="distilled_projectable", options=options)) is None
    with pytest.raises(ValueError, match="unknown option 'encodes'"):
        experiment._check_options(tiny_projectable(model="distilled_projectable", options={"encodes": ()}))


@pytest.mark.parametrize("encoder", [("resnet18", 3), ("resnet18", "w.pth", "sha", "more")])
def test_an_encoder_is_up_to_three_strings(encoder, digits):
    with pytest.raises(ValueError, match=r"encoder=\['resnet18', .*\]; allowed: up to three strings"):
        build(tiny_projectable(options=dict(encoder=encoder, conditioning="Features")), digits)


def test_operations_of_the_default_maps_by_hand(source):
    """One layer, d 16 → 8: eight P (embeddings, head, q, k, v, up, out, down), four G of heads, two of neurons."""
    config = tiny_projectable(options=arms.MAPS.options)
    inside = 8 * (8 * 128 + 4 * 128 + 2 * 2048 + 48)  # X of all maps, gains and shifts, from 8 numbers a task
    polar = (8 + 4) * (2 * 16 * 64 + 5 * 512)  # XᵀX and X times the root; of 8 × 8: G², root, G twice, G²
    reads, writes = 8 * 16 * (48 + 64 + 32 + 32 + 16), 8 * 16 * (16 + 64)
    generating = inside + polar + reads + writes + 4 * 8 * 16 * 8 + 2 * 8 * 64 * 32
    shapes = tiny().shape(16, 8).n_operations() + tiny().shape(16).n_operations()
    assert operations(config) == 3 * 40 * 10 * (shapes * 4 * 16 + generating) + operations(tiny_source())


def test_the_seed_of_a_run_decides_its_random_numbers_not_that_of_its_start(source, digits):
    one, two = (build(tiny_projectable(tiny_source(), seed=seed), digits) for seed in (0, 1))
    assert not torch.equal(one.conditioning["d8"].table, two.conditioning["d8"].table)


# ------------------------------------------------------------------------------------------------ many, in parallel


def slowly(config, told) -> None:
    """A run in a process of its own, which tells its steps."""

    def report(step, steps, loss):
        told.send(step)
        time.sleep(0.02)

    run(config, report)


@pytest.mark.slow
def test_two_processes_that_want_the_same_run_train_it_once(universal, other_runs, capsys):
    told, tell = Pipe(duplex=False)
    other = get_context("fork").Process(target=slowly, args=(tiny(), tell))
    other.start()
    tell.close()  # else nobody would hear that it died
    try:
        assert told.recv() == 1
        seen = []
        mine = run(tiny(), lambda *step: seen.append(step))  # waits for the other one
        assert [told.recv() for _ in range(39)] == list(range(2, 41))
        other.join()
        assert other.exitcode == 0
    finally:
        other.kill()
    assert seen == [] and f"{mine.folder.name} is being trained by another process: waiting" in capsys.readouterr().err
    assert mine.folder.parent == other_runs and mine.history == universal.history


GOOD = {"universal": tiny(), "projectable": tiny_projectable(), "specialists": tiny(model="specialists", lr=(3e-3,))}
OWN = tiny_projectable(steps=2, options={"family": "Imported"})
BAD = tiny(options=(("conditioning", "telepathy"),))


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Four good runs, two of which need a start, and a bad one among them, on two workers; and the error.

    One is of a family of a module that is imported, by a notebook, say, which workers cannot read themselves.
    """
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("modules")
    family = "@family\nclass Imported(Linear):\n    pass\n"
    (folder / "imported.py").write_text(f"from projectable.generators import Linear, family\n\n\n{family}")
    patch.syspath_prepend(folder)
    importlib.import_module("imported")
    patch.setenv("PROJECTABLE_RUNS", str(tmp_path_factory.mktemp("many")))
    patch.setenv("PYTHONPATH", str(root()))
    patch.setattr(experiment, "workers", lambda: 2)
    keep_data()
    experiment._pool.cache_clear()  # workers that another test may have started write elsewhere
    error = None
    try:
        run_many([GOOD["universal"], BAD, GOOD["projectable"], GOOD["specialists"], OWN], test=True)
    except ValueError as raised:
        error = raised
    experiment._pool(experiment.runs_dir(), "", "", ("imported",))[0].shutdown()
    experiment._pool.cache_clear()
    assert is_done(OWN), error
    yield {name: Run(config, folder_of(config)) for name, config in GOOD.items()}, error
    del generators.FAMILIES["Imported"]
    patch.undo()


@pytest.mark.slow
def test_an_error_is_raised_after_the_others_are_saved(side_by_side):
    runs, error = side_by_side
    assert "unknown conditioning 'telepathy'" in str(error)
    assert all((r.folder / "result.json").exists() and (r.folder / "test.json").exists() for r in runs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_side_by_side_gives_the_same_numbers_as_alone(side_by_side, session_runs, name, monkeypatch):
    theirs = side_by_side[0][name]
    monkeypatch.setenv("PROJECTABLE_RUNS", str(session_runs))
    mine = run(theirs.config)
    assert mine.folder != theirs.folder
    assert mine.history == theirs.history and mine.result["best_step"] == theirs.result["best_step"]
    a, b = mine.model().state_dict(), theirs.model().state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    for member, losses in mine.test_losses().items():
        assert torch.equal(losses, theirs.test_losses()[member])


@pytest.mark.slow
def test_what_is_there_is_found_again_in_the_order_asked_for(side_by_side, monkeypatch):
    runs = side_by_side[0]
    monkeypatch.setenv("PROJECTABLE_RUNS", str(runs["universal"].folder.parent))
    monkeypatch.setattr(experiment, "_pool", lambda *about: pytest.fail("trained again"))
    wanted = [GOOD["specialists"], GOOD["universal"], GOOD["specialists"]]
    found = run_many(wanted, test=True)
    assert [r.config for r in found] == wanted and [r.folder for r in found] == [folder_of(c) for c in wanted]


@pytest.mark.parametrize("p0", ["pca", "slice"])
def test_a_source_cut_to_its_own_width_is_that_source(source, digits, p0):
    cut = tiny(model="cut", sizes=(16,), steps=1, lr=(0.0,), start=tiny_source(), options=(("p0", p0),))
    whole = run(cut).model()
    mine, theirs = split_losses(whole, digits, "val")["d16"], split_losses(source.model(), digits, "val")["source"]
    assert torch.allclose(mine, theirs, atol=1e-5), "a rotation of the stream changes nothing; nothing was trained"
    half = run(cut.with_(sizes=(8,))).model()
    assert half.per_task["qkv"].shape == (10, 1, 8, 24)
    if p0 == "slice":
        first = source.model().plain["qkv"][0, :8, :8] * 2**0.5  # of the queries; √(d/d_s) as in every projection
        assert torch.allclose(half.per_task["qkv"][3, 0, :, :8], first)


def test_a_cut_that_is_distilled_begins_as_the_cut_and_learns_from_its_source(source, digits):
    cut, taught = (build(tiny(model=model, start=tiny_source()), digits) for model in ("cut", "distilled_cut"))
    assert taught.per_task.keys() == cut.per_task.keys()
    assert all(torch.equal(w, cut.per_task[name]) for name, w in taught.per_task.items())
    tokens = digits.first("train", 4)
    ids = torch.arange(len(tokens))
    answers = transformer.forward(source.model().weights("source", ids), tokens, 8).softmax(-1)
    own = transformer.forward(taught.weights("d8", ids), tokens, 8).log_softmax(-1)
    told = -(own.gather(-1, tokens[..., None])[..., 0] + (answers * own).sum(-1)).mean((1, 2)) / 2
    assert torch.allclose(taught.losses(ids, tokens)["d8"], told, atol=1e-5)


@pytest.mark.parametrize("mode", ["trained", "frozen"])
def test_projections_that_are_distilled_learn_from_their_source_as_it_is(source, digits, mode):
    options = {"share": 0.3, "source_mode": mode}
    plain = build(tiny_projectable(options={"source_mode": mode}), digits)
    taught = build(tiny_projectable(model="distilled_projectable", options=options), digits)
    assert taught.members == plain.members and taught.state_dict().keys() == plain.state_dict().keys()
    tokens = digits.first("train", 4)
    ids = torch.arange(len(tokens))
    usual, found = plain.losses(ids, tokens), taught.losses(ids, tokens)
    assert [*found] == [*usual] and ("source" in found) == (mode == "trained")
    assert all(torch.allclose(found[m], usual[m], atol=1e-5) for m in found if m == "source")
    answers = transformer.forward(plain.weights("source", ids), tokens, 8).softmax(-1)
    own = transformer.forward(plain.weights("d8", ids), tokens, 8).log_softmax(-1)
    for target, alike in ((answers.detach(), True), (answers, mode == "frozen")):  # no target that comes to meet
        told = 0.7 * usual["d8"] - 0.3 * (target * own).sum(-1).mean((1, 2))
        assert torch.allclose(found["d8"], told, atol=1e-5)
        of = [[*model.named_parameters()] for model in (plain, taught)]
        grads = [
            torch.autograd.grad(loss.sum(), [w for _, w in ws if w.requires_grad], retain_graph=True, allow_unused=True)
            for loss, ws in zip((told, found["d8"]), of, strict=True)
        ]
        assert alike == all(
            mine is theirs is None or torch.allclose(mine, theirs, atol=1e-6)
            for mine, theirs in zip(*grads, strict=True)
        )
    with torch.no_grad():
        assert torch.equal(taught.losses(ids, tokens)["d8"], plain.losses(ids, tokens)["d8"]), "judged by images alone"


def test_a_start_of_another_width_is_not_trained_under_this_ones_name(digits, source):
    wide = tiny(sizes=(16,), steps=2)
    with pytest.raises(ValueError, match="'specialists' of width 8; allowed: a width of its start: d16"):
        build(tiny(model="specialists", start=wide, steps=2), digits)
    assert build(tiny(model="specialists", start=wide, sizes=(16,), steps=2), digits).members == ("d16",)
    with pytest.raises(ValueError, match="'tuned' of width 16; allowed: a width of its start: source, d8"):
        build(tiny(model="tuned", start=tiny_projectable(), sizes=(16,)), digits)


@pytest.mark.parametrize("conditioning", ["SupportSet", "ShuffledID"])
def test_looking_at_a_models_width_draws_nothing(digits, source, conditioning):
    config, states = tiny_projectable(options={"conditioning": conditioning}), []
    for make in (experiment.untrained, lambda config, data, start: build(config, data)):
        start = run(config.start).model()
        torch.manual_seed(5)
        make(config, digits, start)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["model.safetensors", "history.json"])
@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_of_a_run_that_lost_a_file_the_folder_has_to_go(other_runs, name, what):
    path = run(tiny(steps=2)).folder / name
    path.unlink() if what == "gone" else path.write_bytes(path.read_bytes()[:-9])
    found = experiment.Run(tiny(steps=2), path.parent)
    with pytest.raises(DamagedFile, match=rf"{name} is {what}.*: delete the folder {path.parent} and run again$"):
        found.model() if name.startswith("model") else found.history
    shutil.rmtree(path.parent)  # as it says
    again = run(tiny(steps=2))
    assert again.model() and again.history


def test_of_several_errors_the_one_is_told_that_is_no_divergence(other_runs, monkeypatch):
    monkeypatch.setattr(experiment, "workers", lambda: 1)
    errors = [DivergedError("the loss is nan"), OSError("the disk is on fire")]
    monkeypatch.setattr(experiment, "_in_turn", lambda *about: list(errors))
    for diverging in (True, False):
        with pytest.raises(OSError, match="the disk is on fire"):
            run_many([tiny(steps=2)], diverging=diverging)


@pytest.mark.parametrize(
    "config, words",
    [
        (tiny(model="hypernetwork", options={"z_dim": 0}), "option z_dim=0; allowed: 1 to 65536"),
        (tiny(model="hard_mixture", options={"n_experts": 0}), "option n_experts=0; allowed: 1 to 65536"),
        (tiny(model="distilled", options={"share": 2.0}, start=tiny_source()), "option share=2.0; allowed: 0 to 1"),
        (
            tiny(model="distilled_cut", options={"share": math.nan}, start=tiny_source()),
            "option share=nan; allowed: 0 to 1",
        ),
        (tiny_projectable(options={"encoder": "resnet50"}), "option encoder='resnet50'; allowed: a list"),
    ],
)
def test_options_out_of_bounds_are_named(config, words, digits):
    with pytest.raises(ValueError, match=words):
        build(config, digits)


def test_a_module_that_is_changed_while_it_is_loaded_counts_as_it_was_loaded(tmp_path, monkeypatch):
    """Its functions' code is that of before: under another key it would be found for code that never ran."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "changed_meanwhile.py"
    file.write_text("def f():\n    return 1\n")
    module = importlib.import_module("changed_meanwhile")
    before = storage.source_of(module.__name__)
    file.write_text("def f():\n    return 2222\n")
    assert storage.source_of(module.__name__) == before and "return 1" in before
    importlib.reload(module)
    assert "return 2222" in storage.source_of(module.__name__) and module.f() == 2222
    kept = {name for name in sys.modules if name.startswith("projectable.") and name not in storage._sources}
    assert not {"projectable.models", "projectable.training", "projectable.generators", "projectable.tasks"} & kept


def test_runs_that_diverge_are_remembered_and_do_not_keep_others_from_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECTABLE_RUNS", str(tmp_path))
    monkeypatch.setattr(experiment, "workers", lambda: 1)
    good, bad = tiny(steps=2), tiny_source(steps=2)
    child = tiny_projectable(steps=2, start=bad)
    trained, train = [], experiment._train

    def diverging(config, *arguments):
        trained.append(config)
        if config == bad:
            raise DivergedError("the loss is nan at step 2")
        train(config, *arguments)

    monkeypatch.setattr(experiment, "_train", diverging)
    runs = run_many([child, bad, good], diverging=True)
    assert [r.config for r in runs] == [child, bad, good] and trained.count(bad) == 1
    assert runs[0].result["val"] == {"d8": math.inf, "source": math.inf} == runs[1].result["val"] | {"d8": math.inf}
    assert math.isfinite(runs[2].result["val"]["d8"])
    run_many([child, bad, good], diverging=True)
    for config in (child, bad):
        with pytest.raises(DivergedError, match="the loss is nan at step 2"):
            run_many([good, config])
        with pytest.raises(DivergedError, match="the loss is nan at step 2"):
            run(config)
    assert trained == [bad, good], "nothing was tried again"


class Inline:
    """In place of a pool: the first one loses its worker, as when memory runs out; later ones work in this process."""

    made = 0

    def __init__(self, *arguments):
        Inline.made += 1
        self.broken = Inline.made == 1

    def submit(self, work, *arguments):
        future = Future()
        if self.broken:
            future.set_exception(BrokenProcessPool("a worker was killed"))
        else:
            future.set_result(work(*arguments))
        return future


@pytest.fixture
def inline(other_runs, monkeypatch):
    """`Inline` in place of the pool of another folder of runs."""
    monkeypatch.setattr(Inline, "made", 0)
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(experiment, "_progress", Queue())
    experiment._pool.cache_clear()
    yield
    experiment._pool.cache_clear()


def test_after_a_killed_worker_the_next_call_goes_on(inline):
    with pytest.raises(BrokenProcessPool, match="a worker was killed .*, or a script trains outside of `if __name"):
        run_many([tiny(steps=10)])
    (finished,) = run_many([tiny(steps=10)])
    assert is_done(finished.config)


def test_a_worker_that_was_killed_between_two_calls_is_replaced(inline, monkeypatch):
    def submit(self, work, *arguments, usual=Inline.submit):
        if self.broken:
            raise BrokenProcessPool("a worker was killed")
        return usual(self, work, *arguments)

    monkeypatch.setattr(Inline, "submit", submit)
    (finished,) = run_many([tiny(steps=10)])
    assert is_done(finished.config) and Inline.made == 2


@pytest.mark.parametrize(
    "wrong",
    [
        tiny_projectable(steps=2, options={"famly": "Linear"}),
        tiny_projectable(tiny_source(steps=2, options=(("famly", "Linear"),)), steps=2),
    ],
)
def test_a_misspelt_option_is_said_before_any_run_is_trained(other_runs, wrong):
    with pytest.raises(ValueError, match="unknown option 'famly' of the model"):
        run_many([tiny(steps=2), wrong])
    assert not list(other_runs.glob("*/result.json"))


def test_images_that_are_gone_when_a_run_ends_do_not_lose_it(other_runs, tmp_path, monkeypatch):
    """What it was trained on is in memory."""
    config, train = tiny(steps=2), experiment.train

    def gone(*about, **more):
        monkeypatch.setattr(experiment, "data_for", lambda config: pytest.fail("read again"))
        return train(*about, **more)

    monkeypatch.setattr(experiment, "train", gone)
    experiment._train(config, folder := folder_of(config), None, None, experiment.Team())
    assert (folder / "result.json").exists()


def test_a_folder_that_jupyter_left_in_an_unfinished_run_does_not_stop_it(other_runs):
    (folder_of(tiny(steps=2)) / ".ipynb_checkpoints").mkdir(parents=True)
    (draft := folder_of(tiny(steps=2)) / ".model.safetensors.0123").touch()  # of a process that was killed
    assert run(tiny(steps=2)).is_done() and not draft.exists()


SOURCE, CLUSTERS = dict(model="source", sizes=(), lr=(), source_lr=1e-2), replace(DIGITS, tasks="clusters4")
OURS = dict(model="projectable", start=tiny_source())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(clip=float("nan")), "clip=nan; allowed: more than 0"),
        (dict(eval_every=0), "eval_every=0; allowed: 1 or more"),
        (dict(val_images=-3), "val_images=-3; allowed: 0 or more"),
        (dict(val_images=10**7), "val_images=10000000; allowed: up to 1000000"),
        (dict(d_source=2**17), "d_source=131072; allowed: up to 65536"),
        (dict(sizes=(0,)), "sizes=\\[0\\]; allowed: 1 to 65536"),
        (dict(sizes=(8, 16)), r"1 learning rates for 2 sizes \(8, 16\): one each is allowed"),
        (dict(sizes=(8, 16), lr=(1e-2, 1e-2)), "allowed for model 'universal': one size"),
        (dict(model="projectable"), "model 'projectable' needs 'start'"),
        (
            dict(model="specialists", start=tiny(model="masked_universal")),
            "allowed for 'specialists': one that reads as it does",
        ),
        (
            dict(model="specialists", start=tiny(), n_layers=2),
            "start: n_layers=1, in the run itself 2; allowed: the same in both",
        ),
        (SOURCE | dict(start=tiny()), "start: model 'universal'; allowed for 'source': 'source'"),
        (SOURCE | dict(model="masked_source", start=tiny_source()), "allowed for 'masked_source': 'masked_source'"),
        (
            SOURCE | dict(start=tiny_source(data=CLUSTERS)),
            "start: data=.*clusters4.*, in the run itself .*; allowed: the same in both",
        ),
        (SOURCE | dict(source_lr=0), "source_lr=0.0, with which the source learns nothing; allowed: more than 0"),
        (SOURCE | dict(model="masked_source", source_lr=0), "source_lr=0.0, .*; allowed: more than 0"),
        (OURS | dict(options={"source_mode": "tuned"}), "source_lr=0.0, .*; allowed: more than 0"),
        (SOURCE | dict(sizes=(8,), lr=(1e-2,)), r"sizes=\[8\]; allowed for 'source': none"),
        (OURS | dict(sizes=(), lr=()), r"sizes=\[\]; allowed for 'projectable': one or more"),
        (dict(steps=10**8), "steps=100000000 × tasks_per_step=10 × images_per_task=4; allowed: up to 100000000 images"),
        (dict(options=(("n", 1), ("n", 2))), "'n' is there twice; allowed: each key once"),
        (dict(options={"family": {"a": 1}}), "option family={'a': 1}; allowed: a number, a string, true, false, null"),
        (dict(lr=1e-3), "lr=0.001; allowed: a list of float"),
        (dict(lr=("1e-3",)), "lr='1e-3'; allowed: float"),
        (dict(lr=(10**400,)), "lr=1000.*; allowed: float"),
        (dict(data="digits"), "data is 'digits'; allowed: an object with the keys of DataConfig"),
        (
            dict(model="specialists", start=Run(tiny(), "x")),
            r"start is Run\(.*; allowed: an object with the keys of Run",
        ),
    ],
)
def test_a_config_made_in_python_is_checked_as_one_of_json_is(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(options={"family": "Lineer"}), "unknown generator 'Lineer'"),
        (
            dict(options={"famly": "LowRank"}),
            "unknown option 'famly' of the model 'projectable'; allowed: encoder, family, z_dim, .*, neurons$",
        ),
        (dict(options={"famly": 1, "family": "LowRank"}), "'famly' .*; allowed: .*, neurons, rank$"),
        (dict(options={"famly": 1, "family": "Orthonormal", "inner": "LowRank"}), "'famly' .*, inner, steps, rank$"),
        (dict(options={"seed": 1}), "unknown option 'seed' of the model 'projectable'"),
        (dict(options={"z_dim": 4.5}), "option z_dim=4.5; allowed: a whole number"),
        (dict(options={"z_dim": None}), "option z_dim=None; allowed: a whole number"),
        (dict(options={"n_layers": "1"}), "option n_layers='1'; allowed: a whole number"),
        (dict(options={"family": ["Linear"]}), r"option family=\('Linear',\); allowed: a string"),
        (dict(options={"use_task_embedding": 1}), "option use_task_embedding=1; allowed: true or false"),
        (dict(options={"p0": "magic"}), "unknown p0 'magic'"),
        (dict(options={"source_rate": -1.0}), "source_rate=-1.0; allowed: 0 or more"),
        (dict(options={"source_weight": "much"}), "source_weight='much'; allowed: a number"),
        (dict(options={"z_dim": 0}), "z_dim=0; allowed: 1 to 65536"),
        (dict(sizes=(12,)), "d_model=12 is no multiple of d_head=8"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_before_its_source_is_trained(other_runs, changes, message):
    config = tiny_projectable(tiny_source(steps=3), steps=2).with_(**changes)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not is_done(config.start)


def test_numbers_of_numpy_are_those_of_python():
    made = tiny(
        lr=np.array([1e-2]), seed=np.int64(1), clip=np.float32(1), steps=np.int32(40), options={"n": np.int8(2)}
    )
    assert made.key() == tiny(seed=1, options={"n": 2}).key()


def test_lists_in_a_config_made_in_python_are_as_good_as_tuples():
    options = (("conditioning", "film"), ("widths", (1, 2)))
    made = tiny(sizes=[8], lr=[1e-2], options={"widths": [1, 2], "conditioning": "film"})
    assert made == tiny(sizes=(8,), lr=(1e-2,), options=options) and hash(made) == hash(
        tiny(lr=(1e-2,), options=options)
    )
    assert made.key() == tiny(lr=(1e-2,), options=options).key()


@pytest.mark.parametrize("name", ["vocab_size", "patch"])
def test_data_of_no_codes_or_pixels(name):
    with pytest.raises(ValueError, match=f"{name}=0; allowed: 1 or more"):
        DataConfig("digits", **{name: 0})
    with pytest.raises(ValueError, match=r"dataset=PosixPath\('digits'\); allowed: str"):
        DataConfig(Path("digits"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model="adapted", start=tiny(steps=2), sizes=(16,)),
            r"sizes=\[16\] would have d8; allowed: the widths that",
        ),
        (
            SOURCE | dict(options={"conditioning": "film"}, start=tiny_source(steps=2)),
            "start: conditioning='additive', in the run itself 'film'; allowed: the same in both",
        ),
        (
            dict(model="specialists", start=tiny(data=CLUSTERS, steps=2)),
            "start: 4 tasks; allowed: as many as the run itself has, 10",
        ),
        (
            dict(model="specialists", start=tiny(data=replace(DIGITS, vocab_size=16), steps=2)),
            "start: 16 tokens of 16 codes; allowed: those of the run itself, 16 of 32",
        ),
        (
            dict(model="adapted", start=tiny(data=replace(DIGITS, patch=4), steps=2)),
            "start: 4 tokens of 32 codes; allowed: those of the run itself, 16 of 32",
        ),
        (
            dict(model="adapted", start=tiny(data=replace(DIGITS, val_per_class=30), steps=2)),
            "start: the codes of .*, which are not those of the run itself.*; allowed: the same in both",
        ),
    ],
)
def test_models_that_cannot_be_built(digits, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny(**changes), digits)


def test_a_teacher_without_a_source_is_named_before_it_is_trained(other_runs):
    adapted = tiny(model="adapted", start=tiny_projectable(), steps=2)
    with pytest.raises(ValueError, match="a teacher that is Adapted; allowed: a universal model, as the source is"):
        run(tiny(model="distilled_specialists", start=adapted, steps=2))
    assert not list(other_runs.glob("*/result.json"))


class Transposed(generators.Linear):
    def forward(self, z):
        return super().forward(z).mT


class Double(generators.Linear):
    def forward(self, z):
        return super().forward(z).double()


class Endless(generators.Linear):
    def forward(self, z):
        return super().forward(z) / 0


class Mute(generators.Generator):
    pass


class Noisy(generators.Static):
    def forward(self, z):
        return super().forward(z) + torch.rand(())


class Long(generators.LearnedID):
    def forward(self, task_ids):
        return torch.cat([self.table, self.table[:, :1]], 1)[task_ids]


class Short(generators.LearnedID):
    def forward(self, task_ids):
        return self.table[:5][task_ids]


class Exact(generators.LearnedID):
    def forward(self, task_ids):
        return super().forward(task_ids).double()


class Unknown(generators.LearnedID):
    def forward(self, task_ids):
        return super().forward(task_ids) * float("nan")


class Centred(generators.LearnedID):
    def forward(self, task_ids):
        z = super().forward(task_ids)
        return z - z.mean(0)


@pytest.mark.parametrize(
    "made, said",
    [
        (Transposed, r"the generator Transposed gives maps \(2, 1, 8, 16\) of 2 tasks; allowed: \(2, 1, 16, 8\) or"),
        (Double, "the generator Double gives maps of torch.float64; allowed: numbers, torch.float32"),
        (Endless, "the generator Endless gives maps that are not finite; allowed"),
        (Mute, "the generator Mute gives no maps: NotImplementedError"),
        (
            Noisy,
            "the generator Noisy gives a task other maps alone than beside others, or each time; allowed: the same",
        ),
        (Long, r"the conditioning Long gives vectors \(2, 9\) of 2 tasks; allowed: \(2, 8\)"),
        (Short, "the conditioning Short gives no vectors: index 9 is out of bounds"),
        (Exact, "the conditioning Exact gives vectors of torch.float64; allowed: numbers, torch.float32"),
        (Unknown, "the conditioning Unknown gives vectors that are not finite; allowed"),
        (Centred, "the conditioning Centred gives a task other vectors alone than beside others"),
    ],
)
def test_what_makes_the_wrong_maps_or_vectors_is_named_before_its_source_is_trained(
    other_runs, monkeypatch, made, said
):
    which = "family" if issubclass(made, generators.Generator) else "conditioning"
    monkeypatch.setitem(generators.FAMILIES if which == "family" else generators.CONDITIONINGS, made.__name__, made)
    config = tiny_projectable(tiny_source(steps=3), steps=2, options={which: made.__name__})
    with pytest.raises(ValueError, match=said):
        run(config)
    assert not is_done(config.start)


@pytest.mark.parametrize(
    "registry, name, thing, said",
    [
        (
            generators.FAMILIES,
            "Linear",
            Transposed,
            "test_experiment.Linear has a name that is taken; allowed: another",
        ),
        (generators.CONDITIONINGS, "NoID", Long, "test_experiment.NoID has a name that is taken"),
        (
            generators.FAMILIES,
            "Plain",
            torch.nn.Linear,
            "Plain is no Generator; allowed: a class that inherits from it",
        ),
        (generators.CONDITIONINGS, "Made", lambda n_tasks, z_dim: None, "Made is no Conditioning; allowed: a class"),
        (images.LOADERS, "text", lambda: None, "LOADERS.'text'. has a name that is taken"),
    ],
)
def test_what_is_registered_has_a_name_and_a_base_of_its_own(other_runs, monkeypatch, registry, name, thing, said):
    monkeypatch.setitem(registry, name, thing)
    with pytest.raises(ValueError, match=said):
        run(tiny(steps=2))


class Unit(generators.Linear):
    def forward(self, z):
        return super().forward(z / z.norm(dim=-1, keepdim=True))


def test_a_family_that_divides_by_the_length_of_a_task_vector_is_none_of_these(digits, source, monkeypatch):
    monkeypatch.setitem(generators.FAMILIES, "Unit", Unit)
    assert experiment.build(tiny_projectable(source.config, options={"family": "Unit"}), digits)


def test_a_conditioning_that_needs_what_nobody_tells_is_named(digits, source, monkeypatch):
    class Coloured(generators.LearnedID):
        needs = ("colour",)

    monkeypatch.setitem(generators.CONDITIONINGS, "Coloured", Coloured)
    with pytest.raises(
        ValueError, match="needs 'colour'; allowed: what `experiment.TELL` has, vectors, names, support"
    ):
        experiment.build(tiny_projectable(source.config, options={"conditioning": "Coloured"}), digits)


def test_the_same_folder_is_the_same_data_from_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = DataConfig("folder:own")
    assert own == DataConfig(f"folder:{tmp_path / 'own'}") == DataConfig(f"folder:../{tmp_path.name}/own")
    assert tiny(data=DataConfig("digits")).key() != tiny(data=DataConfig("fashion")).key()
    monkeypatch.setitem(images.LOADERS, "hub:digits", images.LOADERS["digits"])
    assert DataConfig("hub:digits").dataset == "hub:digits", "a name, not a path"


def test_wrong_options_are_named_before_anything_is_trained(digits, monkeypatch):
    monkeypatch.setattr(experiment, "run", lambda config: pytest.fail("trained its start"))
    of_source, told = dict(start=tiny_source(seed=9)), "conditioning, zero_writes"
    for model, changes, allowed in (
        ("adapted", dict(start=tiny(seed=9)), "tune"),
        ("universal", {}, told),
        ("source", dict(sizes=(), lr=(), source_lr=1e-2), told),
        ("hypernetwork", {}, "z_dim, family"),
        ("distilled_hypernetwork", of_source, "z_dim, family, share"),
        ("distilled", of_source, "conditioning, share"),
        ("distilled_specialists", of_source, "share"),
        ("distilled_cut", of_source, "p0, share"),
        ("hard_mixture", {}, "n_experts"),
        ("told", dict(start=tiny(model="support_universal", seed=9)), "none"),
    ):
        with pytest.raises(ValueError, match=f"unknown option 'tun' of the model '{model}'; allowed: {allowed}$"):
            experiment.build(tiny(model=model, options={"tun": "maps"}, **changes), digits)


def test_starts_that_give_what_the_config_says(digits):
    shallow = tiny_projectable(tiny_source(n_layers=2, steps=2), n_layers=2, steps=2, options={"n_layers": 1})
    for model in ("adapted", "tuned"):
        built = experiment.build(tiny(model=model, start=shallow, n_layers=2), digits)
        assert built.weights("d8", torch.arange(2))["qkv"].shape[-3] == 1
    distilled = tiny(model="distilled", start=tiny_source(steps=2), steps=2)
    again = tiny(model="adapted", start=tiny(model="adapted", start=distilled, steps=2), steps=2)
    assert experiment.build(again, digits).members == ("d8",)
    whole = tiny(model="specialists", start=tiny_source(steps=2), sizes=(16,), steps=2)
    assert experiment.build(whole, digits).members == ("d16",)


def test_a_start_that_fails_is_tried_once(other_runs, monkeypatch):
    monkeypatch.setenv("PROJECTABLE_WORKERS", "1")
    tried, train = [], experiment._train

    def fail(config, *about):
        tried.append(config.model)
        if config.model == "source":
            raise OSError("no room")
        train(config, *about)

    monkeypatch.setattr(experiment, "_train", fail)
    with pytest.raises(OSError, match="no room"):
        run_many([tiny_source(), tiny_projectable(), tiny(steps=2)])
    assert tried == ["source", "universal"] and is_done(tiny(steps=2))


def test_a_single_worker_trains_here_and_says_how_far_it_is(other_runs, universal, monkeypatch, capsys):
    monkeypatch.setenv("PROJECTABLE_WORKERS", "1")
    monkeypatch.setattr(experiment, "_pool", lambda *_: pytest.fail("started a worker"))
    bad = tiny(options=(("conditioning", "telepathy"),))
    with pytest.raises(ValueError, match="unknown conditioning 'telepathy'"):
        run_many([bad, tiny()], "two runs", test=True)
    mine = Run(tiny(), folder_of(tiny()))
    assert mine.history == universal.history and (mine.folder / "test.json").exists()
    assert "two runs, 2 runs: 100%" in capsys.readouterr().err and experiment._progress is None


def test_a_single_worker_is_this_process_beside_a_gpu_too(other_runs, monkeypatch):
    monkeypatch.setenv("PROJECTABLE_WORKERS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(experiment, "_in_turn", lambda order, *_: [ValueError(f"{len(order)} run here")])
    with pytest.raises(ValueError, match="1 run here"):
        run_many([tiny()])


def test_a_number_of_workers_that_is_none(monkeypatch):
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("PROJECTABLE_WORKERS", wrong)
        with pytest.raises(ValueError, match=f"PROJECTABLE_WORKERS='{wrong}'; allowed: a whole number of 1 or more"):
            experiment.workers()


def test_as_many_workers_as_the_memory_of_a_gpu_holds(monkeypatch):
    monkeypatch.delenv("PROJECTABLE_WORKERS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, found in ((1, 1), (7, 3), (80, 16)):  # GiB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 80 * 2**30))
        assert experiment.workers() == found
