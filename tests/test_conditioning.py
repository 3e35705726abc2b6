"""The contract of every conditioning, whoever adds it; what each knows of a task."""

import pytest
import torch
from conftest import randomise

from projectable.generators import CONDITIONINGS, Features, SupportSet, make_conditioning

T, K, F, V, N = 5, 3, 7, 32, 16
NAMES = ("ankle boot", "boot", "shirt", "T-shirt", "bag")


@pytest.fixture(scope="module")
def told(digits):
    """What any conditioning may need to be told, of five digits."""
    support = digits.first("train", 16)[:T]
    vectors = torch.randn(T, F, generator=torch.Generator().manual_seed(1)) * 5 + 3
    return dict(support=support, vocab_size=V, names=NAMES, vectors=vectors)


def made(name, told, seed=0):
    torch.manual_seed(seed)
    return make_conditioning(name, T, K, **{need: told[need] for need in CONDITIONINGS[name].needs})


@pytest.mark.parametrize("name", CONDITIONINGS)
class TestEveryConditioning:
    def test_shape_and_size_of_the_entries(self, name, told):
        z = made(name, told)(torch.arange(T))
        assert z.shape == (T, K) and z.dtype == torch.float32
        sizes = torch.stack([made(name, told, seed)(torch.arange(T)).square().mean() for seed in range(10)])
        assert 0.3 < sizes.mean() < 3

    def test_tasks_in_any_order_and_number(self, name, told):
        conditioning = made(name, told).eval()
        z = conditioning(torch.arange(T))
        torch.testing.assert_close(conditioning(torch.tensor([3, 0, 3])), z[[3, 0, 3]])

    def test_gradients_reach_every_parameter(self, name, told):
        conditioning = made(name, told)
        (conditioning(torch.arange(T)) * torch.randn(T, K)).sum().backward()
        for key, parameter in conditioning.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key

    def test_the_seed_decides_everything(self, name, told):
        one, two, other = (made(name, told, seed) for seed in (0, 0, 1))
        drawn = []
        for conditioning in (one, two, other):
            torch.manual_seed(7)
            drawn.append(torch.stack([conditioning(torch.arange(T)) for _ in range(3)]))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    def test_it_says_whether_it_draws(self, name, told):
        """On a GPU a step of training is recorded once: what draws on the CPU can't be."""
        conditioning = made(name, told)
        z, *others = (conditioning(torch.arange(T)) for _ in range(9))
        assert conditioning.draws == any(not torch.equal(z, other) for other in others)

    def test_state_dict_restores_it(self, name, told):
        conditioning, other = randomise(made(name, told)).eval(), made(name, told, seed=1).eval()
        other.load_state_dict(conditioning.state_dict())
        assert torch.equal(other(torch.arange(T)), conditioning(torch.arange(T)))

    def test_rates_are_those_of_its_own_parameters(self, name, told):
        conditioning = made(name, told)
        assert set(conditioning.rates) <= dict(conditioning.named_parameters()).keys()
        assert all(conditioning.rate_factor(key) > 0 for key, _ in conditioning.named_parameters())

    def test_what_it_needs_is_asked_for(self, name, told):
        for need in CONDITIONINGS[name].needs:
            with pytest.raises(ValueError, match=f"the conditioning {name} has to be given .*{need}.* of the tasks"):
                make_conditioning(name, T, K, **{need: None})


def test_no_id_tells_nothing(told):
    z = made("NoID", told)(torch.arange(T))
    assert torch.equal(z, z[:1].expand(T, -1))


def test_shuffled_ids_are_drawn_anew_in_training_and_the_tasks_own_else(told):
    shuffled, ids = made("ShuffledID", told), torch.arange(T).repeat(40)
    one, two = shuffled(ids), shuffled(ids)
    assert not torch.equal(one, two)
    told_of = torch.cdist(one, shuffled.table).argmin(1)  # whose vector it was
    assert torch.equal(shuffled.table[told_of], one) and set(told_of.tolist()) == set(range(T))
    assert 0.05 < (told_of == ids).float().mean() < 0.4  # one in five by chance
    with torch.no_grad():
        assert torch.equal(shuffled(ids), shuffled.table[ids])
    assert torch.equal(shuffled.eval()(ids), shuffled.table[ids])


class TestFeatures:
    def test_by_hand(self):
        features = Features(2, 1, vectors=torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
        with torch.no_grad():
            features.map.copy_(torch.tensor([[10.0], [1.0]]))
        # centre (2, 7), deviations ±1 and ±2: scale √((1 + 1 + 4 + 4) / 4)
        torch.testing.assert_close(features(torch.arange(2)), torch.tensor([[-12.0], [12.0]]) / 2.5**0.5)

    def test_another_task_by_its_vector(self, told):
        features = made("Features", told)
        torch.testing.assert_close(features.encode(told["vectors"][2:4]), features(torch.tensor([2, 3])))

    @pytest.mark.parametrize("vectors", [torch.zeros(T + 1, F), torch.zeros(T), torch.full((T, F), torch.nan)])
    def test_vectors_that_cannot_be(self, vectors):
        with pytest.raises(
            ValueError, match=rf"vectors of shape .*; allowed: one of finite numbers a task, \({T}, F\)"
        ):
            Features(T, K, vectors)


def test_names_alike_give_vectors_alike(told):
    table = made("Attributes", told).table
    similar = table @ table.T
    assert similar[0, 1] > 0.3 and similar[2, 3] > 0.3  # boots; shirts
    assert similar[0, 2:].max() < 0.25 and similar[2, :2].max() < 0.25


class TestSupportSet:
    def test_evaluation_sees_the_first_images(self, told):
        support = made("SupportSet", told).eval()
        for n in (1, 4):
            support.n_eval = n
            torch.testing.assert_close(support(torch.arange(T)), support.encode(told["support"][:, :n]))

    def test_no_random_numbers_are_used_without_gradients(self, told):
        support = made("SupportSet", told)
        state = torch.get_rng_state()
        with torch.no_grad():
            assert torch.equal(support(torch.arange(T)), support(torch.arange(T)))
        assert torch.equal(torch.get_rng_state(), state)

    def test_training_draws_different_images_of_the_task_itself(self, told):
        support, seen = made("SupportSet", told), []
        support.n_train = (4,)
        support.encode = lambda tokens: seen.append(tokens) or torch.zeros(len(tokens), K)
        for _ in range(20):
            support(torch.tensor([2, 4]))
        for tokens in seen:
            assert tokens.shape == (2, 4, N)
            for task, images in zip((2, 4), tokens, strict=True):
                where = (told["support"][task].unsqueeze(0) == images.unsqueeze(1)).all(-1)  # (4, 16)
                assert where.any(1).all()
        assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == 20

    def test_training_draws_the_number_of_images(self, told):
        support = made("SupportSet", told)
        seen = set()
        support.encode = lambda tokens: seen.add(tokens.shape[1]) or torch.zeros(len(tokens), K)
        for _ in range(60):
            support(torch.arange(T))
        assert seen == {1, 4, 16}

    def test_an_image_is_not_drawn_twice(self, told):
        support = torch.arange(16).view(1, 16, 1)
        encoder, seen = SupportSet(1, K, support, vocab_size=16), []
        encoder.n_train = (16,)
        encoder.encode = lambda tokens: seen.append(sorted(tokens.flatten().tolist())) or torch.zeros(1, K)
        encoder(torch.zeros(1, dtype=torch.long))
        assert seen == [list(range(16))]

    def test_the_order_of_images_does_not_matter_but_that_of_tokens_does(self, told):
        encoder, images = made("SupportSet", told), told["support"][:2]
        z = encoder.encode(images)
        torch.testing.assert_close(encoder.encode(images.flip(1)), z, rtol=1e-4, atol=1e-5)
        assert (encoder.encode(images.flip(2)) - z).abs().max() > 0.05

    def test_a_task_is_closer_to_itself_than_to_others(self, told):
        torch.manual_seed(0)
        encoder = SupportSet(T, 32, told["support"], V)
        one, other = (encoder.encode(told["support"][:, i : i + 8]) for i in (0, 8))
        distance = torch.cdist(one, other)
        within = distance.diagonal().mean()
        between = (distance.sum() - distance.diagonal().sum()) / (T * T - T)
        assert between > 1.2 * within

    def test_a_task_may_have_fewer_images(self, told):
        few = SupportSet(T, K, told["support"][:, :10], V).eval()
        assert few.n_train == (1, 4) and few.n_eval == 10
        assert torch.equal(few(torch.arange(T)), few.encode(told["support"][:, :10]))

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(vocab_size=5), "support has tokens from 0 to .*; allowed: 0 to 4"),
            (dict(support=torch.zeros(T, N, dtype=torch.long)), r"support of shape \(5, 16\); allowed: \(5, images"),
        ],
    )
    def test_supports_that_cannot_be(self, told, options, message):
        with pytest.raises(ValueError, match=message):
            SupportSet(T, K, **dict(support=told["support"], vocab_size=V) | options)


def test_unknown_conditioning():
    with pytest.raises(ValueError, match="unknown conditioning 'Horoscope'; allowed: LearnedID, NoID, ShuffledID"):
        make_conditioning("Horoscope", T, K)
