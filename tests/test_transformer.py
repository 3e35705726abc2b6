"""The one Transformer: its hand-written kernels against torch's own, causality, task axes."""

import math

import pytest
import torch
import torch.nn.functional as F

from projectable.transformer import (
    Products,
    Shape,
    _Attention,
    _HeadLoss,
    forward,
    hidden,
    initial_weights,
    linear,
    rms_norm,
    task_losses,
)

CAPPED = -math.log(1e-38)  # what `_HeadLoss` reports for a token whose probability underflows


def tokens_of(shape, n_tasks=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (n_tasks, batch, shape.length), generator=generator)


def task_weights(shape, n_tasks=3):
    """Weights in float64, every one with a task axis, and biases on all reads."""
    generator = torch.Generator().manual_seed(1)
    one = [initial_weights(shape, generator) for _ in range(n_tasks)]
    weights = {name: torch.stack([w[name] for w in one]).double() for name in one[0]}
    for name, size in dict(
        qkv_bias=(shape.n_layers, 3 * shape.d_model), up_bias=(shape.n_layers, shape.d_mlp), head_bias=(32,)
    ).items():
        weights[name] = torch.randn(n_tasks, *size, generator=generator, dtype=torch.float64)
    return weights


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["usual scores", "scores ×1000"])
def test_attention_against_torch(scale, causal):
    torch.manual_seed(0)
    qkv = torch.randn(3, 7, 3, 2, 4, dtype=torch.float64)  # (G, N, 3, h, d_h)
    qkv[:, :, 0] *= scale
    mine, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    q, k, v = theirs.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(3, 7, 8)
    y = _Attention.apply(mine, causal)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["usual scores", "scores ×1000"])
def test_head_loss_against_torch(scale):
    torch.manual_seed(0)
    h, head = torch.randn(3, 10, 4, dtype=torch.float64), torch.randn(3, 4, 9, dtype=torch.float64) * scale
    targets, per_task = torch.randint(9, (3, 10)), torch.rand(3, dtype=torch.float64)
    results = []
    for mine in (True, False):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        if mine:
            losses = _HeadLoss.apply(a, b, targets)
        else:
            nll = F.cross_entropy((a @ b).flatten(0, 1), targets.flatten(), reduction="none")
            losses = nll.view(3, 10).mean(1)
        (losses * per_task).sum().backward()
        cap = losses if mine else nll.clamp_max(CAPPED).view(3, 10).mean(1)
        results.append((cap.detach(), a.grad, b.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_losses_are_cross_entropies_of_the_logits_with_and_without_gradients(shape):
    weights, tokens = initial_weights(shape), tokens_of(shape)
    logits = forward(weights, tokens)
    expected = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view(3, -1).mean(1)
    weights["head"].requires_grad_()
    torch.testing.assert_close(task_losses(weights, tokens), expected)  # the pass that also makes gradients
    with torch.no_grad():
        torch.testing.assert_close(task_losses(weights, tokens), expected)


def test_gradients_of_the_whole_model_against_finite_differences():
    shape = Shape(8, n_layers=2, d_head=4, mlp_ratio=1, vocab_size=5, length=4)
    weights = {k: w.double().requires_grad_() for k, w in initial_weights(shape).items()}
    tokens = tokens_of(shape, 1, 2)

    def loss(*values):
        return task_losses(dict(zip(weights, values, strict=True)), tokens, d_head=4)

    assert torch.autograd.gradcheck(loss, tuple(weights.values()), fast_mode=True)


def test_training_at_extreme_scores_gives_numbers(shape):
    weights = {k: (w * 300).requires_grad_() for k, w in initial_weights(shape).items()}
    task_losses(weights, tokens_of(shape)).sum().backward()
    for name, w in weights.items():
        assert torch.isfinite(w.grad).all(), name


def test_a_token_changes_only_the_predictions_after_it(shape):
    weights, tokens = task_weights(shape), tokens_of(shape)
    before = forward(weights, tokens)
    for i in (0, 5, 14):
        changed = tokens.clone()
        changed[..., i] = (changed[..., i] + 1) % shape.vocab_size
        difference = (forward(weights, changed) - before).abs().amax((0, 1, 3))
        assert difference[: i + 1].max() == 0
        assert difference[i + 1 :].min() > 1e-6


def test_the_beginning_of_a_sequence_is_enough_for_its_logits(shape):
    weights, tokens = initial_weights(shape), tokens_of(shape)
    torch.testing.assert_close(forward(weights, tokens)[:, :, :9], forward(weights, tokens[..., :9]))


def test_tasks_together_as_one_by_one(shape):
    weights, tokens = task_weights(shape), tokens_of(shape)
    together, losses = forward(weights, tokens), task_losses(weights, tokens)
    for t in range(3):
        plain = {name: w[t] for name, w in weights.items()}
        torch.testing.assert_close(together[t : t + 1], forward(plain, tokens[t : t + 1]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(losses[t : t + 1], task_losses(plain, tokens[t : t + 1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", sorted(task_weights(Shape(16, vocab_size=32, length=16))))
def test_a_weight_without_the_task_axis_is_shared(shape, shared):
    weights, tokens = task_weights(shape), tokens_of(shape)
    mixed = weights | {shared: weights[shared][0]}
    repeated = weights | {shared: weights[shared][:1].expand_as(weights[shared])}
    torch.testing.assert_close(forward(mixed, tokens), forward(repeated, tokens), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(task_losses(mixed, tokens), task_losses(repeated, tokens), rtol=1e-10, atol=1e-10)


def test_watch_sees_what_the_writes_read(shape):
    weights, tokens, seen = initial_weights(shape), tokens_of(shape), {}
    last = hidden(weights, tokens, watch=seen.__setitem__)
    assert set(seen) == {f"{what}.{layer}" for what in ("attention", "mlp", "stream") for layer in range(2)}
    step = linear(seen["attention.1"], weights["out"][1]) + linear(seen["mlp.1"], weights["down"][1])
    torch.testing.assert_close(seen["stream.1"], seen["stream.0"] + step)
    torch.testing.assert_close(last, rms_norm(seen["stream.1"]))


def test_counts_are_those_of_the_weights(shape):
    assert shape.n_parameters() == sum(w.numel() for w in initial_weights(shape).values())
    # by hand: per layer 4·16² + 2·16·64 + 16·17 (both halves of attention, on average over positions), head 16·32
    assert shape.n_operations() == 2 * (1024 + 2048 + 272) + 512


@pytest.mark.parametrize("width", [12, 0, -8])
def test_a_width_that_is_no_multiple_of_the_head(width):
    with pytest.raises(ValueError, match=rf"d_model={width} is no multiple of d_head=8; allowed: 8, 16"):
        Shape(width)


def test_products_are_counted_by_their_shapes():
    a, b = torch.zeros(5, 2, 3), torch.zeros(5, 3, 4)
    flat = dict(input=torch.zeros(4), mat1=torch.zeros(2, 3), mat2=torch.zeros(3, 4))
    products = {
        5 * 24: [
            lambda: a @ b,
            lambda: torch.matmul(other=b, input=a),
            lambda: torch.einsum("tij,tjk->tik", a, b),
            lambda: torch.einsum("... i j, ... j k -> ... i k", [a, b]),
            lambda: torch.baddbmm(torch.zeros(5, 2, 4), a, b),
        ],
        24: [
            lambda: torch.addmm(**flat),
            lambda: a[0].mm(b[0]),
            lambda: F.linear(a[0], b[0].T),
            lambda: torch.einsum("...ij,jk->...ik", a[:1], b[0]),
        ],
        5 * 3 * 4: [lambda: torch.einsum("...k,...kn->...n", a[0, 0], b)],  # one vector for many matrices
        0: [lambda: a * 2 + a.sum()],
    }
    for expected, makers in products.items():
        for make in makers:
            with Products() as counter:
                make()
            assert counter.multiply_adds == expected
