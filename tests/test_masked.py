"""The masked family: its loss by hand, no leak, fixed masks where it is evaluated, runs that resume bit by bit."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, tiny, train_until

from projectable import experiment
from projectable.arms import MASKED, Study
from projectable.config import get_profile
from projectable.export import export
from projectable.models import TOLD_BY, Projectable, Universal
from projectable.transformer import Shape, draw_places, masked_losses

T, V, N = 3, 32, 16
SHAPE = Shape(16, n_layers=2, vocab_size=V + 1, length=N, masked=True)


@pytest.fixture
def tokens():
    return torch.randint(V, (T, 4, N), generator=torch.Generator().manual_seed(3))


def universal(conditioning="film", member=None, shape=SHAPE):
    """A masked model whose task terms are not zero, in float64."""
    torch.manual_seed(0)
    return randomise(Universal(shape, T, conditioning, member=member)).double()


def by_hand(w, tokens, places):
    """The mean cross-entropy of one task's tokens (B, N) at the places (B, n), sequence by sequence; w of that task."""
    losses = []
    for sequence, hidden in zip(tokens, places.tolist(), strict=True):
        read = [V if i in hidden else token for i, token in enumerate(sequence.tolist())]
        x = w["embedding"][read] + w["positions"]  # (N, d)
        for layer in range(SHAPE.n_layers):
            h = F.rms_norm(x, x.shape[-1:], eps=1e-6) @ w["qkv"][layer] + w["qkv_bias"][layer]
            q, k, v = (part.unflatten(-1, (-1, 8)).transpose(0, 1) for part in h.chunk(3, -1))  # (h, N, d_h)
            y = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
            x = x + y.transpose(0, 1).flatten(1) @ w["out"][layer]
            h = F.rms_norm(x, x.shape[-1:], eps=1e-6) @ w["up"][layer] + w["up_bias"][layer]
            x = x + F.gelu(h) @ w["down"][layer]
        logits = F.rms_norm(x, x.shape[-1:], eps=1e-6) @ w["head"] + w["head_bias"]
        losses.append(F.cross_entropy(logits[hidden, :V], sequence[hidden]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_the_loss_by_hand(tokens, conditioning, grad):
    model, places = universal(conditioning), draw_places(T, 4, N)
    weights = model.weights("d16", torch.arange(T))
    with torch.set_grad_enabled(grad):
        found = masked_losses(weights, tokens, places)
    plain = {name: len(size) for name, size in SHAPE.weight_shapes().items()}
    none = dict(qkv_bias=torch.zeros(2, 48), up_bias=torch.zeros(2, 64), head_bias=torch.zeros(V + 1))
    for t in range(T):
        one = {name: w[t] if w.dim() > plain.get(name, w.dim() - 1) else w for name, w in weights.items()}
        torch.testing.assert_close(found[t], by_hand(none | one, tokens[t], places[t]), rtol=1e-9, atol=1e-9)


def test_a_masked_token_is_not_seen_and_the_mask_is_never_expected(tokens):
    """The likelihoods of all V tokens at a place add up to one: none depends on the token that stands there."""
    weights = universal().weights("d16", torch.arange(T))
    places = torch.full((T, 1, 1), 5)
    tries = tokens[:, :1].repeat(1, V, 1)
    tries[:, :, 5] = torch.arange(V)
    each = [masked_losses(weights, tries[:, v : v + 1], places) for v in range(V)]
    torch.testing.assert_close(torch.stack(each).neg().exp().sum(0), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("place", [0, 4, 6, N - 1])
def test_what_is_not_masked_is_seen_from_both_sides(tokens, place):
    weights, places = universal().weights("d16", torch.arange(T)), torch.full((T, 4, 1), 5)
    other = tokens.clone()
    other[:, :, place] = (other[:, :, place] + 1) % V
    change = masked_losses(weights, other, places) - masked_losses(weights, tokens, places)
    assert (change.abs() > 1e-6).all()


def test_half_of_every_sequence_is_masked_at_random():
    places = draw_places(T, 4, 49)
    assert places.shape == (T, 4, 24)
    assert all(len(set(row)) == 24 for row in places.flatten(0, 1).tolist())
    assert len({tuple(sorted(row)) for row in places.flatten(0, 1).tolist()}) == T * 4


def projectable(tokens, sizes=(8, 16), **options):
    source = universal("additive", "source", replace(SHAPE, d_model=24)).float()
    return Projectable(source, T, sizes, tokens, **options)


def test_all_models_are_evaluated_on_the_same_masks(tokens, monkeypatch):
    seen, before, ids = [], torch.get_rng_state(), torch.arange(T)
    monkeypatch.setattr("projectable.models.masked_losses", lambda weights, tokens, places, d: seen.append(places))
    models = projectable(tokens), universal(), universal("adaln")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.no_grad():
        for model in models:
            model.losses(ids, tokens)
        assert len(seen) == 5 and all(torch.equal(places, seen[0]) for places in seen)
        models[1].losses(torch.tensor([2, 0]), tokens[:2])  # a task's masks are its own, whatever comes beside it
        assert torch.equal(seen[-1], seen[0][[2, 0]])
    assert torch.equal(torch.get_rng_state(), before)
    seen.clear()
    models[0].losses(ids, tokens)
    models[0].losses(ids, tokens)
    assert all(torch.equal(places, seen[0]) for places in seen[:3]) and not torch.equal(seen[0], seen[3])


def test_processes_that_share_a_step_draw_the_masks_of_one(tokens):
    model, ids, found = universal(), torch.arange(T), []
    for part in (slice(0, 3), slice(0, 2), slice(2, 3)):
        torch.manual_seed(1)
        found.append(model.losses(ids[part], tokens[part])["d16"])
    torch.testing.assert_close(found[0], torch.cat(found[1:]))


@pytest.mark.parametrize("conditioning", ["additive", "film", "adaln"])
def test_at_full_size_and_slice_it_is_the_source(tokens, conditioning):
    source = universal(conditioning, "source").float()
    with torch.no_grad():
        losses = Projectable(source, T, (16,), tokens, p0="slice").losses(torch.arange(T), tokens)
    torch.testing.assert_close(losses["d16"], losses["source"])


def test_every_parameter_is_trained(tokens):
    model = randomise(projectable(tokens))
    sum(loss.sum() for loss in model.losses(torch.arange(T), tokens).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (model.source.plain["head"].grad[:, V] == 0).all()  # nothing expects the mask …
    assert (model.source.plain["embedding"].grad[V] != 0).any()  # … but all see it


SOURCE = tiny(model="masked_source", sizes=(), lr=(), source_lr=1e-2)
CONFIGS = {
    "universal": tiny(model="masked_universal", options=(("conditioning", "film"),)),
    "projectable": tiny(model="masked_projectable", start=SOURCE, source_lr=1e-3, lr=(2e-3,)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_resumed_it_ends_bitwise_as_unbroken(config, digits, tmp_path):
    def trained(checkpoint):
        model = experiment.build(config, digits)
        torch.manual_seed(99 if checkpoint.exists() else config.seed)
        return model, experiment.train(model, digits, config, checkpoint)

    whole, outcome = trained(tmp_path / "a")
    begun = experiment.build(config, digits)
    torch.manual_seed(config.seed)
    train_until(17, begun, digits, config, tmp_path / "b")
    resumed, again = trained(tmp_path / "b")
    assert again.history == outcome.history
    assert all(torch.equal(w, resumed.state_dict()[name]) for name, w in whole.state_dict().items())


def test_a_run_learns_and_is_found_again(digits, tmp_path):
    run = experiment.run(CONFIGS["projectable"])
    first, last = ([r["loss"] for r in run.history if r["split"] == "val"][i] for i in (0, -1))
    assert last < first < 1.1 * torch.tensor(32.0).log()
    ids = torch.arange(10)
    with torch.no_grad():
        losses = run.model().losses(ids, digits.first("val", 10))
    assert {m: loss.mean().item() for m, loss in losses.items()} == pytest.approx(run.result["val"], abs=1e-5)
    assert set(run.test_losses()) == {"source", "d8"}
    with pytest.raises(ValueError, match="fills in masked tokens; allowed: models that sample token by token"):
        export(run, "8", "0", tmp_path / "model")


def test_a_masked_study_has_the_same_arms():
    study = Study(get_profile("smoke"), masked=True)
    for name in MASKED:
        sizes = study.sizes_of(name) if MASKED[name].model == "projectable" else study.sizes_of(name)[:1]
        config = study.config(name, dict.fromkeys(sizes, 1e-2), 0, (1e-2, 1e-2))
        usual = Study(get_profile("smoke")).config(name, dict.fromkeys(sizes, 1e-2), 0, (1e-2, 1e-2))
        start = usual.start and usual.start.with_(model="masked_source")
        assert config == usual.with_(model=f"masked_{usual.model}", start=start)
        assert experiment.operations(config) == experiment.operations(usual)
