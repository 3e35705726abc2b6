"""The contract of every generator family, whoever adds it; and cases computed by hand."""

import pytest
import torch

from projectable.generators import (
    FAMILIES,
    Attributes,
    Kronecker,
    Linear,
    LowRank,
    LowRankMLP,
    Mixture,
    _Polar,
    _scale_of,
    make_generator,
)
from projectable.transformer import Products

T, K, S, M, N = 4, 3, 2, 6, 5


def orthonormal(*shape):
    """Maps with orthonormal columns, as P₀ has them."""
    return torch.linalg.qr(torch.randn(*shape))[0]


def made(name, seed=0):
    torch.manual_seed(seed)
    base = orthonormal(S, M, N)
    return base, make_generator(name, base, K)


def trained(name):
    """The generator after two steps towards maps that differ from task to task; which parameters were reached."""
    _, generator = made(name)
    z, target = torch.randn(T, K), torch.randn(T, S, M, N)
    optimizer = torch.optim.SGD([*generator.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reached = {key: False for key, p in generator.named_parameters() if p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        loss = (generator(z) - target).square().mean()
        if reached:
            loss.backward()
        for key in reached:
            grad = generator.get_parameter(key).grad
            reached[key] |= grad is not None and bool(grad.abs().max() > 0)
        optimizer.step()
    return generator, z, reached


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    def test_shape(self, name):
        _, generator = made(name)
        for tasks in (1, T):
            assert generator(torch.randn(tasks, K)).shape in {(tasks, S, M, N), (1, S, M, N)}

    def test_starts_from_the_base_maps_for_every_task(self, name):
        base, generator = made(name)
        maps = generator(torch.randn(T, K) * 10).expand(T, S, M, N)
        torch.testing.assert_close(maps, base.expand(T, S, M, N), rtol=1e-5, atol=1e-5)

    def test_gradients_reach_every_parameter_within_two_steps(self, name):
        _, _, reached = trained(name)
        assert all(reached.values()), reached

    def test_maps_depend_on_their_own_task_only(self, name):
        generator, z, _ = trained(name)
        maps = generator(z).expand(T, S, M, N)
        for t in range(T):
            torch.testing.assert_close(generator(z[t : t + 1])[0], maps[t])

    def test_the_seed_decides_everything(self, name):
        one, two = trained(name)[0].state_dict(), trained(name)[0].state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_state_dict_restores_it(self, name):
        generator, z, _ = trained(name)
        _, other = made(name, seed=1)
        other.load_state_dict(generator.state_dict())
        assert torch.equal(other(z), generator(z))

    def test_base_maps_of_the_caller_stay_as_they_are(self, name):
        base, generator = made(name)
        before = base.clone()
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(1)
        assert torch.equal(base, before)

    @pytest.mark.parametrize("shape", [(1, 7, 7), (3, 7, 1), (2, 13, 11), (5, 1, 1)])
    def test_any_stack_and_shape(self, name, shape):
        base = orthonormal(*shape)
        maps = make_generator(name, base, K)(torch.randn(T, K)).expand(T, *shape)
        torch.testing.assert_close(maps, base.expand(T, *shape), rtol=1e-5, atol=1e-5)

    def test_rates_are_those_of_its_own_parameters(self, name):
        _, generator = made(name)
        assert set(generator.rates) <= dict(generator.named_parameters()).keys()
        assert all(generator.rate_factor(key) > 0 for key, _ in generator.named_parameters())

    def test_unknown_option(self, name):
        with pytest.raises(ValueError, match="unknown option 'depth' of the generator .*; allowed: "):
            make_generator(name, orthonormal(S, M, N), K, depth=2)


BASE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one 2×2 map


def test_linear_by_hand():
    generator = Linear(BASE, z_dim=2)
    with torch.no_grad():
        generator.directions.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 1.0], [1.0, 0.0]]]]))
    maps = generator(torch.tensor([[2.0, 0.0], [1.0, -3.0]]))
    assert maps.tolist() == [[[[3.0, 2.0], [3.0, 4.0]]], [[[2.0, -1.0], [0.0, 4.0]]]]


def test_low_rank_by_hand():
    generator = LowRank(BASE, z_dim=2, rank=1)
    with torch.no_grad():
        generator.left.copy_(torch.tensor([[[1.0], [2.0]]]))
        generator.right.copy_(torch.tensor([[[3.0], [5.0]]]))
        generator.gate.copy_(torch.tensor([[1.0], [-1.0]]))  # A z = z₁ − z₂
    maps = generator(torch.tensor([[1.0, 0.0], [1.0, 3.0]]))  # P₀ + (1 or −2) · [[3, 5], [6, 10]]
    assert maps.tolist() == [[[[4.0, 7.0], [9.0, 14.0]]], [[[-5.0, -8.0], [-9.0, -16.0]]]]


def test_kronecker_by_hand():
    base = torch.zeros(1, 4, 6)  # B is (2, 2), A (2, 3)
    generator = Kronecker(base, z_dim=2, terms=2)
    torch.nn.init.normal_(generator.coefficients)
    z = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    a, b = torch.einsum("tz,zskij->tskij", z, generator.coefficients), generator.blocks
    for t in range(2):
        expected = torch.kron(a[t, 0, 0], b[0, 0]) + torch.kron(a[t, 0, 1], b[0, 1])
        torch.testing.assert_close(generator(z)[t, 0], expected)


def test_low_rank_mlp_is_of_that_rank_and_tells_the_maps_of_the_stack_apart():
    generator = LowRankMLP(torch.zeros(2, 6, 5), z_dim=3, rank=2)
    torch.nn.init.normal_(generator.left)
    maps = generator(torch.randn(4, 3))
    assert torch.linalg.matrix_rank(maps).tolist() == [[2, 2]] * 4
    assert (maps[:, 0] - maps[:, 1]).abs().max() > 0.1
    generator.embedding.data[1] = generator.embedding.data[0]
    maps = generator(torch.randn(4, 3))
    torch.testing.assert_close(maps[:, 0], maps[:, 1])  # nothing but the embedding does


def test_mixture_by_hand():
    generator = Mixture(BASE, z_dim=1, experts=2)
    with torch.no_grad():
        generator.gate.copy_(torch.tensor([[0.0, 3.0]]).clamp_min(1).log())  # logits 0 and log 3
        generator.offsets.copy_(torch.stack([torch.full((1, 2, 2), 4.0), torch.full((1, 2, 2), -4.0)]))
    maps = generator(torch.tensor([[0.0], [1.0]]))  # shares (1/2, 1/2) and (1/4, 3/4)
    torch.testing.assert_close(maps, torch.stack([BASE, BASE - 2]))


class TestOrthonormal:
    def test_starts_from_the_base_maps_to_float32(self):
        base = orthonormal(3, 40, 24)
        maps = make_generator("Orthonormal", base, K)(torch.randn(T, K))
        assert (maps - base).abs().max() < 1e-6

    @pytest.mark.parametrize("inner, noise", [("Linear", 0.025), ("LowRankMLP", 0.003), ("Mixture", 0.03)])
    def test_is_the_polar_factor_of_the_inner_maps(self, inner, noise):
        torch.manual_seed(0)
        generator = make_generator("Orthonormal", orthonormal(3, 40, 24), K, inner=inner).double()
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        z = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
        maps, inside = generator(z), generator.inner(z)
        u, s, v = torch.linalg.svd(inside, full_matrices=False)
        assert 1.2 < (s.amax(-1) / s.amin(-1)).max() < 2.5  # away from orthonormal, as far as four steps are good for
        assert (inside - maps).abs().max() > 0.05
        torch.testing.assert_close(maps, u @ v, rtol=0, atol=1e-5)
        direction = torch.randn_like(maps)
        ours, exact = (torch.autograd.grad((m * direction).sum(), z, retain_graph=True)[0] for m in (maps, u @ v))
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_gradients_are_those_of_the_steps_themselves(self, steps):
        """The scale, which only decides how soon they converge, is no part of them."""
        torch.manual_seed(0)
        mine = (torch.eye(7, 4) + 0.3 * torch.randn(3, 7, 4)).double().requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        gram = theirs.mT @ theirs
        scale = _scale_of(gram.detach(), (gram @ gram).detach())
        expected = theirs / scale.sqrt()
        for _ in range(steps):  # X (15 − 10 XᵀX + 3 (XᵀX)²) / 8
            gram = expected.mT @ expected
            expected = expected @ (15 * torch.eye(4) - 10 * gram + 3 * gram @ gram) / 8
        y = _Polar.apply(mine, steps)
        direction = torch.randn_like(y)
        y.backward(direction)
        expected.backward(direction)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)

    def test_more_steps_for_maps_far_from_orthonormal(self):
        base = orthonormal(1, 24, 12)
        errors = []
        for steps in (2, 4, 8):
            generator = make_generator("Orthonormal", base, K, inner="Static", steps=steps)
            with torch.no_grad():
                generator.base.mul_(torch.linspace(0.1, 1, 12))
            maps = generator(torch.zeros(1, K))[0, 0]
            errors.append((maps.T @ maps - torch.eye(12)).abs().max().item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5

    @pytest.mark.parametrize("spread, steps, error", [(2.5, 4, 1e-5), (2.5, 2, 0.1), (5, 4, 1e-3), (5, 2, 0.6)])
    def test_how_far_from_orthonormal_columns_are(self, spread, steps, error):
        generator = make_generator("Orthonormal", orthonormal(1, 64, 32), K, inner="Static", steps=steps).double()
        with torch.no_grad():
            generator.base.mul_(torch.linspace(1, spread, 32))
        maps = generator(torch.zeros(1, K).double())[0, 0]
        assert (maps.T @ maps - torch.eye(32)).abs().max() < error

    def test_gradients_at_the_start_are_finite(self):
        generator = make_generator("Orthonormal", torch.eye(8)[:, :4].unsqueeze(0), K)
        (generator(torch.randn(T, K)) * torch.randn(T, 1, 8, 4)).sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in generator.parameters())

    def test_stays_in_float32_under_autocast(self):
        generator = make_generator("Orthonormal", orthonormal(2, 6, 5), K)
        z = torch.randn(T, K)
        with torch.autocast("cpu", torch.bfloat16):
            maps = generator(z)
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, generator(z), rtol=0, atol=0.02)  # the inner maps are in bfloat16
        maps.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in generator.parameters())

    def test_the_scale_of_the_inner_maps_does_not_matter(self):
        generator = make_generator("Orthonormal", orthonormal(2, 6, 5), K)
        before = generator(torch.zeros(1, K))
        for scale in (1e-3, 1e6):
            with torch.no_grad():
                generator.base.mul_(scale)
            torch.testing.assert_close(generator(torch.zeros(1, K)), before, rtol=1e-5, atol=1e-5)

    def test_options_and_rates_are_those_of_the_inner_family(self):
        generator = make_generator("Orthonormal", orthonormal(2, 6, 5), K, inner="LowRankMLP", hidden=3)
        assert generator.rate_factor("inner.left") == LowRankMLP.rates["left"] != 1
        assert generator.inner.left.shape[0] == 3

    @pytest.mark.parametrize("base", [torch.zeros(1, 4, 2), torch.eye(4)[:2].unsqueeze(0), 2 * torch.eye(3)[None]])
    def test_only_from_orthonormal_columns(self, base):
        with pytest.raises(ValueError, match="Orthonormal starts from maps with orthonormal columns; .* away from"):
            make_generator("Orthonormal", base, K)


@pytest.mark.parametrize(
    "name, operations, parameters",
    [
        ("Slice", 0, 0),
        ("Static", 0, 0),
        ("Linear", K * S * M * N, K * S * M * N),
        ("LowRank", K * S * 4 + S * M * N * 4, K * S * 4 + S * (M + N) * 4),
        ("LowRankMLP", K * 32 + S * 32 * (M + N) * 4 + S * M * N * 4, 32 * (K + S + (M + N) * 4)),
        ("Kronecker", K * S * 4 * 3 * 5 + S * 4 * M * N, K * S * 4 * 3 * 5 + S * 4 * 2 * 1),  # B is (2, 1), A (3, 5)
        ("Mixture", K * S * 4 + S * 4 * M * N, 4 * S * M * N + K * S * 4),
        ("Orthonormal", K * S * M * N + S * (2 * M * N * N + 13 * N**3), K * S * M * N),
    ],
)
def test_cost(name, operations, parameters):
    """Multiply-adds of one task's maps; parameters beside P₀."""
    _, generator = made(name)
    with Products() as counter:
        generator(torch.zeros(1, K))
    assert counter.multiply_adds == operations
    assert sum(p.numel() for p in generator.parameters()) == S * M * N + parameters


@pytest.mark.parametrize(
    "name, option", [("LowRank", "rank"), ("LowRankMLP", "hidden"), ("Kronecker", "terms"), ("Mixture", "experts")]
)
def test_options_that_cannot_be(name, option):
    for value in (0, -1, 1.5):
        with pytest.raises(
            ValueError, match=f"{option}={value} is not allowed: it must be a whole number of 1 or more"
        ):
            make_generator(name, BASE, 2, **{option: value})


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown generator 'Cubic'; allowed: Slice, Static, StaticMaps, Linear"):
        make_generator("Cubic", BASE, 2)


def test_attributes_tell_capital_letters_from_small_ones():
    one, other, _ = Attributes(3, 2, ("A", "a", "b")).table
    assert not torch.equal(one, other)
