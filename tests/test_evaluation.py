"""What decides verdicts, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import tiny_projectable

from projectable import evaluation, experiment
from projectable.models import Model, Universal
from projectable.tasks import make_tasks
from projectable.transformer import Shape


def table(**arms):
    """Losses {arm: rows of tasks, one row a seed} of width 8 as `loss_table` lays them out."""
    rows = [
        dict(arm=arm, d_s=8, seed=seed, task=f"task {task}", loss=loss)
        for arm, losses in arms.items()
        for seed, row in enumerate(losses)
        for task, loss in enumerate(row)
    ]
    return pd.DataFrame(rows)


def test_gaps_are_paired_by_seed_and_averaged_over_tasks():
    losses = table(rival=[[1.0, 2.0], [1.5, 2.5], [9.0, 9.0]], ours=[[0.5, 2.1], [1.0, 2.0]])
    gaps = evaluation.paired_gaps(losses, "rival", "ours")
    assert gaps.seed.tolist() == [0, 1], "the rival's third seed has no partner"
    assert gaps.gap.tolist() == pytest.approx([0.2, 0.5])
    each = evaluation.gaps_to_each(losses.replace({"arm": {"ours": "mine"}}), ["rival"], "mine")
    assert each.gap.tolist() == gaps.gap.tolist() and each.comparison.tolist() == ["rival", "rival"]
    means = evaluation.seed_means(losses)
    assert means.query("arm == 'ours'").loss.tolist() == pytest.approx([1.3, 1.5])
    assert evaluation.over_seeds(means).values.tolist() == [
        ["rival", 8, pytest.approx(12.5 / 3), pytest.approx(4.193249), 3],
        ["ours", 8, pytest.approx(1.4), pytest.approx(0.2 / math.sqrt(2)), 2],
    ]


def test_the_interval_is_students():
    # 1, 2, 3, 4: mean 2.5, s = √(5/3), t₃ = 3.18245 → half-width 3.18245 · 1.29099 / 2
    mean, low, high = evaluation.t_interval([1, 2, 3, 4])
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)
    assert math.isnan(evaluation.t_interval([1.0])[1])


@pytest.mark.parametrize(
    "low, high, seeds, above, word",
    [
        (0.1, 0.2, 3, 0.0, "reproduced"),
        (-0.2, -0.1, 3, 0.0, "not reproduced"),
        (-0.1, 0.1, 3, 0.0, "inconclusive"),
        (0.1, 0.2, 2, 0.0, "inconclusive"),
        (0.1, 0.2, 3, 0.15, "inconclusive"),
        (-0.004, 0.2, 3, -0.005, "reproduced"),
        (math.nan, math.nan, 3, 0.0, "inconclusive"),
    ],
)
def test_the_rule_of_a_verdict(low, high, seeds, above, word):
    assert evaluation.verdict(low, high, seeds, above) == word


def test_a_judgement_is_the_interval_and_its_verdict():
    found = evaluation.judge([0.1, 0.11, 0.12])
    assert found["value"] == pytest.approx(0.11) and found["seeds"] == 3 and found["verdict"] == "reproduced"
    assert found["ci_high"] - found["value"] == pytest.approx(4.30265 * 0.01 / math.sqrt(3), abs=1e-6)
    assert evaluation.judge([0.1, 0.11, 0.12], above=0.2)["verdict"] == "not reproduced"
    lower = evaluation.judge([0.1, 0.11, 0.12], below=0.2)
    assert lower == found | dict(verdict="reproduced") and lower["ci_low"] < lower["value"] < lower["ci_high"]
    assert evaluation.judge([0.1, 0.11, 0.12], below=0.05)["verdict"] == "not reproduced"
    assert evaluation.judge([0.1, 0.11, 0.12], below=0.11)["verdict"] == "inconclusive"
    longer = evaluation.judge([0.1, 0.11, 0.12], longer=5)
    assert longer["value"] - longer["ci_low"] == pytest.approx(5 * (found["value"] - found["ci_low"]))
    assert longer["ci_high"] - longer["value"] == pytest.approx(5 * (found["ci_high"] - found["value"]))
    assert longer["verdict"] == "inconclusive"


def test_questions_are_judged_at_every_size_that_both_arms_have():
    wide = table(rival=[[1.0, 2.0]] * 3, ours=[[0.5, 1.9]] * 3, few=[[1.2, 2.4]] * 3)
    losses = pd.concat([wide, wide[wide.arm != "few"].assign(d_s=16, loss=lambda x: x.loss / 2)])
    asked = {"a": ("rival", "ours", "Ours of width {d_s} wins"), "b": ("rival", "few", "Few of {d_s} wins")}
    found = list(evaluation.compare(losses, asked, str.upper, "nats per patch"))
    assert [x["id"] for x in found] == ["a.d8", "a.d16", "b.d8"]
    assert [x["value"] for x in found] == pytest.approx([0.3, 0.15, -0.3])
    assert [x["verdict"] for x in found] == ["reproduced", "reproduced", "not reproduced"]
    assert found[1]["claim"] == "Ours of width 16 wins" and found[1]["statistic"] == "RIVAL − OURS, nats per patch"
    (sampled,) = evaluation.compare(wide, {"a": asked["a"]}, by="task")
    assert {k: sampled[k] for k in ("value", "ci_low", "ci_high", "seeds", "verdict")} == evaluation.judge_sampled(
        wide, "rival", "ours"
    ), "where tasks are a sample the interval says so"
    assert sampled["verdict"] == "inconclusive"


def test_the_crossed_bootstrap_is_wider_where_tasks_differ():
    same = table(rival=[[1.0] * 8] * 5, ours=[[0.9] * 8] * 5)
    assert evaluation.crossed_bootstrap(same, "rival", "ours") == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="1 seeds and 8 groups of tasks; allowed: two of each or more"):
        evaluation.crossed_bootstrap(same[same.seed == 0], "rival", "ours")
    by_task = table(rival=[[1.0] * 8] * 5, ours=[[0.8, 1.0] * 4] * 5)  # gaps 0.2 and 0, alike for all seeds
    mean, low, high = evaluation.crossed_bootstrap(by_task, "rival", "ours")
    # redrawing 8 tasks: standard deviation 0.1/√8; Student's t of the five seeds' four degrees of freedom
    half = 2.7764 * 0.1 / math.sqrt(8) * math.sqrt(5 / 4)
    assert mean == pytest.approx(0.1) and (high - low) / 2 == pytest.approx(half, rel=0.05)
    gaps = evaluation.paired_gaps(by_task, "rival", "ours").gap
    assert evaluation.t_interval(gaps)[1] == pytest.approx(0.1), "the t interval over seeds does not see that"


def test_where_tasks_are_sampled_the_wider_interval_decides():
    by_task = table(rival=[[1.0] * 8] * 5, ours=[[0.7, 0.9] * 4] * 5)  # gaps 0.3 and 0.1, for all seeds
    alone = evaluation.judge(evaluation.paired_gaps(by_task, "rival", "ours").gap)
    assert (alone["ci_low"], alone["ci_high"]) == pytest.approx((0.2, 0.2))
    found = evaluation.judge_sampled(by_task, "rival", "ours")
    _, low, high = evaluation.crossed_bootstrap(by_task, "rival", "ours")
    assert found == alone | dict(ci_low=low, ci_high=high) and low > 0 and found["verdict"] == "reproduced"
    two = by_task.assign(script=by_task.task.isin(sorted(by_task.task.unique())[::2]))  # gaps 0.3 and 0.1 again
    found = evaluation.judge_sampled(two, "rival", "ours", by="script")  # deviation 0.1/√2, one degree of freedom
    assert found["ci_high"] - found["value"] == pytest.approx(12.706 * 0.1, rel=0.05)
    assert found["verdict"] == "inconclusive" and found["value"] == pytest.approx(0.2)
    tasks = sorted(by_task.task.unique())
    uneven = by_task.assign(script=by_task.task.where(by_task.task.isin(tasks[:3]), "other"))  # 1, 1, 1 and 5 tasks
    assert evaluation.judge_sampled(uneven, "rival", "ours", by="script")["value"] == alone["value"], (
        "tasks count alike"
    )
    per_seed = [[0.9 - 0.1 * seed] * 8 for seed in range(5)]  # here the seeds differ
    noisy = table(rival=[[1.0] * 8] * 5, ours=per_seed)
    found, alone = (
        evaluation.judge_sampled(noisy, "rival", "ours"),
        evaluation.judge(evaluation.paired_gaps(noisy, "rival", "ours").gap),
    )
    assert found["ci_low"] == pytest.approx(alone["ci_low"], rel=0.05) and found["verdict"] == alone["verdict"]


def test_the_crossed_bootstrap_wants_every_task_of_one_size():
    losses = table(rival=[[1.0] * 4] * 3, ours=[[0.9] * 4] * 3)
    with pytest.raises(ValueError, match=r"sizes \[8, 16\]; allowed: of one size"):
        evaluation.crossed_bootstrap(pd.concat([losses.assign(d_s=s) for s in (8, 16)]), "rival", "ours")
    with pytest.raises(ValueError, match="1 pairs of seed and task are missing"):
        evaluation.crossed_bootstrap(losses.drop(losses.index[0]), "rival", "ours")


def test_the_width_that_matches():
    sizes, losses = [8, 16, 32], [2.0, 1.5, 1.25]
    assert evaluation.matching_width(sizes, losses, 1.75) == pytest.approx(8 * math.sqrt(2))
    assert evaluation.matching_width(sizes, losses, 1.5) == pytest.approx(16)
    assert evaluation.matching_width(sizes, losses, 1.0) == pytest.approx(64), "the last slope goes on"
    assert evaluation.matching_width(sizes, losses, 2.5) == pytest.approx(4), "and the first"
    assert math.isnan(evaluation.matching_width([8, 16], [1.0, 1.1], 0.9)), "wider is worse: no width matches"


def test_the_steps_that_a_projection_is_worth():
    steps, losses = [100, 1000, 10_000], [2.0, 1.5, 1.4]
    worth = evaluation.steps_worth(steps, losses, 1.75)
    assert 100 < worth < 100 * math.sqrt(10), "fewer than a straight line in log(steps) says: losses fall ever slower"
    straight = evaluation.steps_worth([100, 1000, 10_000], [2.0, 1.5, 1.0], 1.75)
    assert straight == pytest.approx(100 * math.sqrt(10)), "where they do not, as many"
    assert evaluation.steps_worth(steps, losses, 1.4) == pytest.approx(10_000)
    assert evaluation.steps_worth(steps, losses, 3.0) == pytest.approx(100)
    assert evaluation.steps_worth(steps, losses, 1.3) == math.inf
    # more steps that end worse (another seed's sweep) do not count against the shorter run
    assert evaluation.steps_worth(steps, [2.0, 1.5, 1.6], 1.5) == pytest.approx(1000)

    assert evaluation.steps_worth(steps[::-1], losses[::-1], 1.75) == worth, "in any order"


def test_what_each_size_and_seed_of_an_arm_is_worth():
    rows = [("short", 8, 0, 2.0), ("short", 8, 1, 2.2), ("long", 8, 0, 1.0), ("long", 8, 1, 1.0), ("ours", 8, 0, 1.0)]
    rows += [("ours", 8, 1, 3.0), ("ours", 8, 2, 1.0), ("short", 16, 0, 2.0), ("ours", 16, 0, 1.0)]
    means = pd.DataFrame(rows, columns=["arm", "d_s", "seed", "loss"])
    found = evaluation.worth(means, "ours", dict(long=1000, short=100))
    assert found.d_s.tolist() == [8, 8] and found.seed.tolist() == [0, 1]
    assert found.worth_steps.tolist() == pytest.approx([1000, 100])


def test_the_seconds_to_a_loss():
    val = [(10, 2.0), (20, 1.5), (30, 1.4)]
    rows = [dict(step=step, member="d8", split="val", loss=loss) for step, loss in val]
    rows += [dict(step=step, member="d8", split="train", loss=0.0) for step, _ in val]
    run = SimpleNamespace(history=rows, result=dict(seconds=6.0))
    assert [evaluation.seconds_to(run, "d8", loss) for loss in (1.5, 1.45, 1.3)] == [4.0, 6.0, math.inf]


def test_gaps_that_widen_are_paired_by_seed():
    rows = [(s, seed, gap + 0.1 * seed) for s, gap in ((8, 0.5), (16, 0.3), (32, 0.25)) for seed in range(3)]
    gaps = pd.DataFrame([*rows, (8, 3, 9.0)], columns=["d_s", "seed", "gap"])  # a seed that one size has alone
    first, second = evaluation.widening(gaps, "headline.widens", "The gap widens", "nats")
    assert (first["id"], first["claim"]) == ("headline.widens.8_16", "The gap widens from width 16 to 8")
    assert first["statistic"] == "gap at the smaller width − gap at the larger, nats"
    assert (first["value"], first["seeds"], first["verdict"]) == (pytest.approx(0.2), 3, "reproduced")
    assert (second["id"], second["value"]) == ("headline.widens.16_32", pytest.approx(0.05))


def test_an_arm_without_losses_is_named():
    losses = table(rival=[[1.0, 2.0]], ours=[[0.5, 2.1]])
    with pytest.raises(ValueError, match="no losses of an arm 'rivals'; allowed: ours, rival"):
        evaluation.paired_gaps(losses, "rivals", "ours")
    with pytest.raises(ValueError, match="'rival' and 'ours' have no task, size and seed in common"):
        evaluation.paired_gaps(losses[(losses.arm == "ours") != (losses.task == "task 1")], "rival", "ours")


def test_losses_are_those_of_the_runs_own_tasks(universal, digits):
    found = evaluation.loss_table({"universal": [universal]}, digits)
    assert list(found.task) == list(digits.task_names) and set(found.arm) == {"universal"}
    both = {"mine": [experiment.run(tiny_projectable())]}
    whole, small = (evaluation.loss_table(both, digits, sources) for sources in (True, False))
    assert set(zip(whole.arm, whole.d_s, strict=True)) == {("mine", 8), ("mine: source", 16)}
    assert small.to_dict("list") == whole[whole.arm == "mine"].to_dict("list")
    clusters = make_tasks("digits", "clusters10", vocab_size=32, patch=2, val_per_class=20)
    with pytest.raises(ValueError, match="is of digits/classes; allowed: runs of digits/clusters10"):
        evaluation.loss_table({"universal": [universal]}, clusters)


def test_the_ratio_of_deviations_by_the_f_distribution():
    a, b = [0.0, 2.0, 4.0], [0.0, 1.0, 2.0]
    ratio, low, high = evaluation.deviation_ratio(a, b)
    assert ratio == pytest.approx(2.0)
    assert (low, high) == pytest.approx((2 / math.sqrt(39.0), 2 * math.sqrt(39.0)))  # F(2, 2) at 97.5 % is 39
    assert evaluation.deviation_ratio(a, a)[1] < 1 < evaluation.deviation_ratio(a, a)[2]


def test_an_image_is_named_by_the_likeliest_model():
    losses = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[2.0, 2.0], [1.0, 1.0]]])  # (2 models, 2 tasks, 2 images)
    assert evaluation.naming_accuracy(losses) == 0.75  # the second image of task 0 goes to model 1


@pytest.fixture(scope="module")
def projectable():
    return experiment.run(tiny_projectable()).model()


def test_swapping_tasks_gives_each_models_loss_on_each_tasks_images(projectable, digits):
    found = evaluation.swap_losses(projectable, "d8", digits, per_task=5)
    assert found.shape == (10, 10, 5)
    own = projectable.losses(torch.tensor([3]), digits.first("test", 5)[3:4])["d8"]
    torch.testing.assert_close(found[3, 3].mean(), own[0].detach())


def test_the_line_between_two_tasks_ends_at_their_models(projectable, digits):
    line = evaluation.losses_between(projectable, "d8", digits, [0.0, 0.5, 1.0], per_task=5)
    swapped = evaluation.swap_losses(projectable, "d8", digits, per_task=5).mean(-1)
    first = line[line.task == digits.task_names[0]].set_index("fraction")
    assert first.own[0.0] == pytest.approx(swapped[0, 0].item(), abs=1e-5)
    assert first.own[1.0] == pytest.approx(swapped[1, 0].item(), abs=1e-5), (
        "the next task's model on the first's images"
    )
    assert first.other[1.0] == pytest.approx(swapped[1, 1].item(), abs=1e-5)


def test_what_a_training_step_holds(digits):
    class Toy(Model):
        def __init__(self):
            super().__init__()
            self.trained = torch.nn.Parameter(torch.zeros(3))
            self.fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)

        def losses(self, task_ids, tokens):
            return {"d8": (tokens.double() * self.trained[0]).exp().sum((1, 2))}  # keeps the tokens and their exp

    held = evaluation.training_memory(Toy(), digits, tasks=2, images=3)
    doubles = 2 * 3 * digits.codebook.length
    assert held == {"state": 4 * (4 * 3 + 5), "kept": 8 * 2 * doubles}, "once each, and not the parameter"
    model = Universal(Shape(8, 1, vocab_size=32, length=16), 10)
    assert evaluation.training_memory(model, digits, 99, 2) == evaluation.training_memory(model, digits, 10, 2)
