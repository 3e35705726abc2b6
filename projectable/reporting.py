"""Notebooks → reports: execute, render, collect.

Notable:
- Inside a notebook, `Report` writes tables (CSV), figures (PNG), scraps and claims as data, and shows them.
- `reproduce` runs every notebook in a fresh kernel, goes on after failures, and rebuilds the index each time.
- Reports of the `laptop` profile lie in `reports/`, those of other profiles in a folder of their own below,
  so that a smoke run never overwrites the reference; with parameters of one's own they lie elsewhere (`reports_dir`).
  Executed notebooks lie in `build/<profile>/`.
- Every file is written atomically, a notebook's status last: it says that the page beside it is whole. But executed
  notebooks are papermill's: of one that was cut off amid a cell's saving the page shows the source.
- papermill only warns about an unknown parameter, here it is an error; the kernel is that of this very Python, reached
  over IPC; what a notebook prints is passed on, progress bars a state now and then.

How things look is in `pages`. Light to import: whatever is heavy is imported where it is used.
"""

import contextlib
import csv
import dataclasses
import datetime
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from projectable import pages
from projectable.pages import ReportError, check_parameters, notebook_budget, notebook_title, read_notebook
from projectable.storage import current_commit, draft_of, end_with_parent, locked, root, write_atomically
from projectable.storage import device as this_device

PROFILES = ("smoke", "laptop", "gpu")


# ---------------------------------------------------------------------------------------------------- places


def check_profile(profile: str) -> str:
    """The profile itself; raises ReportError naming the allowed ones."""
    if profile not in PROFILES:
        raise ReportError(f"unknown profile {profile!r}; allowed: {', '.join(PROFILES)}")
    return profile


def reports_dir(profile: str) -> Path:
    """Where a profile's pages lie: `reports/` for laptop, `reports/<profile>/` for others, or PROJECTABLE_REPORTS."""
    usual = root() / "reports" / ("" if check_profile(profile) == "laptop" else profile)
    return Path(os.environ.get("PROJECTABLE_REPORTS") or usual).expanduser()


def is_reference(profile: str) -> bool:
    """Whether pages are the reference run's: those of laptop, in their usual place."""
    return profile == "laptop" and not os.environ.get("PROJECTABLE_REPORTS")


def build_dir(profile: str) -> Path:
    """Where work files of a profile lie (executed notebooks)."""
    return root() / "build" / check_profile(profile)


def executed_path(notebook: Path, profile: str) -> Path:
    """Where a notebook's executed copy lies: beside pages that are somebody's own, else in `build_dir`."""
    return (reports_dir if os.environ.get("PROJECTABLE_REPORTS") else build_dir)(profile) / notebook.name


def notebook_paths() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


# ------------------------------------------------------------------------------------------------ small parts


def write_results(path: Path, value) -> None:
    """Write a value as readable JSON, atomically; NaN becomes null, a numpy number a plain one."""
    write_atomically(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value):
    """A value made of JSON's own types."""
    if hasattr(value, "tolist"):  # numpy numbers and arrays, tensors
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path, default):
    """The JSON in a file, an object or a list as `default` is; that itself without one. Raises ReportError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # or gone meanwhile: notebooks may run side by side
        return default
    except ValueError as error:
        raise ReportError(f"{path} is damaged ({error}): delete it") from None
    if not isinstance(value, type(default)):
        raise ReportError(f"{path} is damaged (no {type(default).__name__}): delete it")
    return value


# ------------------------------------------------------------------------------------------ inside a notebook


class Report:
    """What one notebook finds, written as data while it runs. `note` is added to what every statistic says."""

    def __init__(self, notebook: str, profile: str, note: str = ""):
        self.notebook, self.profile, self.note = notebook, check_profile(profile), note
        self.reports = reports_dir(profile)
        self.claims: list[dict] = []
        self.scraps: dict = {}

    def save(self, name: str, df) -> None:
        """Write a tidy table to `results/<name>.csv` without showing it."""
        write_atomically(self.reports / "results" / f"{name}.csv", df.to_csv(index=False, float_format="%.6g"))

    def table(self, name: str, df, caption: str | None = None):
        """Write a tidy table to `results/<name>.csv`; returns it styled: the cell's last line shows it."""
        self.save(name, df)
        return _styled(df, caption)

    def figure(self, name: str, fig, caption: str) -> None:
        """Write a figure to `figures/<name>.png` and show it once with its caption."""
        from IPython.display import Image, Markdown, display
        from PIL import Image as Pixels

        path = self.reports / "figures" / f"{name}.png"
        with draft_of(path) as draft:
            dpi = 75 if self.profile == "smoke" else 150
            fig.savefig(draft, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
            with Pixels.open(draft) as pixels:  # 256 colours: looks the same, at a third of the size
                few = pixels.convert("RGB").quantize(256)
            few.save(draft, "PNG", optimize=True)
        display(Image(str(path), alt=caption), metadata={"figure": name})
        display(Markdown(f"<small>{caption}</small>"))

    def claim(
        self,
        id: str,
        claim: str,
        *,
        statistic: str,
        value: float,
        ci_low: float | None,
        ci_high: float | None,
        seeds: int,
        tasks: int,
        verdict: str,
        commit: str | None = None,
        device: str | None = None,
    ) -> None:
        """Record what was found about a claim; `commit` and `device`: what trained, if not the present ones.

        Raises ValueError for an unknown verdict.
        """
        if verdict not in pages.VERDICTS:
            raise ValueError(f"unknown verdict {verdict!r} for claim {id!r}; allowed: {', '.join(pages.VERDICTS)}")
        statistic = f"{statistic}; {self.note}" if self.note else statistic
        record: dict = dict(id=id, claim=claim, statistic=statistic, value=value, ci_low=ci_low, ci_high=ci_high)
        record |= dict(seeds=seeds, tasks=tasks, verdict=verdict, profile=self.profile)
        record |= dict(device=device or this_device(), commit=commit or current_commit(), notebook=self.notebook)
        self.claims = [old for old in self.claims if old["id"] != id] + [_plain(record)]
        write_results(self.reports / "results" / "claims" / f"{self.notebook}.json", self.claims)

    def claim_each(self, found: Iterable[dict], **about) -> None:
        """`claim` for each of what `evaluation.compare` or `widening` found; `about`: tasks, commit and device."""
        for claim in found:
            self.claim(**claim, **about)

    def claims_table(self):
        """The notebook's claims, styled, which join those of the others: the cell's last line shows them.

        Claims that differ only in width or number of images share a row.
        """
        from IPython.display import HTML

        merge_claims(self.profile)
        return HTML(pages.claims_html([("", self.claims)]))

    def record(self, key: str, value) -> None:
        """Record a number that tests assert, in `results/<notebook>.json`."""
        self.scraps[key] = value
        write_results(self.reports / "results" / f"{self.notebook}.json", self.scraps)


IN_WORDS = {"d_s": "width", "lr": "learning rate", "val_loss": "validation loss", "std": "deviation", "count": "seeds"}


RATES = ("learning rate", "source rate")  # shown as they were chosen


def _styled(df, caption):
    """A table for people: arms and columns in words, numbers of a column with as many decimals, no index."""
    from .plotting import label_of

    if "arm" in df:
        df = df.assign(arm=df["arm"].map(label_of))
    if "what" in df:  # the same, written for that table
        df = df.drop(columns="arm", errors="ignore")
    for low in [name for name in df.columns if name.endswith("_low")]:  # and the value before: `0.37 [0.34, 0.40]`
        value, high = df.columns[df.columns.get_loc(low) - 1], f"{low.removesuffix('_low')}_high"
        records = df[[value, low, high]].set_axis(["value", "ci_low", "ci_high"], axis=1).to_dict("records")
        df = df.assign(**{value: [pages.interval(record) for record in records]}).drop(columns=[low, high])
    df = df.rename(columns=lambda name: IN_WORDS.get(name, str(name).replace("_", " ")))
    numeric = [column for column in df.columns if df[column].dtype.kind in "iuf"]
    forms = dict.fromkeys(df.columns, pages.number)
    forms |= {c: pages.numbers(df[c].tolist()) if c not in RATES else "{:g}".format for c in numeric}
    style = df.style.format(forms, escape="html").hide(axis="index")  # classes have any name
    style = style.set_table_styles({c: [{"selector": "", "props": "text-align: right"}] for c in numeric})
    return style.set_caption(caption) if caption else style


def merge_claims(profile: str) -> None:
    """Write all notebooks' claims, in the order of the notebooks, to `claims.json`."""
    reports = reports_dir(profile)
    claims = [c for path in sorted((reports / "results" / "claims").glob("*.json")) for c in _read_json(path, [])]
    write_results(reports / "claims.json", claims)


# ---------------------------------------------------------------------------------------- running notebooks


class _Echo:
    """A notebook's output on the terminal: whole lines as they come, a progress bar's states now and then."""

    def __init__(self, every: float = 15.0):
        self.every, self.last = every, time.monotonic()

    def write(self, text: str) -> None:
        for piece in re.split(r"(?<=\n)|(?=\r)", text):
            line, whole = piece.strip(), piece.endswith("\n")
            if not line:
                continue
            if sys.stdout.isatty():
                print(f"\r\033[K      {line[:110]}", end="\n" if whole else "", flush=True)
            elif whole or time.monotonic() - self.last > self.every:
                self.last = time.monotonic()
                print(f"      {line}", flush=True)

    def flush(self) -> None:
        pass


def execute(path: Path, executed: Path, parameters: dict) -> None:
    """Run a notebook and write it to `executed`, with its outputs; raises what the notebook raised."""
    import papermill
    from traitlets.config import Config

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning on every start
    os.environ.pop("JUPYTER_PATH", None)  # the kernel is that of this very Python
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    if os.environ.get("PROJECTABLE_WORKERS") != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the kernel computes little: runs go side by side in workers
    executed.parent.mkdir(parents=True, exist_ok=True)
    echo = _Echo()
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"  # sockets have short paths
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=place) as sockets:
        papermill.execute_notebook(
            path,
            executed,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=False,
            stdout_file=echo,
            stderr_file=echo,
            start_timeout=180,
            extra_arguments=["--log-level=CRITICAL"],  # an interrupt is how a kernel is ended, no error
            config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/k"}),
        )


@dataclasses.dataclass
class Status:
    """How the run of a notebook went."""

    notebook: str
    title: str
    profile: str
    status: str = "not run yet"  # or running, ok, failed
    seconds: float | None = None
    device: str = ""
    commit: str = ""
    finished: str = ""  # ISO time
    error: str = ""
    figure: str = ""  # name of the first figure, which the index shows
    trained: int | None = None  # runs that came to be meanwhile; the others it shows were there
    before: float | None = None  # where none did: the seconds of the last time that some did

    def path(self) -> Path:
        return reports_dir(self.profile) / "results" / "status" / f"{self.notebook}.json"

    def write(self) -> None:
        write_results(self.path(), dataclasses.asdict(self))


def read_status(path: Path, profile: str) -> Status:
    """The last known status of a notebook."""
    fresh = Status(path.stem, notebook_title(path), profile)
    kept = _read_json(fresh.path(), {})
    return dataclasses.replace(fresh, **{name: kept[name] for name in vars(fresh) if name in kept})


def run_notebook(path: Path, profile: str, parameters: dict | None = None, among: Sequence[str] = ()) -> Status:
    """Run one notebook and write its page, its status and the index; a failure is told by the status.

    The page leads to those before and after it, of the ones that are there or that are to come (`among`).
    """
    parameters = {"profile": profile} | (parameters or {})
    check_parameters(path, parameters)
    executed, earlier = executed_path(path, profile), read_status(path, profile)
    status = Status(path.stem, notebook_title(path), profile, "running", device=this_device(), commit=current_commit())
    status.write()
    build_index(profile)
    executed.unlink(missing_ok=True)
    (reports_dir(profile) / "results" / "claims" / f"{path.stem}.json").unlink(missing_ok=True)

    start, clock = time.monotonic(), time.time()
    status.status, status.error = "failed", "interrupted"
    try:
        execute(path, executed, parameters)
        status.status, status.error = "ok", ""
    except Exception as error:
        name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        status.error = re.sub(r"\x1b\[[0-9;]*m", "", f"{name}: {message}")  # without colours
    finally:  # also when interrupted
        status.seconds = round(time.monotonic() - start, 1)
        status.trained = _runs_since(clock)
        if status.trained == 0:
            status.before = earlier.seconds if earlier.trained else earlier.before
        status.finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        merge_claims(profile)
        render(path, status, among)
        build_index(profile)
    return status


def _runs_since(clock: float) -> int:
    """How many runs were finished since that time (seconds since the epoch)."""
    from .experiment import runs_dir

    count = 0
    for folder in runs_dir().glob("*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # no run, or a lock that is gone meanwhile
            changed = folder.stat().st_mtime >= clock  # as few of thousands are
            count += changed and (folder / "result.json").stat().st_mtime >= clock
    return count


def render(path: Path, status: Status, among: Sequence[str] = ()) -> None:
    """Write a notebook's page from its executed copy (without one, from its source), then its status.

    One HTML file that opens without a network. It leads to the pages before and after it, of those that are there or
    that are to come (`among`); beside the reference run, to that run's where its own are neither.
    """
    executed, reports = executed_path(path, status.profile), reports_dir(status.profile)
    try:
        nb = read_notebook(executed if executed.exists() else path)
    except ReportError:  # cut off while it was saved
        nb = read_notebook(path)
    outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
    status.figure = next((o.metadata["figure"] for o in outputs if "figure" in o.get("metadata", {})), "")
    titles = {path.stem: notebook_title(path) for path in notebook_paths()}
    here = {status.notebook, *among, *(path.stem for path in reports.glob("*.html"))}
    names = [name for name in titles if name in here]
    at = names.index(status.notebook) if status.notebook in names else 0
    html = pages.notebook_html(
        nb,
        dataclasses.asdict(status),
        root() / "notebooks",
        _read_json(reports / "results" / "claims" / f"{status.notebook}.json", []),
        previous=(names[at - 1], titles[names[at - 1]]) if at > 0 else None,
        next=(names[at + 1], titles[names[at + 1]]) if at + 1 < len(names) else None,
        made_by=current_commit(),
    )
    if (usual := root() / "reports") != reports:  # of other profiles, or one's own: a page that is not here is there
        for name in titles.keys() - here:
            html = html.replace(f'href="{name}.html', f'href="{os.path.relpath(usual / name, reports)}.html')
    write_atomically(reports / f"{path.stem}.html", html)
    status.write()


def build_index(profile: str) -> None:
    """Write `index.html`, and `findings.html` where there is a findings.md, from whatever results there are."""
    reports = reports_dir(profile)
    notebooks = []
    for path in notebook_paths():
        budget = notebook_budget(path) if profile == "laptop" else None
        more = {"page": (reports / f"{path.stem}.html").exists(), "budget": budget}
        notebooks.append(dataclasses.asdict(read_status(path, profile)) | more)
    if os.environ.get("PROJECTABLE_REPORTS"):  # others may lie elsewhere
        notebooks = [status for status in notebooks if status["status"] != "not run yet"]
    claims = _read_json(reports / "claims.json", [])
    bench = reports / "results" / "bench.csv"  # of `make bench`
    speed = list(csv.DictReader(bench.read_text(encoding="utf-8").splitlines())) if bench.exists() else []
    others = kept_runs(claims, reports)
    profiles = []
    if is_reference(profile) and (reports_dir("gpu") / "index.html").exists():
        profiles.append(("Parts of it with a larger source and more images, on a GPU", "gpu/index.html"))
    elif reports == root() / "reports" / profile and (reports.parent / "index.html").exists():
        profiles.append(("The reference run, of profile laptop", "../index.html"))
    findings = reports / "findings.md"  # of the reference: words that somebody wrote about it, and tables of its claims
    if findings.exists():
        words = pages.words_html("What was found", _with_claims(findings, claims, others), reports)
        write_atomically(findings.with_suffix(".html"), words)
    html = pages.index_html(profile, claims, notebooks, reports / "figures", speed, others, profiles, findings.exists())
    write_atomically(reports / "index.html", html)


def keep(name: str, profile: str = "laptop") -> Path:
    """Keep this run's claims as results/claims_NAME_run.csv: the index and findings.md set later ones beside them.

    Raises ReportError where there are no claims or they are kept already, for a name that is taken or is none.
    """
    if not re.fullmatch(r"\w+", name):
        raise ReportError(f"{name!r} is no name of a run; allowed: letters, digits and _")
    reports = reports_dir(check_profile(profile))
    path, claims = reports / "results" / f"claims_{name}_run.csv", _read_json(reports / "claims.json", [])
    if path.exists():
        raise ReportError(f"{path} is there already: another name, or delete it")
    if not claims:
        raise ReportError(f"{reports / 'claims.json'} holds no claims: nothing to keep")
    for there in path.parent.glob("claims_*_run.csv"):
        run = another_run(claims, there)
        if run["both"] == len(claims) and not run["others"]:
            raise ReportError(f"these claims are kept already, as {there.name}: run the notebooks first")
    from pandas import DataFrame

    columns = ["id", "value", "ci_low", "ci_high", "seeds", "tasks", "verdict", "commit"]
    write_atomically(path, DataFrame(claims).to_csv(columns=columns, index=False, float_format="%.6g"))
    return path


def kept_runs(claims: list[dict], reports: Path) -> list[dict]:
    """`another_run` of every run that is kept beside these reports, but for these claims themselves."""
    runs = [another_run(claims, path) for path in sorted((reports / "results").glob("claims_*_run.csv"))]
    return [run for run in runs if run["others"]]


def _with_claims(findings: Path, claims: list[dict], others: list[dict]) -> str:
    differ = {claim["id"] for other in others for claim, _ in other["changed"]}
    return pages.with_claims(findings.read_text(encoding="utf-8"), claims, differ)


def another_run(claims: list[dict], path: Path) -> dict:
    """These claims beside those of another run, kept in a CSV (id, value, ci_low, ci_high, verdict, commit).

    `file`: its name; `both`: how many claims have both; `changed`: pairs of claims whose verdict differs, `opposite` of
    them one refutes what the other finds; `others`: how many are of another commit or value.
    """
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    numbers = ("value", "ci_low", "ci_high")
    there = {row["id"]: row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows}
    pairs = [(claim, there[claim["id"]]) for claim in claims if claim["id"] in there]
    changed = [(claim, other) for claim, other in pairs if claim["verdict"] != other["verdict"]]
    opposite = sum({a["verdict"], b["verdict"]} == {"reproduced", "not reproduced"} for a, b in changed)
    others = sum((a["commit"], pages.interval(a)) != (b["commit"], pages.interval(b)) for a, b in pairs)
    return dict(file=path.name, both=len(pairs), changed=changed, opposite=opposite, others=others)


def write_claims(profile: str) -> None:
    """Write the reference run's claims into README.md, between its two `claims` comments, and into findings.md.

    Not where a notebook failed: it has none.
    """
    if not is_reference(profile) or any(read_status(p, profile).status == "failed" for p in notebook_paths()):
        return
    reports, readme = reports_dir("laptop"), root() / "README.md"
    claims, findings = _read_json(reports / "claims.json", []), reports / "findings.md"
    if findings.exists():
        write_atomically(findings, _with_claims(findings, claims, kept_runs(claims, reports)))
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    parts = re.fullmatch(r"(.*?<!-- claims: .*?-->).*?(<!-- /claims -->.*)", text, re.DOTALL)  # between them: rows
    if not (parts and claims):
        return
    rows = []
    for heading, group in pages.claim_groups(claims):
        rows += [f"**{heading}**: {pages.counted(group)}.", ""]
        families = pages.claim_families(group)
        in_sight = [family for family in families if _is_in_sight(family)]
        rows += _rows(in_sight) if in_sight else []
        if folded := [family for family in families if family not in in_sight]:
            rows += [f"<details><summary>{heading}: those without such a failure</summary>", ""]
            rows += [*_rows(folded), "</details>", ""]
    write_atomically(readme, "\n".join([parts[1], *rows, parts[2]]))


def _is_in_sight(family: pages.Family) -> bool:
    """Of the paper's claims all are, of ours those that failed somewhere."""
    return any(pages.PAPERS.fullmatch(c["id"]) or c["verdict"] == "not reproduced" for _, c in family[2])


def _rows(families: list[pages.Family]) -> list[str]:
    """A table of Markdown: a row for each family of claims; what is not `reproduced` is set off."""
    rows = ["| claim | found: verdict, value [95 % interval] |", "|---|---|"]
    for words, statistic, found in families:
        lines = []
        for name, c in found:
            verdict = c["verdict"] if c["verdict"] == "reproduced" else f"**{c['verdict']}**"
            lines.append(f"{f'{name}: ' if name else ''}{verdict}, {pages.interval(c)}")
        cells = (f"{words}<br><sub>{statistic}</sub>", "<br>".join(lines))
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return [*rows, ""]


# -------------------------------------------------------------------------------------------- the whole thing


@contextlib.contextmanager
def lock(profile: str):
    """One writer at a time for the reports of a profile; a second one gets a ReportError that says so."""
    path = executed_path(Path("lock"), profile)

    def refuse() -> None:
        who = path.read_text().strip() or "?"
        raise ReportError(f"process {who} is writing the {profile} reports: wait for it to end") from None

    with locked(path, refuse):
        path.write_text(str(os.getpid()))
        for notebook in notebook_paths():  # nobody else runs now: what is `running` was cut off
            status = read_status(notebook, profile)
            if status.status == "running":
                dataclasses.replace(status, status="failed", error="interrupted").write()
        yield


def select_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The notebooks named by number (`03`), numbers (`00-06`), stem or file name; all of them without names.

    Raises ReportError naming the allowed ones.
    """
    paths = notebook_paths()
    if not paths:
        raise ReportError(f"no numbered notebooks in {root() / 'notebooks'}")
    chosen = []
    for name in only:
        first, last = name.split("-") if re.fullmatch(r"\d\d-\d\d", name) else ("", "")
        found = [p for p in paths if Path(name).name in (p.stem, p.name, p.stem[:2]) or first <= p.stem[:2] <= last]
        if not found:
            raise ReportError(f"unknown notebook {name!r}; allowed: {', '.join(p.stem for p in paths)}")
        chosen += found
    return [path for path in paths if path in chosen] if only else paths


def reproduce(
    profile: str, only: Sequence[str] = (), executor: str = "", parameters: dict[str, str] | None = None
) -> int:
    """Run the notebooks in order, or as jobs (`executor`: local, slurm); returns how many failed, after naming them.

    Those of the `smoke` profile, which train next to nothing, go side by side. `parameters` are those of all notebooks
    that are run, their values as a command line gives them. Raises ReportError for what is unknown.
    """
    check_profile(profile)
    for name in ("PROJECTABLE_ROOT", "PROJECTABLE_DATA", "PROJECTABLE_RUNS", "PROJECTABLE_REPORTS"):
        if place := os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(place))  # kernels run in a folder of their own
    paths = select_notebooks(only)
    given = {name: pages.literal(value) for name, value in (parameters or {}).items()}
    if "profile" in given:
        raise ReportError(f"profile={given['profile']!r} among the parameters; allowed: as --profile")
    for path in paths:
        check_parameters(path, {"profile": profile} | given)
    # seconds from nothing, by budgets, which are for `laptop`; else of the last time
    usual = [notebook_budget(p) if profile == "laptop" else read_status(p, profile).seconds for p in paths]
    done: list[Status] = []
    start = time.monotonic()
    with lock(profile):
        beside = bool(executor) or profile == "smoke" and len(paths) > 1
        runs = _side_by_side(paths, profile, executor, given) if beside else _one_by_one(paths, profile, given)
        for status in runs:
            done.append(status)
            rest = "" if beside else _rest(usual, done)
            took, elapsed = map(pages.duration, (status.seconds, time.monotonic() - start))
            print(f"        {status.status} in {took} (elapsed {elapsed}{rest})", flush=True)
            if status.status != "ok":
                print(f"        {status.error}", flush=True)
        merge_claims(profile)
        build_index(profile)
    write_claims(profile)
    reports = reports_dir(profile)
    names = {path.stem for path in paths}
    for run in kept_runs([c for c in _read_json(reports / "claims.json", []) if c["notebook"] in names], reports):
        same, name = run["both"] - len(run["changed"]), pages.kind(run["file"])
        print(f"beside {name}: {same} of {run['both']} verdicts the same, {run['opposite']} opposite")
    print(f"reports: {reports / 'index.html'}")
    if failed := sorted(status.notebook for status in done if status.status != "ok"):
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def _rest(usual: list[float | None], done: list[Status]) -> str:
    """The time left: what notebooks usually take, times how much slower or faster those were that trained just now.

    Where none has trained anything so far the others are taken to find their runs, too.
    """
    left, took = usual[len(done) :], [status.seconds or 0.0 for status in done]
    if not left:
        return ""
    mean = sum(took) / len(took)
    known = [(s, t) for s, t, status in zip(usual, took, done, strict=False) if s and status.trained != 0]
    pace = sum(t for _, t in known) / sum(s for s, _ in known) if known else 1.0
    found = all(status.trained == 0 for status in done)
    return f", about {pages.duration(sum(mean if found or not s else pace * s for s in left))} left"


def _one_by_one(paths: list[Path], profile: str, parameters: dict) -> Iterator[Status]:
    for place, path in enumerate(paths, 1):
        print(f"[{place:2}/{len(paths)}] {path.stem}", flush=True)
        yield run_notebook(path, profile, parameters, [p.stem for p in paths])


def _side_by_side(paths: list[Path], profile: str, executor: str, parameters: dict) -> Iterator[Status]:
    """As many at once as there are cores, or as the cluster lets run; as they end."""
    from .experiment import runs_dir, workers
    from .training import Jobs

    pool: Any
    if executor:
        pool = Jobs(executor, runs_dir() / "jobs", workers())
    else:
        pool = ProcessPoolExecutor(workers(), get_context("spawn"), _beside_others)
    try:
        names = [path.stem for path in paths]
        longest_first = sorted(paths, key=lambda path: -(notebook_budget(path) or 0))  # none is left to end alone
        futures = {pool.submit(run_notebook, path, profile, parameters, names): path for path in longest_first}
        for place, future in enumerate(as_completed(futures), 1):
            path = futures[future]
            print(f"[{place:2}/{len(paths)}] {path.stem}", flush=True)
            if error := future.exception():  # the process was lost: a notebook's own error is in its status
                status = dataclasses.replace(read_status(path, profile), status="failed", error=str(error))
                status.write()
            yield status if error else future.result()
    except (KeyboardInterrupt, GeneratorExit):  # at once: a process would begin the notebooks that it was given already
        for process in [] if executor else list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        if executor:
            pool.cancel()
        else:
            pool.shutdown(cancel_futures=True)


def _beside_others() -> None:
    """In a process that shares machine and terminal: one core for each notebook, and no word of its progress."""
    end_with_parent()
    os.environ["PROJECTABLE_WORKERS"] = os.environ["OMP_NUM_THREADS"] = "1"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of the kernels, too
        os.dup2(nowhere, stream)


def report(profile: str) -> int:
    """Make the pages and the index again from the executed notebooks, without running anything."""
    with lock(profile):
        executed = [path for path in select_notebooks() if executed_path(path, profile).exists()]
        for path in executed:
            render(path, read_status(path, profile), [path.stem for path in executed])
        merge_claims(profile)
        build_index(profile)
    write_claims(profile)
    return len(executed)
