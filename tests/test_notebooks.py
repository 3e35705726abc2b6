"""Every notebook through papermill at the smoke setting, once; then what they recorded is checked."""

import ast
import json
import math
import os
import re
import time
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from test_browser import look

from projectable import pages, reporting
from projectable.arms import ARMS, UNIVERSALS
from projectable.config import get_profile
from projectable.generators import CONDITIONINGS, FAMILIES, Static

pytestmark = [pytest.mark.slow, pytest.mark.notebook]
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMOKE = get_profile("smoke")
EXPLAINED = ("parameters", "alike", "modulated", "source", "task", "gains", "maps")


@pytest.fixture(scope="module")
def reports():
    """The reports of one smoke run of all notebooks, in a project folder of their own."""
    root, last = Path(os.environ["PROJECTABLE_TOY_NOTEBOOKS"]), time.monotonic() + 900
    while not (root / "status").exists():
        assert time.monotonic() < last, "the notebooks take more than a quarter of an hour"
        time.sleep(0.2)
    assert (root / "status").read_text().strip() == "0", (root / "said.txt").read_text()[-4000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROJECTABLE_ROOT", str(root))
        patch.setenv("PROJECTABLE_RUNS", str(root / "runs"))
        yield root / "reports" / "smoke"


def recorded(reports: Path, notebook: str) -> dict:
    return json.loads((reports / "results" / f"{notebook}.json").read_text())


def test_every_notebook_ends_well(reports):
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        status = json.loads((reports / "results" / "status" / f"{path.stem}.json").read_text())
        assert (status["status"], status["error"]) == ("ok", "")
        assert (reports / f"{path.stem}.html").stat().st_size > 10_000


def test_pages_need_nothing_from_outside(reports):
    for page in reports.glob("*.html"):
        html = page.read_text()
        loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(([^)]+)\)""", html)
        outside = {a or b for a, b in loaded if not (a or b).startswith(("data:", "#")) and "://" in (a or b)}
        assert outside <= {"https://arxiv.org/abs/2506.05641"}, page.name
        assert "<script src" not in html and "@import" not in html


@pytest.mark.parametrize("name", [*(path.stem for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))), "index"])
def test_pages_are_seen_on_a_phone(reports, browser, name):
    look(browser, reports / f"{name}.html")


def test_quickstart_makes_a_model_smaller_than_its_source(reports):
    found = recorded(reports, "00_quickstart")
    assert found["source_parameters"] == n_parameters(SMOKE.d_source) + 10 * SMOKE.d_source  # what it is told of tasks
    biases = SMOKE.n_layers * 7 * 16 + SMOKE.data.vocab_size  # of q, k, v and up; of the head
    assert found["projected_parameters"] == n_parameters(16) + biases
    assert 0 < found["val_projected"] < math.log(SMOKE.data.vocab_size)


def n_parameters(d: int) -> int:
    """Parameters counted by hand: embedding and head, positions of 16 tokens, 12 d² a layer."""
    return 2 * SMOKE.data.vocab_size * d + 16 * d + SMOKE.n_layers * 12 * d * d


def test_codes_keep_the_digits_legible(reports):
    found = recorded(reports, "01_data_and_tasks")
    assert 15 < found["psnr_db"] < 40
    assert found["label_bound"] == pytest.approx(math.log(10) / 16)


def test_every_arm_and_size_has_as_many_trials(reports):
    trials = pd.read_csv(reports / "results" / "trials.csv")
    assert set(trials.arm) == set(ARMS)
    counts = trials.groupby(["arm", "d_s"]).size()
    assert set(counts) == {SMOKE.trials}
    for (arm, _), rows in trials.groupby(["arm", "d_s"]):
        assert rows.best.sum() == 1 and rows.val_loss[rows.best].item() == rows.val_loss.min(), arm
        assert rows.lr.is_unique


def test_claims_are_all_there_and_follow_from_the_recorded_losses(reports):
    claims = {c["id"]: c for c in json.loads((reports / "claims.json").read_text())}
    small, middle, large = SMOKE.sizes
    expected = {f"headline.d{s}" for s in SMOKE.sizes} | {f"headline.specialists.d{s}" for s in SMOKE.sizes}
    expected |= {f"headline.widens.{small}_{middle}", f"headline.widens.{middle}_{large}", "source.kept"}
    expected |= {f"headline.{of}.d{s}" for of in ("distilled", "matched", "hypernetwork", "each") for s in SMOKE.sizes}
    expected |= {"source.kept_whole", "longer.kept", "given.kept", "taught.kept"}
    expected |= {f"headline.few_dims.d{small}", f"headline.clusters.d{small}"}
    expected |= {f"explained.{what}.d{s}" for what in EXPLAINED for s in SMOKE.sizes}
    by_size = (
        "direct.examples direct.compute direct.distilled direct.start direct.tuned direct.cut direct.cut_examples "
        "direct.cut_start direct.cut_compute text.hypernetwork stability.again stability.spread "
        "stability.agreement stability.source stability.smooth "
        "cost.generation cost.hypernetwork cost.one_width text text.task source.width "
        "longer.universal longer.hypernetwork longer.specialists longer.source longer.gap "
        "brings.start.kept brings.start.free brings.objective.trained brings.objective.random brings.again.start.kept "
        "brings.again.start.free brings.again.objective.trained brings.again.objective.random hyper.form "
        "hyper.projected given.universal given.hypernetwork given.specialists given.cut given.random given.fades "
        "given.universal_distilled given.cut_distilled given.distilled given.both_distilled "
        "given.frozen given.compute.universal given.compute.hypernetwork given.compute.specialists given.compute.cut "
        "taught.projected taught.hypernetwork taught.both"
    ).split()
    of_two_sizes = (
        "conditioning.shuffled conditioning.wrong conditioning.support conditioning.classes generators.family "
        "generators.sizes generators.layout_per_matrix generators.p0_random generators.p0_slice generators.lambda_1 "
        "generators.z_2 generators.z_16 source.depth.l1 source.depth.l2 source.depth.l3 source.masked source.mixture "
        "multimodal multimodal.caption"
    ).split()
    expected |= {f"{id}.d{s}" for id in by_size for s in SMOKE.sizes} | {"cost.break_even"}
    of_two_sizes += [f"conditioning.{name}" for name in CONDITIONINGS if name not in ("NoID", "ShuffledID")]
    expected |= {f"{id}.d{s}" for id in of_two_sizes for s in (small, large)}
    expected |= {f"conditioning.clusters{n}.d{small}" for n in (10, SMOKE.n_clusters)}
    transfer = ("", ".support", ".source", ".support_source")
    transfer = [f"transfer{id}" for id in transfer] + ["scarce", "scarce.source"]
    expected |= {f"{id}.{world}.n5.d{small}" for id in transfer for world in ("glyphs", "classes")}
    widens = [f"{small}_{middle}", f"{middle}_{large}"]
    expected |= {f"{id}.widens.{pair}" for id in ("stability.again", "text", "longer") for pair in widens}
    expected |= {f"transfer.growth.d{small}", f"transfer.hypernetwork.classes.n5.d{small}"}
    two_best = {id for id in claims if id.startswith("generators.source.")}
    assert len(two_best) == 4 and set(claims) == expected | two_best
    losses = pd.read_csv(reports / "results" / "test_losses.csv")
    mean = losses.groupby(["arm", "d_s", "seed"]).loss.mean()
    for s in SMOKE.sizes:
        gap = (mean["universal", s] - mean["projected", s]).to_numpy()
        claim = claims[f"headline.d{s}"]
        assert claim["value"] == pytest.approx(gap.mean(), abs=1e-4)
        half = 12.7062 * abs(gap[0] - gap[1]) / 2  # Student's t, one degree of freedom: t · s/√2, s = |a − b|/√2
        assert claim["ci_high"] - claim["value"] == pytest.approx(half, abs=1e-3)
    for claim in claims.values():
        assert claim["seeds"] == len(SMOKE.seeds)
        assert claim["verdict"] == "inconclusive", "two seeds are no evidence"
        assert claim["ci_low"] <= claim["value"] <= claim["ci_high"]


def test_what_notebooks_record_is_what_their_tables_say(reports):
    def table(name, *index):
        return pd.read_csv(reports / "results" / f"{name}.csv").set_index(list(index))

    found, means = recorded(reports, "02_source_and_projections"), table("source_and_projected", "arm", "d_s")["mean"]
    for s in SMOKE.sizes:
        assert found[f"test_projected_{s}"] == pytest.approx(means["projected", s], abs=1e-4)
    found, trials = recorded(reports, "03_universal_models"), pd.read_csv(reports / "results" / "trials.csv")
    universal = trials[trials.arm.isin(UNIVERSALS)]
    for s, rows in universal.groupby("d_s"):
        assert found[f"best_universal_d{s}"] == rows.loc[rows.val_loss.idxmin()].arm
    assert found["at_edge"] == trials.at_edge.sum() and found["trials"] == len(trials)
    assert found["matched_steps"] > SMOKE.source_steps + SMOKE.joint_steps, "projections cost more than their rivals"
    found, naming = recorded(reports, "04_projected_vs_universal"), table("naming", "d_s")
    for s in SMOKE.sizes:
        assert found[f"naming_accuracy_d{s}"] == pytest.approx(naming.naming_accuracy[s], abs=1e-4)
        assert naming.naming_accuracy_low[s] < naming.naming_accuracy[s] < naming.naming_accuracy_high[s] < 2
    small = SMOKE.sizes[0]
    swap = table("task_swap", "images_of").to_numpy()
    assert swap.diagonal().mean() == pytest.approx(naming.own_task[small], abs=1e-3)


@pytest.mark.parametrize(
    "table, claim, rival, ours",
    [
        ("controls", "explained.parameters", "universal", "static_token"),
        ("controls", "explained.alike", "universal_additive", "static_token"),
        ("controls", "explained.source", "bank_trained", "projected"),
        ("controls", "explained.maps", "static_maps", "projected"),
        ("direct", "direct.examples", "specialists", "projected"),
        ("direct", "direct.compute", "specialists_matched", "projected"),
        ("compute", "direct.cut_examples", "cut_half", "projected"),
        ("compute", "cost.hypernetwork", "hypernetwork_matched", "projected"),
        ("conditioning", "conditioning.Features", "told_NoID", "told_Features"),
        ("conditioning", "conditioning.shuffled", "told_ShuffledID", "projected"),
        ("generators", "generators.p0_slice", "p0_slice", "projected"),
        ("masked", "source.masked", "universal", "projected"),
        ("mixture", "source.mixture", "hard_mixture", "projected"),
        ("text", "text.task", "static_token", "projected"),
        (
            "given_compute",
            "given.compute.cut",
            "cut from the source that projections start from, tuned, equal compute",
            "projected",
        ),
        ("captions", "multimodal", "universal", "projected"),
    ],
)
def test_claims_can_be_computed_from_the_losses_by_seed(reports, table, claim, rival, ours):
    claims = {c["id"]: c for c in json.loads((reports / "claims.json").read_text())}
    losses = pd.read_csv(reports / "results" / f"{table}_by_seed.csv")
    losses = losses.set_index(["arm", "d_s", "seed"]).loss.sort_index()
    for s in SMOKE.sizes[::2]:
        gap = losses[rival, s] - losses[ours, s]
        assert len(gap) == len(SMOKE.seeds) and claims[f"{claim}.d{s}"]["value"] == pytest.approx(gap.mean(), abs=1e-4)


def test_claims_of_further_notebooks_follow_from_their_tables(reports):
    claims = {c["id"]: c for c in json.loads((reports / "claims.json").read_text())}
    direct = pd.read_csv(reports / "results" / "direct.csv").set_index(["arm", "d_s"])["mean"]
    support = pd.read_csv(reports / "results" / "support.csv").groupby("d_s").mean()
    by_task = pd.read_csv(reports / "results" / "text_by_task.csv").groupby("d_s").gap.mean()
    for s in SMOKE.sizes:
        start = direct["specialists", s] - direct["tuned_0.1", s]
        assert claims[f"direct.start.d{s}"]["value"] == pytest.approx(start, abs=1e-4)
        assert claims[f"text.d{s}"]["value"] == pytest.approx(by_task[s], abs=1e-4)
    for s in SMOKE.sizes[::2]:
        assert claims[f"conditioning.support.d{s}"]["value"] == pytest.approx(
            support.loc[s, "1 image"] - support.loc[s, "16 images"], abs=1e-4
        )
    same = pd.read_csv(reports / "results" / "same_loss.csv")
    assert set(same.d_s) == set(SMOKE.sizes) and (same.groupby("d_s").size() == 3).all()
    assert ((same.as_good > 0) | (same.seconds == math.inf)).all() and (same.whole_run > 0).all()
    given = (
        pd.read_csv(reports / "results" / "given_by_seed.csv")
        .set_index(["step", "arm", "d_s", "seed"])
        .loss.sort_index()
    )
    first, steps = sorted(set(given.index.get_level_values("step")))  # other profiles have a third, the last
    worth = {n: given[n, "bank_kept"] - given[n, "projected"] for n in (first, steps)}
    for s in SMOKE.sizes:
        assert claims[f"given.random.d{s}"]["value"] == pytest.approx(worth[steps][s].mean(), abs=1e-4)
        fades = (worth[first] - worth[steps])[s].mean()
        assert claims[f"given.fades.d{s}"]["value"] == pytest.approx(fades, abs=1e-4)
    change = given[steps, "projected: source"] / given[steps, "source"] - 1
    assert claims["given.kept"]["value"] == pytest.approx(change.mean(), abs=1e-4)
    trials = pd.read_csv(reports / "results" / "given_trials.csv").set_index("arm").step
    matched = recorded(reports, "19_source_given")["steps_at_equal_compute"]
    assert set(trials["cut_start_matched"]) == {matched[0]}
    assert set(trials["hypernetwork"]) == {first, steps, matched[1]}
    families = pd.read_csv(reports / "results" / "families.csv")
    assert set(families.family) == {name for name, family in FAMILIES.items() if not issubclass(family, Static)}
    lean, full = (families[families.family == name].maps.sum() for name in ("LowRank", "Linear"))
    assert lean < full / 2


def test_the_index_leads_to_every_claim_and_page(reports):
    html = unescape((reports / "index.html").read_text())
    claims = json.loads((reports / "claims.json").read_text())
    for _, group in pages.claim_groups(claims):
        for words, statistic, found in pages.claim_families(group):
            row = html[html.index(f"<td>{words}<br><small>{statistic}</small>") :]
            row = row[: row.index("</tr>")]
            assert all(f'href="{claim["notebook"]}.html"' in row for _, claim in found)
            shown = [f"{name}:</small> {pages.interval(claim)}</div>" for name, claim in found if name]
            assert all(words in row for words in shown) and row.count('class="badge') == len(found)
    for notebook in {claim["notebook"] for claim in claims}:
        top = unescape((reports / f"{notebook}.html").read_text()).partition("<main>")[0]
        its = [claim for claim in claims if claim["notebook"] == notebook]
        for words, *_ in pages.claim_families(its, whole=True):
            assert f"<tr><td>{words}<" in top, "a page begins with what was found"
        assert top.count('class="badge') == len(its)
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        assert f"{path.stem}.html" in html


@pytest.mark.parametrize("path", reporting.notebook_paths(), ids=lambda path: path.stem)
def test_every_table_is_shown(path):
    """A cell shows what its last line gives, or what is displayed: a table before that is only saved."""
    for cell in pages.read_notebook(path).cells:
        lines = ast.parse(cell.source).body[:-1] if cell.cell_type == "code" else []
        calls = [
            ast.unparse(n.value.func)
            for line in lines
            for n in ast.walk(line)
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
        ]
        assert "report.table" not in calls, cell.source
