"""The figures say what the data says, in the colours fixed for each family."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from projectable import plotting
from projectable.arms import ARMS

LOSSES = pd.DataFrame(
    [
        {"arm": arm, "d_s": size, "seed": seed, "loss": loss + seed * 0.01 - size / 100}
        for arm, loss in (("projected_linear", 1.8), ("universal_film", 1.9), ("universal_adaln", 1.95))
        for size in (8, 16, 32)
        for seed in range(3)
    ]
)


def test_colours_belong_to_families():
    assert plotting.colour("projected_linear") == plotting.colour("projected")
    assert plotting.colour("universal − projected") == plotting.colour("universal")
    assert plotting.colour("trained bank") == plotting.colour("control")
    assert plotting.colour("something else") == plotting.OTHER
    names = ("projected", "universal", "specialist", "source", "hypernetwork without a source", "cut", "bank")
    main = [plotting.colour(name) for name in names]
    assert len(set(main)) == len(main)
    beside = {plotting.colour(name) for name in names if name != "cut"}  # a mixture is beside some of these
    assert plotting.colour("hard mixture of four plain models") not in beside
    words = ("source_frozen", "projected, source frozen")  # an arm's name and its words
    assert {plotting.colour(name) for name in words} == {plotting.colour("projected")}
    assert plotting.colour("cut_tuned") == plotting.colour("cut") != plotting.colour("source")
    widths = {look["color"] for look in plotting.looks(["width 8", "width 16", "width 32"]).values()}
    assert len(widths) == 3 and not widths & set(plotting.FAMILIES.values()), "what is of no family takes none's colour"


def test_arms_of_one_family_differ():
    looks = plotting.looks(["universal_film", "universal_adaln", "projected"])
    assert looks["universal_film"]["color"] == looks["universal_adaln"]["color"]
    assert looks["universal_film"]["linestyle"] != looks["universal_adaln"]["linestyle"]
    assert looks["projected"]["linestyle"] == "-"
    controls = plotting.looks(
        [name for name in ARMS if plotting.family(name) in ("static", "random")] + ["bank", "control"]
    )
    pairs = {(look["color"], look["linestyle"], look["marker"]) for look in controls.values()}
    assert len(pairs) == len(controls) > 6


def test_loss_against_size_draws_means_and_every_seed():
    fig = plotting.loss_against_size(LOSSES, source=1.5)
    (ax,) = fig.axes
    bars = {c.get_label(): c.lines[0] for c in ax.containers}
    np.testing.assert_allclose(bars["projected linear"].get_ydata(), [1.73, 1.65, 1.49])
    assert to_hex(bars["projected linear"].get_color()).upper() == plotting.FAMILIES["projected"]
    assert sum(len(line.get_ydata()) for line in ax.lines if line.get_marker() == "o" and line.get_alpha()) == 27
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "test loss (nats per token)"
    assert [t.get_text() for t in fig.legends[0].get_texts()].count("source (large)") == 1
    (below,) = plotting.loss_against_size(LOSSES, source=1.2).axes  # below all others: off the axis still
    assert below.get_ylim()[0] < 1.2 - 0.02


def test_gap_takes_the_intervals_it_is_given():
    gaps = LOSSES.rename(columns={"arm": "comparison", "loss": "gap"})
    gaps = gaps[gaps["comparison"] == "universal_film"]
    summary = pd.DataFrame(
        {"comparison": "universal_film", "d_s": [8, 16, 32], "mean": [3, 2, 1], "ci_low": 0.5, "ci_high": 4}
    )
    (ax,) = plotting.gap_against_size(gaps, summary).axes
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), [3, 2, 1])
    (segments,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(segments.get_segments()[0][:, 1], [0.5, 4])


def test_sweep_marks_the_best_and_tells_an_edge():
    rates = [1e-3, 1e-2, 1e-1]
    df = pd.concat(
        pd.DataFrame({"arm": arm, "d_s": 8, "lr": rates, "val_loss": losses})
        for arm, losses in (("projected", [2, 1, 3]), ("universal", [3, 2, 1]))
    )
    (ax,) = plotting.sweep_curves(df).axes
    marks = {line.get_marker(): float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
    assert marks == {"o": 1e-2, "X": 1e-1}


def test_a_sweep_shows_trials_that_diverged_without_a_loss(tmp_path):
    df = pd.DataFrame(dict(arm="projected", d_s=8, lr=[1e-3, 1e-2, 1e-1, 1.0], val_loss=[2, 1, np.inf, np.inf]))
    fig = plotting.sweep_curves(df)
    (ax,) = fig.axes
    curve, diverged, best = ax.lines
    assert np.isnan(curve.get_ydata()).tolist() == [False, False, True, True]
    assert diverged.get_marker() == "x" and diverged.get_xdata().tolist() == [1e-1, 1.0]
    assert (best.get_marker(), best.get_xdata()) == ("o", [1e-2]) and np.isfinite(ax.get_ylim()).all()
    fig.savefig(tmp_path / "drawn.png")


@pytest.mark.parametrize("last", [4, 16, 64, 256])
def test_learning_rates_can_be_told_apart_in_many_panels(last):
    rates = [1e-3 * 2**k for k in range(9) if 2**k <= last]
    df = pd.DataFrame([dict(arm="projected", d_s=8 * 2**i, lr=lr, val_loss=1 + lr) for i in range(5) for lr in rates])
    fig = plotting.sweep_curves(df)
    fig.draw_without_rendering()
    panels = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in panels] == [f"width {8 * 2**i}" for i in range(5)]
    for ax in panels:
        low, high = ax.get_xlim()
        seen = [label for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert len(seen) >= 2
        starts = [label.get_window_extent().x0 for label in seen]
        height = seen[0].get_fontsize() * fig.dpi / 72  # of the letters: apart by that, turned ones do not touch
        assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) > height


def test_waterfall_writes_the_changes():
    df = pd.DataFrame({"label": ["universal", "bank", "maps"], "loss": [2.0, 1.9, 1.95], "d_s": 8})
    (ax,) = plotting.waterfall(df).axes
    assert [t.get_text() for t in ax.texts] == ["2.000", "−0.100", "+0.050"]
    twice = pd.concat([df, df.assign(loss=df.loss + [0.2, 0.0, 0.1])])
    (ax,) = plotting.waterfall(twice).axes
    assert [t.get_text() for t in ax.texts] == ["2.100", "−0.200", "+0.100"], "of the means"
    points = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    assert np.concatenate(points) == pytest.approx([2.0, 2.2, 1.9, 1.9, 1.95, 2.05])
    assert ax.get_xlim()[0] < 1.9 and ax.get_xlim()[1] > 2.2


def test_changes_that_lower_the_loss_are_full_bars_and_others_hatched():
    df = pd.DataFrame({"change": ["better", "better", "worse"], "d_s": 8, "gap": [-0.2, -0.1, 0.1]})
    (ax,) = plotting.changes(df, "change").axes
    better, worse = ax.patches
    assert better.get_width() == pytest.approx(-0.15) and worse.get_width() == pytest.approx(0.1)
    assert not better.get_hatch() and worse.get_hatch()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["better", "worse"]


@pytest.mark.parametrize("own", [True, False])
def test_what_costs_is_drawn_as_means_with_their_seeds(own):
    df = pd.DataFrame({"arm": ["universal", "universal", "bank"], "d_s": 8, "cost": [1e4, 1e4, 3e4]})
    (ax,) = plotting.loss_against_cost(df.assign(loss=[2.0, 2.2, 1.9]), "cost", 1e3, own).axes
    small, large = ([line for line in ax.lines if line.get_markersize() == size] for size in (3, 8))
    assert [line.get_label() for line in large] == ["universal", "bank"]
    assert np.concatenate([line.get_ydata() for line in large]) == pytest.approx([2.1, 1.9])
    assert np.concatenate([line.get_ydata() for line in small]) == pytest.approx([2.0, 2.2, 1.9])
    assert ax.xaxis.get_major_formatter()(2e4, None) == "20"
    of_families = {plotting.colour("universal"), plotting.colour("bank")}
    assert ({line.get_color() for line in large} == of_families) != own


def test_a_single_gap_has_no_legend_but_two_have():
    df = pd.DataFrame({"comparison": "a", "d_s": [8, 16] * 2, "seed": [0, 0, 1, 1], "gap": [0.1, 0.2, 0.3, 0.4]})
    (ax,) = plotting.gap_against_size(df).axes
    assert ax.get_legend() is None
    (ax,) = plotting.gap_against_size(pd.concat([df, df.assign(comparison="b")])).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_matrix_writes_its_numbers_and_labels():
    ax = plotting.matrix(pd.DataFrame([[1.0, 2.0]], index=["r"], columns=["a", "b"]), label="loss").axes[0]
    assert [t.get_text() for t in ax.texts] == ["1.00", "2.00"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"] and not ax.patches
    framed = plotting.matrix(np.eye(3), diagonal=True).axes[0].patches
    assert [(frame.get_x(), frame.get_y()) for frame in framed] == [(i, i) for i in range(3)]


def test_rows_and_captions_may_hold_dollars():
    fig = plotting.image_grid(np.zeros((1, 1, 8, 8)), ["$0_to_$50"], [["$_$"]])
    fig.savefig(io.BytesIO(), format="png")  # formulas are parsed where they are drawn


def test_captions_stand_below_their_images():
    images = np.zeros((2, 3, 8, 8))
    images[1, 2] = 0.5
    (ax,) = plotting.image_grid(images, captions=[["a", "b", "c"], ["d", "e", "f"]]).axes
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (2 * (8 + 2) - 1, 3 * (8 + 1) - 1) and (sheet[10:18, -8:] == 0.5).all()
    assert [text.get_text() for text in ax.texts] == list("abcdef")
    x, y = ax.texts[-1].get_position()
    assert x == 18 + 4 and 18 <= y < 20


@pytest.mark.parametrize("columns", [[], ["d_s"]])
def test_learning_curves_take_the_columns_there_are(columns):
    df = pd.DataFrame({"step": [0, 1] * 4, "loss": range(8), "seed": 0})
    df = df.assign(arm=["a"] * 4 + ["b"] * 4, d_s=[8, 8, 16, 16] * 2)[["arm", "step", "loss", *columns]]
    fig = plotting.learning_curves(df)
    assert isinstance(fig, Figure) and len(fig.axes) == (2 if "d_s" in columns else 1)
    assert len(fig.axes[0].lines) == 2


def test_learning_curves_with_seeds_as_points_and_a_start_at_nothing():
    df = pd.DataFrame({"step": [0, 0, 10, 10, 1000, 1000], "loss": [3.0, 5, 2, 4, 1, 2], "seed": [0, 1] * 3})
    ax = plotting.learning_curves(df.assign(arm="a"), ticks=(0, 10, 1000)).axes[0]
    mean, points = ax.lines
    assert list(mean.get_ydata()) == [4.0, 3.0, 1.5] and sorted(points.get_ydata()) == [1.0, 2, 2, 3, 4, 5]
    at = [ax.transData.transform((step, 0))[0] for step in (0, 10, 100, 1000)]
    assert np.allclose(at[3] - at[2], at[2] - at[1]) and at[0] < at[1]
    assert [ax.xaxis.get_major_formatter()(tick, None) for tick in (0, 1000)] == ["0", "1k"]
