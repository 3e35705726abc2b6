"""How fast: one thread, each comparison in turns. `make bench` runs this; nothing here asserts a time."""

import pytest
import torch
import torch.nn.functional as F

from projectable.arms import LINEAR, MAPS, Maps
from projectable.config import get_profile
from projectable.models import Model, Projectable, Specialists, Universal
from projectable.training import FastProducts
from projectable.transformer import Shape, initial_weights, sample, task_losses

T, SIZES = 10, (8, 16, 32)
IDS = torch.arange(T)


def tokens(images: int) -> torch.Tensor:
    return torch.randint(256, (T, images, 49), generator=torch.Generator().manual_seed(1))


def stepper(model, loss):
    """A whole training step: forward, backward, clipping, fused AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def ours(model: Model, x: torch.Tensor):
    """As `train` makes it: with fast products."""
    return FastProducts()(stepper(model, lambda: sum(v.mean() for v in model.losses(IDS, x).values())))


def plain(d: int, layers: int) -> Universal:
    return Universal(Shape(d, layers), T, "none")


def projectable(d: int, layers: int, mode: str = "trained", maps: Maps = LINEAR) -> Projectable:
    source = Universal(Shape(d, layers), T, "additive", "source")
    return Projectable(source, T, SIZES, tokens(2), source_mode=mode, **maps.options)


@pytest.mark.parametrize("d, layers, images, maps", [(64, 2, 4, LINEAR), (64, 2, 4, MAPS), (96, 3, 12, LINEAR)])
def test_joint_step_against_the_plain_models_in_it(compare, d, layers, images, maps):
    x = tokens(images)
    joint = ours(projectable(d, layers, maps=maps), x)
    steps = [ours(plain(size, layers), x) for size in (d, *SIZES)]
    shape = f"{'linear' if maps is LINEAR else 'default'} maps, d = {d}, {layers} layers, {T} × {images} images"
    compare(f"step of source + 3 projections ({shape})", joint, "the same 4 plain models", lambda: [s() for s in steps])


def test_joint_step_against_its_source(compare):
    x = tokens(12)
    joint, source = ours(projectable(96, 3), x), ours(plain(96, 3), x)
    what = "step of source + 3 projections (linear maps, d = 96, 3 layers, 10 × 12 images)"
    compare(what, joint, "plain step at d = 96", source, 1 / 1.5)


@pytest.mark.parametrize("d, layers, images", [(64, 2, 4), (96, 3, 12)])
def test_projections_batched_against_a_loop_over_tasks(compare, d, layers, images):
    x, model = tokens(images), projectable(d, layers, "random_trained")

    @FastProducts()
    def batched():
        model.zero_grad()
        sum(v.mean() for v in model.losses(IDS, x).values()).backward()

    def looped():  # without fast products: for many small ones they are slower
        model.zero_grad()
        for t in range(T):
            sum(v.sum() / T for v in model.losses(IDS[t : t + 1], x[t : t + 1]).values()).backward()

    shape = f"linear maps, d = {d}, {layers} layers, {T} × {images} images"
    compare(f"3 projections, batched over tasks ({shape})", batched, "a loop over tasks", looped, 2.0)


def gpt2(d: int, layers: int):
    transformers = pytest.importorskip("transformers", reason="the optional extra `bench` is not installed")
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=49, n_embd=d, n_layer=layers, n_head=d // 8, n_inner=4 * d, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("d, target", [(8, 1.2), (16, 1.2), (32, 1.2), (96, 1.0)])
def test_plain_step_against_gpt2(compare, d, target):
    x, other = tokens(12), gpt2(d, 3)
    flat = x.flatten(0, 1)
    read = torch.cat([torch.zeros(len(flat), 1, dtype=torch.long), flat[:, :-1]], 1)  # a start, then all but the last
    step = stepper(other, lambda: F.cross_entropy(other(read).logits.flatten(0, 1), flat.flatten()))
    compare(f"plain step, d = {d}, 3 layers, 120 images", ours(plain(d, 3), x), "Hugging Face GPT-2", step, target)


def test_cached_sampling_against_generate(compare):
    weights, other = initial_weights(Shape(32)), gpt2(32, 2).eval()
    other.config.use_cache = True
    start = torch.zeros(16, 1, dtype=torch.long)

    def generate():
        with torch.no_grad():
            options = dict(do_sample=True, top_k=0, max_new_tokens=49, use_cache=True)
            assert other.generate(start, attention_mask=torch.ones_like(start), **options).shape == (16, 50)

    compare("16 sampled images, d = 32, 2 layers", lambda: sample(weights, 16, 49), "generate", generate, 2.0, rounds=7)


def test_one_shot_generation_against_training_a_specialist(compare):
    profile = get_profile("laptop")
    model, x = projectable(profile.d_source, profile.n_layers), tokens(profile.images_per_task)

    @torch.no_grad()
    def generate():
        for size in SIZES:
            model.weights(f"d{size}", IDS)

    one = Specialists(Shape(32, profile.n_layers), 1)
    step = FastProducts()(stepper(one, lambda: task_losses(one.weights("d32", IDS[:1]), x[:1], 8).mean()))
    steps = profile.source_steps + profile.joint_steps
    compare(
        f"generating {T} tasks × {len(SIZES)} sizes in one shot", generate, "one step of one specialist, d = 32", step
    )
    from conftest import ROWS

    share = ROWS[-1]["ours_ms"] / (T * len(SIZES)) / (ROWS[-1]["other_ms"] * steps)
    ROWS.append(dict(what=f"one of these models, as a share of a specialist's {steps} steps, seconds", value=share))
