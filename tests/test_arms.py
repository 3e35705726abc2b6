"""How learning rates, variants and starts are chosen, with runs whose losses are made up; how new tasks are met."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import DIGITS, randomise, tiny, tiny_projectable

from projectable import arms, experiment, generators
from projectable.arms import ARMS, EVERY, FEW_IMAGES, LINEAR, MAPS, MIDDLES, UNIVERSALS, Scarce, Study, at_size
from projectable.config import get_profile
from projectable.models import Adapted, Hypernetwork, Projectable, SupportUniversal, Universal, for_new_tasks
from projectable.training import DivergedError
from projectable.transformer import Shape

PROFILE = replace(get_profile("smoke"), trials=3, max_trials=6)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(trials=0), "trials=0; allowed: 1 or more"),
        (dict(seeds=()), r"seeds=\(\); allowed: one or more"),
        (dict(sizes=8), "sizes=8; allowed: a list of int"),
        (dict(sizes=("8",)), "sizes='8'; allowed: int"),
    ],
)
def test_what_a_profile_or_a_study_says_is_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(PROFILE, **changes)
    if "sizes" in changes:
        with pytest.raises(ValueError, match=said):
            Study(PROFILE, **changes)


@pytest.fixture
def study(monkeypatch):
    """A study whose runs end at once with the loss that `study.loss(config, member)` gives; `study.asked` keeps all."""
    found = Study(PROFILE)
    found.asked = []

    def run_many(configs, words, test=False, diverging=False):
        found.asked += configs
        runs = []
        for config in configs:
            members = [f"d{s}" for s in config.sizes] + ["source"]
            result = {"val": {m: found.loss(config, m) for m in members}, "seconds": 1.0}
            runs.append(SimpleNamespace(config=config, result=result, has_diverged=found.diverges(config)))
        return runs

    monkeypatch.setattr(arms, "run_many", run_many)
    monkeypatch.setattr(arms, "Run", lambda config, _: SimpleNamespace(has_diverged=found.diverges(config)))
    found.diverges = lambda config: False
    return found


def bowl(lr, best):
    """A loss that is least at that rate, and the larger the more factors away."""
    return 1.0 + abs(math.log2(lr / best))


def test_a_sweep_goes_on_until_the_best_is_inside(study):
    study.loss = lambda config, member: bowl(config.lr[0], 0.32)
    trials = study.sweep("universal_film")
    eight = trials[trials.d_s == 8]
    assert eight.lr.tolist() == [0.04, 0.08, 0.16, 0.32, 0.64]
    assert eight.lr[eight.best].tolist() == [0.32] and not eight.at_edge.any()
    assert study.rates("universal_film")[8] == 0.32


def test_the_sources_rate_beside_projections_is_swept_for_each_arm(study):
    best = {"trained": 1.0, "random_kept": 4.0}

    def loss(config, member):
        options = dict(config.options)
        of_source = bowl(options.get("source_rate", 1.0), best.get(options.get("source_mode", "trained"), 1.0))
        return of_source + bowl(config.start.source_lr if config.start else 1e-2, 1.4e-2)

    study.loss = loss
    found = arms.sweep_source_rates(study, "projected", "bank_kept")
    tried = {name: rows.source_rate.tolist() for name, rows in found.groupby("arm")}
    assert tried == {"projected": [0.5, 1.0, 2.0], "bank_kept": [0.5, 1.0, 2.0, 4.0, 8.0]}
    assert dict(zip(found.arm[found.best], found.source_rate[found.best], strict=True)) == dict(
        projected=1, bank_kept=4
    )
    other = Study(PROFILE, options={name: dict(source_rate=2.0) for name in ("projected", "bank_kept")})
    rates = {8: 1e-2, 16: 1e-2, 24: 1e-2}
    for name in ("projected", "bank_kept"):
        one, two = (of.config(name, rates, 1) for of in (study, other))
        assert one.start == two.start and dict(two.options)["source_rate"] == 2.0, "one beginning for all"


def test_rates_of_the_source_are_multiples_of_the_controls_whatever_the_study_has(study):
    study.options = {"projected": dict(source_rate=2.0)}
    study.loss = lambda config, member: 1.0
    found = arms.sweep_source_rates(study, "projected")
    asked = [dict(c.options).get("source_rate", 1.0) for c in study.asked if c.model == "projectable"]
    assert asked[-len(found) :] == found.source_rate.tolist() == [0.5, 1.0, 2.0]


def test_studies_of_two_folders_share_no_trial(study):
    study.loss = lambda config, member: bowl(config.lr[0], {"/cats": 0.32, "/dogs": 0.02}[config.data.dataset[-5:]])
    pets = [
        Study(replace(PROFILE, data=replace(PROFILE.data, dataset=f"folder:/pictures/{name}")))
        for name in ("cats", "dogs")
    ]
    tables = arms.sweep_together([(one, ["universal_film"]) for one in pets])
    assert [one.rates("universal_film")[8] for one in pets] == [0.32, 0.02]
    assert {c.data.dataset for c in study.asked} == {one.data.dataset for one in pets} and len(tables) == 2


def test_an_arm_that_is_not_there_is_named(study):
    with pytest.raises(ValueError, match="unknown arm 'projectd'; allowed: source, source_control, .*, hard_mixture$"):
        study.sweep("source_control", "projectd")
    with pytest.raises(ValueError, match="unknown arm 'projectd'; allowed: source, .*, universal$"):
        study.seeds("universal", "projectd")
    with pytest.raises(ValueError, match="unknown arm 'universal'"):  # which of them, its sweep is to say
        study.sweep("universal")
    with pytest.raises(
        ValueError, match="options of an unknown arm 'told_Feature'; allowed: source, .*, hard_mixture$"
    ):
        Study(PROFILE, options={"told_Feature": {}})
    with pytest.raises(
        ValueError, match="unknown arm 'static'; allowed: source, source_control, projected, universal_a"
    ):
        Study(PROFILE, masked=True).sweep("static")
    with pytest.raises(ValueError, match="unknown arm 'projected'; allowed: projected_vector"):
        Scarce(study, "heldout20", 5, 20).sweep("projected")
    with pytest.raises(ValueError, match="no arm was swept yet"):
        study.trials()


def test_an_arm_may_be_given_more_options(study):
    given = Study(PROFILE, options={"told_Features": dict(encoder=("resnet50", "a.pth"))})
    mine, usual = (of.config("told_Features", {8: 1e-2}, 0, (1e-2, 1e-2)) for of in (given, study))
    assert dict(mine.options) == dict(usual.options) | dict(encoder=("resnet50", "a.pth"))
    assert given.config("projected", {8: 1e-2}, 0, (1e-2, 1e-2)) == study.config(
        "projected", {8: 1e-2}, 0, (1e-2, 1e-2)
    )


def test_sweeps_of_several_studies_share_their_rounds(study, monkeypatch):
    study.loss = lambda config, member: bowl(config.lr[0], {PROFILE.n_layers: 0.08, 3: 0.32}[config.n_layers])
    deeper, rounds, run_many = Study(replace(PROFILE, n_layers=3)), [], arms.run_many
    monkeypatch.setattr(
        arms, "run_many", lambda configs, words, **how: rounds.append(len(configs)) or run_many(configs, words)
    )
    tables = arms.sweep_together([(study, ["universal_film"]), (deeper, ["universal_film"])])
    first = 3 * len(PROFILE.sizes)
    assert rounds[0] == 2 * first and len(rounds) > 1 and max(rounds[1:]) < 2 * first + 2 * len(PROFILE.sizes)
    for table, alone in zip(tables, (study, deeper), strict=True):
        pd.testing.assert_frame_equal(alone.trials(), table)
        pd.testing.assert_frame_equal(table, alone.sweep("universal_film"))
    both = pd.concat([tables[0], study.sweep("specialists")], ignore_index=True)
    study.rates("universal_film")  # a sweep again, but no new trials
    pd.testing.assert_frame_equal(study.trials(), both)
    assert (tables[0].groupby("d_s").size() < tables[1].groupby("d_s").size())[8], "one goes on alone"


def test_a_best_that_stays_at_the_edge_is_marked(study):
    study.loss = lambda config, member: -config.lr[0]
    trials = study.sweep("universal_film")
    assert (trials.groupby("d_s").size() == PROFILE.max_trials).all()
    assert trials.groupby("d_s").at_edge.sum().tolist() == [1, 1, 1]


def test_a_rate_that_changes_nothing_is_the_middle_one(study):
    study.loss = lambda config, member: 1.0
    trials = study.sweep("universal_film")
    middles = [study.middle("universal_film", size) for size in PROFILE.sizes]
    assert trials.lr[trials.best].tolist() == middles and not trials.at_edge.any()
    assert (trials.groupby("d_s").size() == 3).all()


def test_trials_that_diverge_are_the_worst_and_a_sweep_of_nothing_else_is_an_error(study):
    study.loss = lambda config, member: math.inf if config.lr[0] > 0.03 else bowl(config.lr[0], 0.02)
    trials = study.sweep("universal_film").query("d_s == 8")
    assert trials.lr.tolist() == [0.01, 0.02, 0.04, 0.08, 0.16] and trials.lr[trials.best].tolist() == [0.02]
    assert trials.val_loss.tolist() == [2.0, 1.0, math.inf, math.inf, math.inf] and not trials.at_edge.any()
    study.loss = lambda config, member: math.inf
    words = r"universal_token, width 8: training diverged at each of 6 learning rates: centre its sweep lower"
    with pytest.raises(DivergedError, match=words):
        study.sweep("universal_token")


def test_sizes_of_one_run_have_rates_of_their_own(study):
    best = {"d8": 1e-2, "d16": 5e-3, "d24": 2e-2}
    study._rates |= {"source": {32: 1e-2}, "source_control": {32: 1e-2}}
    study.loss = lambda config, member: bowl(
        config.lr[config.sizes.index(int(member[1:]))] if member in best else 1, best.get(member, 1)
    )
    assert study.rates("projected") == {8: 1e-2, 16: 5e-3, 24: 2e-2}


def test_the_sources_beginning_is_judged_by_its_projections(study):
    def loss(config, member):
        if config.model == "projectable":
            return bowl(config.start.source_lr, 7e-3)
        return bowl(config.source_lr, 2.8e-2)  # its own loss would choose another

    study.loss = loss
    trials = study.sweep("source")
    assert trials.lr[trials.best].tolist() == [7e-3] and set(trials.arm) == {"source"}
    assert all(config.model == "projectable" for config in study.asked)
    assert all(config.lr == tuple(at_size(MAPS.lr, s) for s in config.sizes) for config in study.asked)
    assert {config.source_lr for config in study.asked} == {at_size(MIDDLES["arms"]["source_control"], 32)}
    assert study.rates("source_control") == {32: 2e-2}, "the control is judged by itself, as far as its sweep goes"
    config = study.config("projected", {s: 1e-3 for s in PROFILE.sizes}, seed=1)
    assert (config.start.source_lr, config.start.seed, config.source_lr) == (7e-3, 1, 2e-2)


def test_the_best_universal_model_is_chosen_by_size_on_validation_images(study):
    favour = {8: "film", 16: "adaln", 24: "token"}
    study.loss = lambda config, member: (
        bowl(config.lr[0], 0.08) - 0.5 * (dict(config.options)["conditioning"] == favour[config.sizes[0]])
    )
    assert [study.best_universal(s) for s in PROFILE.sizes] == ["universal_film", "universal_adaln", "universal_token"]
    n_asked = len(study.asked)
    assert study.best_universal(8) == "universal_film" and len(study.asked) == n_asked, "once is enough"
    runs = study.seeds("universal")["universal"]
    assert sorted((r.config.sizes[0], r.config.seed) for r in runs) == [(s, i) for s in PROFILE.sizes for i in (0, 1)]
    assert {dict(r.config.options)["conditioning"] for r in runs} == set(favour.values())


def test_a_rival_that_learns_from_a_given_source_is_told_as_the_best_of_the_study_without_one(study):
    study.loss = lambda config, member: (
        bowl((*config.lr, config.source_lr)[0] or 1.0, 0.08) - (dict(config.options).get("conditioning") == "film")
    )
    given = Study(replace(PROFILE, source_steps=50, joint_steps=5), rivals=study)
    assert given.best_universal(8) == "universal_film"
    taught = given.config("universal_taught", {8: 1e-2}, 0)
    assert dict(taught.options)["conditioning"] == "film" and (taught.steps, taught.start.steps) == (5, 50)
    trained = {(config.model, config.steps) for config in study.asked}
    assert ("universal", 55) not in trained, "as long as source and projections together"


def test_seeds_of_several_studies_are_those_that_each_asks_for(study, monkeypatch):
    study.loss = lambda config, member: bowl((*config.lr, config.source_lr)[0] or 1.0, 0.02)
    few = Scarce(study, "heldout20", 5, 20)
    wanted = [(study, ["projected", "universal"]), (few, ["scratch", "projected_vector"])]
    arms.sweep_together([(study, ["projected", *UNIVERSALS]), wanted[1]])
    study.asked.clear()
    arms.seeds_together(wanted, max_seeds=2)
    together = {config.key() for config in study.asked}
    study.asked.clear()
    for of, names in wanted:
        of.seeds(*names, max_seeds=2)
    asked = [config.key() for config in study.asked]
    n_sizes = len(PROFILE.sizes)
    assert together >= set(asked) and len(asked) == 2 + 3 * 2 * n_sizes


def test_where_a_seed_diverges_all_seeds_take_the_best_of_the_other_rates(study, capsys):
    study.loss = lambda config, member: bowl(config.lr[0], 0.16)
    study.diverges = lambda config: config.seed == 1 and config.lr[0] > 0.1
    runs = study.seeds("universal_film")["universal_film"]
    eight = [(r.config.seed, r.config.lr[0]) for r in runs if r.config.sizes == (8,)]
    assert eight == [(0, 0.08), (1, 0.08)] and not any(study.diverges(r.config) for r in runs)
    trials = study.trials().query("d_s == 8")
    assert trials.lr[trials.best].tolist() == [0.08] == [study.rates("universal_film")[8]]
    assert trials.val_loss[trials.lr == 0.16].tolist() == [math.inf]
    said = capsys.readouterr().out.splitlines()
    words = "universal_film, width 8: seed 1 diverged at 0.16; all seeds take the best of the other rates"
    assert words in said and len(said) == len(set(said)), "each once"
    study.diverges = lambda config: config.seed == 1
    with pytest.raises(DivergedError, match="universal_film, width .*: training diverged at each of 6 learning rates"):
        study.seeds("universal_film")


def test_where_what_a_seed_starts_from_diverges_that_is_chosen_anew(study):
    """The source, and then the projections by it; the best universal model, from which others are tuned."""

    def diverges(config):
        gone = config.seed == 1 and (config.source_lr > 0.02 or config.model == "universal" and config.lr[0] > 0.01)
        return gone and config.model != "projectable" or config.start is not None and diverges(config.start)

    study.loss = lambda config, member: bowl((config.start or config).source_lr or config.lr[0], 2.8e-2)
    study.diverges = diverges
    assert study.rates("source")[32] == 2.8e-2
    runs = study.seeds("projected")["projected"]
    assert {r.config.start.source_lr for r in runs} == {study.rates("source")[32]} == {1.4e-2}
    assert study.rates(study.best_universal(8))[8] > 0.01
    runs = study.seeds("specialists_tuned")["specialists_tuned"]
    assert all(r.config.start.lr[0] <= 0.01 for r in runs) and not any(diverges(r.config) for r in runs)


def test_only_what_diverged_is_refused_where_several_seeds_start_from_it(study):
    """The best universal model diverges at two seeds: the second one does not take the next best model with it."""
    study.profile = replace(PROFILE, seeds=(0, 1, 2))
    study.loss = lambda config, member: (
        bowl((*config.lr, config.source_lr)[0] or 1.0, 0.08) + (dict(config.options).get("conditioning") != "film")
    )

    def diverges(config):
        film = dict(config.options).get("conditioning") == "film"
        return film and config.seed > 0 or config.start is not None and diverges(config.start)

    study.diverges = diverges
    assert study.best_universal(8) == "universal_film"
    runs = study.seeds("specialists_tuned")["specialists_tuned"]
    assert {name for name, *_ in study._refused} == {"universal_film"}
    assert len(runs) == 3 * len(PROFILE.sizes) and not any(diverges(r.config) for r in runs)


def test_a_rate_of_new_tasks_at_which_a_seed_diverges_is_left_out(study):
    study.loss = lambda config, member: bowl((*config.lr, config.source_lr)[0] or 1.0, 0.06)
    study.diverges = lambda config: config.model == "specialists" and config.seed == 1 and config.lr[0] > 0.05
    scarce = Scarce(study, "heldout20", 5, 20)
    assert scarce.rates("scratch")[8] == 0.06
    runs = scarce.seeds("scratch")["scratch"]
    assert {r.config.lr[0] for r in runs if r.config.sizes == (8,)} == {0.02} == {scarce.rates("scratch")[8]}
    study.diverges = lambda config: (
        bool(config.start)
        and study.diverges(config.start)
        or (config.model == "projectable" and config.seed == 1 and config.lr[0] == first)
    )
    first = study.rates("projected")[8]
    runs = scarce.seeds("projected_vector")["projected_vector"]
    assert first not in {r.config.start.lr[0] for r in runs} and len(runs) == 2 * len(PROFILE.sizes)


def test_tuned_specialists_and_their_start_see_as_many_examples_as_all(study):
    study.loss = lambda config, member: bowl(config.lr[0], 0.08)
    config = study.config("specialists_tuned", {8: 1e-2}, seed=1)
    assert config.start.model == "universal" and config.start.seed == 1
    assert config.steps + config.start.steps == PROFILE.source_steps + PROFILE.joint_steps


@pytest.mark.parametrize("maps", [MAPS, LINEAR], ids=["orthonormal", "linear"])
def test_arms_that_name_no_family_have_the_studys_maps(study, maps, digits):
    study.maps, study.loss = maps, lambda config, member: 1.0
    start = Universal(Shape(32, n_layers=2, vocab_size=32, length=16), 10, "additive", "source")
    for name, arm in EVERY.items():
        if arm.model == "projectable":
            config = study.config(name, {8: 1e-2}, 0)
            static = dict.fromkeys(maps.families, arm.options["static"]) if "static" in arm.options else {}
            of_maps = {} if "family" in arm.options else maps.options | static
            own = {key: value for key, value in arm.options.items() if key != "static"}
            assert dict(config.options) == of_maps | own, name
            if "conditioning" not in own:
                model = experiment.untrained(config, digits, start)  # the family takes these options
                assert type(model.projections["d8"].stream).__name__ == (own | of_maps)["family"]


def test_sweeps_of_projections_are_centred_on_the_rate_of_their_maps(study):
    study.loss = lambda config, member: bowl(config.lr[0], study.middle("projected", 8))
    study._rates |= {"source": {32: 1e-2}, "source_control": {32: 1e-2}}
    for study.maps in (MAPS, LINEAR):
        trials = study.sweep("projected", "family_Mixture")
        rates = trials.groupby(["arm", "d_s"]).lr.unique()
        for size in PROFILE.sizes:
            centre = at_size(study.maps.lr, size)
            assert set(rates["projected", size]) >= {float(f"{centre * f:.2g}") for f in (0.5, 1, 2)}
            own = MIDDLES[study.maps.name].get("family_Mixture", study.maps.lr)
            assert at_size(own, size) in rates["family_Mixture", size]


def test_a_study_may_begin_its_sweeps_elsewhere(study):
    assert study.middle("universal_film", 16) == 4e-2 and study.middle("universal_token", 32) == 2e-2
    short = Study(PROFILE, middles="letters", maps=LINEAR)
    assert short.middle("universal_film", 16) == 4e-2 and short.middle("universal_film", 40) == 2e-2
    assert short.middle("projected", 16) == 6e-4, "the study's comes before that of the maps"
    assert short.middle("depth_2", 8) == MIDDLES["linear"]["depth_2"][8]
    assert short.middle("static_maps", 8) == LINEAR.lr[8] and short.middle("hard_mixture", 8) == 5.6e-2
    assert short.middle("source", 32) == MIDDLES["arms"]["source"][0] and short.middle("source_control", 32) == 2e-2
    with pytest.raises(ValueError, match="unknown middles of sweeps 'letter'; allowed: orthonormal, linear, short"):
        Study(PROFILE, middles="letter")
    with pytest.raises(ValueError, match="unknown middles of sweeps 'mine'; allowed: orthonormal, linear, short"):
        Study(PROFILE, maps=replace(LINEAR, name="mine"))


def test_another_sweep_chooses_the_rate_anew(study, monkeypatch):
    study.loss = lambda config, member: bowl(config.lr[0], 0.028)
    study.sweep("specialists")
    before = study.rates("specialists")
    monkeypatch.setitem(MIDDLES["arms"], "specialists", {8: 0.16})
    study.loss = lambda config, member: bowl(config.lr[0], 0.32)
    study.sweep("specialists")
    assert before[8] == 0.028 and study.rates("specialists")[8] == 0.32


def test_arms_that_cannot_be_are_refused(study, monkeypatch):
    for steps in ("jonit", 0, -0.5, None):
        with pytest.raises(ValueError, match=f"steps={steps!r}; allowed: source, joint, .*, or a share"):
            arms.Arm("mine", "universal", steps)
    assert arms.Arm("mine", "universal", 1) == arms.Arm("mine", "universal")
    monkeypatch.setitem(EVERY, "mine", arms.Arm("mine", "universal"))
    with pytest.raises(ValueError, match="no middle of the sweep of 'mine'; allowed: an entry of it under"):
        study.sweep("mine")


def test_sweeps_begin_at_rates_of_arms_that_there_are():
    for name, table in MIDDLES.items():
        assert not table.keys() - EVERY.keys(), name
        assert all(0 < rate < 1 and size >= 0 for lr in table.values() for size, rate in lr.items()), name
    own = {name for name, arm in EVERY.items() if not arm.model.endswith("projectable") and arm.steps != "none"}
    assert MIDDLES["arms"].keys() == own, "projections begin at the rate of their maps"


def test_controls_differ_from_the_projection_in_what_they_say(study):
    study.loss = lambda config, member: 1.0
    rates = {8: 1e-2, 16: 1e-2, 24: 1e-2}
    controls = [
        name
        for name, arm in (ARMS | {n: EVERY[n] for n in ("source_tuned", "bank_kept")}).items()
        if arm.model == "projectable"
    ]
    options = {name: dict(study.config(name, rates, 0).options) for name in controls}
    static = dict(inner="Static", neurons="Static")
    for name, difference in {
        "projected_few_dims": dict(z_dim=3),
        "static_token": static,
        "static_maps": dict(inner="StaticMaps", neurons="StaticMaps"),
        "static": static | dict(use_task_embedding=False),
        "bank_trained": dict(source_mode="random_trained"),
        "bank_frozen": dict(source_mode="random_frozen"),
        "source_frozen": dict(source_mode="frozen"),
        "source_tuned": dict(source_mode="tuned"),
        "bank_kept": dict(source_mode="random_kept"),
    }.items():
        assert options[name] == options["projected"] | difference


def test_every_arm_is_in_one_place_and_starts_somewhere():
    assert set(UNIVERSALS) <= set(ARMS) <= set(EVERY)
    assert all(arm.start in ("", "universal", *EVERY) for arm in EVERY.values())
    assert all(arm.base in ("", "universal", *EVERY) and arm.after in ("", *FEW_IMAGES) for arm in FEW_IMAGES.values())


# -------------------------------------------------------------------------------------------------- new tasks


@pytest.mark.parametrize("conditioning", ["token", "additive", "film", "adaln", "hypernetwork"])
def test_a_model_for_new_tasks_starts_at_the_mean_of_those_it_knows(shape, conditioning):
    def of_tasks(n):
        return (
            Hypernetwork(shape, n, 3, "LowRank")
            if conditioning == "hypernetwork"
            else Universal(shape, n, conditioning)
        )

    known, mean = randomise(of_tasks(3)), of_tasks(1)
    new = for_new_tasks(known, 5)
    ids = torch.arange(5)
    table = dict(film="film", hypernetwork="conditioning.table").get(conditioning, "task_embedding")
    state = known.state_dict()
    mean.load_state_dict(state | {table: state[table].mean(0, keepdim=True)})
    for name, w in new.weights("d16", ids).items():
        torch.testing.assert_close(w, mean.weights("d16", torch.zeros(5, dtype=torch.long))[name])
    assert [name for name, p in new.named_parameters() if p.requires_grad] == [table]
    assert all(p.requires_grad for p in for_new_tasks(known, 5, "maps").parameters())
    with pytest.raises(ValueError, match="unknown tune 'all'; allowed: vector, maps"):
        for_new_tasks(known, 5, "all")


@pytest.fixture(scope="module")
def base():
    return experiment.run(tiny_projectable()).model()


def test_projections_for_new_tasks_start_at_the_mean_and_tune_what_they_say(base, digits):
    support = digits.first("train", 4)[:2]
    new = Adapted(base, 2, (8,), support)
    assert new.members == ("d8",)
    known = base.conditioning["d8"](torch.arange(10)).mean(0)
    torch.testing.assert_close(new.vectors["d8"][1], known)
    ids = torch.arange(2)
    before = base.projections["d8"].stream.base.clone()
    optimizer = torch.optim.SGD([p for ps in new.groups().values() for p in ps], lr=0.1)
    first = new.losses(ids, support)["d8"].sum()
    for _ in range(10):
        optimizer.zero_grad()
        new.losses(ids, support)["d8"].sum().backward()
        optimizer.step()
    assert new.losses(ids, support)["d8"].sum() < first
    assert torch.equal(base.projections["d8"].stream.base, before), "only vectors and what the source is told"
    assert not any(p.requires_grad for p in base.source.parameters())
    alone = Adapted(base, 2, (8,), support, "z")
    assert [p is alone.vectors["d8"] for p in alone.groups()["d8"]] == [True] and len(new.groups()["d8"]) == 2


def test_maps_for_new_tasks_are_tuned_where_asked(base, digits):
    support = digits.first("train", 4)[:2]
    new = Adapted(base, 2, (8,), support, "maps")
    assert any(p is base.projections["d8"].stream.base for p in new.groups()["d8"])
    assert new.rate_factor("vectors.d8") == 1.0
    assert new.rate_factor("base.projections.d8.stream.base") == pytest.approx(0.01)
    with pytest.raises(ValueError, match="unknown tune 'model'; allowed: z, vector, maps"):
        Adapted(base, 2, (8,), support, "model")
    with pytest.raises(ValueError, match="no projections of d16 to adapt; allowed: d8"):
        Adapted(base, 2, (16,), support)


def test_maps_that_were_fixed_stay_so_when_maps_are_tuned(source, digits, monkeypatch):
    class Fixed(generators.Linear):
        def __init__(self, base, z_dim):
            super().__init__(base, z_dim)
            self.base.requires_grad_(False)

    monkeypatch.setitem(generators.FAMILIES, "Fixed", Fixed)
    fixed = Projectable(source.model(), 10, (8,), digits.first("train", 4), family="Fixed")
    stream = Adapted(fixed, 2, (8,), digits.first("train", 4)[:2], "maps").base.projections["d8"].stream
    assert [name for name, p in stream.named_parameters() if p.requires_grad] == ["directions"]


@pytest.mark.parametrize(("conditioning", "where"), [("additive", "positions"), ("film", "qkv")])
def test_a_universal_model_is_told_of_new_tasks_by_their_images(shape, digits, conditioning, where):
    torch.manual_seed(0)
    support = digits.first("train", 16)
    known, ids = SupportUniversal(shape, support, conditioning=conditioning), torch.arange(3)
    same = known.weights("d16", ids)[where]
    assert torch.equal(same[0], same[1]), "before training it makes no use of them"
    optimizer = torch.optim.Adam(known.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        known.losses(torch.arange(10), support[:, :4])["d16"].sum().backward()
        optimizer.step()
    assert not torch.equal(known.outward, torch.zeros_like(known.outward)) and known.rate_factor("outward") == 1.0
    assert all(p.grad.abs().max() > 0 for p in known.encoder.parameters()), "after two steps images decide"
    known.eval()
    new = known.told_of(support[[7, 2]]).eval()
    for name, w in new.weights("d16", torch.arange(2)).items():
        whole = known.weights("d16", torch.tensor([7, 2]))[name]
        torch.testing.assert_close(w, whole)
    few = known.told_of(support[[7, 2], :3]).eval().weights("d16", torch.arange(2))[where]
    assert (few != new.weights("d16", torch.arange(2))[where]).any(), "three images say something else than 16"
    with pytest.raises(ValueError, match="conditioning 'adaln' by images; allowed: additive, film"):
        SupportUniversal(shape, support, conditioning="adaln")


def test_new_tasks_need_a_start_that_can_be_told_of_them(digits):
    with pytest.raises(ValueError, match="'specialists'; allowed for 'adapted': 'projectable' or 'universal'"):
        tiny(model="adapted", start=tiny(model="specialists"))
    with pytest.raises(ValueError, match="start: projections that are adapted already; allowed for 'adapted': the p"):
        tiny(model="adapted", start=tiny(model="adapted", start=tiny_projectable()))
    with pytest.raises(ValueError, match="'universal'; allowed for 'told': 'support_universal'"):
        tiny(model="told", start=tiny(), lr=(0.0,), steps=1)
    with pytest.raises(ValueError, match="Universal with 'none' conditioning; allowed for new tasks: token, additive"):
        experiment.build(tiny(model="adapted", start=tiny(options=(("conditioning", "none"),), steps=2)), digits)


def test_a_few_images_of_new_tasks_choose_their_own_rate(study):
    study.loss = lambda config, member: bowl((*config.lr, config.source_lr)[0] or 1.0, 0.54)
    scarce = Scarce(study, "heldout20", 5, 20)
    trials = scarce.sweep("scratch")
    eight = trials[trials.d_s == 8]
    assert eight.lr.tolist() == pytest.approx([0.0067, 0.02, 0.06, 0.18, 0.54, 1.6]), "on, until the best is inside"
    assert eight.lr[eight.best].tolist() == [0.54] and not eight.at_edge.any() and scarce.rates("scratch")[8] == 0.54
    config = scarce.config("scratch", 8, 0.06, seed=1)
    assert config.data.tasks == "heldout20-few5-s1" and config.seed == 1 and config.start is None
    assert DIGITS.dataset == config.data.dataset
    told = scarce.sweep("projected_support", "universal_support")
    assert (told.lr == 0).all() and told.best.all() and not told.at_edge.any(), "nothing is tuned: nothing to sweep"
    told_run = scarce.config("universal_support", 8, 0.0, seed=1)
    assert (told_run.model, told_run.steps, told_run.start.sizes) == ("told", 1, (8,))
    taught = scarce.config("distilled", 8, 0.06, seed=1)
    assert taught.start.sizes == (PROFILE.d_source,) and taught.start.start.model == "source", "its teacher is tuned"


def test_sweeps_of_new_tasks_share_their_rounds_with_those_of_what_they_start_from(study, monkeypatch):
    study.loss = lambda config, member: bowl((*config.lr, config.source_lr)[0] or 1.0, 0.02)
    study._rates |= {"source": {32: 1e-2}, "source_control": {32: 1e-2}}
    rounds, run_many = [], arms.run_many

    def counting(configs, words, **how):
        rounds.append({config.data.tasks for config in configs})
        return run_many(configs, words, **how)

    monkeypatch.setattr(arms, "run_many", counting)
    names = ["projected_vector", "projected_model", "distilled", "universal_vector"]
    few = [Scarce(study, "heldout20", n, 20) for n in (5, 25)]
    tables = arms.sweep_together([(of, names) for of in few])
    new = {f"heldout20-few{n}-s0" for n in (5, 25)}
    assert all(of in ({study.data.tasks}, new) for of in rounds), "both at once, after the study's own"
    together = len(rounds)
    assert {*UNIVERSALS, "projected", "source_control"} <= set(study.trials().arm)
    for of, table in zip(few, tables, strict=True):
        assert list(dict.fromkeys(table.arm)) == names
        rounds.clear()
        pd.testing.assert_frame_equal(Scarce(study, "heldout20", of.n, 20).sweep(*names), table)
        assert all(tasks == {f"heldout20-few{of.n}-s0"} for tasks in rounds) and len(rounds) < together


def test_a_run_that_goes_on_is_shown_other_images_than_what_it_starts_from(study, digits):
    study.loss = lambda config, member: 1.0
    config = study.config("specialists_tuned", {8: 1e-2}, 0)
    assert config.steps == config.start.steps and (config.start.drawn_before(), config.drawn_before()) == (0, 1)
    order = config.steps, config.tasks_per_step, config.images_per_task, config.seed
    first, second = (digits.draw(*order, part.drawn_before()) for part in (config.start, config))
    assert not torch.equal(first[1], second[1])
    assert study.config("projected", {8: 1e-2}, 0).drawn_before() == 0, "another number of steps is another order"
