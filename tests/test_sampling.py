"""Sampling: the cache changes nothing, the samples follow the model's own probabilities."""

import pytest
import torch
from conftest import randomise

from projectable.models import TOLD_BY, Specialists, Universal
from projectable.transformer import Shape, _Decoder, forward, initial_weights, sample

T = 3


@pytest.fixture
def tokens():
    return torch.randint(32, (T, 5, 16), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_cached(weights, tokens, d_head=8):
    """What `forward` gives, token by token as `sample` does it: tokens (T, n, N) → (T, n, N, V)."""
    decoder = _Decoder(weights, *tokens.shape, d_head, 1.0)
    return torch.stack([decoder.step(t) for t in (None, *tokens[..., :-1].unbind(-1))], 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_with_a_cache_the_logits_are_the_same(shape, tokens, conditioning):
    """No task axis, one on the positions only, or one on all reads with biases (FiLM), or on writes too (AdaLN)."""
    weights = randomise(Universal(shape, T, conditioning)).double().weights("d16", torch.arange(T))
    assert (logits_cached(weights, tokens) - forward(weights, tokens)).abs().max() < 1e-12


def test_with_a_cache_the_logits_are_the_same_with_every_weight_by_task(shape, tokens):
    weights = randomise(Specialists(shape, T)).double().weights("d16", torch.arange(T))
    assert (logits_cached(weights, tokens) - forward(weights, tokens)).abs().max() < 1e-12
    one = {name: w[:1] for name, w in weights.items()}  # a task axis of size 1 is shared
    plain = {name: w[0] for name, w in weights.items()}
    assert torch.equal(logits_cached(one, tokens), logits_cached(plain, tokens))


def test_another_head_size(tokens):
    shape = Shape(12, n_layers=1, d_head=4, vocab_size=32, length=16)
    weights = {name: w.double() for name, w in initial_weights(shape, seeded()).items()}
    assert (logits_cached(weights, tokens, d_head=4) - forward(weights, tokens, d_head=4)).abs().max() < 1e-12


def test_shapes_and_range(shape):
    plain = initial_weights(shape)
    for weights, n_tasks in ((plain, 1), ({**plain, "positions": plain["positions"].expand(T, -1, -1)}, T)):
        drawn = sample(weights, n=5, length=16)
        assert drawn.shape == (n_tasks, 5, 16) and drawn.dtype == torch.int64
        assert drawn.min() >= 0 and drawn.max() < 32
    assert sample(plain, n=2, length=3).shape == (1, 2, 3)


def test_the_generator_decides_everything(shape):
    weights = initial_weights(shape, seeded())
    first = sample(weights, 4, 16, generator=seeded(1))
    torch.manual_seed(7)
    assert torch.equal(sample(weights, 4, 16, generator=seeded(1)), first)
    assert not torch.equal(sample(weights, 4, 16, generator=seeded(2)), first)
    assert torch.equal(sample(weights, 4, 6, generator=seeded(1)), first[..., :6])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_models_probabilities(temperature):
    """Every sequence of two tokens out of three: 30,000 draws against the exact product of probabilities."""
    shape = Shape(8, n_layers=1, vocab_size=3, length=2)
    weights = randomise(Universal(shape, 2, "film"), std=0.2).weights("d8", torch.arange(2))
    n = 30_000
    drawn = sample(weights, n, 2, temperature=temperature, generator=seeded())
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1)  # (2, 9, 2)
    with torch.no_grad():
        log_p = (forward(weights, pairs) / temperature).log_softmax(-1)
    expected = log_p.gather(-1, pairs.unsqueeze(-1)).sum((-1, -2)).exp()  # (2, 9)
    for task in range(2):
        counts = torch.bincount(drawn[task, :, 0] * 3 + drawn[task, :, 1], minlength=9)
        chi2 = ((counts - n * expected[task]) ** 2 / (n * expected[task])).sum()
        assert chi2 < 26.1  # 8 degrees of freedom: above it once in a thousand; the seed is fixed
    assert (expected[0] - expected[1]).abs().max() > 0.02  # the two tasks do differ


def test_low_temperature_is_the_most_likely_token(shape):
    weights = initial_weights(shape, seeded())
    drawn = sample(weights, 3, 16, temperature=1e-4, generator=seeded())
    assert torch.equal(forward(weights, drawn).argmax(-1), drawn)


def test_samples_can_be_trained_on_and_carry_no_gradient(shape):
    weights = {name: w.requires_grad_() for name, w in initial_weights(shape).items()}
    drawn = sample(weights, 2, 16)
    assert not drawn.requires_grad
    forward(weights, drawn).sum().backward()
    assert weights["embedding"].grad is not None


@pytest.mark.parametrize("value", [0, 0.0, 1e-40, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(shape, value):
    with pytest.raises(ValueError, match=rf"temperature={value} .*allowed: 1e-6 or more"):
        sample(initial_weights(shape), 2, 16, temperature=value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=17), "length=17 does not fit the model's positions; allowed: 1 to 16"),
        (dict(length=0), "length=0 .*allowed: 1 to 16"),
        (dict(n=0), "n=0 .*allowed: 1 or more"),
        (dict(d_head=5), "d_head=5 .*allowed: divisors of 16"),
    ],
)
def test_arguments_that_do_not_fit(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(initial_weights(shape), **{"n": 2, "length": 16, **arguments})
