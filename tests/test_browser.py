"""The pages as a reader sees them: opened from disk in headless Chromium, as wide as a desktop and as a phone."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from projectable import reporting
from projectable.reporting import Report, Status

pytestmark = pytest.mark.slow
REPORTS = Path(__file__).parents[1] / "reports"
WIDTHS = {"desktop": 1280, "phone": 390}

SEEN = """() => {
  const drawn = node => node.getBoundingClientRect().width > 2 && node.getBoundingClientRect().height > 2;
  return {
    width: document.scrollingElement.scrollWidth,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
    undrawn: [...document.querySelectorAll("math, .badge, table, h1, main img")].filter(node =>
      !node.closest("details:not([open])") && !drawn(node)).map(node => node.outerHTML.slice(0, 200)),
    fractions: [...document.querySelectorAll("mfrac")].filter(node =>
      node.children[0].getBoundingClientRect().bottom > node.children[1].getBoundingClientRect().top + 1).length,
    empty: [...document.querySelectorAll("details[open] > :not(summary, style)")].filter(node => !drawn(node)).length,
    folded: document.querySelectorAll("details:not([open])").length,
  };
}"""


def look(browser, path: Path) -> dict:
    """Open a page on a phone, unfold it, and assert what holds for every page; then as wide as a desktop."""
    if not browser.contexts:  # one for all pages: a new one each costs half as much again
        browser.new_context(is_mobile=True).new_page()
    (page,), said, asked = browser.contexts[0].pages, [], []
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 800})
    heard = {
        "console": lambda message: said.append(f"{message.type}: {message.text}"),
        "pageerror": lambda error: said.append(str(error)),
        "requestfailed": lambda request: said.append(f"failed: {request.url[:200]}"),
        "request": lambda request: asked.append(request.url),
    }
    for event, hear in heard.items():
        page.on(event, hear)
    try:
        page.goto(path.as_uri(), wait_until="load")
        seen = page.evaluate(SEEN)
        if seen["folded"]:
            page.locator("details:not([open]) > summary").last.click()  # as a reader does it; the rest at once: faster
        page.evaluate("document.querySelectorAll('details:not([open]) > summary').forEach(summary => summary.click())")
        unfolded = page.evaluate(SEEN)
        links = page.evaluate("[...document.links].map(link => link.getAttribute('href'))")
        page.set_viewport_size({"width": WIDTHS["desktop"], "height": 800})
        wide = page.evaluate(SEEN)
    finally:
        for event, hear in heard.items():
            page.remove_listener(event, hear)
    assert said == []
    assert [url[:200] for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert seen["broken"] == [] and seen["undrawn"] == [] and seen["fractions"] == 0
    assert (unfolded["folded"], unfolded["empty"]) == (0, 0), "code stays folded"
    assert max(seen["width"], unfolded["width"]) <= WIDTHS["phone"], "the page scrolls sideways"
    assert wide["width"] <= WIDTHS["desktop"] and wide["undrawn"] == [] and wide["fractions"] == 0, "on a desktop"
    for link in links:
        assert link.startswith(("https://", "#")) or (path.parent / link.partition("#")[0]).exists(), link
    return seen


@pytest.mark.parametrize("name", [path.name for path in sorted(REPORTS.glob("*.html"))])
def test_the_reference_reports(browser, name):
    seen = look(browser, REPORTS / name)
    assert seen["folded"] > 0 or name in ("index.html", "findings.html")


def test_a_page_with_all_that_is_too_wide(browser, tmp_path, monkeypatch):
    """Long words, formulas, tables, lines of code and errors: each scrolls or breaks by itself."""
    monkeypatch.setenv("PROJECTABLE_ROOT", str(tmp_path))
    word, name = "unbreakable" * 12, "00_wide"
    formula = " + ".join(f"\\frac{{a_{{{i}}}}}{{\\sqrt{{b_{i}}}}}" for i in range(40))
    table = "|" + "|".join([f"column {i}" for i in range(30)]) + "|\n" + "|---" * 30 + "|\n" + "|0.1234" * 30 + "|"
    text = f"# {word}\n\nInline ${formula}$ and `{word}`.\n\n$${formula}$$\n\n{table}\n\n- ${formula}$\n- {word}"
    nb = new_notebook(cells=[new_markdown_cell(text), new_code_cell(f"profile = '{word}'")])
    nb.cells[1].metadata["tags"] = ["parameters"]
    html = "<table><tr>" + f"<td>{word}</td>" * 9 + "</tr></table>"
    nb.cells[1].outputs = [
        new_output("stream", name="stdout", text=f"{word * 3}\n" * 30),
        new_output("stream", name="stderr", text=f"{word}\n"),
        new_output("display_data", {"text/html": html}),
        new_output("error", ename="RuntimeError", evalue=word, traceback=[f"{word} {word}"]),
    ]
    for folder in ("notebooks", "build/laptop"):
        (tmp_path / folder).mkdir(parents=True)
        nbformat.write(nb, tmp_path / folder / f"{name}.ipynb")
    Status(
        name, word, "laptop", "failed", 3.2, word, "abc1234", "2025-01-31T09:05:07+00:00", f"RuntimeError: {word}"
    ).write()
    found = dict(value=1.0, ci_low=0.5, ci_high=1.5, seeds=5, tasks=10, verdict="not reproduced", commit="abc1234")
    Report(name, "laptop").claim("c", word, statistic=f"{word}, nats per token", **found)
    assert reporting.report("laptop") == 1
    for page in (f"{name}.html", "index.html"):
        look(browser, tmp_path / "reports" / page)


@pytest.mark.parametrize(
    "body",
    [
        "<script>console.error('oh')</script>",
        "<img src='http://localhost:9/a.png'>",
        "<img src='data:image/png;base64,AAAA'>",
        "<main><math></math></main>",
        "<details><summary>code</summary><pre></pre></details><style>pre { display: none }</style>",
        "<details><summary>code</summary><div style='width: 2000px'>wide</div></details>",
        "<a href='gone.html'>gone</a>",
    ],
)
def test_what_is_wrong_with_a_page_is_seen(browser, body, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        f"<!doctype html><title>bad</title><meta name=viewport content='width=device-width'><h1>a</h1>{body}"
    )
    with pytest.raises(AssertionError):
        look(browser, page)
