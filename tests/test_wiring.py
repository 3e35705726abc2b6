"""What a config, a profile and an option say arrives where it decides numbers: other values than the defaults."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny, tiny_projectable, tiny_source
from test_arms import PROFILE, study  # noqa: F401
from test_reporting import FOUND, project, write_notebook  # noqa: F401

import projectable
from projectable import experiment, reporting, tasks, training
from projectable.arms import Scarce
from projectable.config import DataConfig, get_profile
from projectable.tasks import TaskData


def test_a_training_is_what_its_config_says(digits, monkeypatch):
    seen, real = {}, dict(draw=TaskData.draw, clip=torch.nn.utils.clip_grad_norm_, of=training.split_losses)
    optimizer = training.make_optimizer

    def noted(name, function, what):
        return lambda *given, **more: (seen.setdefault(name, what(given)), function(*given, **more))[1]

    monkeypatch.setattr(TaskData, "draw", noted("draw", real["draw"], lambda given: given[1:]))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted("clip", real["clip"], lambda given: given[1]))
    monkeypatch.setattr(training, "split_losses", noted("val", real["of"], lambda given: given[2:]))
    monkeypatch.setattr(training, "make_optimizer", noted("decay", optimizer, lambda given: given[2]))
    changes = dict(steps=3, tasks_per_step=7, images_per_task=3, seed=5, clip=0.25, weight_decay=0.5, val_images=6)
    config = tiny(**changes)
    training.train(experiment.build(config, digits), digits, config)
    assert seen == dict(draw=(3, 7, 3, 5, 0), clip=0.25, val=("val", 6), decay=0.5)


def test_the_best_step_is_that_of_the_mean_over_members(digits, source, monkeypatch):
    losses = iter([dict(source=[1.0] * 10, d8=[9.0] * 10), dict(source=[2.0] * 10, d8=[3.0] * 10)])
    given = lambda *_, **__: {m: torch.tensor(x, dtype=torch.float64) for m, x in next(losses).items()}  # noqa: E731
    monkeypatch.setattr(training, "split_losses", given)
    config = tiny_projectable(steps=2, eval_every=1)
    assert training.train(experiment.build(config, digits), digits, config).best_step == 2


def test_options_arrive_in_the_model(digits, source):
    def built(model, options, **changes):
        return experiment.build(tiny(model=model, options=options, **changes), digits)

    maker = built("hypernetwork", dict(z_dim=3, family="LowRank"))
    assert (maker.conditioning.z_dim, maker.family) == (3, "LowRank")
    assert len(built("hard_mixture", dict(n_experts=3)).per_task["qkv"]) == 3
    for model in ("distilled", "distilled_hypernetwork", "distilled_specialists", "distilled_cut"):
        assert built(model, dict(share=0.3), start=tiny_source()).share == 0.3
    assert built("support_universal", dict(conditioning="film")).conditioning == "film"
    for model, more in (("universal", {}), ("source", dict(sizes=(), lr=(), source_lr=1e-2))):
        assert not built(model, dict(zero_writes=True), **more).plain["out"].any()
    for start in (tiny(steps=2), tiny_projectable(steps=2)):
        few, all_ = (built("adapted", dict(tune=tune), start=start) for tune in ("vector", "maps"))
        few, all_ = (sum(map(len, model.groups().values())) for model in (few, all_))
        assert few < all_


def test_profiles_arrive_in_configs(study):  # noqa: F811
    study.loss = lambda config, member: 1.0
    changes = dict(eval_every=3, val_images=7, images_per_task=5, tasks_per_step=6, seeds=(3, 4))
    study.profile = replace(PROFILE, **changes)
    mine, few = study.config("specialists", {8: 1e-2}, 3), Scarce(study, "heldout20", 5, 20)
    for config in (mine, few.config("scratch", 8, 1e-2, 3)):
        assert (config.val_images, config.images_per_task, config.tasks_per_step) == (7, 5, 6)
    assert mine.eval_every == 3
    laptop = get_profile("laptop")
    assert (laptop.short.source_steps, laptop.short.joint_steps, laptop.short.eval_every) == (60, 240, 200)
    assert (laptop.long.source_steps, laptop.long.joint_steps, laptop.long.eval_every) == (800, 3200, 800)


def test_of_a_notebook_that_fails_nothing_earlier_is_left(project, monkeypatch):  # noqa: F811
    path = write_notebook(project, "01_good", "1 + 1")
    claims = project / "reports" / "results" / "claims" / "01_good.json"
    executed = project / "build" / "laptop" / "01_good.ipynb"
    reporting.write_results(claims, [dict(id="c", commit="a")])
    executed.parent.mkdir(parents=True)
    executed.write_text(path.read_text().replace("1 + 1", "earlier_run"))
    monkeypatch.setattr(reporting, "execute", lambda *_: 1 / 0)
    assert reporting.run_notebook(path, "laptop").status == "failed"
    assert json.loads((project / "reports" / "claims.json").read_text()) == []
    assert "earlier_run" not in (project / "reports" / "01_good.html").read_text()


@pytest.mark.parametrize("own", [False, True])
def test_only_the_reference_run_writes_its_claims_into_the_readme(project, monkeypatch, own):  # noqa: F811
    (project / "README.md").write_text(before := "a <!-- claims: x --> b <!-- /claims -->")
    monkeypatch.setenv("PROJECTABLE_REPORTS", str(project / "own") if own else "")
    write_notebook(project, "00_a")

    def run(path, *_):
        reporting.write_results(reporting.reports_dir("laptop") / "results" / "claims" / "00_a.json", [FOUND])
        return reporting.Status(path.stem, "A", "laptop", "ok", 1.0)

    monkeypatch.setattr(reporting, "run_notebook", run)
    for make in (lambda: reporting.reproduce("laptop"), lambda: reporting.report("laptop")):
        (project / "README.md").write_text(before)
        make()
        assert ((project / "README.md").read_text() == before) == own


def test_a_worker_whose_code_or_images_are_others_refuses(other_runs):
    with pytest.raises(RuntimeError, match="code or images were changed while this process ran"):
        experiment._work(tiny(steps=1), other_runs / "universal-000000000000", False)
    assert not list(other_runs.glob("*/result.json"))


def test_side_by_side_runs_have_one_thread_each(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for workers, threads in ((2, 1), (1, 7)):
        monkeypatch.setattr(experiment, "workers", lambda workers=workers: workers)
        assert experiment._threads() == threads


def test_families_come_back_from_the_disk(digits, other_runs, monkeypatch):
    monkeypatch.setitem(tasks.MAKERS, "mine", lambda *about: replace(digits, families=tuple("abcdefghij")))
    assert experiment.data_for(DataConfig("mine", "kinds", 32, 2, 20)).families == tuple("abcdefghij")


def test_a_low_temperature_is_the_likeliest_token_without_torch_too(monkeypatch):
    class Session:
        def run(self, names, given):
            n, length = given["tokens"].shape
            return [np.broadcast_to(np.array([0.0, 1.0, 2.0], np.float32), (n, length, 3))]

    about = dict(length=4, patch=1, height=2, width=2, n_codes=3)
    about["codes"] = projectable.base64.b64encode(np.array([0, 0.5, 1], "<f4").tobytes()).decode()
    monkeypatch.setattr(projectable, "open_onnx", lambda path: (Session(), about))
    cold, warm = (projectable.sample_onnx("x", 50, t, seed=0) for t in (0.01, 1.0))
    assert (cold == 1).all() and len(np.unique(warm)) == 3
