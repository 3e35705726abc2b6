"""Notebooks become pages that open offline; failures, mistakes and claims end where a reader sees them."""

import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from nbconvert import nbconvertapp
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from projectable import __main__, pages, reporting
from projectable.config import get_profile
from projectable.reporting import Report, ReportError, Status

NOTEBOOKS, REPORTS = (Path(__file__).parents[1] / name for name in ("notebooks", "reports"))
TEXT = r"""# A question?

Loss $L = \lambda \mathrm{CE}(M_1; x, t)$, but `$HOME and $PATH` is code.

$$\sqrt{\tfrac{d}{d_s}} P^\top W$$

\begin{align*} a &= b \\ c &= d \end{align*}

| weight | size |
|---|---|
| $W_Q$ | 3 |
"""

CLAIM = """
from projectable.reporting import Report
report = Report("01_good", profile)
report.claim("c1", "Small is <beautiful>", statistic="gap", value=0.5, ci_low=0.4, ci_high=0.6,
             seeds=seeds, tasks=10, verdict="reproduced", commit="abc1234", device="cuda: far away")
"""

FINDINGS = (
    CLAIM
    + """
import sys
import pandas as pd
from matplotlib.figure import Figure
figure = Figure(); figure.subplots().plot([1, 2])
report.figure("curve", figure, "A line.")
report.record("gap", 0.5)
print("10 %\\r20 %\\r100 %", file=sys.stderr)
report.table("numbers", pd.DataFrame({"arm": ["a"], "loss": [1.23456]}), "Numbers")
"""
)

KERNEL = """
import json, os, torch
facts = dict(threads=torch.get_num_threads(), folder=os.getcwd())
with open(os.path.join(os.environ["PROJECTABLE_ROOT"], "kernel.json"), "w") as file:
    json.dump(facts, file)
"""

TRAINING = """
import os
from pathlib import Path
run = Path(os.environ["PROJECTABLE_RUNS"]) / "new"; run.mkdir(); (run / "result.json").touch()
"""


STATUS = dataclasses.asdict(Status("n", "t", "laptop", "ok", 1.0))
FOUND = dict(id="c", claim="x", statistic="gap", value=0.1, ci_low=0.0, ci_high=0.2, seeds=3, tasks=10, notebook="00_a")
FOUND |= dict(profile="laptop", device="cpu", commit="new", verdict="inconclusive")


def write_notebook(folder: Path, name: str, *code: str, text: str = TEXT, parameters='profile = "laptop"\nseeds = 5'):
    cells = [new_markdown_cell(text), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb = new_notebook(cells=cells + [new_code_cell(source) for source in code])
    folder.joinpath("notebooks").mkdir(exist_ok=True)
    nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")
    return folder / "notebooks" / f"{name}.ipynb"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without notebooks, which the package takes for its own."""
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(reporting.__file__).parents[1]))
    return tmp_path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A project after `reproduce`: a notebook that works, one that fails, one that works after it."""
    folder = tmp_path_factory.mktemp("project")
    before = folder / "runs" / "before" / "result.json"
    before.parent.mkdir(parents=True)
    before.touch()
    os.utime(before, (0, 0))
    write_notebook(folder, "00_bad", 'raise RuntimeError("no \\x1b[31m<luck>\\x1b[0m")', text="# Bad one")
    write_notebook(folder, "01_good", FINDINGS, TRAINING, KERNEL)
    ours = dict(PROJECTABLE_ROOT=".", PROJECTABLE_RUNS="runs", PROJECTABLE_WORKERS="1")  # kernels run in notebooks/
    ours["PYTHONPATH"] = str(Path(reporting.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (ours | dict(PROJECTABLE_REPORTS="")).items():
            patch.setenv(name, value)
        result = CliRunner().invoke(__main__.cli, ["reproduce", "--profile", "smoke", "-p", "seeds", "7"])
    return folder / "build" / "smoke" / "own_report", result  # for parameters of one's own were given


class Addresses(HTMLParser):
    """Collects what a browser would load: src of anything, href of all but anchors, addresses in styles."""

    def __init__(self, html: str):
        super().__init__()
        self.loaded, self.tags, self.folded, self.depth = [], [], [], 0
        self.feed(html)
        self.loaded += re.findall(r"@import\s*[\"']?([^\"';]+)|url\(\s*[\"']?([^\"')]+)", html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.depth += tag == "details"
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "background") or (name == "href" and tag != "a"):
                self.loaded.append(value)

    def handle_endtag(self, tag):
        self.depth -= tag == "details"

    def handle_data(self, text):
        if self.depth:
            self.folded.append(text)


def test_reproduce_goes_on_after_a_failure_and_names_it(ran):
    reports, result = ran
    assert result.exit_code == 1
    assert "failed: 00_bad" in result.stdout
    states = [json.loads(p.read_text())["status"] for p in sorted((reports / "results" / "status").glob("*.json"))]
    assert states == ["failed", "ok"]
    assert not list(reports.rglob(".*")), "drafts of atomic writes were left"


def test_kernels_have_one_thread_and_the_folder_of_the_notebooks(ran):
    reports, _ = ran
    root = reports.parents[2]
    facts = json.loads((root / "kernel.json").read_text())
    assert facts == dict(threads=1, folder=str(root / "notebooks"))


def test_pages_and_index_tell_how_many_runs_their_time_holds(ran):
    reports, _ = ran
    for page in ("01_good.html", "index.html"):
        assert "1 run trained meanwhile" in (reports / page).read_text()
    words = [pages.trained(runs) for runs in (None, 0, 2, 1234)]
    assert words == ["", "no run trained meanwhile", "2 runs trained meanwhile", "1,234 runs trained meanwhile"]


def test_a_page_from_finished_runs_tells_what_they_took_to_train(project, monkeypatch):
    path = write_notebook(project, "01_good", text="# Good one")
    monkeypatch.setattr(reporting, "execute", lambda path, executed, parameters: None)
    trained = iter([3, 0, 0, 0])
    monkeypatch.setattr(reporting, "_runs_since", lambda clock: next(trained))
    first, *later = [reporting.run_notebook(path, "smoke") for _ in range(3)]
    assert first.before is None and [status.before for status in later] == [first.seconds] * 2
    assert "no run trained meanwhile (with training: 9 min 02 s)" == pages.trained(0, 542.0)
    took = pages.duration(first.seconds)
    assert (
        f"no run trained meanwhile (with training: {took})"
        in (reporting.reports_dir("smoke") / "01_good.html").read_text()
    )

    def time_in_index() -> str:
        return (reporting.reports_dir("smoke") / "index.html").read_text().partition('data-label="time">')[2]

    assert time_in_index().startswith(f"{took}<br><small>rendered again in {pages.duration(later[-1].seconds)}</small>")
    monkeypatch.setattr(reporting, "execute", lambda path, executed, parameters: 1 / 0)
    reporting.run_notebook(path, "smoke")
    assert time_in_index().startswith(f"{took}<br><small>failed after")


@pytest.mark.slow
def test_notebooks_as_jobs_leave_what_they_leave_in_order(project, monkeypatch, submitit):
    monkeypatch.setenv("PROJECTABLE_RUNS", str(project / "runs"))
    monkeypatch.delenv("PROJECTABLE_EXECUTOR", raising=False)
    write_notebook(project, "00_bad", 'raise RuntimeError("no luck")', text="# Bad one")
    write_notebook(project, "01_good", CLAIM)
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "PROJECTABLE_EXECUTOR", "")  # set by the command: not to stay
        result = CliRunner().invoke(__main__.cli, ["reproduce", "--profile", "smoke", "--executor", "local"])
        assert os.environ["PROJECTABLE_EXECUTOR"] == "local", "what notebooks train is jobs, too"
    assert result.exit_code == 1 and "failed: 00_bad" in result.output
    assert "RuntimeError: no luck" in result.output
    reports = project / "reports" / "smoke"
    states = [json.loads(p.read_text())["status"] for p in sorted((reports / "results" / "status").glob("*.json"))]
    assert states == ["failed", "ok"] and "no luck" in (reports / "00_bad.html").read_text()
    assert [c["id"] for c in json.loads((reports / "claims.json").read_text())] == ["c1"]
    assert "Small is &lt;beautiful&gt;" in (reports / "index.html").read_text()
    assert list((project / "runs" / "jobs").iterdir()), "they were jobs"
    assert [p.name for p in reports.parent.iterdir()] == ["smoke"], "the reference reports are left alone"


def test_parameters_of_ones_own_leave_all_usual_reports_alone(ran, project, monkeypatch):
    reports, result = ran
    root = reports.parents[2]
    assert sorted(p.name for p in root.iterdir()) == ["build", "kernel.json", "notebooks", "runs"]
    assert [p.name for p in reports.parent.glob("*.ipynb")] == [] and len(list(reports.glob("*.ipynb"))) == 2
    assert result.stdout.splitlines()[-2] == f"reports: {reports / 'index.html'}"
    (project / "README.md").write_text(readme := "a <!-- claims: x --> b <!-- /claims -->")
    reporting.write_results(project / "reports" / "claims.json", claims := [dict(id="c1")])
    write_notebook(project, "00_a")
    monkeypatch.setattr(reporting, "run_notebook", lambda path, *_: Status(path.stem, "A", "laptop", "ok", 1.0))
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "PROJECTABLE_REPORTS", "")  # set by the command: not to stay
        result = CliRunner().invoke(__main__.cli, ["reproduce", "-p", "seeds", "1"], catch_exceptions=False)
    assert result.exit_code == 0 and (project / "build" / "laptop" / "own_report" / "index.html").exists()
    assert json.loads((project / "reports" / "claims.json").read_text()) == claims
    assert (project / "README.md").read_text() == readme


def test_a_folder_is_named_from_where_the_command_is_given(project, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(reporting, "reproduce", lambda *given: asked.append(given[-1]) or [])
    monkeypatch.setenv("PROJECTABLE_REPORTS", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for named in ("pets", "~/pets"):
        CliRunner().invoke(__main__.cli, ["reproduce", "-p", "folder", named, "-p", "d_s", "8"], catch_exceptions=False)
    assert asked == [{"folder": str(tmp_path / place / "pets"), "d_s": "8"} for place in ("", "home")]
    none = CliRunner().invoke(__main__.cli, ["reproduce", "-p", "folder", ""])
    assert "folder=''; allowed: a folder of class folders" in str(none.exception) and len(asked) == 2


def test_pages_load_nothing_and_run_nothing(ran):
    reports, _ = ran
    pages = sorted(reports.glob("*.html"))
    assert [p.stem for p in pages] == ["00_bad", "01_good", "index"]
    for path in pages:
        found = Addresses(path.read_text())
        assert [a for a in found.loaded if not str(a).startswith("data:")] == []
        assert not {"script", "link", "iframe", "object"} & set(found.tags)
        assert "http" not in path.read_text()


def test_maths_is_mathml_and_code_is_folded_and_left_alone(ran):
    reports, _ = ran
    html = (reports / "01_good.html").read_text()
    found, folded = Addresses(html), "".join(Addresses(html).folded)
    assert found.tags.count("math") == 4
    assert "<code>$HOME and $PATH</code>" in html
    assert "$L" not in html and "begin{align" not in html
    assert "report.record" in folded.replace("\n", "")
    assert "seeds = 5" in folded and 'profile = "smoke"' in folded
    assert "<pre>100 %\n</pre>" in html  # the last state of the progress bar


def test_figure_is_shown_once_with_its_caption(ran):
    reports, _ = ran
    html = (reports / "01_good.html").read_text()
    assert html.count("<img") == 1
    assert 'alt="A line."' in html and "<small>A line.</small>" in html
    assert (reports / "figures" / "curve.png").stat().st_size > 1000


def test_page_of_a_failing_notebook_shows_the_error_at_the_top(ran):
    reports, _ = ran
    html = (reports / "00_bad.html").read_text()
    assert "RuntimeError: no &lt;luck&gt;" in html[: html.index("<main>")]
    assert "\x1b" not in html
    assert json.loads((reports / "results/status/00_bad.json").read_text())["error"] == "RuntimeError: no <luck>"


def test_results_are_data(ran):
    reports, _ = ran
    assert (reports / "results/numbers.csv").read_text() == "arm,loss\na,1.23456\n"
    assert json.loads((reports / "results/01_good.json").read_text()) == {"gap": 0.5}
    (claim,) = json.loads((reports / "claims.json").read_text())
    assert claim["notebook"] == "01_good" and claim["profile"] == "smoke" and claim["commit"] == "abc1234"
    assert claim["device"] == "cuda: far away", "of what trained, not of what renders"
    assert claim["seeds"] == 7, "a number, as the command line said"


def test_index_lists_claims_and_notebooks(ran):
    reports, _ = ran
    html = (reports / "index.html").read_text()
    assert "not a numerical reproduction" in html
    assert "Small is &lt;beautiful&gt;" in html and "0.500 [0.400, 0.600]" in html
    assert '<span class="badge reproduced">reproduced</span>' in html
    assert all(f'href="{name}.html"' in html for name in ("01_good", "00_bad"))
    assert html.count("<img") == 1  # the claim's thumbnail


def test_index_shows_claims_that_differ_in_a_width_in_one_row(tmp_path):
    common = dict(statistic="gap, nats per token", ci_low=0.1, ci_high=0.3, seeds=5, commit="abc", notebook="04_a")
    claims = [
        dict(id=f"headline.d{s}", claim=f"Small wins at width {s}", value=0.2, verdict=verdict, **common)
        for s, verdict in ((8, "reproduced"), (16, "inconclusive"))
    ]
    html = pages.index_html("laptop", claims, [], tmp_path, [])
    rows = html.partition('<table class="rows claims">')[2].partition("</tbody>")[0]
    assert rows.count("Small wins") == rows.count('href="04_a.html"') == 1
    assert [rows.count(f"width {s}:") for s in (8, 16)] == [1, 1]
    assert rows.index("reproduced") < rows.index("width 8:") < rows.index("inconclusive") < rows.index("width 16:")


def test_the_index_tells_what_differs_from_another_run(tmp_path):
    found = dict(statistic="gap", value=0.1, ci_low=0.0, ci_high=0.2, seeds=3, notebook="04_x", commit="new")
    here = [dict(id=f"c{i}", claim=f"claim {i}", verdict="reproduced") | found for i in range(3)]
    there = pd.DataFrame(here[1:] + [dict(here[0], id="gone")]).assign(commit="old")
    there.loc[there.id == "c2", ["verdict", "value", "ci_low", "ci_high"]] = "inconclusive", -0.25, None, None
    there.to_csv(tmp_path / "other.csv")
    other = reporting.another_run(here, tmp_path / "other.csv")
    assert other["both"] == 2
    assert [(a["id"], b["verdict"], b["value"], b["ci_low"]) for a, b in other["changed"]] == [
        ("c2", "inconclusive", -0.25, None)
    ]
    alike = reporting.another_run(here[:2], tmp_path / "other.csv")
    html = pages.index_html("laptop", here, [], tmp_path, [], [other, alike])
    assert "1 of 2 verdicts are the same" in html and html.count("claim 2") == 2 and html.count("claim 1") == 1
    assert "1 of 1 verdicts are the same" in html and html.count("None differs.") == 1
    assert "Beside another run" not in pages.index_html("laptop", here, [], tmp_path, [], [other | dict(both=0)])
    assert (other["opposite"], other["others"], alike["others"]) == (0, 2, 1)


def test_a_run_that_is_kept_stands_beside_later_ones(project):
    """Not beside itself; a name is given once, and what is opposite is counted apart."""
    reports = project / "reports"
    reports.mkdir()
    with pytest.raises(pages.ReportError, match="holds no claims: nothing to keep"):
        reporting.keep("mine")
    found = dict(claim="c", statistic="gap", ci_low=0.01, ci_high=None, seeds=3, tasks=10, notebook="04_x", commit="a")
    claims = [found | dict(id=f"c.d{s}", value=1 / s, verdict="reproduced") for s in (3, 8)]
    (reports / "claims.json").write_text(json.dumps(claims))
    path = reporting.keep("mine")
    assert path.name == "claims_mine_run.csv" and reporting.kept_runs(claims, reports) == []
    for name, why in (
        ("mine", "is there already: another name, or delete it"),
        ("a b", "allowed: letters, digits and _"),
        ("again", "these claims are kept already, as claims_mine_run.csv: run the notebooks first"),
    ):
        with pytest.raises(pages.ReportError, match=why):
            reporting.keep(name)
    later = [claims[0], claims[1] | dict(value=-0.1, verdict="not reproduced")]
    (run,) = reporting.kept_runs(later, reports)
    assert (run["both"], run["opposite"], [claim["id"] for claim, _ in run["changed"]]) == (2, 1, ["c.d8"])
    html = pages.index_html("laptop", later, [], reports, [], [run])
    assert "Beside the run “mine”: 1 of 2 verdicts are the same, 1 the opposite" in html


def test_runs_that_are_kept_are_others():
    """But for the reference run, which readers' own runs are set beside."""
    claims, kept = json.loads((REPORTS / "claims.json").read_text()), sorted(REPORTS.glob("results/claims_*_run.csv"))
    reference = REPORTS / "results/claims_reference_run.csv"
    assert len(kept) >= 3 and reference in kept
    assert [other for other in reporting.kept_runs(claims, REPORTS) if "reference" in other["file"]] == []
    for path in kept:
        there = pd.read_csv(path).set_index("id")
        if path == reference:
            assert set(there.index) == {claim["id"] for claim in claims}, "`projectable keep reference` anew"
            continue
        pairs = [(claim, there.loc[claim["id"]]) for claim in claims if claim["id"] in there.index]
        assert len(pairs) > 100 and there.index.is_unique, path
        same = [claim["id"] for claim, other in pairs if claim["commit"] == other["commit"]]
        assert same == [], path


def test_claims_with_different_rivals_stay_apart():
    pairs = zip((8, 16, 32), ("a − b", "a − b", "c − b"), strict=True)
    claims = [dict(id=f"scarce.d{s}", claim=f"At width {s} b wins", statistic=words) for s, words in pairs]
    both, other = pages.claim_families(claims)
    assert both[1] == "a − b" and [name for name, _ in both[2]] == ["width 8", "width 16"]
    assert other == ("At width 32 b wins", "c − b", [("", claims[2])])


def test_claims_that_differ_in_the_number_of_images_stand_together():
    def claim(n, s):
        return dict(id=f"transfer.n{n}.d{s}", claim=f"With {n} images of x, at width {s}, y wins", statistic="a − b")

    ((words, _, found),) = pages.claim_families([claim(n, s) for n in (5, 25) for s in (8, 32)])
    assert words == "With few images of x, y wins"
    assert [name for name, _ in found] == [f"{n} images, width {s}" for n in (5, 25) for s in (8, 32)]
    ((words, _, found),) = pages.claim_families([claim(5, 8), claim(25, 8)])
    assert words == "With few images of x, at width 8, y wins" and [n for n, _ in found] == ["5 images", "25 images"]
    ((words, _, found),) = pages.claim_families([claim(5, 8), claim(5, 32)])
    assert words == "With 5 images of x, y wins" and [n for n, _ in found] == ["width 8", "width 32"]


def test_tables_are_in_words(tmp_path):
    table = pd.DataFrame(dict(arm=["static_token", "mine"], d_s=[8, 16], val_loss=[1.5, 1.25], at_edge=[True, False]))
    html = reporting._styled(table, None).to_html()
    for words in ("one map for all tasks (StaticToken)", "mine", "width", "validation loss", "at edge"):
        assert f">{words}</t" in html
    assert "static_token" not in html and "1.5000" in html
    classes = pd.DataFrame({"class": ["<lod", "a & b"]})
    assert "<td" in (html := reporting._styled(classes, None).to_html()) and "&lt;lod" in html and "a &amp; b" in html


def test_index_without_results_and_while_running(project):
    write_notebook(project, "00_later", text="# Later")
    write_notebook(project, "01_now", text="# Now")
    Status("01_now", "Now", "laptop", "running").write()
    reporting.build_index("laptop")
    html = (project / "reports/index.html").read_text()
    assert "Not run yet: 00_later." in html and ">running</span>" in html and "No claim is recorded yet" in html
    assert "00_later.html" not in html and "Beside another run" not in html


def test_the_index_finds_every_run_that_is_kept(project):
    write_notebook(project, "00_a")
    (project / "reports/results").mkdir(parents=True)
    (project / "reports/claims.json").write_text(json.dumps([FOUND]))
    for name, verdict in (("another", "inconclusive"), ("third", "reproduced")):
        table = pd.DataFrame([FOUND | dict(verdict=verdict, commit=name)])
        table.to_csv(project / f"reports/results/claims_{name}_run.csv", index=False)
    reporting.build_index("laptop")
    html = (project / "reports/index.html").read_text()
    assert "Beside the comparison run: 1 of 1 verdicts are the same" in html
    assert "Beside a third run: 0 of 1 verdicts are the same" in html


def test_only_what_was_run_is_set_beside_other_runs(project, monkeypatch, capsys):
    claim = FOUND | dict(notebook="01_b")
    for name in ("00_a", "01_b"):
        write_notebook(project, name)
    reporting.write_results(project / "reports/results/claims/01_b.json", [claim])
    table = pd.DataFrame([claim | dict(verdict="reproduced", commit="old")])
    table.to_csv(project / "reports/results/claims_third_run.csv", index=False)
    monkeypatch.setattr(reporting, "run_notebook", lambda path, *_: Status(path.stem, "A", "laptop", "ok", 1.0))
    said = {only: (reporting.reproduce("laptop", [only]), capsys.readouterr().out)[1] for only in ("00", "01")}
    assert "beside" not in said["00"] and "beside a third run: 0 of 1 verdicts the same, 0 opposite" in said["01"]


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (["03"], "03"),
        (["00-03", "07_d.ipynb"], "00 03 07"),
        (["05-20", "00_a"], "00 07"),
        (["notebooks/03_b.ipynb"], "03"),
        ((), "00 03 07"),
    ],
)
def test_notebooks_are_named_by_number_range_or_file(project, only, found):
    for name in ("00_a", "03_b", "07_d"):
        write_notebook(project, name)
    assert [path.stem[:2] for path in reporting.select_notebooks(only)] == found.split()


def test_unknown_names_are_errors_that_list_the_allowed(project):
    path = write_notebook(project, "00_a")
    with pytest.raises(ReportError, match="unknown parameter sedes; allowed: profile, seeds"):
        reporting.run_notebook(path, "laptop", {"sedes": 3})
    with pytest.raises(ReportError, match="unknown parameter sedes; allowed: profile, seeds"):
        reporting.reproduce("laptop", parameters={"sedes": "3"})
    with pytest.raises(ReportError, match="profile='gpu' among the parameters; allowed: as --profile"):
        reporting.reproduce("laptop", parameters={"profile": "gpu"})
    with pytest.raises(ReportError, match="unknown notebook '7'; allowed: 00_a"):
        reporting.reproduce("laptop", ["7"])
    assert not (project / "reports").exists()


def test_parameters_are_of_the_kind_that_a_notebook_has(project):
    path = write_notebook(project, "00_a", parameters='profile = "laptop"\nd_s = 8\nnumbers = [5, 25]\nfolder = ""')
    pages.check_parameters(path, dict(profile="smoke", d_s=16, numbers=(1,), folder="pets"))
    with pytest.raises(ReportError, match=r"00_a.ipynb: d_s='eight'; allowed: a whole number, as 8"):
        reporting.reproduce("laptop", parameters={"d_s": "eight"})
    with pytest.raises(ReportError, match="d_s=8.0; allowed: a whole number, as 8"):
        reporting.reproduce("laptop", parameters={"d_s": "8.0"})
    with pytest.raises(ReportError, match=r"numbers=5; allowed: a list, as \[5, 25\]"):
        reporting.reproduce("laptop", parameters={"numbers": "5"})
    assert not (project / "reports").exists()


def test_parameters_on_the_command_line_are_python_where_they_can_be():
    found = [pages.literal(words) for words in ("3", "0.5", "(1, 2)", "True", "'3'", "/data/pets", "a b", "")]
    assert found == [3, 0.5, (1, 2), True, "3", "/data/pets", "a b", ""]


def test_a_claim_is_shown_by_its_own_figure(tmp_path):
    """In the index; the first figure of its notebook where none is named, none where no figure shows it."""
    colours = dict(headline="red", gaps="blue", first="green")
    for name, colour in colours.items():
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{name}.png")
    common = dict(
        claim="c", statistic="s", value=0.2, ci_low=0.1, ci_high=0.3, seeds=5, commit="a", verdict="reproduced"
    )
    ids = (
        "headline.d8",
        "headline.distilled.d8",
        "headline.specialists.d8",
        "headline.clusters.d8",
        "direct.examples.d8",
        "cost.generation.d8",
        "other",
    )
    claims = [common | dict(id=id, claim=id, notebook="n" if id != "other" else "m") for id in ids]
    status = STATUS | dict(figure="first", budget=None, page=True)
    html = pages.index_html("laptop", claims, [status], tmp_path, [])
    table = html[html.index('<table class="rows claims">') :]
    shown = [base64.b64decode(found) for found in re.findall(r'class="thumb">.*?base64,([^"]+)', table)]
    pixels = [Image.open(io.BytesIO(found)).convert("RGB").getpixel((4, 4)) for found in shown]
    assert np.abs(np.subtract(pixels, [(255, 0, 0), (0, 0, 255), (0, 128, 0)])).max() < 9, "not twice where it is above"
    assert table.count("<small>as above</small>") == 1
    assert re.findall(r'class="thumb"><a href="([^"]+)"', table) == [f"figures/{name}.png" for name in colours]


def test_claims_merge_in_order_and_a_rerun_replaces(project):
    def claim(report, id, verdict="inconclusive", value=1.0):
        report.claim(
            id, id, statistic="s", value=value, ci_low=None, ci_high=None, seeds=5, tasks=3, verdict=verdict, commit="c"
        )

    second, first = Report("01_b", "laptop"), Report("00_a", "laptop")
    claim(second, "z")
    claim(first, "y")
    claim(first, "x", value=np.float32("nan"))
    first.claims_table()
    read = lambda: json.loads((project / "reports/claims.json").read_text())  # noqa: E731
    assert [c["id"] for c in read()] == ["y", "x", "z"]
    assert read()[1]["value"] is None
    again = Report("00_a", "laptop")
    found = dict(claim="c", statistic="s", value=1.0, ci_low=0.5, ci_high=1.5, seeds=5, verdict="reproduced")
    again.claim_each([found | dict(id=id) for id in "yw"], tasks=3, commit="c")
    again.claims_table()
    assert [c["id"] + c["verdict"] for c in read()] == ["yreproduced", "wreproduced", "zinconclusive"]
    with pytest.raises(ValueError, match="'confirmed'.*allowed: reproduced, inconclusive, not reproduced"):
        claim(first, "v", "confirmed")
    assert first.claims_table().data.count('class="badge') == 2


def test_a_page_begins_with_what_was_found():
    common = dict(statistic="gap", ci_low=0.1, ci_high=0.3, seeds=5, commit="abc", notebook="n")
    claims = [
        dict(id=f"wins.d{s}", claim=f"Small <wins> at width {s}", value=value, verdict=verdict, **common)
        for s, value, verdict in (
            (8, -0.01234, "not reproduced"),
            (16, 0.2, "inconclusive"),
            (32, 12.3, "inconclusive"),
        )
    ]
    nb = new_notebook(cells=[new_markdown_cell("Why?")])
    html = pages.notebook_html(nb, STATUS, Path("."), claims)
    top = html[html.index('class="outcome"') : html.index("</section>")]
    assert html.index("<h1>") < html.index(top) < html.index("<p>Why?")
    assert "? 2 inconclusive, ✗ 1 not reproduced" in top and top.count("Small &lt;wins&gt;") == 1
    assert 'class="badge not-reproduced" title="not reproduced: −0.012 [0.100, 0.300]">✗ −0.012</span>' in top
    heads = re.findall(r"<th>([^<]*)</th>", top)
    cells = re.findall(r'<td data-label="([^"]+)"><span[^>]*>([^<]+)</span>', top)
    assert heads == ["", "width 8", "width 16", "width 32"]
    assert cells == [("width 8", "✗ −0.012"), ("width 16", "? 0.200"), ("width 32", "? 12.3")]
    assert "<small>gap</small>" in top and pages.LEGEND in top, "a unit that is not nats per token is said"
    assert "trained by commit abc" in html
    again = STATUS | dict(commit="old")
    assert "page made by" not in html and "page made by" not in pages.notebook_html(nb, again, Path("."), made_by="old")
    assert "page made by commit new" in pages.notebook_html(nb, again, Path("."), made_by="new")
    assert 'class="outcome"' not in pages.notebook_html(nb, STATUS, Path("."))


def test_claims_of_one_question_share_a_row_whoever_was_chosen_for_it():
    common = dict(verdict="inconclusive", value=0.1, ci_low=0.0, ci_high=0.2, notebook="n")
    claims = [
        dict(id=f"few.n{n}.d{s}", claim=f"With {n} images of it, at width {s}, ours wins", statistic=words, **common)
        for n, words in ((100, "a − b, nats per token"), (5, "c − b, nats per token"))
        for s in (32, 8)
        if (n, s) != (5, 32)
    ]
    claims.append(dict(id="kept", claim="Kept", statistic="share", **common))
    (columns, rows), (none, alone) = pages.in_brief(claims)
    assert columns == ["5 images, width 8", "100 images, width 8", "100 images, width 32"]
    ((words, unit, found),) = rows
    assert (words, unit) == ("With few images of it, ours wins", "")
    assert [claim["id"] for claim in found] == ["few.n5.d8", "few.n100.d8", "few.n100.d32"]
    assert none == ["value"] and alone == [("Kept", "share", [claims[-1]])]
    one = claims[0] | dict(id="alone.d16"), claims[0] | dict(id="pair.8_16")
    of_widths, of_pairs = pages.in_brief([claims[0], *one])
    assert of_widths[0] == ["width 16", "width 32"] and [row[2] for row in of_widths[1]] == [
        [None, claims[0]],
        [one[0], None],
    ]
    assert of_pairs[0] == ["width 8 against 16"], "what stands alone is under its width"
    assert len(pages.claim_families(claims)) == 3, "with their statistics they are apart"
    wider = [
        one[0] | dict(id=f"wide.d{s}", claim=f"A wider one of width {s} beats one of {n}")
        for s, n in ((8, 32), (32, 64))
    ]
    ((_, rows),) = pages.in_brief(wider)
    assert [(words, found) for words, _, found in rows] == [
        ("A wider one of width 8 beats one of 32", [wider[0], None]),
        ("A wider one of width 32 beats one of 64", [None, wider[1]]),
    ], "who else is compared is not hidden"


def test_the_index_begins_with_a_table_of_what_was_found(tmp_path):
    common = dict(claim="c", statistic="s", ci_low=0.1, ci_high=0.3, seeds=5, commit="a", notebook="04_x")
    found = {"headline.d8": (0.111, "reproduced"), "headline.d32": (0.02, "inconclusive")}
    found |= {"headline.matched.d16": (-0.05, "not reproduced"), "unasked.d64": (1.0, "reproduced")}
    claims = [dict(id=id, value=value, verdict=verdict, **common) for id, (value, verdict) in found.items()]
    widths, groups = pages.in_short(claims)
    assert widths == [8, 16, 32] and len(groups) == 2
    html = pages.index_html("laptop", claims, [], tmp_path, [])
    table = html.partition('<table class="grid">')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd](?: scope=.row.)?>(.*?)</t[hd]>", row) for row in table.split("<tr")[2:]]
    shown = [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows if len(row) == 4]
    assert shown == [
        ["the best universal model 5&nbsp;seeds", "✓ 0.111", "", "? 0.020"],
        ["the best universal model 5&nbsp;seeds", "", "✗ −0.050", ""],
    ]
    assert 'href="04_x.html" title="reproduced: 0.111 [0.100, 0.300]"' in table
    assert 'id="short"' not in pages.index_html("laptop", claims[-1:], [], tmp_path, [])


def test_every_question_of_the_first_table_is_one_that_was_asked():
    ids = {claim["id"].rpartition(".d")[0] for claim in json.loads((REPORTS / "claims.json").read_text())}
    assert [id for asked in pages.IN_SHORT.values() for id in asked if id not in ids] == []


@pytest.mark.parametrize("name", list(pages.SETTINGS))
def test_the_index_tells_the_settings_of_its_profile(name):
    p, words = get_profile(name), pages.SETTINGS[name]
    said = [int(number) for number in re.findall(r"\b\d+", words)]
    assert said == [49, p.data.vocab_size, p.d_source, p.n_layers, *p.sizes, len(p.seeds)]


def test_rules_fold_away_up_to_what_is_bold_next():
    text = "# A\n\n**Question.** Why?\n\n**Rules**, first:\n\n- a\n\n**Budget**\n\n## B\n\n**Earlier runs.** Two.\n"
    folded = pages.folded(text)
    assert folded.count("<details>") == 2 and folded.startswith("# A\n\n**Question.** Why?\n\n<details>")
    assert "<summary>Rules of the verdicts</summary>\n\n**Rules**, first:\n\n- a\n\n</details>" in folded
    assert folded.endswith("<summary>Earlier runs</summary>\n\n**Earlier runs.** Two.\n\n</details>\n\n")
    assert "**Reproduced** where" in pages.folded("**Rules.** x\n**Reproduced** where\n").partition("</details>")[0]


def test_a_column_of_numbers_has_as_many_decimals():
    columns = {
        (0.5, 0.00912): ["0.5000", "0.0091"],
        (12.3456, 0.5): ["12.35", "0.50"],
        (4776, 14768): ["4,776", "14,768"],
    }
    columns |= {(5, 17): ["5", "17"], (2e-4, -3.21e-3): ["0.0002", "−0.00321"], (1234.56, -7.0): ["1,235", "−7"]}
    columns |= {(1.43e12, 1.0): ["1.43e+12", "1.0000"], (1.5, math.inf): ["1.5000", "∞"], (math.nan, 2.0): ["–", "2"]}
    for values, words in columns.items():
        form = pages.numbers(values)
        assert [form(value) for value in values] == words


def test_words_become_a_page_that_loads_nothing(project):
    (project / "reports").mkdir()
    (project / "reports/findings.md").write_text(
        "# What was found\n\nA [page](04_x.html), $x$, 5 **bold**, [another](../notebooks/03_y.ipynb).\n\n"
        "## The paper's claims\n"
    )
    reporting.build_index("laptop")
    html = (project / "reports/findings.html").read_text()
    assert 'href="04_x.html"' in html and "<math" in html and "<strong>bold</strong>" in html
    assert html.count("What was found</h1>") == 1 and Addresses(html).loaded == []
    assert '<h2 id="the-papers-claims">' in html and 'href="03_y.html"' in html
    (project / "reports/claims.json").write_text(json.dumps([FOUND]))
    reporting.build_index("laptop")
    assert 'href="findings.html"' in (project / "reports/index.html").read_text()


def test_tables_of_claims_are_made_anew_in_words():
    words = "# a\n\n<!-- claims: rival − ours\n{rows}\n-->\nold\n<!-- /claims -->\n\nend <!-- claims: x --> it\n"
    rows = "headline | universal\nheadline.widens | how much it widens\ngone | nobody\nsource.kept | the source"
    about = dict(ci_low=-0.1, ci_high=0.3, verdict="inconclusive", notebook="04_a", seeds=5)
    found = {
        "headline.d16": 0.1,
        "headline.d8": 0.2,
        "headline.widens.8_16": -0.05,
        "source.kept": 0.1,
        "headlines": 1.0,
    }
    claims = [about | dict(id=id, value=value) for id, value in found.items()]
    claims[1] |= dict(verdict="not reproduced", seeds=3)
    text = pages.with_claims(words.format(rows=rows), claims, differ := {"headline.d8", "headlines"})
    assert pages.with_claims(text, claims, differ) == text and "old" not in text
    assert text.startswith("# a\n\n<!-- claims: rival − ours\nheadline | universal\n") and text.endswith(
        "<!-- /claims -->\n\nend <!-- claims: x --> it\n"
    )
    table = [line.replace("\u00a0", " ") for line in text.splitlines() if line.startswith("|")]
    page = "[04](../notebooks/04_a.ipynb)"
    assert table[0] == "| rival − ours | found | width 8 | width 16 | 8 against 16 | seeds | page |"
    assert table[2:] == [
        f"| universal | – | ✗ 0.200 [−0.100, 0.300] † | ? 0.100 [−0.100, 0.300] | – | 3 or 5 | {page} |",
        f"| how much it widens | – | – | – | ? −0.050 [−0.100, 0.300] | 5 | {page} |",
        "| nobody | – | – | – | – | – | – |",
        f"| the source | ? 0.100 [−0.100, 0.300] | – | – | – | 5 | {page} |",
    ]
    assert pages.with_claims(words, []) == words
    for broken in ("headline", "headline|x", "", "headline | x\n\nb | y"):  # no such block: not a word is lost
        assert pages.with_claims(words.format(rows=broken), claims) == words.format(rows=broken)
    unclosed = words.format(rows=rows).replace("<!-- /claims -->", "mine", 1) + words.format(rows=rows)
    assert "mine" in (text := pages.with_claims(unclosed, claims)) and text.count("old") == 1


def test_pictures_of_a_page_are_smaller_and_the_same():
    flat = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(flat, "PNG")
    page = f'<img src="data:image/png;base64,{base64.b64encode(flat.getvalue()).decode()}">'
    assert len(pages.smaller(page)) < len(page)
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(deep, "PNG")
    page = f'<img src="data:image/png;base64,{base64.b64encode(deep.getvalue()).decode()}">'
    assert pages.smaller(page) == page, "WebP has eight bits"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    page = f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="noise"/>'
    kept = re.fullmatch(r'<img src="data:image/webp;base64,([\w+/=]+)" alt="noise"/>', pages.smaller(page))
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(kept[1])))) == np.asarray(noise)).all()
    for broken in ("AAAA", "AAA", page[32:400]):
        assert pages.smaller(other := f"<img src='data:image/png;base64,{broken}'>") == other


def test_code_that_shows_nothing_is_folded_with_the_code_after_it():
    cells = [new_code_cell(source) for source in ("a = 1", "b = 2", "a + b", "c = 3")]
    cells[2].outputs = [new_output("stream", name="stdout", text="3")]
    cells.insert(4, new_markdown_cell("words"))
    assert [cell.source for cell in pages._together(cells)] == ["a = 1\n\nb = 2\n\na + b", "c = 3", "words"]


def test_tables_of_trials_fold_at_any_length_and_those_of_claims_at_none():
    rows = "<tr><td>1</td></tr>"
    trials = f"<table><caption>Every trial of it.</caption>{rows}</table>"
    assert pages.tables(trials).startswith("<details><summary>Every trial of it.")
    assert not pages.tables(trials.replace("Every trial", "The losses")).startswith("<details>")
    assert pages.tables(f'<table class="rows claims">{50 * rows}</table>').startswith("<table")


def test_an_interval_stands_beside_its_value(project):
    df = pd.DataFrame(dict(d_s=[8], share=[0.37], share_low=[0.34], share_high=[0.40], mean=[1.0], seeds=[5]))
    styled = Report("00_a", "laptop").table("t", df)
    assert styled.data.columns.tolist() == ["width", "share", "mean", "seeds"]
    assert styled.data.share.tolist() == ["0.370 [0.340, 0.400]"]
    assert (project / "reports/results/t.csv").read_text().startswith("d_s,share,share_low,share_high,mean,seeds\n")


def test_a_damaged_report_file_is_named(project):
    path = write_notebook(project, "00_a")
    status = Status("00_a", "t", "laptop", "ok", 1.0)
    status.write()
    for content, words in (("", "Expecting value"), ("[]", "no dict")):
        status.path().write_text(content)
        with pytest.raises(ReportError, match=rf"00_a\.json is damaged \({words}.*: delete it"):
            reporting.read_status(path, "laptop")
    status.path().write_text('{"status": "ok", "foo": 1}')  # of another version
    assert reporting.read_status(path, "laptop").status == "ok"


def test_pages_lead_only_to_pages(project):
    for name in ("00_a", "01_b", "02_c"):
        write_notebook(project, name, text=f"# {name}’s title", parameters="profile = 'laptop'")
    page = project / "reports/00_a.html"
    status = reporting.Status("00_a", "t", "laptop", "ok", 1.0)
    reporting.render(project / "notebooks/00_a.ipynb", status)
    assert "01_b" not in page.read_text() and "02_c" not in page.read_text()
    reporting.render(project / "notebooks/02_c.ipynb", dataclasses.replace(status, notebook="02_c"))
    reporting.render(project / "notebooks/00_a.ipynb", status)
    assert ">02 02_c’s title →</a>" in page.read_text() and "01_b" not in page.read_text()
    reporting.render(project / "notebooks/00_a.ipynb", status, ["00_a", "01_b"])
    assert '<a class="next" href="01_b.html">' in page.read_text()


def test_pages_of_ones_own_lead_to_the_reference_where_they_are_alone(project, monkeypatch):
    text = "# Mine\n\n[here](00_a.html), [there](01_b.html#x)"
    for name in ("00_a", "01_b"):
        write_notebook(project, name, text=text, parameters="profile = 'laptop'")
    own = project / "build/laptop/own_report"
    monkeypatch.setenv("PROJECTABLE_REPORTS", str(own))
    reporting.render(project / "notebooks/00_a.ipynb", reporting.Status("00_a", "t", "laptop", "ok", 1.0))
    reporting.build_index("laptop")
    page, index = (own / "00_a.html").read_text(), (own / "index.html").read_text()
    assert 'href="00_a.html"' in page and 'href="../../../reports/01_b.html#x"' in page
    assert (
        "00_a.html" in index and "01_b" not in index and "Fashion-MNIST" not in index and "make reproduce" not in index
    )


def test_another_page_beside_ones_own_reports_is_not_taken_for_the_reference(project, monkeypatch):
    write_notebook(project, "00_a", parameters="profile = 'laptop'")
    for folder, leads in (("site/mine", False), ("reports/smoke", True)):
        monkeypatch.setenv("PROJECTABLE_REPORTS", "" if leads else str(project / folder))
        reporting.reports_dir("smoke").mkdir(parents=True)
        (project / folder).with_name("index.html").write_text("of somebody")
        reporting.build_index("smoke")
        assert ('href="../index.html"' in (project / folder / "index.html").read_text()) == leads


def test_the_time_left_follows_the_pace_of_what_ran_just_now():
    def left(usual, *done):
        statuses = [reporting.Status("n", "t", "laptop", seconds=seconds, trained=trained) for seconds, trained in done]
        return reporting._rest(usual, statuses)

    assert left([600.0, 1200.0, 60.0], (300.0, 9)) == ", about 10 min 30 s left"  # twice as fast
    assert left([600.0, 1200.0, 60.0], (6.0, 0)) == ", about 12 s left"  # the runs were there
    assert left([60.0, 600.0, 1200.0], (6.0, 0), (600.0, 9)) == ", about 20 min 00 s left"
    assert left([None, 100.0], (20.0, 3)) == ", about 1 min 40 s left"
    assert left([100.0, None, None], (30.0, 3)) == ", about 1 min 00 s left"
    assert left([100.0], (30.0, 3)) == ""


def test_every_notebook_says_what_it_takes():
    budgets = {path.stem: pages.notebook_budget(path) for path in reporting.notebook_paths()}
    assert all(budgets.values()), budgets
    said = re.search(r"\*\*Budget\*\*[^.]* (\d+) minutes", NOTEBOOKS.joinpath("08_direct_training.ipynb").read_text())
    assert budgets["01_data_and_tasks"] == 60 and budgets["08_direct_training"] == 60 * int(said[1])


def test_second_reproduce_is_refused_while_the_first_runs(project, monkeypatch):
    write_notebook(project, "00_a")
    Status("00_a", "A", "smoke", "running").write()
    with reporting.lock("smoke"):
        assert reporting.read_status(reporting.notebook_paths()[0], "smoke").error == "interrupted"
        with pytest.raises(ReportError, match=r"process \d+ is writing the smoke reports"):
            reporting.reproduce("smoke")
        with monkeypatch.context() as patch:  # whose pages lie elsewhere need not wait
            patch.setenv("PROJECTABLE_REPORTS", str(project / "mine"))
            with reporting.lock("smoke"), pytest.raises(ReportError, match="is writing the smoke reports"):
                reporting.reproduce("smoke")
    with reporting.lock("smoke"):
        pass  # free again


def test_report_renders_again_without_running(project):
    path = write_notebook(project, "00_a", text="# A", parameters="profile = 'laptop'")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].outputs = [new_output("stream", name="stdout", text="from the build\n")]
    (project / "build/laptop").mkdir(parents=True)
    nbformat.write(nb, project / "build/laptop/00_a.ipynb")
    assert reporting.report("laptop") == 1
    assert "from the build" in (project / "reports/00_a.html").read_text()
    whole = (project / "build/laptop/00_a.ipynb").read_text()
    (project / "build/laptop/00_a.ipynb").write_text(whole[:-40])  # killed while papermill saved it
    assert reporting.report("laptop") == 1 and "from the build" not in (project / "reports/00_a.html").read_text()


def test_html_that_markdown_mixes_in_stays_whole():
    nb = new_notebook(cells=[new_markdown_cell("a <small>b</small> c\n\n<details>\n\n*d*\n\n</details>")])
    html = pages.notebook_html(nb, STATUS, Path("."))
    assert "a <small>b</small> c" in html and re.search(r"<details>\s*<p><em>d</em></p>\s*</details>", html)


def test_formula_that_cannot_be_converted_is_shown_as_code():
    assert pages.mathml(r"\left( <a", "inline") == r"<code>\left( &lt;a</code>"


def test_numbers_for_people():
    shown = {
        0.123456: "0.1235",
        0.00125: "0.00125",
        12.3456: "12.3",
        2e-5: "2e−05",
        -0.000988: "−0.000988",
        7: "7",
        1588112: "1,588,112",
        float("inf"): "∞",
        12345.6: "12,345.6",
        1234.0: "1,234",
        None: "–",
    }
    assert {value: pages.number(value) for value in shown} == shown
    assert pages.number(float("nan")) == "–" and pages.number(True) == "yes" and pages.number(np.False_) == ""
    shorter = {None: "–", 0.1234: "0.123", 120.0: "120", -0.00022: "−0.0002", 1.0: "1.000", 16.7: "16.7"}
    shorter |= {
        -0.05: "−0.050",
        -0.1049: "−0.105",
        5.1e-4: "0.0005",
        9.6e-4: "0.001",
        -2.61e-5: "−0.00003",
        0.0: "0.0000",
        float("inf"): "∞",
    }
    assert {value: pages.short(value) for value in shorter} == shorter
    assert [pages.duration(s) for s in (None, 8, 200, 3900)] == ["", "8 s", "3 min 20 s", "1 h 05 min"]
    claim = {"value": 3.21, "ci_low": 3.0, "ci_high": 3.4}
    assert pages.interval(claim) == "3.210 [3.000, 3.400]"
    assert pages.interval(claim | {"ci_low": None}) == "3.2100"
    near_zero = {"value": -0.00004, "ci_low": -0.00066, "ci_high": 0.00058}
    assert pages.interval(near_zero) == "−0.00004 [−0.00066, 0.00058]"
    assert pages.interval({"value": 16.711, "ci_low": 15.653, "ci_high": 17.77}) == "16.7 [15.7, 17.8]"


def test_table_is_shown_with_few_decimals(project):
    html = Report("00_a", "laptop").table("t", pd.DataFrame({"n": [3], "x": [1.23456789]})).to_html()
    assert "1.2346" in html and ">3<" in html
    assert (project / "reports/results/t.csv").read_text() == "n,x\n3,1.23457\n"


def test_tables_fit_narrow_screens_and_long_ones_fold():
    frame = pd.DataFrame({"matching_width": [1.0], "d_s": [8], "claim": ["a claim of more words than a phone is wide"]})
    html = pages.tables(frame.to_html(index=False))
    assert "<th>matching_<wbr>width</th>" in html and "<th>d_s</th>" in html and "<details" not in html
    assert '<td><div class="long">a claim of more words than a phone is wide</div></td>' in html
    long = pages.tables(pd.concat([frame] * 60).style.set_caption("Every trial.").to_html())
    assert long.startswith("<details><summary>Every trial. (60 rows)</summary>") and long.endswith("</details>")
    assert long.count('<td class="col0" >1.0') == 60, "cells have the class of their column alone"
    assert (
        pages.tables("<p>more than thirty letters, no table_at_all</p>")
        == "<p>more than thirty letters, no table_at_all</p>"
    )


def stored(folder: Path, *cells, name: str = "00_x") -> Path:
    """A notebook of these cells."""
    nbformat.write(new_notebook(cells=list(cells)), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def parameters(source: str):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


GOOD = 'profile = "laptop"  # smoke, laptop or gpu\nsizes: list = [8, -16]'


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([new_code_cell("profile = 1")], "needs exactly one cell tagged `parameters`, has 0"),
        ([parameters(GOOD), parameters("a = 1")], "needs exactly one cell tagged `parameters`, has 2"),
        ([parameters("profile = ")], "line 1 of the parameters: invalid syntax"),
        (
            [parameters("profile = 'a'\nseeds = range(3)")],
            r"`seeds = range\(3\)` among the parameters; allowed: name = lit",
        ),
        ([parameters("import os\nprofile = 'a'")], "`import os` among the parameters"),
        ([parameters("profile = 'a'\nprofile += 'b'")], r"`profile \+= 'b'` among the parameters"),
        ([parameters("a = b = 1")], "`a = b = 1` among the parameters"),
        ([parameters("seeds = 1\nprofile = 'a'")], "the first parameter is seeds; allowed: profile"),
        ([parameters("# nothing")], "the first parameter is missing; allowed: profile"),
        (
            [parameters(GOOD), new_code_cell("1", execution_count=3)],
            "cell 2 is stored with its run; `jupyter nbconvert",
        ),
        (
            [parameters(GOOD), new_code_cell("1", outputs=[new_output("stream", text="1")])],
            "cell 2 is stored with its run",
        ),
    ],
)
def test_notebooks_unfit_to_be_stored_are_named(tmp_path, cells, words, capsys):
    bad, good = stored(tmp_path, *cells), stored(tmp_path, parameters(GOOD), new_code_cell("1"), name="01_good")
    with pytest.raises(ReportError, match=f"00_x.ipynb: {words}"):
        pages.check_stored(bad)
    result = CliRunner().invoke(__main__.cli, ["check", str(bad), str(good)])
    assert result.exit_code == 1 and re.match(f"error: 00_x.ipynb: {words}", result.stderr)
    assert "01_good" not in result.stderr
    assert CliRunner().invoke(__main__.cli, ["check", str(good)]).exit_code == 0


def test_what_strips_outputs_makes_a_notebook_fit(tmp_path):
    hooks = (Path(reporting.__file__).parents[1] / ".pre-commit-config.yaml").read_text()
    (command,) = re.findall(r"entry: jupyter (nbconvert .*)", hooks)
    path = stored(tmp_path, parameters(GOOD), new_code_cell("1", execution_count=1))
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].outputs = [new_output("execute_result", {"text/plain": "1"}, execution_count=1)]
    nbformat.write(nb, path)
    nbconvertapp.main([*command.split()[1:], str(path)])
    pages.check_stored(path)


def test_the_notebooks_are_fit_to_be_stored(tmp_path, monkeypatch):
    assert CliRunner().invoke(__main__.cli, ["check"]).exit_code == 0
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))  # where there is none
    assert "no numbered notebooks in" in str(CliRunner().invoke(__main__.cli, ["check"]).exception)


def test_readme_shows_every_claim_with_failures_in_sight(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))
    readme = tmp_path / "README.md"
    readme.write_text("# a\n\n<!-- claims: written by a program -->\nold\n<!-- /claims -->\n\nend\n")
    claim = dict(statistic="gap", value=-0.2, ci_low=-0.3, ci_high=-0.1, seeds=5)
    claims = [
        claim | {"id": f"{id}.d{s}", "claim": f"a {id} of width {s} wins", "verdict": verdict}
        for id in ("conditioning.x", "conditioning.y", "headline")
        for s, verdict in ((8, "reproduced"), (16, "inconclusive" if id == "conditioning.y" else "not reproduced"))
    ]
    reporting.write_results(tmp_path / "reports" / "claims.json", claims)
    for _ in range(2):  # a second time changes nothing
        reporting.write_claims("laptop")
    text = readme.read_text()
    found = "width 8: reproduced, −0.200 [−0.300, −0.100]<br>width 16: **{}**, −0.200 [−0.300, −0.100]"
    rows = [f"| a {id} wins<br><sub>gap</sub> |" for id in ("headline", "conditioning.x", "conditioning.y")]
    verdicts = ["not reproduced", "not reproduced", "inconclusive"]
    places = [text.index(f"{row} {found.format(verdict)} |") for row, verdict in zip(rows, verdicts, strict=True)]
    fold = text.index("<details><summary>Harder tests of ours: those without such a failure</summary>")
    assert places[0] < text.index("Harder tests of ours**: ✓ 2 reproduced, ? 1 inconclusive, ✗ 1 not reproduced.")
    assert places[0] < places[1] < fold < places[2] < text.index("</details>"), "failures are not folded away"
    assert "old" not in text and text.startswith("# a\n") and text.endswith("<!-- /claims -->\n\nend\n")


def test_a_notebook_that_failed_does_not_take_its_claims_from_the_readme(project):
    path, readme = write_notebook(project, "00_a", "1"), project / "README.md"
    reporting.write_results(project / "reports" / "claims.json", [FOUND])
    for state in ("failed", "ok"):
        readme.write_text(before := "a <!-- claims: x --> b <!-- /claims -->")
        Status(path.stem, "A", "laptop", state).write()
        reporting.write_claims("laptop")
        assert (readme.read_text() == before) == (state == "failed")


def test_the_kernel_is_that_of_this_python_and_takes_all_threads_where_nothing_runs_beside(project, monkeypatch):
    import papermill

    seen = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *about, **more: seen.append(dict(os.environ)))
    monkeypatch.setenv("JUPYTER_PATH", "/of/another/python")
    for name in ("OMP_NUM_THREADS", "JUPYTER_PREFER_ENV_PATH"):
        monkeypatch.delenv(name, raising=False)
    for workers in ("1", "2"):
        monkeypatch.setenv("PROJECTABLE_WORKERS", workers)
        reporting.execute(project / "a.ipynb", project / "build" / "a.ipynb", {})
    assert all("JUPYTER_PATH" not in env and env["JUPYTER_PREFER_ENV_PATH"] == "1" for env in seen)
    assert [env.get("OMP_NUM_THREADS") for env in seen] == [None, "1"]


def test_places_may_begin_with_a_tilde(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project / "home"))
    monkeypatch.setenv("PROJECTABLE_REPORTS", "~/pages")
    monkeypatch.setattr(reporting, "_one_by_one", lambda *about: iter(()))
    write_notebook(project, "00_a", "1")
    reporting.reproduce("laptop")
    assert os.environ["PROJECTABLE_REPORTS"] == str(project / "home" / "pages")


def test_a_page_does_not_say_where_ones_own_images_lie():
    cell = new_code_cell('folder = "/home/ann/of a client/pets"\nd_s = 8', metadata=dict(tags=["injected-parameters"]))
    nb = new_notebook(cells=[new_markdown_cell("# A"), cell, new_code_cell('open("/home/ann/else")')])
    html = pages.notebook_html(nb, STATUS, Path("."))
    assert "client" not in html and "…/pets" in html and "/home/ann/else" in html
