"""What decides numbers and no other test notices: rates, seeds, splits, scales, what is counted."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny, tiny_projectable, tiny_source
from test_arms import PROFILE, study  # noqa: F401
from test_evaluation import table
from test_projection import BIG, big, model, tokens  # noqa: F401

from projectable import arms, evaluation, experiment
from projectable.arms import LAMBDA, Scarce
from projectable.generators import make_generator
from projectable.models import Adapted, SupportUniversal, Universal, base_maps, redraw_inner_weights
from projectable.tasks import TaskData
from projectable.training import train
from projectable.transformer import forward, hidden, initial_weights


def test_lambda_multiplies_the_gradient_of_the_sources_own_loss(digits, source, monkeypatch):
    grads = {}
    for weight in (1.0, 3.0):
        config = tiny_projectable(options={"source_weight": weight}, steps=1)
        small, seen = experiment.build(config, digits), []
        with monkeypatch.context() as patch:

            def clip(parameters, most, small=small, seen=seen):
                seen.append(small.source.plain["qkv"].grad.clone())
                return torch.ones(())

            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            train(small, digits, config)
        grads[weight] = seen[0]
    small = experiment.build(config, digits)
    ids, index = digits.draw(1, 10, 4, config.seed)
    small.losses(ids[0], digits.batch(ids[0], index[0]))["source"].mean().backward()
    torch.testing.assert_close(grads[3.0] - grads[1.0], 2 * small.source.plain["qkv"].grad, rtol=1e-3, atol=1e-6)


def test_relative_rates_in_numbers(tokens):  # noqa: F811
    small = model(tokens)
    rates = {
        name: small.rate_factor(f"projections.d8.{name}")
        for name in ("stream.base", "neurons.base", "modulation.base", "stream.directions")
    }
    assert rates == {"stream.base": 1.0, "neurons.base": 0.25, "modulation.base": 4.0, "stream.directions": 0.4}
    assert model(tokens, source_rate=0.5).rate_factor("source.plain.qkv") == 0.5


def test_pca_is_that_of_normalised_states_the_last_one_counting_twice(big, tokens):  # noqa: F811
    weights, seen = initial_weights(big, torch.Generator().manual_seed(0)), {}
    weights["positions"][0] *= 30  # one token whose states are long
    last = hidden(weights, tokens, watch=seen.__setitem__)
    unit = [x.reshape(-1, BIG).double() for x in (seen["stream.0"], seen["stream.1"], last)]
    unit = torch.cat([x / x.square().mean(-1, keepdim=True).sqrt() for x in unit])
    expected = torch.linalg.svd(unit, full_matrices=False)[2][:8].T.float()
    found = base_maps(weights, tokens, big, 8)[0]
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-4)


def test_random_starts_and_sources_follow_the_seed(tokens, digits, source, big):  # noqa: F811
    one, two = (base_maps(initial_weights(big), tokens, big, 8, "random", seed)[0] for seed in (0, 1))
    assert not torch.equal(one, two)
    start = tiny_source()
    banks = [
        experiment.build(tiny_projectable(start, seed=s, options={"source_mode": "random_frozen"}), digits)
        for s in (0, 1)
    ]
    assert not torch.equal(banks[0].source.plain["qkv"], banks[1].source.plain["qkv"])


def test_redrawing_keeps_the_scale_of_each_layer(tokens):  # noqa: F811
    source = model(tokens).source
    with torch.no_grad():
        source.plain["qkv"][1] *= 5
    redraw_inner_weights(source, 0)
    assert source.plain["qkv"][1].std() > 3 * source.plain["qkv"][0].std()


def test_hidden_terms_are_the_mean_over_tasks(tokens):  # noqa: F811
    small = model(tokens, use_task_embedding=False)
    mean = small.source.task_embedding.mean(0)
    torch.testing.assert_close(small.told(torch.tensor([2]))["positions"][0], small.source.plain["positions"] + mean)


def test_new_tasks_start_where_the_base_puts_them(digits, source):
    support = digits.first("train", 16)[:2]
    base = experiment.run(tiny_projectable(options={"conditioning": "SupportSet"}, steps=2)).model()
    new = Adapted(base, 2, (8,), support)
    torch.testing.assert_close(new.vectors["d8"], base.conditioning["d8"].encode(support))
    torch.testing.assert_close(new.told["d8"][1], base.source.task_embedding.mean(0))
    hidden_base = experiment.run(tiny_projectable(options={"use_task_embedding": False}, steps=2)).model()
    assert not Adapted(hidden_base, 2, (8,), support).told["d8"].requires_grad


def test_many_columns_of_which_one_is_long_stay_orthonormal():
    maps = make_generator("Orthonormal", torch.eye(512).unsqueeze(0), 2, inner="Static", steps=8)
    with torch.no_grad():
        maps.base[:, :, 1:] *= 0.55
    found = maps(torch.zeros(1, 2))[0, 0]
    assert (found.T @ found - torch.eye(512)).abs().max() < 1e-3


@pytest.mark.parametrize("name, scale", [("LowRank", "right"), ("Kronecker", "blocks"), ("Mixture", "gate")])
def test_sizes_at_the_start_do_not_grow_with_the_rank(name, scale):
    options = {"LowRank": dict(rank=16), "Kronecker": dict(terms=16), "Mixture": {}}[name]
    found = getattr(make_generator(name, torch.linalg.qr(torch.randn(4, 64, 32))[0], 4, **options), scale).std().item()
    assert found == pytest.approx({"right": 0.25, "blocks": 0.25, "gate": 1.0}[scale], rel=0.2)


def test_how_long_each_arm_trains_and_who_trains_its_source(study):  # noqa: F811
    study.profile = replace(PROFILE, source_steps=7, joint_steps=30, seeds=(3, 4))
    study.loss = lambda config, member: 1.0 - (dict(config.options).get("conditioning") == "film")
    rates, steps = dict.fromkeys(study.sizes, 1e-2), {}
    one = lambda name, size=8: study.config(name, {size: 1e-2}, 4)  # noqa: E731
    for name in ("specialists", "specialists_a_tenth", "specialists_tuned", "cut", "universal_distilled"):
        steps[name] = one(name).steps
    steps |= {name: one(name, 32).steps for name in ("source", "source_control")}
    assert steps == dict(
        specialists=37,
        specialists_a_tenth=4,
        specialists_tuned=18,
        cut=1,
        universal_distilled=37,
        source=7,
        source_control=30,
    )
    projected = {
        name: study.config(name, rates, 4)
        for name in (
            "projected",
            "source_frozen",
            "bank_frozen",
            "bank_trained",
            "bank_kept",
            "source_tuned",
            "generators_anew",
        )
    }
    assert {c.steps for c in projected.values()} == {30}
    assert {name: c.source_lr > 0 for name, c in projected.items()} == dict(
        projected=True,
        source_frozen=False,
        bank_frozen=False,
        bank_trained=True,
        bank_kept=True,
        source_tuned=True,
        generators_anew=False,
    )
    assert {name: c.start.seed for name, c in projected.items()} == dict.fromkeys(projected, 4) | dict(
        generators_anew=3
    )
    assert {dict(c.options)["source_weight"] for c in projected.values()} == {LAMBDA}
    study.matched_steps = lambda start, rival, sizes: {"hypernetwork": 98}.get(rival, 100 - len(sizes))
    best = ("universal_distilled", "universal_matched", "universal_alone")
    assert [dict(one(name).options)["conditioning"] for name in best] == ["film"] * 3
    assert [one(name).steps for name in ("universal_matched", "universal_alone", "hypernetwork_matched")] == [
        97,
        99,
        98,
    ]


def test_matched_steps_spend_what_the_start_has_cost(study, monkeypatch):  # noqa: F811
    study.loss = lambda config, member: 1.0
    costs = dict(projectable=900.0, universal=100.0, source=300.0)
    monkeypatch.setattr(arms, "operations", lambda config: costs[config.model])
    both = PROFILE.source_steps + PROFILE.joint_steps
    assert study.matched_steps() == both * 900 // 300
    assert study.matched_steps(study.config("source_control", {32: 1e-2}, 0)) == both * 600 // 300
    assert study.matched_steps(sizes=PROFILE.sizes[:1]) == both * 900 // 100
    costs["hypernetwork"] = 150.0
    assert study.matched_steps(rival="hypernetwork") == both * 900 // 450


def test_arms_with_fewer_seeds(study):  # noqa: F811
    study.profile, study.loss = replace(PROFILE, seeds=(0, 1, 2, 3)), lambda config, member: bowl(config)
    bowl = lambda config: 1.0 + abs(math.log2((config.lr or (config.source_lr,))[0] / 0.01))  # noqa: E731
    assert [len(study.seeds(name)[name]) for name in ("static", "projected")] == [3, 4]
    assert len(study.seeds("projected", max_seeds=2)["projected"]) == 2


def test_new_tasks_are_validated_as_the_known_ones_and_use_the_whole_base(study):  # noqa: F811
    study.loss = lambda config, member: 1.0
    config = Scarce(study, "heldout20", 5, 20).config("projected_vector", 8, 1e-2, 0)
    assert (config.patience, config.warmup) == (3, 10) and config.start.sizes == study.sizes
    assert config.val_images == PROFILE.val_images


def test_the_crossed_bootstrap_redraws_seeds():
    by_seed = table(rival=[[1.0] * 4] * 5, ours=[[0.9 - 0.1 * seed] * 4 for seed in range(5)])
    mean, low, high = evaluation.crossed_bootstrap(by_seed, "rival", "ours")
    assert mean == pytest.approx(0.3) and low < 0.2 and high > 0.4


def test_disagreement_is_the_kl_of_the_row_from_the_column(digits, source):
    models = [experiment.run(tiny_projectable(seed=seed)).model() for seed in (0, 1)]
    ids, images = torch.arange(10), digits.first("test", 5)
    with torch.no_grad():
        p, q = (forward(m.weights("d8", ids), images).log_softmax(-1) for m in models)
    found = evaluation.disagreement(models, "d8", digits, per_task=5)
    torch.testing.assert_close(found[0, 1], (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-3, atol=1e-6)
    assert found.diagonal().abs().max() < 1e-6 and found[1, 0] > 1e-4


def test_costs_in_numbers(digits, source, monkeypatch):
    small = experiment.run(tiny_projectable()).model()
    ticks = iter(range(1000))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(ticks))
    cost = evaluation.generation_cost(small, "d8", repeats=3)
    assert cost["ms"] == 1000 and cost["maps"] == sum(p.numel() for p in small.groups()["d8"])
    assert cost["source"] == sum(p.numel() for p in small.source.parameters())
    weights = small.weights("d8", torch.arange(1)).values()
    assert cost["deployed"] == sum(w.numel() for w in weights) and cost["ms_low"] == cost["ms_high"] == 1000
    config = tiny_projectable()
    assert 10 * cost["multiply_adds"] == pytest.approx(
        (
            experiment.operations(config)
            - experiment.operations(config.with_(steps=39))
            - 3 * 640 * (config.shape(16, 8).n_operations() + config.shape(16).n_operations())
        )
        / 3,
        rel=0.01,
    )


def test_where_claims_come_from_and_bits_of_a_table(digits, source, universal):
    found = [SimpleNamespace(result=dict(commit=c, device="cpu")) for c in ("a", "b", "a")]
    assert evaluation.origin({"x": found}) == dict(commit="a, b", device="cpu")
    losses = evaluation.loss_table({"universal": [universal]}, digits)
    assert (losses.bits_per_pixel / losses.loss).tolist() == pytest.approx([16 / math.log(2) / 64] * 10)


def test_only_training_images_shape_a_model(digits, source, monkeypatch):
    seen, first = [], TaskData.first
    monkeypatch.setattr(TaskData, "first", lambda data, split, n: seen.append(split) or first(data, split, n))
    base = tiny_projectable(steps=2)
    for config in (
        base, tiny_projectable(options={"conditioning": "SupportSet"}), tiny(model="support_universal"),
        tiny(model="hard_mixture"), tiny(model="adapted", start=base),
        tiny(model="cut", start=tiny_source(), options=(("p0", "pca"),)),
    ):  # fmt: skip
        experiment.build(config, digits)
    monkeypatch.setattr("projectable.tasks.images.image_features", lambda images, *_, **__: torch.zeros(len(images), 3))
    experiment.TELL["vectors"](digits)
    assert len(seen) > 6 and set(seen) == {"train"}


def test_a_source_may_start_with_writes_of_zero(shape):
    plain = Universal(shape, 3, "additive", zero_writes=True).plain
    assert not plain["out"].any() and not plain["down"].any() and plain["qkv"].any()
    with pytest.raises(ValueError, match="zero_writes=True with AdaLN-Zero"):
        Universal(shape, 3, "adaln", zero_writes=True)
    assert SupportUniversal(shape, torch.zeros(3, 4, 16, dtype=torch.long)).rate_factor("encoder.tokens") == 0.3
