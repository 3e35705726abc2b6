"""Universal conditional models against an explicit forward pass; specialists; distillation."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, tiny

from projectable import experiment
from projectable.generators import Linear
from projectable.models import (
    TOLD_BY,
    Distilled,
    DistilledSpecialists,
    HardMixture,
    Hypernetwork,
    Specialists,
    Universal,
    group_tasks,
)
from projectable.training import make_optimizer
from projectable.transformer import embed, forward, hidden, rms_norm, task_losses

T = 4


@pytest.fixture
def tokens():
    return torch.randint(32, (T, 3, 16), generator=torch.Generator().manual_seed(5))


def conditional(shape, conditioning, seed=0):
    """A universal model whose task terms are not zero, in float64."""
    torch.manual_seed(seed)
    return randomise(Universal(shape, T, conditioning), std=0.7).double()


def explicit(plain, tokens, scale, shift, gate, d_head=8):
    """One task's logits the textbook way: scale and shift what a read sees, gate what is written. tokens (B, N)."""
    x = F.pad(plain["embedding"][tokens[:, :-1]], (0, 0, 1, 0)) + plain["positions"]
    layers = len(plain["qkv"])
    for layer in range(layers):
        h = scale[layer] * rms_norm(x) + shift[layer]
        q, k, v = (
            part.unflatten(-1, (-1, d_head)).transpose(1, 2) for part in (h @ plain["qkv"][layer]).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + gate[layer] * (y @ plain["out"][layer])
        h = scale[layers + layer] * rms_norm(x) + shift[layers + layer]
        x = x + gate[layers + layer] * (F.gelu(h @ plain["up"][layer]) @ plain["down"][layer])
    return (scale[-1] * rms_norm(x) + shift[-1]) @ plain["head"]


@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_folded_weights_equal_the_explicit_forward_pass(shape, tokens, conditioning):
    model = conditional(shape, conditioning)
    logits = forward(model.weights("d16", torch.arange(T)), tokens).expand(T, -1, -1, -1)
    n, d = shape.n_layers, shape.d_model
    for t in range(T):
        plain = {name: w.detach().clone() for name, w in model.plain.items()}
        scale, shift, gate = (f(2 * n + 1, d, dtype=torch.float64) for f in (torch.ones, torch.zeros, torch.ones))
        if conditioning == "token":
            plain["positions"][0] += model.task_embedding[t]
        elif conditioning == "additive":
            plain["positions"] += model.task_embedding[t]
        elif conditioning == "film":
            scale, shift = 1 + model.film[t, 0], model.film[t, 1]
        elif conditioning == "adaln":
            m = (F.silu(model.task_embedding[t]) @ model.modulation).view(-1, d)
            scale, shift, gate = 1 + m[: 2 * n + 1], m[2 * n + 1 : 4 * n + 2], m[4 * n + 2 :]
        expected = explicit(plain, tokens[t], scale, shift, gate)
        torch.testing.assert_close(logits[t], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_at_the_start_all_tasks_are_told_the_same(shape, tokens, conditioning):
    model = Universal(shape, T, conditioning)
    losses = model.losses(torch.arange(T), tokens[:1].expand(T, -1, -1))["d16"]
    torch.testing.assert_close(losses, losses[:1].expand(T))


def test_adaln_zero_starts_with_blocks_that_do_nothing(shape, tokens):
    weights, seen = Universal(shape, T, "adaln").weights("d16", torch.arange(T)), {}
    hidden(weights, tokens, watch=seen.__setitem__)
    assert torch.equal(seen["stream.1"].view(T, 3, 16, 16), embed(weights, tokens))


@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_every_parameter_is_trained(shape, tokens, conditioning):
    model = conditional(shape, conditioning)
    model.losses(torch.arange(T), tokens)["d16"].mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert sum(len(ps) for ps in model.groups().values()) == len(list(model.parameters()))


def test_unknown_conditioning(shape):
    with pytest.raises(
        ValueError, match="unknown conditioning 'telepathy'; allowed: none, token, additive, film, adaln"
    ):
        Universal(shape, T, "telepathy")


@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_specialists_begin_as_the_universal_model_they_start_from(shape, tokens, conditioning):
    model, ids = conditional(shape, conditioning), torch.arange(T)
    specialists = Specialists(shape, T, model.weights("d16", ids)).double()
    mine, theirs = specialists.losses(ids, tokens)["d16"], model.losses(ids, tokens)["d16"]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    subset = torch.tensor([3, 1])
    torch.testing.assert_close(specialists.losses(subset, tokens[:2])["d16"], model.losses(subset, tokens[:2])["d16"])


def test_training_one_specialist_leaves_the_others_alone(shape, tokens):
    specialists = Specialists(shape, T)
    before = {name: w.detach().clone() for name, w in specialists.per_task.items()}
    optimizer = make_optimizer(specialists, {"d16": 1e-2}, 0.0)
    specialists.losses(torch.tensor([2]), tokens[:1])["d16"].sum().backward()
    optimizer.step()
    for name, w in specialists.per_task.items():
        moved = (w != before[name]).flatten(1).any(1)
        assert moved.tolist() == [False, False, True, False], name


def test_training_the_specialist_leaves_the_universal_model_alone(shape, tokens):
    model = Universal(shape, T, "film")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    specialists = Specialists(shape, T, model.weights("d16", torch.arange(T)))
    with torch.no_grad():
        for parameter in specialists.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


@pytest.mark.parametrize("family", ["Static", "StaticMaps", "Slice"])
def test_of_a_family_without_z_a_hypernetwork_is_one_model_for_all_tasks(shape, tokens, family):
    losses = Hypernetwork(shape, T, family=family).losses(torch.arange(T), tokens[:1].expand(T, -1, -1))["d16"]
    assert losses.shape == (T,) and torch.equal(losses, losses[:1].expand(T))


def test_a_hypernetwork_makes_the_small_weights_itself(shape, tokens):
    torch.manual_seed(0)
    model, ids = Hypernetwork(shape, T, z_dim=3), torch.arange(T)
    weights = model.weights("d16", ids)
    for name, size in shape.weight_shapes().items():
        assert weights[name].shape == (T, *size) and torch.equal(weights[name][0], weights[name][1]), (
            "alike at the start"
        )
    film = Universal(shape, T, "film").weights("d16", ids)
    assert weights.keys() == film.keys(), "what is deployed is what FiLM deploys: biases beside the plain weights"
    base = sum(maker.base.numel() for maker in model.makers.values())
    assert sum(p.numel() for p in model.parameters()) == 4 * base + 3 * T, "W, three directions, and a vector a task"
    optimizer = make_optimizer(model, {"d16": 1e-2}, 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model.losses(ids, tokens)["d16"].sum().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    apart = model.weights("d16", ids)
    assert all((w[0] != w[1]).any() for w in apart.values()), "every weight depends on the task"
    some = model.weights("d16", torch.tensor([3, 1]))
    for name, w in apart.items():
        torch.testing.assert_close(some[name][1], w[1])
    assert model.rate_factor("makers.modulation.base") == 4.0 == model.rate_factor("makers.qkv.base") * 4
    assert model.rate_factor("makers.up.directions") == Linear.rates["directions"]
    assert model.rate_factor("conditioning.table") == 1.0
    with pytest.raises(ValueError, match="unknown generator 'Cubic'; allowed: Slice, Static"):
        Hypernetwork(shape, T, family="Cubic")


def test_tasks_that_look_alike_are_grouped():
    """Tasks 0 and 2 use the first half of the codes, 1 and 3 the other; 4 has 0's codes at other places."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(a, a + 4, (2, 50, 16), generator=generator) for a in (0, 4))
    ordered = torch.arange(16).expand(1, 50, -1) % 4
    groups = group_tasks(torch.stack([low[0], high[0], low[1], high[1], ordered[0]]), 8, 3).tolist()
    assert groups[0] == groups[2] and groups[1] == groups[3] and len(set(groups)) == 3
    assert sorted(group_tasks(low, 8, 4).tolist()) == [0, 1]  # never more groups than tasks


def test_a_hard_mixture_gives_each_task_the_plain_model_of_its_group(shape, tokens):
    mixture, ids = randomise(HardMixture(shape, torch.tensor([1, 0, 1, 2]))), torch.arange(T)
    weights = mixture.weights("d16", ids)
    for name, size in shape.weight_shapes().items():
        assert weights[name].shape == (T, *size)
        assert torch.equal(weights[name][0], weights[name][2]) and not torch.equal(weights[name][0], weights[name][1])
    assert sum(p.numel() for p in mixture.parameters()) == 3 * shape.n_parameters()
    mixture.losses(torch.tensor([2]), tokens[:1])["d16"].sum().backward()
    for name, w in mixture.per_task.items():
        assert w.grad.flatten(1).any(1).tolist() == [False, True, False], name


def test_a_hard_mixture_as_a_run(digits):
    run = experiment.run(tiny(model="hard_mixture", options=(("n_experts", 4),)))
    model, (_, groups) = run.model(), experiment.build(run.config, digits).named_buffers().__next__()
    assert torch.equal(model.expert_of, groups) and set(groups.tolist()) == {0, 1, 2, 3}
    assert run.result["val"]["d8"] < torch.tensor(32.0).log()


@pytest.fixture(params=["universal", "specialists"])
def pupil(shape, request):
    torch.manual_seed(1)
    teacher = randomise(Universal(shape, T, "additive", member="source"))
    if request.param == "specialists":
        return DistilledSpecialists(teacher, shape, T)
    return Distilled(teacher, shape, T, "film")


def test_distillation_is_half_the_data_half_the_teacher(pupil, tokens):
    ids = torch.arange(T)
    log_p = forward(pupil.weights("d16", ids), tokens).log_softmax(-1)
    target = forward(pupil.teacher.weights("source", ids), tokens).softmax(-1)
    cross = -(target * log_p).sum(-1).mean((1, 2))
    expected = 0.5 * task_losses(pupil.weights("d16", ids), tokens) + 0.5 * cross
    torch.testing.assert_close(pupil.losses(ids, tokens)["d16"], expected)
    with torch.no_grad():  # what is evaluated and reported: the loss on the data
        torch.testing.assert_close(pupil.losses(ids, tokens)["d16"], task_losses(pupil.weights("d16", ids), tokens))


def test_distillation_neither_trains_nor_saves_the_teacher(pupil, tokens):
    before = {name: w.clone() for name, w in pupil.teacher.state_dict().items()}
    optimizer = make_optimizer(pupil, {"d16": 1e-2}, 0.1)
    pupil.losses(torch.arange(T), tokens)["d16"].sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], w) for name, w in pupil.teacher.state_dict().items())
    assert all(p.grad is None for p in pupil.teacher.parameters())
    assert not any("teacher" in name for name in pupil.state_dict())


def test_a_pupil_as_able_as_its_teacher_nears_it(shape, tokens):
    """With the data's share at zero, distillation ends at the teacher's own answers."""
    torch.manual_seed(0)
    teacher = Universal(shape, T, "none", member="source")
    pupil = Distilled(teacher, shape, T, "none", share=1.0)
    optimizer = make_optimizer(pupil, {"d16": 1e-2}, 0.0)
    gaps = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = pupil.losses(torch.arange(T), tokens)["d16"].mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            p = forward(teacher.weights("source", torch.arange(T)), tokens).log_softmax(-1)
            gaps.append(loss.item() + (p.exp() * p).sum(-1).mean().item())  # KL: cross-entropy less the entropy
    assert 0 < gaps[-1] < 0.3 * gaps[0]


def test_the_teacher_moves_with_the_pupil(pupil):
    pupil.to("meta")
    assert {p.device.type for p in pupil.teacher.parameters()} == {"meta"}
