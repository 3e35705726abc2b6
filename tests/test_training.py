"""The loop: it learns, it can be cut off anywhere and ends bitwise the same, it says where it failed."""

import contextlib
import math
import os
import re
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from threading import Event, Thread

import pytest
import safetensors.torch
import torch
from conftest import tiny, tiny_projectable, train_until

from projectable import experiment, generators
from projectable.models import Projectable
from projectable.storage import DamagedFile, load_tensors
from projectable.training import (
    AdamW,
    DivergedError,
    FastProducts,
    Team,
    check_precision,
    cuda_graph,
    gains_by_onednn,
    make_optimizer,
    schedule,
    split_losses,
    train,
)
from projectable.transformer import _losses as losses


def trained(config, digits, model=None, **options):
    """A model after training, and what training says of it."""
    model = model or experiment.build(config, digits)
    return model, train(model, digits, config, **options)


def same(one, other) -> bool:
    """Bit by bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def validation(outcome, member) -> list[float]:
    return [row["loss"] for row in outcome.history if row["split"] == "val" and row["member"] == member]


# ------------------------------------------------------------------------------------------------------ the parts


def test_schedule():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-6)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.09)))
    assert max(rates) > 0.97 and 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert schedule(0, 100, 0) == 1.0


def test_every_parameter_has_its_members_rate_times_its_own_factor(digits, source):
    config = tiny_projectable(sizes=(8, 16), lr=(0.5, 0.25), source_lr=0.125)
    model = experiment.build(config, digits)
    groups = make_optimizer(model, config.rates(), 0.5).param_groups
    assert {(group["weight_decay"], group["betas"]) for group in groups} == {(0.5, (0.9, 0.95))}
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        member = next((m for m in ("d8", "d16") if f".{m}." in name), "source")
        assert rate.pop(id(parameter)) == config.rates()[member] * model.rate_factor(name), name
    assert not rate
    assert model.rate_factor("conditioning.d8.table") == model.rate_factor("source.plain.qkv") == 1


@pytest.mark.parametrize("block", [3, 20, 1000])
def test_losses_of_a_split_are_means_over_all_its_images(digits, universal, block):
    model = universal.model()
    losses = split_losses(model, digits, "test", block=block)["d8"]
    for task, tokens in enumerate(digits.tokens["test"]):
        with torch.no_grad():
            alone = [model.losses(torch.tensor([task]), x.view(1, 1, -1))["d8"].item() for x in tokens]
        assert losses[task].item() == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    few = split_losses(model, digits, "test", per_task=7)["d8"]
    with torch.no_grad():
        expected = model.losses(torch.arange(10), digits.first("test", 7))["d8"]
    torch.testing.assert_close(few.float(), expected)


def test_of_a_split_without_images_there_is_no_loss(digits, universal):
    bare = replace(digits, tokens=digits.tokens | {"val": [x[:0] for x in digits.tokens["val"]]})
    assert split_losses(universal.model(), bare, "val")["d8"].isnan().all()


def test_a_graph_is_captured_once_and_for_one_shape(digits, universal, monkeypatch):
    """What a CPU can say of it: the rest is in `test_gpu.py`."""
    captured, model, ids = [], universal.model(), torch.arange(10)

    def capture(module, like, allow_unused_input):
        captured.append([x.shape for x in like])
        return lambda *inputs: {member: loss + 1 for member, loss in module(*inputs).items()}

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    losses_of = cuda_graph(model)
    for images, by_graph in ((4, 1), (4, 1), (3, 0)):
        tokens = digits.first("train", images)
        expected = model.losses(ids, tokens)["d8"] + by_graph
        torch.testing.assert_close(losses_of(ids, tokens)["d8"], expected)
    assert captured == [[(10,), (10, 4, 16)]]
    assert Team().losses(model) == model.losses, "on a CPU there is none"


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("model", ["universal", "specialists"])
def test_it_learns(digits, model):
    config = tiny(model=model, steps=100, eval_every=25)
    start = split_losses(experiment.build(config, digits), digits, "val", 10)["d8"].mean().item()
    trained_model, outcome = trained(config, digits)
    losses = validation(outcome, "d8")
    assert losses[-1] < 0.75 * start and losses == sorted(losses, reverse=True)
    assert split_losses(trained_model, digits, "val", 10)["d8"].mean().item() == pytest.approx(losses[-1], abs=1e-6)


def test_projections_learn_and_the_source_goes_on(digits, source):
    _, outcome = trained(tiny_projectable(steps=60), digits)
    assert outcome.history[0].keys() == {"step", "member", "split", "loss"}
    assert {row["member"] for row in outcome.history} == {"source", "d8"}
    assert validation(outcome, "d8")[-1] < validation(outcome, "d8")[0] - 0.05
    assert validation(outcome, "source")[-1] < source.result["val"]["source"]


def test_the_training_loss_is_the_mean_since_the_last_evaluation(digits):
    seen = []
    _, outcome = trained(tiny(), digits, report=lambda step, steps, loss: seen.append((step, steps, loss)))
    assert [(step, steps) for step, steps, _ in seen] == [(i, 40) for i in range(1, 41)]
    rows = [row for row in outcome.history if row["split"] == "train"]
    for row in rows:
        window = [loss for step, _, loss in seen if row["step"] - 10 < step <= row["step"]]
        assert row["loss"] == pytest.approx(sum(window) / 10, abs=1e-6)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]


def test_the_last_step_is_evaluated_even_off_the_beat(digits):
    _, outcome = trained(tiny(steps=13), digits)
    assert [row["step"] for row in outcome.history if row["split"] == "val"] == [10, 13]


def test_members_that_share_nothing_learn_as_if_alone(digits, source):
    """Small models of a frozen source: their own rates and their own clipping, so that company changes nothing."""
    config = tiny_projectable(options={"source_mode": "frozen"}, clip=0.1, steps=30)
    alone, first = trained(config, digits)
    together, second = trained(config.with_(sizes=(8, 16), lr=(*config.lr, 0.3)), digits)
    assert validation(first, "d8") == validation(second, "d8")
    a, b = alone.state_dict(), together.state_dict()
    assert first.best_step == second.best_step
    assert all(torch.equal(a[key], b[key]) for key in a)


TOO_FAST = tiny(steps=200, lr=(10.0,), warmup=80)  # it gets worse while the rate still rises


def test_early_stopping_ends_early_and_restores_the_best(digits):
    config = TOO_FAST.with_(patience=2)
    model, outcome = trained(config, digits)
    losses = validation(outcome, "d8")
    best = min(losses)
    assert 3 <= len(losses) < 20 and losses.index(best) == len(losses) - 3
    assert outcome.best_step == 10 * (losses.index(best) + 1)
    assert split_losses(model, digits, "val", 10)["d8"].mean().item() == pytest.approx(best, abs=1e-6)


def test_the_best_step_is_kept_without_early_stopping_too(digits):
    run = experiment.run(TOO_FAST.with_(steps=30, warmup=20))
    losses = validation(run, "d8")
    assert losses[-1] > min(losses) == run.result["val"]["d8"]
    assert split_losses(run.model(), digits, "val", 10)["d8"].mean().item() == pytest.approx(min(losses), abs=1e-6)


# -------------------------------------------------------------------------------------------------------- cut off


ARMS = {
    "universal": lambda: tiny(),
    "projectable": lambda: tiny_projectable(checkpoint_every=15),
    "several sizes": lambda: tiny_projectable(sizes=(8, 16), lr=(2e-3, 1e-3), options={"p0": "slice"}),
    "early stopping": lambda: TOO_FAST.with_(patience=3, checkpoint_every=7),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_ends_bitwise_where_an_unbroken_one_does(digits, source, tmp_path, arm):
    config, checkpoint = ARMS[arm](), tmp_path / "checkpoint.safetensors"
    unbroken, expected = trained(config, digits)
    for stop in (1, 17, 20):  # the last one is a step with an evaluation
        about, _ = train_until(stop, experiment.build(config, digits), digits, config, checkpoint)
        assert about["step"] == stop and len(about["history"]) < len(expected.history)
        torch.rand(3)  # whatever else happens in between
    seen, how = [], dict(report=lambda step, *_: seen.append(step), stop=lambda: seen[-1:] == [config.steps])
    resumed, outcome = trained(config, digits, checkpoint=checkpoint, **how)
    assert seen == list(range(21, seen[-1] + 1)) and same(resumed, unbroken)
    assert outcome.history == expected.history and outcome.best_step == expected.best_step


def test_seconds_leave_interruptions_out(digits, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.safetensors"
    now = 0.0

    def clock():
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr("projectable.training.time.perf_counter", clock)
    about, _ = train_until(20, experiment.build(tiny(), digits), digits, tiny(), checkpoint)
    now += 1000
    _, outcome = trained(tiny(), digits, checkpoint=checkpoint)
    assert 0 < about["seconds"] < outcome.seconds < 1000


def killed(config) -> None:
    """A run in a process of its own, which is killed when it has half saved its second checkpoint."""
    saved, save = [], safetensors.torch.save_file

    def save_half(tensors, path, about):
        save(tensors, path, about)
        saved.append(path)
        if len(saved) == 2:
            os.truncate(path, 500)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_half
    experiment.run(config)


@pytest.mark.slow
def test_a_run_that_is_killed_while_saving_goes_on_and_ends_bitwise_the_same(digits, source, other_runs):
    config = tiny_projectable()
    unbroken, expected = trained(config, digits)
    experiment.run(config.start)
    child = get_context("fork").Process(target=killed, args=(config,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    folder = experiment.folder_of(config)
    _, about = load_tensors(folder / "checkpoint.safetensors")
    assert about["step"] == 10 and not experiment.is_done(config)
    seen = []
    run = experiment.run(config, lambda step, steps, loss: seen.append(step))
    assert seen[0] == 11  # it went on, it did not begin again
    assert same(run.model(), unbroken) and run.history == expected.history
    assert run.result["best_step"] == expected.best_step


def test_the_checkpoint_of_another_run_is_refused(digits, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train_until(10, experiment.build(tiny(), digits), digits, tiny(), checkpoint)
    with pytest.raises(DamagedFile, match=re.escape(f"{checkpoint} is the checkpoint of another run: delete it")):
        trained(tiny(seed=1), digits, checkpoint=checkpoint)


# --------------------------------------------------------------------------------------------------- fast products

ZEN = dict(cpu_name="AMD EPYC", avx512_f=True, amx_tile=False)
GAINS = gains_by_onednn(getattr(torch.cpu, "get_capabilities", dict)())


@pytest.mark.parametrize(
    ("capabilities", "gains"),
    [
        (ZEN, True),
        ({}, False),
        (ZEN | dict(cpu_name="Intel Xeon"), False),
        (ZEN | dict(avx512_f=False), False),
        (ZEN | dict(amx_tile=True), False),
    ],
    ids=["Zen", "unknown", "Intel", "no AVX-512", "AMX"],
)
def test_products_go_to_onednn_where_a_processor_gains_and_keeps_float32(monkeypatch, capabilities, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with FastProducts():
        with FastProducts():
            assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if gains else "none")
        assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if gains else "none")
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_products_stay_fast_while_another_thread_needs_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN, raising=False)
    entered, go_on, seen = Event(), Event(), []

    def other():
        with FastProducts():
            entered.set()
            assert go_on.wait(10)
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)

    with FastProducts():
        thread = Thread(target=other)
        thread.start()
        assert entered.wait(10)
    go_on.set()
    thread.join()
    assert seen == ["bf16"] and torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_training_and_evaluation_have_fast_products_and_leave_no_trace(digits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN, raising=False)
    model, seen = experiment.build(tiny(), digits), []
    usual = model.losses
    model.losses = lambda *given: seen.append(torch.backends.mkldnn.matmul.fp32_precision) or usual(*given)
    split_losses(model, digits, "test")
    train(model, digits, tiny(steps=3, eval_every=1))  # an evaluation after every step
    assert len(seen) >= 7 and set(seen) == {"bf16"}
    with pytest.raises(KeyboardInterrupt):
        train(model, digits, tiny(), stop=iter([False, True]).__next__)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"  # its user's word
        split_losses(model, digits, "test")
        assert seen[-1] == torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.skipif(not GAINS, reason="this processor does not gain by oneDNN: its products are left alone")
@pytest.mark.parametrize("inner", [33, 96, 588, 5880])
def test_fast_products_keep_the_accuracy_of_float32(inner):
    """Rounded to bfloat16 their errors would be thousands of times as large."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(10, inner, n, generator=generator) for n in (96, 256))
    exact = a.double().mT @ b.double()
    with FastProducts():
        found = {"many": torch.bmm(a.mT, b), "one": torch.stack([x.T @ y for x, y in zip(a, b, strict=True)])}
    for how, product in found.items():
        assert (product - exact).square().mean().sqrt() < 1e-6 * exact.square().mean().sqrt(), how


# ------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_is_refused_where_it_does_not_pay(digits, monkeypatch):
    @contextlib.contextmanager
    def as_if(device, precision):
        time.sleep(0.02 if precision == "bfloat16" else 0.0)
        yield

    monkeypatch.setattr("projectable.training.autocast", as_if)
    with pytest.raises(
        ValueError, match=r"'bfloat16' takes \S+ ms a pass on this device \(cpu\), float32 \S+ ms; allowed"
    ):
        trained(tiny(precision="bfloat16"), digits)
    with pytest.raises(ValueError, match="unknown precision 'float16'; allowed: float32, bfloat16"):
        tiny(precision="float16")


def test_precisions_are_timed_before_the_first_step_only(digits, tmp_path, monkeypatch):
    timed, checkpoint = [], tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr("projectable.training.check_precision", lambda *given: timed.append(given[-1]))
    config = tiny(precision="bfloat16", steps=20)
    train_until(10, experiment.build(config, digits), digits, config, checkpoint)
    trained(config, digits, checkpoint=checkpoint)
    assert timed == ["bfloat16"], "a resumed run is not refused because the machine is busy"


def test_bfloat16_is_taken_where_it_is_measured_to_be_faster(digits, monkeypatch):
    @contextlib.contextmanager
    def as_if(device, precision):
        time.sleep(0.02 if precision == "float32" else 0.0)
        yield

    monkeypatch.setattr("projectable.training.autocast", as_if)
    model, state = experiment.build(tiny(), digits), torch.get_rng_state()
    check_precision(model, torch.arange(10), digits.first("train", 2), "bfloat16")
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arm", ["universal", "projectable"])
def test_in_bfloat16_the_weights_and_the_loss_stay_in_float32(digits, source, monkeypatch, arm):
    """As on a GPU: the products of the forward pass are in bfloat16, and it learns the same, nearly."""
    config = {"universal": tiny, "projectable": tiny_projectable}[arm]()
    _, expected = trained(config, digits)
    monkeypatch.setattr("projectable.training.check_precision", lambda *_: None)
    seen = []
    monkeypatch.setattr("projectable.transformer._losses", lambda h, *rest: seen.append(h.dtype) or losses(h, *rest))
    model, outcome = trained(config.with_(precision="bfloat16"), digits)
    assert set(seen) == {torch.float32} == {p.dtype for p in model.parameters()}
    found = validation(outcome, "d8")
    assert found != validation(expected, "d8")
    assert found == pytest.approx(validation(expected, "d8"), abs=5e-3)


# ------------------------------------------------------------------------------------------------------- diverged


def test_a_diverged_run_names_the_step_and_keeps_the_last_good_checkpoint(digits, tmp_path):
    config, checkpoint = tiny(), tmp_path / "checkpoint.safetensors"
    model = experiment.build(config, digits)

    def poison(step, steps, loss):
        if step == 23:
            with torch.no_grad():
                model.plain["qkv"][0, 0, 0] = math.nan

    with pytest.raises(DivergedError, match=r"the loss is nan at step 24 of 40; .*learning rates.*warm-up than 5"):
        trained(config, digits, model, checkpoint=checkpoint, report=poison)
    tensors, about = load_tensors(checkpoint)
    assert about["step"] == 20
    assert all(torch.isfinite(t).all() for name, t in tensors.items() if name.startswith("model."))
    resumed, _ = trained(config, digits, checkpoint=checkpoint)  # a better hand can go on from there
    assert same(resumed, trained(config, digits)[0])


@pytest.mark.parametrize("where", ["the gradient", "some weights"])
def test_what_an_update_would_break_is_never_saved(digits, tmp_path, where, monkeypatch):
    """The loss of step 20 is fine, but its gradient is not; or the update makes a weight that no loss has seen yet."""
    config, checkpoint = tiny(), tmp_path / "checkpoint.safetensors"
    model, step_now = experiment.build(config, digits), []
    clip, step_of = torch.nn.utils.clip_grad_norm_, AdamW.step

    def clip_badly(parameters, most):
        step_now.append(1)
        if where == "the gradient" and len(step_now) == 20:
            parameters[0].grad[0] = math.nan
        return clip(parameters, most)

    def step_badly(self, *arguments):
        step_of(self, *arguments)
        if where == "some weights" and len(step_now) == 20:
            with torch.no_grad():
                model.plain["positions"][-1, 0] = math.inf
                model.plain["embedding"][31, 0] = math.inf

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_badly)
    monkeypatch.setattr(AdamW, "step", step_badly)
    monkeypatch.setattr("projectable.training.split_losses", lambda *_, **__: {"d8": torch.ones(10)})
    with pytest.raises(DivergedError, match=f"{where} .* not finite at step 20 of 40; the last good"):
        trained(config, digits, model, checkpoint=checkpoint)
    tensors, about = load_tensors(checkpoint)
    assert about["step"] == 10 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    if where == "the gradient":
        assert all(p.isfinite().all() for p in model.parameters())


def test_tasks_without_validation_images_are_left_out_of_the_choice(digits):
    val = [tokens if task % 2 else tokens[:0] for task, tokens in enumerate(digits.tokens["val"])]
    data = replace(digits, tokens=digits.tokens | {"val": val})
    model, outcome = trained(tiny(), data)
    losses = split_losses(model, data, "val", 10)["d8"]
    assert losses.isnan().tolist() == [True, False] * 5
    best = min(validation(outcome, "d8"))
    assert math.isfinite(best) and losses[1::2].mean().item() == pytest.approx(best, abs=1e-6)
    with pytest.raises(ValueError, match="digits/classes has no validation images"):
        trained(tiny(), replace(digits, tokens=digits.tokens | {"val": [t[:0] for t in val]}))


def test_an_absurd_rate_is_an_error_or_numbers_but_never_a_silent_nan(digits):
    try:
        model, outcome = trained(tiny(lr=(1e30,)), digits)
    except DivergedError as error:
        assert "step" in str(error) and "1e+30" in str(error)
    else:
        assert all(math.isfinite(row["loss"]) for row in outcome.history)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_nan_of_the_last_update_is_named(digits):
    config = tiny(steps=1)
    model = experiment.build(config, digits)

    def poison(step, steps, loss):
        with torch.no_grad():
            model.plain["qkv"][0, 0, 0] = math.nan

    with pytest.raises(DivergedError, match="step 1 of 1"):
        trained(config, digits, model, report=poison)


class Dropped(generators.Linear):
    """Linear maps, of whose numbers half are left out while they are trained."""

    def forward(self, z):
        return torch.nn.functional.dropout(super().forward(z), training=self.training)


def test_validation_is_of_models_as_they_are_used(digits, source, monkeypatch):
    monkeypatch.setitem(generators.FAMILIES, "Dropped", Dropped)
    model = Projectable(source.model(), 10, (8,), digits.first("train", 4), family="Dropped").train()
    first, second = (split_losses(model, digits, "val", 5)["d8"] for _ in range(2))
    assert torch.equal(first, second) and model.training and model.projections["d8"].training


def test_where_nothing_is_trained_that_is_said(digits):
    config = tiny_projectable(source_lr=0.0, options={"source_mode": "frozen", "family": "Slice"})
    with pytest.raises(ValueError, match="the loss of d8 hangs on nothing that is trained; allowed: maps that learn"):
        train(experiment.build(config, digits), digits, config)
