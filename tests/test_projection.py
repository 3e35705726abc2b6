"""Projection: where it has to be exact, by hand and in float64; what becomes of the source."""

import math

import pytest
import torch
from conftest import randomise, tiny_projectable

from projectable import experiment, transformer
from projectable.models import (
    LAYOUTS,
    SOURCE_MODES,
    TOLD_BY,
    Projectable,
    Projection,
    Universal,
    base_maps,
    kept_layers,
    redraw_inner_weights,
    small_shape,
)
from projectable.transformer import Shape, forward, initial_weights, rms_norm, task_losses

BIG, SMALL, T = 24, 8, 3


@pytest.fixture
def big():
    return Shape(BIG, n_layers=2, vocab_size=32, length=16)


@pytest.fixture
def tokens():
    return torch.randint(32, (T, 4, 16), generator=torch.Generator().manual_seed(3))


def model(tokens, sizes=(SMALL,), seed=0, conditioning="additive", **options):
    """A projectable model over an untrained source whose task terms are not zero."""
    torch.manual_seed(seed)
    source = Universal(Shape(BIG, n_layers=2, vocab_size=32, length=16), T, conditioning, member="source")
    for name, parameter in source.named_parameters():
        if not name.startswith("plain."):
            torch.nn.init.normal_(parameter, std=0.3)
    return Projectable(source, T, sizes, tokens, **options)


def orthonormal(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0][:, :columns]


def selection(size, chosen):
    return torch.eye(size, dtype=torch.float64)[:, chosen].unsqueeze(0).repeat(2, 1, 1)


HEADS = [2]  # the source's live head: a small model of width 8 has one
NEURONS = list(range(5, 96, 3))[:29] + [0, 1, 2]  # 32 of the source's 96 neurons
COLUMNS = [HEADS[0] * 8 + i for i in range(8)]


def source_within(p):
    """Weights of a source whose stream lies in span(P): writes end in P Pᵀ, other heads and neurons are cut off."""
    weights = {k: w.double() for k, w in initial_weights(Shape(BIG, 2, vocab_size=32, length=16)).items()}
    for name in ("embedding", "positions", "out", "down"):
        weights[name] = weights[name] @ p @ p.T
    for name, alive in (("out", COLUMNS), ("down", NEURONS)):
        dead = [row for row in range(weights[name].shape[1]) if row not in alive]
        weights[name][:, dead] = 0
    return weights


def test_a_read_sees_the_same_where_the_stream_lies_in_the_span(monkeypatch):
    monkeypatch.setattr(transformer, "EPS", 0.0)
    p, w = orthonormal(64, 16), torch.randn(64, 32, dtype=torch.float64)
    x = torch.randn(100, 16, dtype=torch.float64) @ p.T
    small = rms_norm(x @ p) @ (math.sqrt(64 / 16) * p.T @ w)
    assert (rms_norm(x) @ w - small).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_small_model_is_the_source_where_the_stream_lies_in_the_span(big, tokens, layout, monkeypatch):
    monkeypatch.setattr(transformer, "EPS", 0.0)
    p = orthonormal(BIG, SMALL)
    weights, c = source_within(p), torch.randn(T, SMALL, dtype=torch.float64) @ p.T
    bases = (p, selection(BIG, COLUMNS), selection(96, NEURONS))
    projection = Projection(big, small_shape(big, SMALL), bases, z_dim=2, family="Linear", layout=layout).double()
    terms = {"positions": weights["positions"] + c.unsqueeze(1)}
    small = projection(weights, terms, torch.randn(T, 2, dtype=torch.float64))
    told = weights | terms
    assert (forward(small, tokens) - forward(told, tokens)).abs().max() < 1e-12
    assert (task_losses(small, tokens) - task_losses(told, tokens)).abs().max() < 1e-12


def test_pca_finds_the_span_and_the_heads_and_neurons_that_matter(big, tokens):
    weights = {k: w.float() for k, w in source_within(orthonormal(BIG, SMALL)).items()}
    bases = base_maps(weights, tokens, big, SMALL, "pca")
    assert bases[1][0].nonzero()[:, 0].tolist() == COLUMNS
    assert sorted(bases[2][1].nonzero()[:, 0].tolist()) == sorted(NEURONS)
    small = Projection(big, small_shape(big, SMALL), bases, z_dim=2, family="Linear")(weights, {}, torch.randn(T, 2))
    torch.testing.assert_close(forward(small, tokens), forward(weights, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["pca", "slice", "random"])
def test_base_maps_are_orthonormal_and_select_whole_heads(big, tokens, kind):
    for size in (8, 16, 24):
        stream, heads, neurons = base_maps(initial_weights(big), tokens, big, size, kind)
        assert stream.shape == (BIG, size) and heads.shape == (2, BIG, size) and neurons.shape == (2, 96, 4 * size)
        for maps in (stream, heads, neurons):
            torch.testing.assert_close(
                maps.transpose(-1, -2) @ maps, torch.eye(maps.shape[-1]).expand(*maps.shape[:-2], -1, -1)
            )
        starts = heads.argmax(1).view(2, -1, 8)
        assert (starts[..., :1] + torch.arange(8) == starts).all() and (starts[..., 0] % 8 == 0).all()
    if kind == "slice":
        assert torch.equal(stream, torch.eye(BIG)) and torch.equal(heads[0], torch.eye(BIG))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["Linear", "Static"])
@pytest.mark.parametrize("conditioning", TOLD_BY)
def test_at_full_size_and_slice_it_is_the_source(big, tokens, conditioning, family, layout):
    """The largest small model is the source itself, whatever tells that of its task: nothing is lost but by size."""
    whole = model(tokens, (BIG,), p0="slice", layout=layout, conditioning=conditioning, family=family)
    ids = torch.arange(T)
    torch.testing.assert_close(
        forward(whole.weights("d24", ids), tokens), forward(whole.weights("source", ids), tokens)
    )


@pytest.mark.parametrize("conditioning", ["film", "adaln"])
def test_task_terms_of_the_source_are_projected_as_if_folded_into_its_weights(big, tokens, conditioning):
    small = randomise(model(tokens, conditioning=conditioning))
    projection, ids = small.projections["d8"], torch.arange(T)
    z = small.conditioning["d8"](ids)
    found = projection(small.source.plain_weights(), small.source.terms(ids), z)
    folded = small.source.weights("source", ids)
    g_qk, g_vo = projection.heads(z).chunk(2, dim=1)
    for t in range(T):
        one = projection(
            {k: w[t] if w.dim() > len(big.weight_shapes().get(k, ())) else w for k, w in folded.items()}, {}, z
        )
        for name in ("embedding", "positions", "qkv", "out", "up", "down", "head"):
            torch.testing.assert_close(found[name][t], one[name][t])
        q, k, v = folded["qkv_bias"][t].chunk(3, dim=-1)  # each (L, d)
        bias = [(x.unsqueeze(1) @ g[t]).squeeze(1) for x, g in ((q, g_qk), (k, g_qk), (v, g_vo))]
        torch.testing.assert_close(found["qkv_bias"][t] - one["qkv_bias"][t], torch.cat(bias, dim=-1))
        bias = (folded["up_bias"][t].unsqueeze(1) @ projection.neurons(z)[t]).squeeze(1)
        torch.testing.assert_close(found["up_bias"][t] - one["up_bias"][t], bias)
        torch.testing.assert_close(found["head_bias"][t] - one["head_bias"][t], folded["head_bias"][t])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_layers_are_mixtures_of_the_sources(tokens, layout):
    """Near one-hot at the start: the kept layer as it is; with α = (a, b) that mixture, before the maps."""
    ids = torch.arange(T)
    whole, one = (model(tokens, (BIG,), p0="slice", layout=layout, n_layers=n) for n in (2, 1))
    kept, found = whole.weights("d24", ids), one.weights("d24", ids)
    for name in ("qkv", "out", "up", "down"):
        assert found[name].shape[1] == 1
        torch.testing.assert_close(found[name][:, 0], kept[name][:, kept_layers(2, 1)[0]])
    with torch.no_grad():
        one.projections["d24"].depth.base.copy_(torch.tensor([[[0.25, 0.5]]]))
    mixed = one.weights("d24", ids)["out"][:, 0]
    torch.testing.assert_close(mixed, 0.25 * kept["out"][:, 0] + 0.5 * kept["out"][:, 1])
    assert one.losses(ids, tokens)["d24"].isfinite().all()


def test_kept_layers_are_spread():
    assert [kept_layers(3, n) for n in (1, 2, 3)] == [[1], [0, 2], [0, 1, 2]]


def test_by_hand():
    """d 2 → 1, one layer, heads and MLP of one unit a column; P = (0.6, 0.8), the first head, the second neuron."""
    shape = Shape(2, n_layers=1, d_head=1, mlp_ratio=1, vocab_size=2, length=2)
    weights = {
        "embedding": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "positions": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "qkv": torch.tensor([[[1.0, 2.0, 5.0, 6.0, 0.0, 1.0], [3.0, 4.0, 7.0, 8.0, 1.0, 0.0]]]),
        "out": torch.tensor([[[1.0, 1.0], [9.0, 9.0]]]),
        "up": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]),
        "down": torch.tensor([[[9.0, 9.0], [2.0, 1.0]]]),
        "head": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    }
    first, second = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    bases = torch.tensor([[0.6], [0.8]]), first, second
    root = math.sqrt(2)
    for layout in LAYOUTS:
        projection = Projection(shape, small_shape(shape, 1), bases, z_dim=1, family="Linear", layout=layout)
        small = projection(
            weights, {"positions": weights["positions"] + torch.tensor([[[10.0, 0.0]]])}, torch.zeros(1, 1)
        )
        expected = {
            "embedding": [[[2.2], [5.0]]],  # 0.6·1 + 0.8·2, 0.6·3 + 0.8·4
            "positions": [[[6.6], [6.8]]],  # (1, 0) and (0, 1), each plus c = (10, 0)
            "qkv": [[[[3.0 * root, 8.6 * root, 0.8 * root]]]],  # columns 0, 2 and 4: the first head
            "out": [[[[1.4]]]],
            "up": [[[[4.4 * root]]]],  # 0.6·2 + 0.8·4
            "down": [[[[2.0]]]],  # 0.6·2 + 0.8·1
            "head": [[[0.6 * root, 0.8 * root]]],
        }
        for name, values in expected.items():
            torch.testing.assert_close(small[name], torch.tensor(values), msg=f"{layout} {name}: {small[name]}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_maps_against_the_formula_matrix_by_matrix(big, layout):
    """Trained maps select nothing any more: √(d/d_s) diag(1 + gain) Pᵀ W G for reads, Gᵀ W P for writes."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in big.weight_shapes().items()
    }
    bases = (orthonormal(BIG, SMALL), selection(BIG, COLUMNS), selection(96, NEURONS))
    projection = randomise(
        Projection(big, small_shape(big, SMALL), bases, z_dim=2, family="Linear", layout=layout).double()
    )
    z, c = (torch.randn(T, size, generator=generator, dtype=torch.float64) for size in (2, BIG))
    small = projection(weights, {"positions": weights["positions"] + c.unsqueeze(1)}, z)
    p, g, n, modulation = (
        part(z) for part in (projection.stream, projection.heads, projection.neurons, projection.modulation)
    )
    root, shared = math.sqrt(BIG / SMALL), layout == "shared"
    for t in range(T):
        gain, shift = modulation[t, 0].view(2, 5, SMALL)  # of reads: qkv 0, qkv 1, up 0, up 1, head

        def check(name, layer, expected, t=t):
            found = small[name][t] if layer is None else small[name][t, layer]
            assert (found - expected).abs().max() < 1e-12 * (1 + expected.abs().max()), (name, layer)

        def check_read(name, layer, read, i, gain=gain, shift=shift):
            check(name, layer, (1 + gain[i]).unsqueeze(1) * read)
            check(f"{name}_bias", layer, shift[i] @ read)

        check("embedding", None, weights["embedding"] @ p[t, 0])
        check("positions", None, (weights["positions"] + c[t]) @ p[t, 0])
        check_read("head", None, root * p[t, 0 if shared else 1].T @ weights["head"], 4)
        for layer in range(2):
            p_q, p_k, p_v, p_up, p_out, p_down = (p[t, 0 if shared else 2 + 2 * i + layer] for i in range(6))
            g_q, g_k, g_v, g_out = (g[t, (i // 2 if shared else i) * 2 + layer] for i in range(4))
            g_up, g_down = n[t, layer], n[t, layer if shared else 2 + layer]
            q, k, v = weights["qkv"][layer].chunk(3, dim=1)
            read = torch.cat([p_q.T @ q @ g_q, p_k.T @ k @ g_k, p_v.T @ v @ g_v], dim=1)
            check_read("qkv", layer, root * read, layer)
            check_read("up", layer, root * p_up.T @ weights["up"][layer] @ g_up, 2 + layer)
            check("out", layer, g_out.T @ weights["out"][layer] @ p_out)
            check("down", layer, g_down.T @ weights["down"][layer] @ p_down)


def test_layouts_start_alike(tokens):
    ids = torch.arange(T)
    shared, apart = (model(tokens, layout=layout).weights("d8", ids) for layout in LAYOUTS)
    for name in shared:
        torch.testing.assert_close(shared[name], apart[name])


def test_layouts_tie_what_they_say(tokens):
    """`shared` has one P for every read and write; `per_matrix` can move one weight alone."""
    ids = torch.arange(T)
    for layout, others_move in (("shared", True), ("per_matrix", False)):
        small = model(tokens, layout=layout)
        before = small.weights("d8", ids)
        with torch.no_grad():
            small.projections["d8"].stream.base[0] += 0.1  # the first P: the embedding's
        after = small.weights("d8", ids)
        assert not torch.equal(before["embedding"], after["embedding"])
        for name in ("qkv", "out", "up", "down", "head"):
            assert torch.equal(before[name], after[name]) != others_move, (layout, name)


TASK_FREE = {
    "Slice": dict(family="Slice"),
    "Static": dict(family="Static"),
    "Orthonormal": dict(family="Orthonormal", inner="Static", neurons="Static"),
}


@pytest.mark.parametrize("maps", TASK_FREE.values(), ids=TASK_FREE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_task_terms_all_tasks_share_one_model(tokens, maps, layout):
    small = model(tokens, layout=layout, use_task_embedding=False, **maps)
    randomise(small.conditioning)
    plain, one = small.weights("d8", torch.arange(T)), small.weights("d8", torch.arange(1))
    for name, size in small_shape(small.shape, SMALL).weight_shapes().items():
        assert plain[name].shape == size, name  # no task axis at all
        assert torch.equal(plain[name], one[name].view(size)), name


@pytest.mark.parametrize("told", [True, False], ids=["StaticToken", "Static"])
@pytest.mark.parametrize("maps", TASK_FREE.values(), ids=TASK_FREE)
def test_a_static_projection_has_losses_for_several_tasks(tokens, maps, told):
    same = tokens[:1].expand(T, -1, -1)
    small = model(tokens, use_task_embedding=told, **maps)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            losses = small.losses(torch.arange(T), same)["d8"]
        assert losses.shape == (T,)
        assert (len(set(losses.tolist())) == 1) != told  # only the task embedding tells the tasks apart


@pytest.mark.parametrize("maps", [m for m in TASK_FREE.values() if "Static" in m.values()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_static_maps_with_gains_and_shifts_only_these_depend_on_the_task(tokens, maps, layout):
    maps = {option: {"Static": "StaticMaps"}.get(value, value) for option, value in maps.items()}
    small, ids = model(tokens, layout=layout, use_task_embedding=False, **maps), torch.arange(T)
    with torch.no_grad():
        at_start = small.weights("d8", ids)
    torch.nn.init.normal_(small.projections["d8"].modulation.directions, std=0.1)
    with torch.no_grad():
        trained = small.weights("d8", ids)
    for name, w in trained.items():
        if name in ("qkv", "up", "head"):  # reads of the stream: a gain each of its entries, alike for all columns
            gains = w / at_start[name]
            torch.testing.assert_close(gains, gains[..., :1].expand_as(gains), rtol=1e-3, atol=1e-3)
            assert gains.std(0).max() > 0.01
        elif name.endswith("_bias"):
            assert w.std(0).max() > 0.01
        else:
            assert w.shape == small_shape(small.shape, SMALL).weight_shapes()[name]  # one for all tasks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neurons_may_have_maps_of_another_family(tokens, layout):
    own = model(tokens, family="Orthonormal", steps=2, neurons="LowRank", layout=layout).projections["d8"]
    kinds = [type(maps).__name__ for maps in (own.stream, own.heads, own.neurons)]
    assert kinds == ["Orthonormal", "Orthonormal", "LowRank"] and own.stream.steps == own.heads.steps == 2
    alike, ids = model(tokens, layout=layout), torch.arange(T)  # Linear maps throughout: all start from the same P₀
    other = model(tokens, family="Orthonormal", neurons="Linear", layout=layout).weights("d8", ids)
    for name, w in alike.weights("d8", ids).items():
        torch.testing.assert_close(other[name], w)


def test_a_tasks_small_model_does_not_depend_on_the_other_tasks_of_the_batch(tokens):
    small = randomise(model(tokens))
    alone, among = small.weights("d8", torch.tensor([1])), small.weights("d8", torch.tensor([2, 1, 0, 1]))
    for name in alone:
        torch.testing.assert_close(alone[name][0], among[name][1])
        assert torch.equal(among[name][1], among[name][3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_of_the_source_is_tuned_through_the_projections(tokens, layout):
    small = randomise(model(tokens, layout=layout))
    task_losses(small.weights("d8", torch.arange(T)), tokens).mean().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mode", SOURCE_MODES)
def test_members_and_trained_groups(tokens, mode):
    small = model(tokens, (8, 16), source_mode=mode)
    assert small.members == (("source",) if mode in ("trained", "random_kept") else ()) + ("d8", "d16")
    assert set(small.groups()) == (set() if mode.endswith("frozen") else {"source"}) | {"d8", "d16"}
    grouped = [id(p) for ps in small.groups().values() for p in ps]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in small.parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["random_kept", "random_trained", "random_frozen"])
def test_random_modes_redraw_inner_weights_at_the_same_scale(tokens, mode):
    before = model(tokens).source.state_dict()
    after = model(tokens, source_mode=mode).source.state_dict()
    for name, w in before.items():
        if name.split(".")[-1] in ("qkv", "out", "up", "down"):
            flat, new = w.flatten(1), after[name].flatten(1)
            torch.testing.assert_close(new.std(1), flat.std(1), rtol=0.1, atol=0)
            for one, other in zip(flat, new, strict=True):
                assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15, name
        else:
            assert torch.equal(after[name], w), name


def test_redrawing_depends_on_the_seed(tokens):
    drawn = []
    for seed in (0, 0, 1):
        source = model(tokens).source
        redraw_inner_weights(source, seed)
        drawn.append(source.plain["qkv"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("mode, weight", [("tuned", 0.0), ("random_trained", 0.0), ("random_kept", 3.0)])
def test_a_source_has_its_own_objective_where_the_mode_says_so(tokens, mode, weight):
    small = model(tokens, source_mode=mode, source_weight=3.0)
    losses = small.losses(torch.arange(T), tokens)
    total = sum((3.0 if member == "source" else 1.0) * loss.mean() for member, loss in losses.items())
    (found,) = torch.autograd.grad(total, small.source.plain["up"])
    of = [task_losses(small.weights(member, torch.arange(T)), tokens).mean() for member in ("d8", "source")]
    (expected,) = torch.autograd.grad(of[0] + weight * of[1], small.source.plain["up"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["frozen", "random_frozen"])
def test_a_frozen_source_is_the_same_after_training(digits, source, mode):
    config = tiny_projectable(options={"source_mode": mode}, steps=4)
    small = experiment.build(config, digits)
    before = {k: v.clone() for k, v in small.source.state_dict().items()}
    experiment.train(small, digits, config)
    assert all(torch.equal(before[k], v) for k, v in small.source.state_dict().items())
    assert all(p.grad is None for p in small.source.parameters())
    if mode == "frozen":
        assert all(torch.equal(before[k], v) for k, v in source.model().state_dict().items())


def test_sizes_that_cannot_be(tokens):
    with pytest.raises(ValueError, match="size 32 is above the source's 24; allowed: multiples of 8 up to 24"):
        model(tokens, (32,))
    with pytest.raises(ValueError, match="3 layers of a source with 2; allowed: 1 to 2"):
        model(tokens, n_layers=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "twisted"}, "unknown layout 'twisted'; allowed: shared, per_matrix"),
        ({"p0": "magic"}, "unknown p0 'magic'; allowed: pca, slice, random"),
        ({"source_mode": "melted"}, "unknown source_mode 'melted'; allowed: trained, tuned, frozen"),
    ],
)
def test_unknown_options(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        model(tokens, **options)
