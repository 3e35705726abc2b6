"""The comparison: which arms there are, each with its own learning-rate sweep, and their runs over seeds.

Rules, alike for all arms: the trials of a sweep are full-length runs of the first seed, `profile.trials` of them a
size, a factor 2 apart; where the best is at an edge, the sweep goes on beyond it. The rate with the lowest validation
loss is used for every seed; a trial that diverges has an infinite one, and so has a rate at which another of the seeds
that are asked for does (in a run of several sizes the rates of all): then all seeds are run anew at the best of the
others. A choice between variants (the best conditioning) is made on validation images, too. What the source learns
alone is a beginning: its rate there is the one after which projections come out best, all sizes together, with the
rates in the middle of their own sweep.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import chain
from typing import Any

import pandas as pd

from . import generators
from .config import Profile, RunConfig
from .experiment import Run, folder_of, operations, run_many
from .training import DivergedError

FACTOR = 2.0  # between the learning rates of a sweep
STEPS = ("source", "joint", "matched", "alone", "none")
UNIVERSALS = ("universal_token", "universal_additive", "universal_film", "universal_adaln")


def at_size(lr: dict[int, float], size: int) -> float:
    """The rate of that size; the next smaller one's where it is not listed, the smallest one's below all."""
    return lr[max([s for s in lr if s <= size], default=min(lr))]


@dataclass(frozen=True)
class Arm:
    """One contender."""

    words: str  # as a legend shows it
    model: str
    # source (the source alone), joint, a share of both together, matched (as much compute as source and projections of
    # all sizes), alone (one size, as much as source and projections of that size alone), or none: one at a rate of zero
    steps: str | float = 1.0
    start: str = ""  # the arm whose run it starts from
    options: dict = field(default_factory=dict)
    max_seeds: int | None = None  # fewer seeds for arms that train long or came later; claims say how many
    only: int | None = None  # the place of its one size among the study's, where the arm is about that one
    one_start: bool = False  # all seeds start from the first seed's run

    def __post_init__(self):
        if self.steps not in STEPS and not (isinstance(self.steps, int | float) and self.steps > 0):
            raise ValueError(f"steps={self.steps!r}; allowed: {', '.join(STEPS)}, or a share, a number above 0")

    @property
    def projects(self) -> bool:
        """Whether its models are projections of a source: all sizes are trained in one run then."""
        return self.model.endswith("projectable")


# Middles of sweeps, by width (`at_size`), are where earlier ones ended, for all arms alike: few have to go on beyond an
# edge. Those of `arms` are for all studies that have no others.
MIDDLES: dict[str, dict[str, dict[int, float]]] = {
    name: {arm: {int(size): rate for size, rate in lr.items()} for arm, lr in arms.items()}
    for name, arms in tomllib.loads((resources.files(__package__) / "middles.toml").read_text("utf-8")).items()
}
_SOURCE = dict(conditioning="additive", zero_writes=True)
LAMBDA = 3.0  # weight of the source's own objective: with 1 the source loses about 1 % (validation images)


@dataclass(frozen=True)
class Maps:
    """A form of the projections: its name in `MIDDLES`, options of `Projectable`, those that name families."""

    name: str
    options: dict
    families: tuple[str, ...]  # options that name the family of maps that depend on z: `static` arms name another

    @property
    def lr(self) -> dict[int, float]:
        """The middle of the sweeps of its arms."""
        return MIDDLES[self.name]["projected"]


# The default: nearly orthonormal maps (two Newton–Schulz steps), but for the neurons', of its own for each matrix. The
# best on validation images: families and layout in an earlier run of notebook 10; together, and cheaper, in 17 runs.
MAPS = Maps(
    "orthonormal",
    dict(family="Orthonormal", steps=2, layout="per_matrix", neurons="Linear", z_dim=8),
    ("inner", "neurons"),
)
LINEAR = Maps("linear", dict(family="Linear", z_dim=8), ("family",))  # the simplest form; cheaper


def _projected(words: str, max_seeds=None, only=None, **options) -> Arm:
    """An arm of the study's maps, or of others, where `options` name a family."""
    return Arm(words, "projectable", "joint", "source", dict(source_weight=LAMBDA) | options, max_seeds, only)


ARMS = {
    "source": Arm("source alone", "source", "source", options=_SOURCE),
    "source_control": Arm("source, trained on without projections", "source", "joint", "source", options=_SOURCE),
    "source_whole": Arm("source alone, all steps in one go", "source", options=_SOURCE, max_seeds=3),
    "universal_token": Arm("universal, task token", "universal", options=dict(conditioning="token")),
    "universal_additive": Arm("universal, additive", "universal", options=dict(conditioning="additive")),
    "universal_film": Arm("universal, FiLM", "universal", options=dict(conditioning="film")),
    "universal_adaln": Arm("universal, AdaLN-Zero", "universal", options=dict(conditioning="adaln")),
    "universal_distilled": Arm(
        "best universal, distilled from the source", "distilled", start="source_control", max_seeds=3
    ),
    "universal_matched": Arm("best universal, the projections' compute", "universal", "matched", max_seeds=3),
    "hypernetwork": Arm("hypernetwork without a source", "hypernetwork"),
    "specialists": Arm("specialists from scratch", "specialists"),
    "specialists_tuned": Arm("specialists, tuned from the best universal", "specialists", 0.5, "universal"),
    "projected": _projected("projected"),
    "projected_few_dims": _projected("projected, task vectors of 3 dimensions", only=0, z_dim=3),
    "static_token": _projected("one map for all tasks (StaticToken)", static="Static"),
    "static_maps": _projected("one map, gains and shifts by task (StaticMaps)", static="StaticMaps"),
    "static": _projected("one model for all tasks (Static)", max_seeds=3, static="Static", use_task_embedding=False),
    "bank_trained": _projected("random source, trained", source_mode="random_trained"),
    "bank_frozen": _projected("random source, frozen", max_seeds=3, source_mode="random_frozen"),
    "source_frozen": _projected("projected, source frozen", max_seeds=3, source_mode="frozen"),
}
# of the notebook on direct training: specialists from scratch with fewer and more steps, and from projected models
DIRECT = {
    f"specialists_{name}": Arm(f"specialists from scratch, {words}", "specialists", steps, max_seeds=3)
    for name, words, steps in (
        ("a_hundredth", "a hundredth of the steps", 0.01),
        ("a_tenth", "a tenth of the steps", 0.1),
        ("a_third", "three tenths", 0.3),
        ("matched", "the projections' compute", "matched"),
    )
}
DIRECT["specialists_distilled"] = Arm(
    "specialists from scratch, distilled from the source", "distilled_specialists", start="source_control", max_seeds=3
)
# those from scratch, the shortest first
FROM_SCRATCH = (*(name for name in DIRECT if name.startswith("specialists_a_")), "specialists", "specialists_matched")
DIRECT |= {
    f"tuned_{share:g}": Arm(f"projected, then {share:.0%} of the steps", "tuned", share, "projected", max_seeds=3)
    for share in (0.01, 0.1, 1.0)
}
# of the notebook on equal compute: specialists that are the source, cut to the leading directions of its activations, …
_CUT: dict = dict(options=dict(p0="pca"), max_seeds=3)
CUT = {
    "cut": Arm("cut from the fully trained source", "cut", "none", "source_control", **_CUT),
    "cut_tuned": Arm("cut from the fully trained source, tuned", "cut", "joint", "source_control", **_CUT),
    "cut_start": Arm("cut from the source that projections start from, tuned", "cut", "joint", "source", **_CUT),
    "source_half": Arm("source alone, half of the steps", "source", 0.5, options=_SOURCE, max_seeds=3),
    "cut_half": Arm("cut from a source of half the steps, tuned for the other half", "cut", 0.5, "source_half", **_CUT),
    "cut_matched": Arm(
        "cut from the fully trained source, tuned, the projections' compute", "cut", "matched", "source_control", **_CUT
    ),
}
# … and rivals with the projections' compute, of all widths and of one
EQUAL_COMPUTE = {
    "hypernetwork_matched": Arm("hypernetwork, the projections' compute", "hypernetwork", "matched", max_seeds=3),
    "universal_alone": Arm(
        "best universal, the compute of projecting to its width alone", "universal", "alone", max_seeds=3
    ),
}
# of the notebook on hypernetworks: other forms of maps (orthonormal ones make no weights), and more task dimensions
HYPERNETWORKS = {
    f"hypernetwork_{name}": Arm(f"hypernetwork, {name} form", "hypernetwork", options=dict(family=name))
    for name in ("LowRank", "LowRankMLP", "Kronecker", "Mixture")
}
HYPERNETWORKS["hypernetwork_z16"] = Arm(
    "hypernetwork, task vectors of 16 dimensions", "hypernetwork", options=dict(z_dim=16)
)
# of the notebook on generators: one factor at a time around linear maps
_OTHER_FAMILIES: dict[str, dict] = {
    # steps as in `MAPS`
    name: dict(family=name, z_dim=8) | (dict(steps=2) if name == "Orthonormal" else {})
    for name, family in generators.FAMILIES.items()
    if name != "Linear" and not issubclass(family, generators.Static)
}
FAMILIES = {f"family_{name}": _projected(f"{name} maps", **options) for name, options in _OTHER_FAMILIES.items()}
_LINEAR: dict = dict(max_seeds=3, family="Linear")
FACTORS = {
    "layout_per_matrix": _projected("separate maps for each matrix", z_dim=8, layout="per_matrix", **_LINEAR),
    "p0_random": _projected("start: random orthonormal", z_dim=8, p0="random", **_LINEAR),
    "p0_slice": _projected("start: the first entries (slice)", z_dim=8, p0="slice", **_LINEAR),
    "lambda_1": _projected("λ = 1", z_dim=8, source_weight=1.0, **_LINEAR),
    "z_2": _projected("task vectors of 2 dimensions", z_dim=2, **_LINEAR),
    "z_16": _projected("task vectors of 16 dimensions", z_dim=16, **_LINEAR),
}
ALONE = {f"alone_{i}": _projected(f"one size alone ({i})", max_seeds=3, only=i) for i in range(2)}
# of the notebook on conditionings: what the maps are told of a task
_TOLD = {
    "NoID": "nothing",
    "ShuffledID": "an ID drawn anew in every step",
    "Features": "mean image features",
    "Attributes": "the letters of its name",
    "SupportSet": "some of its images",
}
CONDITIONED = {
    f"told_{name}": _projected(_TOLD.get(name, name), max_seeds=3, conditioning=name)
    for name in generators.CONDITIONINGS
    if name != "LearnedID"
}
OTHERS = {
    # of the notebook on what the source brings: with and without its own objective, trained before or not
    "source_tuned": _projected("source tuned for the projections alone", source_mode="tuned"),
    "bank_kept": _projected("random source with the source's objective", source_mode="random_kept"),
    # of the notebook on a source that is there already: a rival that starts from it, too, with the projections' compute
    "cut_start_matched": replace(
        CUT["cut_start"], words=f"{CUT['cut_start'].words}, the projections' compute", steps="matched"
    ),
    # … and those that also learn from it
    "projected_taught": replace(_projected("projected, distilled from its source"), model="distilled_projectable"),
    "cut_taught": replace(
        CUT["cut_start"], words=f"{CUT['cut_start'].words}, distilled from it", model="distilled_cut"
    ),
    "hypernetwork_taught": Arm(
        "hypernetwork, distilled from the source", "distilled_hypernetwork", start="source_control"
    ),
    "universal_taught": replace(
        ARMS["universal_distilled"],
        words="best universal, distilled from the source that projections start from",
        steps="joint",
        start="source",
    ),
    # of the notebook on stability: other generators over one and the same source
    "generators_anew": replace(ARMS["source_frozen"], words="projected, one frozen source", one_start=True),
    **{
        f"bank_{name}": _projected(
            f"{name} maps, random source, trained", max_seeds=3, source_mode="random_trained", **options
        )
        for name, options in _OTHER_FAMILIES.items()
    },
    # of the notebook on the source: fewer layers than it has
    **{f"depth_{n}": _projected(f"projected to {n} layers", max_seeds=3, n_layers=n) for n in (1, 2)},
    # of the notebook on transfer: rivals, and the random source, told of new tasks by their images
    "universal_support": Arm("universal, additive, told some of its images", "support_universal"),
    "universal_support_film": Arm(
        "universal, FiLM, told some of its images", "support_universal", options=dict(conditioning="film")
    ),
    "bank_support": _projected(
        "random source, trained, told some of its images", source_mode="random_trained", conditioning="SupportSet"
    ),
    # of the notebook on the source: another rival of the same deployed size, and another family of Transformers
    "hard_mixture": Arm("hard mixture of four plain models", "hard_mixture", max_seeds=3),
}
EVERY = ARMS | DIRECT | CUT | EQUAL_COMPUTE | HYPERNETWORKS | FAMILIES | FACTORS | ALONE | CONDITIONED | OTHERS
# arms of a masked study: those that make sense without an order, so no task token
MASKED = {name: ARMS[name] for name in ("source", "source_control", "projected", *UNIVERSALS[1:])}


class Compared:
    """Arms whose learning rates are swept, and that are run over seeds: those of a `Study`, or of `Scarce` images."""

    arms: Collection[str]  # those that can be asked for
    about = ""  # of its progress
    factor = FACTOR

    def __init__(self, profile: Profile):
        self.profile = profile
        self._rates: dict[str, dict[int, float]] = {}
        self._swept: dict[str, pd.DataFrame] = {}
        self._about_rows: dict[str, int] = {}  # what every row of a table of trials says, too
        self._refused: set[tuple[str, int, float]] = set()  # arm, size and rate at which a seed diverged

    def sizes_of(self, name: str) -> tuple[int, ...]:
        """The sizes of an arm's models."""
        raise NotImplementedError

    def middle(self, name: str, size: int) -> float:
        """Where the sweep of an arm and size is centred; zero where nothing is trained."""
        raise NotImplementedError

    def _trials(self, powers: dict[tuple[str, int], list[int]]) -> dict[tuple[str, int, int], RunConfig]:
        """The configs of trials, {(arm, size, power): config}, from the powers of each arm and size."""
        raise NotImplementedError

    def _judged_by(self, name: str, size: int) -> list[str]:
        """The members whose mean validation loss judges a trial."""
        return [f"d{size}"]

    def _of_seeds(self, names: Iterable[str], max_seeds: int | None) -> list[tuple[str, str, RunConfig]]:
        """The configs of arms over seeds, each with the name that was given and that of its arm."""
        raise NotImplementedError

    def _before(self, name: str, config: RunConfig) -> tuple[Compared, str]:
        """Whose arm a run of that arm starts from, and which; none: an empty name."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ sweeps

    def rate_at(self, name: str, size: int, power: int) -> float:
        """The learning rate of a trial: the middle of the sweep times `factor` to that power."""
        return float(f"{self.middle(name, size) * self.factor**power:.2g}")

    def sweep(self, *names: str) -> pd.DataFrame:
        """Every trial of these arms: arm, d_s, lr, val_loss, best, at_edge, seconds. Trains what is missing.

        Raises ValueError for an unknown arm.
        """
        return sweep_together([(self, names)])[0]

    def _sweeping(self, names: tuple[str, ...]) -> Generator[list[RunConfig], list[Run], pd.DataFrame]:
        """The same, asking for the runs of its trials, as often as a best one is at an edge."""
        n_trials = self.profile.trials
        first = [k - (n_trials - 1) // 2 for k in range(n_trials)]
        where = [(name, size) for name in names for size in self.sizes_of(name)]
        powers = {at: first if self.middle(*at) else [0] for at in where}
        while True:
            trials = self._trials(powers)
            unique = list(dict.fromkeys(trials.values()))
            runs = dict(zip(unique, (yield unique), strict=True))
            rows, again = [], False
            for name, size in where:
                ks, judges = sorted(k for n, s, k in trials if (n, s) == (name, size)), self._judged_by(name, size)
                results = {k: runs[trials[name, size, k]].result for k in ks}
                lrs = {k: self.rate_at(name, size, k) for k in ks}
                losses = {k: sum(found["val"][m] for m in judges) / len(judges) for k, found in results.items()}
                losses |= {k: math.inf for k, lr in lrs.items() if (name, size, lr) in self._refused}
                most = self.profile.max_trials if self.middle(name, size) else 1
                best, at_edge, further = _best_rate(losses, most, f"{name}, width {size}")
                powers[name, size] = ks + further
                again |= bool(further)
                about: dict[str, Any] = dict(arm=name, **self._about_rows, d_s=size)
                for k in ks:
                    trial = dict(lr=lrs[k], val_loss=losses[k], best=k == best, at_edge=at_edge and k == best)
                    rows.append(about | trial | dict(seconds=results[k]["seconds"]))
            if not again:
                table = pd.DataFrame(rows)
                self._swept |= dict(list(table.groupby("arm", sort=False)))
                self._rates = {name: rates for name, rates in self._rates.items() if name not in names}
                return table

    def trials(self) -> pd.DataFrame:
        """Every trial so far, of all arms, as `sweep` gives them; ValueError before the first sweep."""
        if not self._swept:
            raise ValueError("no arm was swept yet: nothing was tried")
        return pd.concat(self._swept.values(), ignore_index=True)

    def rates(self, name: str) -> dict[int, float]:
        """The best learning rate of an arm by size, from its sweep."""
        if name not in self._rates:
            table = self._swept[name] if name in self._swept else self.sweep(name)
            best = table[table.best]
            self._rates[name] = dict(zip(best.d_s.tolist(), best.lr.tolist(), strict=True))
        return self._rates[name]

    # ------------------------------------------------------------------------------------------------- seeds

    def seeds(self, *names: str, max_seeds: int | None = None) -> dict[str, list[Run]]:
        """The runs of these arms over all seeds (at most `max_seeds`) at their best rates, tested.

        In a `Study`, `universal` stands for the best one a size. Raises ValueError for an unknown arm.
        """
        runs = _tested([(self, names)], max_seeds, f"{self.about}seeds of {_words(names)}")
        result: dict[str, list[Run]] = {name: [] for name in names}
        for (name, *_), run in zip(self._of_seeds(names, max_seeds), runs, strict=True):
            result[name].append(run)
        return result

    def _blamed(self, name: str, config: RunConfig) -> list[tuple[Compared, str, int, float, int]]:
        """Whose arm, size, rate and seed a run diverged by: its own, for all its sizes, or those of its start."""
        whose, start = self._before(name, config)
        if start and config.start is not None and Run(config.start, folder_of(config.start)).has_diverged:
            return whose._blamed(start, config.start)
        rates = zip(config.sizes or (config.d_source,), config.lr or (config.source_lr,), strict=True)
        return [(self, name, size, lr, config.seed) for size, lr in rates]

    def _forget(self) -> tuple[str, ...]:
        """Forget what was chosen; the arms that were swept."""
        names, self._rates, self._swept = tuple(self._swept), {}, {}
        return names


class Study(Compared):
    """All arms of one profile and one definition of tasks: sweeps, choices, runs over seeds.

    `masked`: of the family that fills in masked tokens, whose arms are `MASKED`. `maps`: the form of projections in all
    arms that name no family. `options`: more of them for an arm, by its name. `middles`: of its sweeps, a name in
    `MIDDLES`, as that of `maps` is. `rivals`: the study whose universal models are the ones to choose the best of, if
    not this one. Raises ValueError for middles that are not there, and for options of an unknown arm.
    """

    arms: dict[str, Arm]

    def __init__(
        self,
        profile: Profile,
        tasks: str = "classes",
        sizes: tuple[int, ...] | None = None,
        masked: bool = False,
        maps: Maps = MAPS,
        options: dict[str, dict] | None = None,
        middles: str = "",
        rivals: Study | None = None,
    ):
        super().__init__(profile)
        for wanted in filter(None, (middles, maps.name)):
            if wanted not in MIDDLES:
                raise ValueError(f"unknown middles of sweeps {wanted!r}; allowed: {', '.join(MIDDLES)}")
        self.maps, self.options, self.middles = maps, options or {}, MIDDLES.get(middles, {})
        self.rivals = rivals
        self.data, self.sizes = replace(profile.data, tasks=tasks), replace(profile, sizes=sizes or profile.sizes).sizes
        self.arms, self.family = (MASKED, "masked_") if masked else (EVERY, "")
        for name in self.options:
            if name not in self.arms:
                raise ValueError(f"options of an unknown arm {name!r}; allowed: {', '.join(self.arms)}")

    # ----------------------------------------------------------------------------------------------- configs

    def config(
        self, name: str, rates: dict[int, float], seed: int, source_rates: tuple[float, float] | None = None
    ) -> RunConfig:
        """The run of an arm for the sizes in `rates` (learning rate by size), a seed and this profile.

        `source_rates`: of a source alone, and of it beside projections, where they are not to be the chosen ones.
        """
        arm, p = self.arms[name], self.profile
        sizes = () if arm.model == "source" else tuple(sorted(rates))
        options = self._options(name, sizes)
        start, n_steps = self._start_and_steps(arm, sizes, seed, source_rates)
        source_lr = 0.0
        if arm.model == "source":
            (source_lr,) = rates.values()
        elif arm.projects and not options.get("source_mode", "trained").endswith("frozen"):
            # chosen for the control, not for us
            source_lr = source_rates[1] if source_rates else self.rates("source_control")[p.d_source]
        return RunConfig(
            self.family + arm.model,
            self.data,
            p.d_source,
            p.n_layers,
            sizes,
            tuple(rates[s] for s in sizes),
            n_steps,
            seed,
            source_lr,
            p.tasks_per_step,
            p.images_per_task,
            eval_every=p.eval_every,
            val_images=p.val_images,
            options=tuple(options.items()),
            start=start,
        )

    def _options(self, name: str, sizes: tuple[int, ...]) -> dict:
        """An arm's options and the study's; where they name none, its maps, or how the best universal model is told."""
        arm = self.arms[name]
        options = arm.options | self.options.get(name, {})
        if arm.projects and "family" not in options:
            static = options.pop("static", "")
            options = self.maps.options | options | (dict.fromkeys(self.maps.families, static) if static else {})
        if arm.model in ("universal", "distilled") and "conditioning" not in options:
            options["conditioning"] = self.arms[self.best_universal(*sizes)].options["conditioning"]
        return options

    def _start_and_steps(
        self, arm: Arm, sizes: tuple[int, ...], seed: int, source_rates: tuple[float, float] | None
    ) -> tuple[RunConfig | None, int]:
        """The run that an arm's starts from, if from any, and how many steps its own has."""
        p, start = self.profile, None
        both = p.source_steps + p.joint_steps
        if isinstance(arm.steps, str):
            n_steps = {"source": p.source_steps, "joint": p.joint_steps, "none": 1}.get(arm.steps, 0)  # 0: see below
        else:
            n_steps = max(1, round(arm.steps * both))
        if arm.start == "universal":  # shorter than the rival itself: both together see as many examples as all arms
            best = self.best_universal(*sizes)
            start = self.config(best, {s: self.rates(best)[s] for s in sizes}, seed).with_(steps=both - n_steps)
        elif arm.start:
            start_rates = {p.d_source: source_rates[0]} if source_rates else self.rates(arm.start)
            start = self.config(arm.start, start_rates, p.seeds[0] if arm.one_start else seed)
        if arm.steps in ("matched", "alone"):
            rival = "hypernetwork" if arm.model == "hypernetwork" else "universal_film"
            n_steps = self.matched_steps(start, rival, sizes if arm.steps == "alone" else self.sizes)
        return start, n_steps

    def matched_steps(
        self, start: RunConfig | None = None, rival: str = "universal_film", sizes: tuple[int, ...] = ()
    ) -> int:
        """Steps with which small models of these sizes (all) cost what source and projections of these sizes do.

        Where all of them start from one run, what that has cost is spent. `rival`: an arm of such models.
        """
        sizes = sizes or self.sizes
        ours = self.config("projected", {s: 1e-3 for s in sizes}, self.profile.seeds[0])
        models = [self.config(rival, {s: 1e-2}, self.profile.seeds[0]) for s in sizes]
        left = operations(ours) - (operations(start) if start is not None else 0.0)
        return round(models[0].steps * left / sum(map(operations, models)))

    # ------------------------------------------------------------------------------------- sweeps and seeds

    def sizes_of(self, name: str) -> tuple[int, ...]:
        if self.arms[name].model == "source":
            return (self.profile.d_source,)
        only = self.arms[name].only
        return self.sizes if only is None else (self.sizes[only],)

    def middle(self, name: str, size: int) -> float:
        if self.arms[name].steps == "none":
            return 0.0
        known = (self.middles, MIDDLES[self.maps.name], MIDDLES["arms"])
        lr = next((table[name] for table in known if name in table), None)
        if lr is None and not self.arms[name].projects:
            raise ValueError(
                f"no middle of the sweep of {name!r}; allowed: an entry of it under [arms] in middles.toml"
            )
        return at_size(lr or self.maps.lr, size)

    def _trials(self, powers: dict[tuple[str, int], list[int]]) -> dict[tuple[str, int, int], RunConfig]:
        """Projections train all sizes in one run; the source alone is judged by those that start from it."""
        seed, trials = self.profile.seeds[0], {}
        for name in dict.fromkeys(name for name, _ in powers):
            sizes = self.sizes_of(name)
            if name == "source":
                (size,), rates = sizes, {s: self.middle("projected", s) for s in self.sizes}
                control = self.middle("source_control", size)
                for k in powers[name, size]:
                    config = self.config("projected", rates, seed, (self.rate_at(name, size, k), control))
                    # one beginning for all, whatever an arm's rate of the source beside projections is
                    options = tuple(option for option in config.options if option[0] != "source_rate")
                    trials[name, size, k] = config.with_(options=options)
            elif self.arms[name].projects:
                for k in sorted({k for s in sizes for k in powers[name, s]}):
                    config = self.config(name, {s: self.rate_at(name, s, k) for s in sizes}, seed)
                    trials |= {(name, s, k): config for s in sizes}
            else:
                at = [(s, k) for s in sizes for k in powers[name, s]]
                trials |= {(name, s, k): self.config(name, {s: self.rate_at(name, s, k)}, seed) for s, k in at}
        return trials

    def _judged_by(self, name: str, size: int) -> list[str]:
        if name == "source":
            return [f"d{s}" for s in self.sizes]
        return ["source" if self.arms[name].model == "source" else f"d{size}"]

    def best_universal(self, size: int) -> str:
        """The conditioning with the lowest validation loss at that size."""
        if self.rivals:
            return self.rivals.best_universal(size)
        names = [name for name in UNIVERSALS if name in self.arms]
        if not self._swept.keys() >= set(names):
            self.sweep(*names)
        losses = {name: self._swept[name].groupby("d_s").val_loss.min()[size] for name in names}
        return min(losses, key=losses.__getitem__)

    def _of_seeds(self, names: Iterable[str], max_seeds: int | None) -> list[tuple[str, str, RunConfig]]:
        configs: list[tuple[str, str, RunConfig]] = []
        for name in names:
            if name == "universal":
                chosen = {s: self.best_universal(s) for s in self.sizes}
                parts = [(chosen[s], {s: self.rates(chosen[s])[s]}) for s in self.sizes]
            elif self.arms[name].projects:
                parts = [(name, self.rates(name))]
            else:
                parts = [(name, {s: lr}) for s, lr in self.rates(name).items()]
            seeds = self.profile.seeds[: self.arms[name].max_seeds if name in self.arms else None][:max_seeds]
            configs += [(name, arm, self.config(arm, rates, seed)) for seed in seeds for arm, rates in parts]
        return configs

    def _before(self, name: str, config: RunConfig) -> tuple[Compared, str]:
        start = self.arms[name].start
        return self, self.best_universal(*config.sizes) if start == "universal" else start


def seeds_together(wanted: Sequence[tuple[Compared, Iterable[str]]], max_seeds: int = 3) -> None:
    """Train and test what `seeds` gives of each study and the names of its arms, side by side: it finds them then."""
    _tested(wanted, max_seeds, f"seeds of {len(wanted)} studies")


def _tested(wanted: Sequence[tuple[Compared, Iterable[str]]], max_seeds: int | None, words: str) -> list[Run]:
    """The runs of these studies' arms over seeds. Where one diverges all are chosen anew, its rate left out."""
    wanted = [(study, tuple(names)) for study, names in wanted]
    _check_names(wanted, "universal")
    while True:
        asked = [(study, *found[1:]) for study, names in wanted for found in study._of_seeds(names, max_seeds)]
        runs = run_many([config for *_, config in asked], words, test=True, diverging=True)
        diverged = [found for found, run in zip(asked, runs, strict=True) if run.has_diverged]
        if not diverged:
            return runs
        blamed = [found for study, arm, config in diverged for found in study._blamed(arm, config)]
        for whose, arm, d_s, lr, seed in blamed:
            if (arm, d_s, lr) not in whose._refused:
                print(f"{arm}, width {d_s}: seed {seed} diverged at {lr:g}; all seeds take the best of the other rates")
            whose._refused.add((arm, d_s, lr))
        again = dict.fromkeys([*(whose for whose, *_ in blamed), *(study for study, _ in wanted)])
        sweep_together([(study, names) for study in again if (names := study._forget())])


def sweep_together(wanted: Sequence[tuple[Compared, Iterable[str]]]) -> list[pd.DataFrame]:
    """What `sweep` gives of each study and the names of its arms.

    Trained side by side, so that no core waits for the last trial of one.
    """
    arms = [tuple(names) for _, names in wanted]
    _check_names(wanted)
    sweeps = [study._sweeping(names) for (study, _), names in zip(wanted, arms, strict=True)]
    asked, tables = {i: next(sweep) for i, sweep in enumerate(sweeps)}, {}
    abouts = {study.about for study, _ in wanted}
    words = f"{abouts.pop() if len(abouts) == 1 else ''}sweep of {_words(tuple(dict.fromkeys(chain(*arms))))}"
    while asked:
        unique = list(dict.fromkeys(chain(*asked.values())))
        runs = dict(zip(unique, run_many(unique, words, diverging=True), strict=True))
        for i, configs in list(asked.items()):
            try:
                asked[i] = sweeps[i].send([runs[c] for c in configs])
            except StopIteration as end:
                tables[i] = end.value
                del asked[i]
    return [tables[i] for i in range(len(wanted))]


def sweep_sources(*studies: Study) -> None:
    """The sweeps that all others of these studies wait for, few trials each: the source alone, then its control."""
    for name in ("source", "source_control"):
        sweep_together([(study, [name]) for study in studies])


def sweep_source_rates(study: Study, *names: str) -> pd.DataFrame:
    """The source's rate beside projections for each of these arms: arm, source_rate, val_loss, best.

    As a multiple of the control's, which all arms have else: half, once and twice, and on beyond an edge as far as
    sweeps go. Validation loss of the first seed, mean over sizes, the maps at the best rates with once.
    """
    powers: dict[str, list[int]] = {name: [-1, 0, 1] for name in names}
    losses: dict[str, dict[int, float]] = {name: {} for name in names}
    while asked := [(name, k) for name, ks in powers.items() for k in ks if k not in losses[name]]:
        configs = []
        for name, k in asked:
            config = study.config(name, study.rates(name), study.profile.seeds[0])
            options = {option: x for option, x in config.options if option != "source_rate"}  # the study's own, perhaps
            options |= dict(source_rate=FACTOR**k) if k else {}
            configs.append(config.with_(options=options))
        for (name, k), run in zip(asked, run_many(configs, "rates of the source", diverging=True), strict=True):
            losses[name][k] = sum(run.result["val"][f"d{s}"] for s in study.sizes_of(name)) / len(study.sizes_of(name))
        found = {name: _best_rate(losses[name], study.profile.max_trials, name) for name in names}
        best = {name: power for name, (power, _, _) in found.items()}
        powers = {name: further for name, (_, _, further) in found.items()}
    rows = [
        dict(arm=name, source_rate=FACTOR**k, val_loss=losses[name][k], best=k == best[name])
        for name in names
        for k in sorted(losses[name])
    ]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class FewArm:
    """One way to a model of a new task from a few images of it."""

    words: str
    model: str
    base: str  # the arm that was trained on other tasks, or `universal`: the best one of the size; empty: none
    # the middle of its sweep, by size; empty: nothing is tuned, the images are all that it is told
    lr: dict[int, float]
    tune: str = ""  # of the model `adapted`
    after: str = ""  # the FewArm from whose run it goes on: specialists from its small models, or taught by it


FEW_IMAGES = {
    "projected_vector": FewArm("projected, task vector tuned", "adapted", "projected", {8: 5e-2}, "vector"),
    "projected_z": FewArm("projected, z alone tuned", "adapted", "projected", {8: 5e-2}, "z"),
    "projected_maps": FewArm("projected, maps tuned", "adapted", "projected", {8: 5e-2}, "maps"),
    "projected_lean": FewArm(
        "projected by lean maps (LowRank), maps tuned", "adapted", "family_LowRank", {8: 5e-2}, "maps"
    ),
    "projected_model": FewArm(
        "projected, then small model tuned", "specialists", "projected", {8: 2e-3}, after="projected_vector"
    ),
    "projected_support": FewArm("projected, told by its images", "adapted", "told_SupportSet", {}, "vector"),
    "universal_vector": FewArm(
        "universal, task embedding tuned", "adapted", "universal", {8: 1e-1, 32: 3e-2}, "vector"
    ),
    "universal_maps": FewArm("universal, all of it tuned", "adapted", "universal", {8: 5e-2, 32: 5e-3}, "maps"),
    "universal_model": FewArm(
        "universal, then one model a task tuned", "specialists", "universal", {8: 2e-3}, after="universal_vector"
    ),
    "universal_support": FewArm("universal, additive, told by its images", "told", "universal_support", {}),
    "universal_support_film": FewArm("universal, FiLM, told by its images", "told", "universal_support_film", {}),
    "hyper_vector": FewArm(
        "hypernetwork without a source, task vector tuned", "adapted", "hypernetwork", {8: 5e-2, 32: 1.5e-1}, "vector"
    ),
    "hyper_maps": FewArm(
        "hypernetwork without a source, all of it tuned", "adapted", "hypernetwork", {8: 1.7e-3}, "maps"
    ),
    "scratch": FewArm("specialists from scratch", "specialists", "", {8: 2e-2, 16: 1e-2, 32: 5e-3}),
    "source_vector": FewArm(
        "the source itself, task embedding tuned", "adapted", "source_control", {8: 5e-2}, "vector"
    ),
    "distilled": FewArm(
        "specialists from scratch, distilled from the source",
        "distilled_specialists",
        "",
        {8: 2e-2, 16: 1e-2, 32: 5e-3},
        after="source_vector",
    ),
    "random_vector": FewArm("random source, task vector tuned", "adapted", "bank_trained", {8: 5e-2}, "vector"),
    "random_support": FewArm("random source, told by its images", "adapted", "bank_support", {}, "vector"),
    "random_maps": FewArm("random source, maps tuned", "adapted", "bank_trained", {8: 5e-2}, "maps"),
    "random_model": FewArm(
        "random source, then small model tuned", "specialists", "bank_trained", {8: 2e-3}, after="random_vector"
    ),
}


class Scarce(Compared):
    """New tasks with n images of each, after a study of others: the arms of `FEW_IMAGES`, swept and run over seeds.

    Sweeps start with `profile.trials` rates a factor 3 apart and go on beyond an edge, as those of a `Study` do.
    A seed also draws the images; a fifth of them, at least one a task, choose the step and the learning rate (at
    most `profile.val_images` of them).
    """

    factor, arms = 3.0, FEW_IMAGES

    def __init__(self, study: Study, tasks: str, n: int, steps: int):
        super().__init__(study.profile)
        self.study, self.tasks, self.n, self.steps = study, tasks, n, steps
        self.about, self._about_rows = f"{n} images of a new task, ", dict(n=n)

    def sizes_of(self, name: str) -> tuple[int, ...]:
        base = self.study.arms.get(FEW_IMAGES[name].base)
        return (self.study.profile.d_source,) if base and base.model == "source" else self.study.sizes

    def config(self, name: str, size: int, lr: float, seed: int) -> RunConfig:
        """The run of an arm, a size, a learning rate and a seed."""
        arm, p, start = FEW_IMAGES[name], self.study.profile, None
        if arm.after:
            before = size if size in self.sizes_of(arm.after) else p.d_source
            start = self.config(arm.after, before, self.rates(arm.after)[before], seed)
        elif arm.base:
            base = self.study.best_universal(size) if arm.base == "universal" else arm.base
            rates = self.study.rates(base)
            projects = self.study.arms[base].projects
            start = self.study.config(base, rates if projects else {size: rates[size]}, seed)
        steps = self.steps if arm.lr else 1  # one at a rate of zero
        return RunConfig(
            arm.model,
            replace(self.study.data, tasks=f"{self.tasks}-few{self.n}-s{seed}"),
            p.d_source,
            p.n_layers,
            (size,),
            (lr,),
            steps,
            seed,
            tasks_per_step=p.tasks_per_step,
            images_per_task=p.images_per_task,
            warmup=10,
            eval_every=max(1, steps // 10),
            val_images=p.val_images,
            patience=3,
            options=(("tune", arm.tune),) if arm.tune else (),
            start=start,
        )

    def _sweeping(self, names: tuple[str, ...]) -> Generator[list[RunConfig], list[Run], pd.DataFrame]:
        """First those of what these arms start from."""
        arms = [FEW_IMAGES[name] for name in names]
        bases = chain(*(UNIVERSALS if arm.base == "universal" else [arm.base] for arm in arms if arm.base))
        if missing := tuple(b for b in dict.fromkeys(bases) if b not in self.study._swept):
            yield from self.study._sweeping(missing)
        if before := tuple(b for b in dict.fromkeys(arm.after for arm in arms) if b and b not in self._swept):
            yield from self._sweeping(before)
        return (yield from super()._sweeping(names))

    def middle(self, name: str, size: int) -> float:
        lr = FEW_IMAGES[name].lr
        return at_size(lr, size) if lr else 0.0

    def _trials(self, powers: dict[tuple[str, int], list[int]]) -> dict[tuple[str, int, int], RunConfig]:
        seed, where = self.profile.seeds[0], [(name, size, k) for (name, size), ks in powers.items() for k in ks]
        return {(name, s, k): self.config(name, s, self.rate_at(name, s, k), seed) for name, s, k in where}

    def _of_seeds(self, names: Iterable[str], max_seeds: int | None) -> list[tuple[str, str, RunConfig]]:
        seeds = self.profile.seeds[:max_seeds]
        where = [(name, seed, s) for name in names for seed in seeds for s in self.sizes_of(name)]
        return [(name, name, self.config(name, s, self.rates(name)[s], seed)) for name, seed, s in where]

    def _before(self, name: str, config: RunConfig) -> tuple[Compared, str]:
        arm, (size,) = FEW_IMAGES[name], config.sizes
        if arm.after:
            return self, arm.after
        return self.study, self.study.best_universal(size) if arm.base == "universal" else arm.base


def _best_rate(losses: dict[int, float], most: int, whose: str) -> tuple[int, bool, list[int]]:
    """Of a sweep's losses by power: the best power, whether it is at an edge, what to try further (`most` in all).

    Raises DivergedError where all are infinite and no further one is to be tried.
    """
    # of equals the one in the middle, of rates that all diverge the lowest
    best = min(losses, key=lambda k: (losses[k], abs(k) if losses[k] < math.inf else k))
    first, last = min(losses), max(losses)
    at_edge = best in (first, last) and len(losses) > 1
    further = [last + 1 if best == last else first - 1] if at_edge and len(losses) < most else []
    if losses[best] == math.inf and not further:
        raise DivergedError(
            f"{whose}: training diverged at each of {len(losses)} learning rates: centre its sweep lower"
        )
    return best, at_edge, further


def _check_names(wanted: Sequence[tuple[Compared, Iterable[str]]], *more: str) -> None:
    for study, names in wanted:
        allowed = [*study.arms, *(more if isinstance(study, Study) else ())]
        for name in names:
            if name not in allowed:
                raise ValueError(f"unknown arm {name!r}; allowed: {', '.join(allowed)}")


def _words(names: tuple[str, ...]) -> str:
    """Arms as a line of progress names them."""
    return ", ".join(names) if len(names) < 5 else f"{names[0]} and {len(names) - 1} other arms"
