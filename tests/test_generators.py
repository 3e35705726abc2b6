"""The contract of every generator family, whoever adds it; and cases computed by hand."""

import pytest
import torch

from projectable.generators import FAMILIES, Linear, LowRank, make_generator

T, K, S, M, N = 4, 3, 2, 6, 5


def made(name, seed=0):
    torch.manual_seed(seed)
    base = torch.linalg.qr(torch.randn(S, M, N))[0]  # orthonormal columns, as P₀ has them
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


def test_low_rank_is_of_that_rank():
    base = torch.zeros(1, 6, 5)
    generator = LowRank(base, z_dim=3, rank=2)
    torch.nn.init.normal_(generator.gate)
    assert torch.linalg.matrix_rank(generator(torch.randn(4, 3))).tolist() == [[2]] * 4


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown generator 'Cubic'; allowed: Slice, Static, Linear"):
        make_generator("Cubic", BASE, 2)
