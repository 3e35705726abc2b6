"""What contributors rely on: the lock file, the Makefile, the hooks."""

import json
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from projectable import pages, reporting

ROOT = Path(__file__).parents[1]


def test_the_lock_file_fits_and_names_no_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = map(Requirement, project["dependencies"] + sum(project["optional-dependencies"].values(), []))
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.lstrip().startswith("#"))
    for one in needed:
        if one.name != project["name"]:
            assert one.specifier.contains(pins[canonicalize_name(one.name)]), f"{one}: `make lock` renews the file"
    assert not [line for line in lines if re.search(r"/|@|https?:|\+", line)]


def test_the_top_level_holds_what_it_is_to_hold_and_no_more():
    """A test or a command that wrote where it stood would leave something there, and a commit would take it along."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    found = {name.partition("/")[0] for name in done.stdout.splitlines()}
    card = {
        "README.md",
        "environment.yml",
        "notebooks",
        "projectable",
        "reports",
        "tests",
        "Makefile",
        "pyproject.toml",
    }
    usual = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "requirements.lock"}
    assert {name for name in found if not name.startswith(".")} == card | usual


def test_the_documents_name_files_that_exist():
    there = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for document in ("README.md", "CONTRIBUTING.md", "reports/findings.md"):
        for name in re.findall(r"`([\w/]+\.py)`", (ROOT / document).read_text()):
            assert any(f"/{path}".endswith(f"/{name}") for path in there), f"{document}: {name}"


def anchors(text: str) -> set[str]:
    """What links may end in: headings as GitHub names them, and ids that are given."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles} | set(
        re.findall(r'id="([^"]+)"', text)
    )


def test_links_of_the_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "reports/findings.md"):
        document = ROOT / name
        links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
        assert links, name
        for link in (link for link in links if "://" not in link):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{name}: {link}"


def test_the_tables_of_the_findings_hold_the_reference_runs_claims():
    claims, text = json.loads((ROOT / "reports/claims.json").read_text()), (ROOT / "reports/findings.md").read_text()
    kept = reporting.kept_runs(claims, ROOT / "reports")
    differ = {claim["id"] for other in kept for claim, _ in other["changed"]}
    blocks = re.findall(r"<!-- claims: [^\n]*\n(?:[\w.]+ \| [^\n]*\n)+-->", text)
    assert len(blocks) == text.count("<!-- claims: ") == text.count("<!-- /claims -->") > 10
    assert pages.with_claims(text, claims, differ) == text, "`projectable report` renews them"
    ids = {re.sub(r"\.(d\d+|\d+_\d+)$", "", claim["id"]) for claim in claims}
    assert set(re.findall(r"^([\w.]+) \| ", text, re.MULTILINE)) <= ids


def test_the_reference_pages_lead_from_one_to_the_next():
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if re.fullmatch(r"\d\d_\w+", path.stem)]
    for name, following in pairwise(name for name in names if (ROOT / "reports" / f"{name}.html").exists()):
        page = (ROOT / "reports" / f"{name}.html").read_text()
        assert page.count(f'class="next" href="{following}.html"') == 2, f"{name}: at its top and at its end"


def make(folder: Path, *words: str) -> str:
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_lists_every_target():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^  make ([a-z]+) +\w", make(ROOT, "help"), re.MULTILINE) == phony.split()
    assert set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) == set(phony.split())


def test_make_reproduces_some_notebooks():
    said = make(ROOT, "-n", "reproduce", "PROFILE=smoke", "ONLY=00-06 20")
    assert said.endswith("-m projectable reproduce --profile smoke --only 00-06 --only 20\n")


def test_make_clean_leaves_what_was_computed(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [tmp_path / name for name in ("runs/a/result.json", "reports/index.html", ".venv/bin/python")]
    for path in [*kept, tmp_path / "build/laptop/00.ipynb", tmp_path / "tests/__pycache__/a.pyc"]:
        path.parent.mkdir(parents=True)
        path.touch()
    for folder in ("projectable", "notebooks"):
        (tmp_path / folder).mkdir()
    make(tmp_path, "clean")
    assert all(path.exists() for path in kept)
    assert not (tmp_path / "build").exists() and not (tmp_path / "tests/__pycache__").exists()


def test_hooks_fetch_nothing():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    assert {hook["language"] for repo in repos for hook in repo["hooks"]} == {"system"}
