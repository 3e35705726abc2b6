"""On a CUDA device: the same numbers as on a CPU up to rounding, a step of training as one graph, runs side by side."""

import pytest
import torch
from conftest import tiny, tiny_projectable, tiny_source, train_until

from projectable import experiment, training
from projectable.config import RunConfig
from projectable.experiment import run, run_many
from projectable.generators import CONDITIONINGS, FAMILIES
from projectable.models import SOURCE_MODES
from projectable.storage import load_tensors
from projectable.training import Team, cuda_graph, split_losses, train
from projectable.transformer import sample

pytestmark = pytest.mark.gpu
ARMS = {
    **{f"universal {name}": dict(options=(("conditioning", name),)) for name in ("token", "additive", "film", "adaln")},
    "specialists": dict(model="specialists"),
    "hard mixture": dict(model="hard_mixture"),
    "hypernetwork": dict(model="hypernetwork"),
}
MAPS = [name for name in FAMILIES if name != "Slice"]  # which learns nothing but gains and shifts


@pytest.fixture(autouse=True)
def device():
    """Hidden from all other tests: `pytest -m gpu` shows it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or it is hidden: `pytest -m gpu`")


def eager(config: RunConfig, digits, model) -> list[float]:
    """Validation losses of a training without a graph."""

    class Eager(Team):
        def losses(self, model):
            return model.losses

    return values(train(model, digits, config, team=Eager()))


def values(outcome) -> list[float]:
    return [row["loss"] for row in outcome.history]


def configs():
    for name, changes in ARMS.items():
        yield pytest.param(lambda changes=changes: tiny(**changes), id=name)
    for name in MAPS:
        yield pytest.param(lambda name=name: tiny_projectable(options=dict(family=name)), id=name)
    for mode in SOURCE_MODES:
        yield pytest.param(lambda mode=mode: tiny_projectable(options=dict(source_mode=mode)), id=mode)
    yield pytest.param(
        lambda: tiny(model="distilled", options=(("conditioning", "film"),), start=tiny_source()), id="distilled"
    )


@pytest.mark.parametrize("make", [*configs()])
def test_a_training_as_a_graph_is_the_training_without(make, digits, source, monkeypatch):
    """Losses at every evaluation; and those of a CPU."""
    config, graphs = make().with_(steps=12, eval_every=4, warmup=4), []
    monkeypatch.setattr(training, "cuda_graph", lambda model: graphs.append(cuda_graph(model)) or graphs[-1])
    found = {}
    for name in ("graph", "eager", "cpu"):
        model = experiment.build(config, digits)
        model = model if name == "cpu" else model.to("cuda")
        found[name] = eager(config, digits, model) if name == "eager" else values(train(model, digits, config))
    assert len(graphs) == 1
    assert found["graph"] == pytest.approx(found["eager"], abs=1e-3)
    assert found["graph"] == pytest.approx(found["cpu"], abs=5e-3)
    assert found["graph"][-1] < found["graph"][2 * len(model.members) - 1]  # of the last member, which learns


@pytest.mark.parametrize("name", ["additive", "film"])
def test_losses_and_gradients_of_a_graph(name, digits):
    """Of one step after another, against those of the model itself."""
    model = experiment.build(tiny(options=(("conditioning", name),)), digits).to("cuda")
    graph, ids = cuda_graph(model), torch.arange(10, device="cuda")
    for first in range(0, 12, 4):
        tokens = digits.first("train", 12)[:, first : first + 4].to("cuda")
        grads = []
        for losses_of in (graph, model.losses):
            model.zero_grad(set_to_none=True)
            losses = losses_of(ids, tokens)["d8"]
            losses.sum().backward()
            grads.append([losses.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in CONDITIONINGS.items() if kind.draws])
def test_what_draws_random_numbers_is_no_graph(name, digits, source, monkeypatch):
    """Each step draws anew: else the losses of a step on the same images would be the same."""
    monkeypatch.setattr(training, "cuda_graph", lambda model: pytest.fail("captured"))
    model = experiment.build(tiny_projectable(options=dict(conditioning=name)), digits).to("cuda").train()
    with torch.no_grad():  # where a task's vector says something
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    losses_of, ids = Team().losses(model), torch.arange(10, device="cuda")
    tokens = digits.first("train", 4).to("cuda")
    seen = {losses_of(ids, tokens)["d8"].sum().item() for _ in range(8)}
    assert len(seen) > 1


def test_a_run_that_was_cut_off_goes_on(other_runs, digits):
    config = tiny_source(steps=20, eval_every=10)
    whole = experiment.build(config, digits).to("cuda")
    expected = train(whole, digits, config)
    cut, path = experiment.build(config, digits).to("cuda"), other_runs / "checkpoint.safetensors"
    train_until(7, cut, digits, config, path)
    assert load_tensors(path)[1]["step"] == 7
    fresh = experiment.build(config, digits).to("cuda")
    assert values(train(fresh, digits, config, path)) == pytest.approx(values(expected), abs=1e-3)


def test_bfloat16_is_trained_or_refused_with_both_times(digits):
    config = tiny(precision="bfloat16", steps=4, eval_every=4)
    model = experiment.build(config, digits).to("cuda")
    try:
        found = values(train(model, digits, config))
    except ValueError as error:
        assert "precision='bfloat16' takes" in str(error) and "cuda" in str(error)
    else:
        assert all(0 < value < 10 for value in found)


def test_runs_side_by_side(other_runs, monkeypatch, digits):
    """Two workers; results say where they were trained, and test losses are those of a CPU."""
    monkeypatch.setenv("PROJECTABLE_WORKERS", "2")
    experiment._pool.cache_clear()
    try:
        runs = run_many([tiny(), tiny(seed=1), tiny_source()], test=True)
    finally:
        experiment._pool(experiment.runs_dir(), "", "", ())[0].shutdown()
        experiment._pool.cache_clear()
    assert all(r.result["device"].startswith("cuda: ") for r in runs)
    for r in runs:
        found = r.test_losses()
        for member, losses in split_losses(r.model(), digits, "test").items():
            torch.testing.assert_close(found[member], losses, atol=1e-4, rtol=0)


def test_samples_come_from_the_device_of_the_weights(digits, universal):
    model = run(universal.config).model().to("cuda")
    ids, generator = torch.arange(10, device="cuda"), torch.Generator("cuda").manual_seed(0)
    drawn = sample(model.weights("d8", ids), 3, digits.codebook.length, generator=generator)
    assert drawn.is_cuda and drawn.shape == (10, 3, digits.codebook.length)
    assert 0 <= drawn.min() <= drawn.max() < len(digits.codebook.codes)
