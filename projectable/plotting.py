"""One look for every figure.

Notable:
- Colours are Okabe–Ito's (safe for colour-blind readers) and belong to *families* of arms, the same in all
  figures: the projected models are blue, the universal ones vermilion. Arms of one family differ by dash. What is of no
  family (widths, seeds, conditions) has colours that no family has; better and worse have none.
- Each function takes tidy data and returns a matplotlib `Figure`; pyplot's global state is not used.
- Points are seeds, lines are means, bars are 95 % intervals: of Student's t over seeds, where none is given.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from projectable.arms import EVERY
from projectable.evaluation import t_interval

LOSS = "test loss (nats per token)"
SIZE = "embedding size of the small model, $d_s$"

# The family of an arm is the word below that its words hold first: “universal, FiLM” is universal.
FAMILIES = {
    "projected": "#0072B2",  # blue
    "universal": "#D55E00",  # vermilion
    "specialist": "#009E73",  # green
    "source": "#000000",
    "hypernetwork": "#56B4E9",  # sky
    "slice": "#E69F00",  # orange: the source cut down without learning to project
    "cut": "#E69F00",
    "hard mixture": "#E69F00",  # it is never beside these
    "static": "#CC79A7",  # purple: the controls
    "control": "#CC79A7",
    "random": "#CC79A7",
    "bank": "#CC79A7",
}
OTHER = "#7A7A7A"
OWN = ("#332288", "#999933", "#882255", "#44AA99", "#661100", "#6699CC", "#AA4499")  # Tol's muted ones: of no family
BETTER: dict = dict(color="#5C6675", alpha=0.85)  # bars
WORSE: dict = dict(facecolor="white", edgecolor="#5C6675", hatch="////")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")  # one more than dashes: pairs repeat after thirty

STYLE: dict = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EC",
    "axes.edgecolor": "#5C6675",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 4.4,  # a dash pattern shows on both sides of the marker
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


def family(arm: str) -> str | None:
    """The family that an arm belongs to, None for none."""
    words = label_of(arm).lower()
    found = [(words.find(word), word) for word in FAMILIES if word in words]
    return min(found)[1] if found else None


def colour(arm: str) -> str:
    """The fixed colour of an arm's family; grey for an arm of none."""
    return FAMILIES.get(family(str(arm)) or "", OTHER)


def looks(arms) -> dict[str, dict]:
    """Line looks of several arms: colour by family, dash and marker by place among those of one colour.

    Where no arm belongs to a family each has a colour of its own.
    """
    arms = list(arms)
    own = None if any(map(family, map(str, arms))) else OWN
    places: dict[str, int] = {}
    result = {}
    for number, arm in enumerate(arms):
        its = own[number % len(own)] if own and len(arms) > 1 else colour(arm)
        place = number if own else places.get(its, 0)
        places[its] = place + 1
        result[arm] = {"color": its, "linestyle": DASHES[place % len(DASHES)], "marker": MARKERS[place % len(MARKERS)]}
    return result


def label_of(arm) -> str:
    """An arm's name as a legend shows it: in the words of `arms`, where it is one of them."""
    return EVERY[arm].words if arm in EVERY else str(arm).replace("_", " ")


def _panels(count: int, width: float = 8.0, height: float = 4.5, sharey: bool = True):
    """A figure with `count` panels (at least one), four at most side by side, and their axes as a list."""
    rows = -(-count // 4)
    fig = Figure(figsize=(width, height * (1 + 0.6 * (rows - 1))), layout="constrained")
    axes = fig.subplots(rows, -(-count // rows), sharey=sharey, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.set_axis_off()
    return fig, list(axes[:count])


def _ticks(ax, locator, words="{x:g}") -> None:
    """Major ticks alone on the horizontal axis, and what is written at them."""
    ax.xaxis.set(major_locator=locator, minor_locator=NullLocator(), major_formatter=words)


def _legend(fig: Figure, axes) -> None:
    """A legend for all panels, below them (inside for one or two of one panel); the figure grows with its rows."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(axes) == 1 and 0 < len(entries) < 3:  # more would lie on bars, which `best` does not look at
        axes[0].legend()
    elif entries:
        longest = max(map(len, entries))
        columns = 3 if longest < 30 else 2 if longest < 49 else 1
        width, height = fig.get_size_inches()
        fig.set_size_inches(width, height + 0.25 * max(0, -(-len(entries) // columns) - 2))
        fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), columns))


def _lines_over_size(
    df: pd.DataFrame, group: str, value: str, xlabel: str, ylabel: str, summary: pd.DataFrame | None = None
):
    """Seeds as points, means with intervals as lines, against size: a log2 axis with a tick at each."""
    fig, (ax,) = _panels(1)
    names, sizes = list(dict.fromkeys(df[group])), sorted(df["d_s"].unique())
    aside = (sizes[-1] / sizes[0]) ** 0.018  # so that intervals stay apart
    for place, (name, look) in enumerate(looks(names).items()):
        rows = df[df[group] == name]
        shift = aside ** (place - (len(names) - 1) / 2)
        if summary is None:
            means = [(size, *t_interval(part)) for size, part in rows.groupby("d_s")[value]]
        else:
            part = summary[summary[group] == name].sort_values("d_s")
            means = list(part[["d_s", "mean", "ci_low", "ci_high"]].itertuples(index=False, name=None))
        size, mean, low, high = np.array(means, dtype=float).T
        ax.plot(rows["d_s"] * shift, rows[value], "o", color=look["color"], alpha=0.5, ms=4, mec="none")
        bars = np.nan_to_num(np.stack([mean - low, high - mean]))
        ax.errorbar(size * shift, mean, yerr=bars, capsize=3, ms=5, label=label_of(name), **look)
    ax.set_xscale("log", base=2)
    _ticks(ax, FixedLocator(sizes))
    ax.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return fig, ax


@rc_context(STYLE)
def loss_against_size(df: pd.DataFrame, source: float | None = None, ylabel: str = LOSS, xlabel: str = SIZE) -> Figure:
    """Loss of each arm against size. `df`: arm, d_s, seed, loss. `source`: the large model's loss, a line."""
    fig, ax = _lines_over_size(df, "arm", "loss", xlabel, ylabel)
    if source is not None:
        ax.axhline(source, color=FAMILIES["source"], lw=1.2, ls=(0, (6, 3)), label="source (large)")
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, source - 0.04 * (high - low)), high)  # the line is not to lie on the axis
    _legend(fig, [ax])
    return fig


@rc_context(STYLE)
def gap_against_size(
    df: pd.DataFrame, summary: pd.DataFrame | None = None, ylabel: str = "gap (nats per token)", xlabel: str = SIZE
) -> Figure:
    """Paired gaps against size. `df`: comparison, d_s, seed, gap. `summary`, instead of t intervals:
    comparison, d_s, mean, ci_low, ci_high.
    """
    fig, ax = _lines_over_size(df, "comparison", "gap", xlabel, ylabel, summary)
    ax.axhline(0, color="#1D2430", lw=1)
    if df["comparison"].nunique() > 1:  # of one the axis says what it is
        _legend(fig, [ax])
    return fig


@rc_context(STYLE)
def learning_curves(
    df: pd.DataFrame,
    ylabel: str = "loss (nats per token)",
    xlabel: str = "step",
    ticks: Sequence[float] | None = None,
    sharey: bool = True,
) -> Figure:
    """Loss while training, mean over seeds. `df`: arm, step, loss, any of d_s (panels), seed (points).

    With `ticks` steps are on a log axis, which has these; 0 may be among them. Means are marked then: steps are few.
    `sharey`: panels have one scale.
    """
    sizes = sorted(df["d_s"].unique()) if "d_s" in df else [None]
    fig, axes = _panels(len(sizes), sharey=sharey)
    for ax, size in zip(axes, sizes, strict=True):
        of_size = df if size is None else df[df["d_s"] == size]
        for arm, look in looks(dict.fromkeys(df["arm"])).items():
            part = of_size[of_size["arm"] == arm]
            mean = part.groupby("step")["loss"].mean()
            shown = look | (dict(ms=5) if ticks is not None else dict(marker=None))
            ax.plot(mean.index, mean.to_numpy(), label=label_of(arm), **shown)
            if "seed" in df:
                seeds = part.groupby(["step", "seed"])["loss"].mean().reset_index()
                ax.plot(seeds["step"], seeds["loss"], "o", ms=3, alpha=0.5, color=look["color"], mec="none")
        if ticks is not None:
            ax.set_xscale("symlog", linthresh=min(tick for tick in ticks if tick > 0))
            _ticks(ax, FixedLocator(ticks), lambda tick, _: f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}")
        ax.set_xlabel(xlabel)
        if size is not None:
            ax.set_title(f"width {size}")
    axes[0].set_ylabel(ylabel)
    _legend(fig, axes)
    return fig


@rc_context(STYLE)
def loss_against_operations(df: pd.DataFrame) -> Figure:
    """Loss against what a deployed model computes. `df`: arm, operations (multiply-adds an image), loss, d_s."""
    fig, (ax,) = _panels(1)
    for arm, look in looks(dict.fromkeys(df["arm"])).items():
        part = df[df["arm"] == arm]
        mean = part.groupby("operations")["loss"].mean()
        ax.plot(part["operations"], part["loss"], "o", ms=3, alpha=0.6, color=look["color"])
        ax.plot(mean.index, mean.to_numpy(), ms=6, label=label_of(arm), **look)
    for operations, part in df.groupby("operations"):
        ax.annotate(f"{part['d_s'].iloc[0]:g}", (operations, part["loss"].max()), (0, 7), textcoords="offset points")
    ax.set_xscale("log")
    _ticks(ax, LogLocator(subs=(1, 2, 5)), lambda x, _: f"{x / 1e6:g}")
    ax.set_xlabel("million multiply-adds an image (widths above the points)")
    ax.set_ylabel(LOSS)
    _legend(fig, [ax])
    return fig


@rc_context(STYLE)
def loss_against_cost(df: pd.DataFrame, xlabel: str, unit: float = 1.0, own: bool = False) -> Figure:
    """Loss against what models cost, a panel a size: means, joined where an arm has several costs, and seeds as small
    points. `df`: arm, d_s, cost, loss.

    The axis counts in `unit`. `own`: arms have colours that no family has.
    """
    sizes, arms = sorted(df["d_s"].unique()), list(dict.fromkeys(df["arm"]))
    looks_of = {
        arm: dict(color=OWN[i % len(OWN)] if own else colour(arm), marker=MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(arms)
    }
    fig, axes = _panels(len(sizes), sharey=False)
    for ax, size in zip(axes, sizes, strict=True):
        for arm, part in df[df["d_s"] == size].groupby("arm", sort=False):
            mean, look = part.groupby("cost")["loss"].mean(), looks_of[arm]
            ax.plot(part["cost"], part["loss"], "o", ms=3, alpha=0.6, color=look["color"])
            ax.plot(mean.index, mean.to_numpy(), ms=8, mec="white", label=label_of(arm), **look)
        ax.set_xscale("log")
        _ticks(ax, LogLocator(subs=(1, 2, 5)), lambda x, _: f"{x / unit:g}")
        ax.margins(x=0.15)
        ax.set_xlabel(xlabel)
        ax.set_title(f"width {size}")
    axes[0].set_ylabel(LOSS)
    _legend(fig, axes)
    return fig


@rc_context(STYLE)
def changes(df: pd.DataFrame, xlabel: str) -> Figure:
    """What changes do to a loss, a panel a size. `df`: change, d_s, gap = loss with the change − without it.

    Seeds are points, means bars: full ones lower the loss, hatched ones raise it, as in `waterfall`.
    """
    sizes, names = sorted(df["d_s"].unique()), list(dict.fromkeys(df["change"]))
    fig, axes = _panels(len(sizes), height=1.2 + 0.32 * len(names))
    for ax, size in zip(axes, sizes, strict=True):
        for place, name in enumerate(names):
            gap = df[(df["change"] == name) & (df["d_s"] == size)]["gap"]
            if len(gap):
                ax.barh(place, gap.mean(), height=0.6, **(BETTER if gap.mean() <= 0 else WORSE))
                ax.plot(gap, [place] * len(gap), "o", ms=4, color="#1D2430", mec="white", mew=0.6)
        ax.axvline(0, color="#1D2430", lw=1)
        ax.xaxis.set_major_locator(MaxNLocator(8 // len(sizes)))
        ax.set_yticks(range(len(names)), [label_of(name) for name in names])
        ax.set_title(f"width {size}")
    axes[0].invert_yaxis()
    fig.supxlabel(xlabel, fontsize="medium")
    return fig


@rc_context(STYLE)
def sweep_curves(df: pd.DataFrame) -> Figure:
    """Validation loss against learning rate. `df`: arm, d_s, lr, val_loss. An arm's best is ringed; one
    at an edge of its sweep, which would ask for a wider one, is crossed. Trials far from every best are cut off;
    those that diverged (an infinite loss) are small crosses at the top."""
    sizes = sorted(df["d_s"].unique())
    fig, axes = _panels(len(sizes), sharey=False)
    for ax, size in zip(axes, sizes, strict=True):
        for arm, look in looks(dict.fromkeys(df["arm"])).items():
            mean = df[(df["arm"] == arm) & (df["d_s"] == size)].groupby("lr")["val_loss"].mean()
            if mean.empty:
                continue
            ax.plot(mean.index, mean.where(mean < np.inf).to_numpy(), ms=4, label=label_of(arm), **look)
            diverged = mean.index[mean == np.inf]
            ax.plot(diverged, [0.98] * len(diverged), "x", color=look["color"], transform=ax.get_xaxis_transform())
            best = mean.idxmin()
            edge = best in (mean.index[0], mean.index[-1])
            ax.plot(best, mean[best], "X" if edge else "o", ms=11, mfc="none", mec=look["color"], mew=1.6)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        subs = (1, 2, 5) if high < 20 * low else (1, 3) if high < 100 * low else (1,)  # fewer where they would be many
        _ticks(ax, LogLocator(subs=subs, numticks=20))
        ax.tick_params(axis="x", labelrotation=35)
        ax.set_xlabel("learning rate")
        bests = df[df["d_s"] == size].groupby("arm")["val_loss"].min()
        low, high = ax.get_ylim()
        ax.set_ylim(low, min(high, bests.max() + 0.15))
        ax.set_title(f"width {size}")
    axes[0].set_ylabel("validation loss (nats per token)")
    _legend(fig, axes)
    return fig


@rc_context(STYLE)
def image_grid(images, row_labels=None, captions=None) -> Figure:
    """Images in [0, 1] as a grid. `images`: (rows, columns, height, width), channels behind if any; a label a row.

    `captions`: words below each image, (rows, columns).
    """
    images = np.asarray(images, dtype=float)
    rows, columns, height, width = images.shape[:4]
    gap = max(1, height // 14)
    below = gap if captions is None else max(2, height // 4)  # between rows
    room = [(0, 0), (0, 0), (0, below), (0, gap)] + [(0, 0)] * (images.ndim - 4)
    sheet = np.pad(images, room, constant_values=1).swapaxes(1, 2)  # (rows, height + below, columns, width + gap, …)
    sheet = sheet.reshape(rows * (height + below), columns * (width + gap), *images.shape[4:])[:-gap, :-gap]
    wide = min(8.0, 1.0 + 1.2 * columns)  # inches: few images are not blown up
    fig, (ax,) = _panels(1, wide, max(1.2, (wide - 1.0) * sheet.shape[0] / sheet.shape[1]))
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for row, words in enumerate(captions if captions is not None else ()):
        for column, text in enumerate(words):
            x, y = column * (width + gap) + width / 2, row * (height + below) + height + below / 8
            ax.text(x, y, text, ha="center", va="top", fontsize=7, parse_math=False)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    centres = [row * (height + below) + height / 2 for row in range(rows)]
    labels = [] if row_labels is None else row_labels
    ax.set_yticks(centres if len(labels) else [], labels, parse_math=False)  # classes have any name
    ax.tick_params(length=0)
    return fig


@rc_context(STYLE)
def matrix(data, label: str = "", diagonal: bool = False, xlabel: str = "", ylabel: str = "") -> Figure:
    """A heat map with its numbers written in. `data`: a data frame (its labels are taken) or a 2-d array.

    `diagonal`: frame what lies on it.
    """
    import seaborn as sns  # a second, for one kind of figure

    data = pd.DataFrame(data)
    rows, columns = data.shape
    fig, (ax,) = _panels(1, 8.0, 1.6 + 0.5 * rows)
    words = dict(annot=True, fmt=".2f", annot_kws={"fontsize": 9}, cbar_kws={"label": label})
    sns.heatmap(data.astype(float), cmap="cividis", ax=ax, **words)
    ax.set_xticks(ax.get_xticks(), list(data.columns), rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(ax.get_yticks(), list(data.index), rotation=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(length=0)
    for place in range(min(rows, columns) if diagonal else 0):
        ax.add_patch(Rectangle((place, place), 1, 1, fill=False, ec="#E69F00", lw=2.5, clip_on=False))
    return fig


@rc_context(STYLE)
def waterfall(df: pd.DataFrame) -> Figure:
    """How the loss falls (or rises) from stage to stage. `df`: label, loss in the order of the stages, a row a seed,
    d_s (a panel a size). Full bars lower the mean, hatched ones raise it; the change is written beside. Seeds are
    points."""
    sizes = sorted(df["d_s"].unique())
    labels = list(dict.fromkeys(df["label"]))
    fig, axes = _panels(len(sizes), height=1.2 + 0.5 * len(labels))
    for ax, size in zip(axes, sizes, strict=True):
        part = df[df["d_s"] == size]
        seeds = [part.loc[part["label"] == name, "loss"] for name in labels]
        losses = [found.mean() for found in seeds]
        for place, loss in enumerate(losses):
            before = losses[place - 1] if place else loss
            change = loss - before
            ax.barh(place, change, left=before, height=0.55, **(BETTER if change <= 0 else WORSE))
            ax.plot([loss, loss], [place - 0.28, place + 1 if place + 1 < len(losses) else place + 0.28], "k-", lw=1)
            ax.plot(seeds[place], [place] * len(seeds[place]), "o", ms=4, color="#1D2430", mec="white", mew=0.6)
            words = f"{change:+.3f}".replace("-", "−") if place else f"{loss:.3f}"
            end = max(before, seeds[place].max()), place
            ax.annotate(words, end, (5, 0), textcoords="offset points", va="center", fontsize=10)
        left, right = part["loss"].min(), part["loss"].max()
        span = right - left or 1.0
        ax.set_xlim(left - 0.08 * span, right + 0.62 * span)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.set_title(f"width {size}")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    fig.supxlabel(LOSS, fontsize="medium")
    return fig
