"""Notebooks as files and as pages: read and checked, or made into HTML that opens offline, with the index of all.

Notable: maths becomes MathML while the markdown is parsed (so code is left alone), figures are embedded, code
and progress output are folded away, and there is no script at all. Functions from data to HTML: no file is
written here. The templates, in `page/`: `index.html.j2` (nbconvert's name for its main one) is the page of a notebook,
`claims.html.j2` the index of all.
"""

import ast
import base64
import io
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path

TEMPLATES = Path(__file__).parent / "page"
VERDICTS = {"reproduced": "✓", "inconclusive": "?", "not reproduced": "✗"}
LEGEND = (
    "✓ reproduced: the 95 % interval over seeds lies on the claim's side of its bound (zero, where none is named); "
    "✗ not reproduced: on the other side; ? inconclusive: the bound lies inside it."
)


# ------------------------------------------------------------------------------------------------- a notebook as a file


class ReportError(Exception):
    """A mistake that one line explains: an unknown name, a notebook that can't be run, a folder in use."""


def read_notebook(path: Path):
    """The notebook as nbformat's object. Raises ReportError where the file is none."""
    # jsonschema's grammar of addresses takes 1.5 s to import, and no notebook's schema asks for one
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise ReportError(f"{path} is not readable as a notebook: {error}") from error


def notebook_title(path: Path) -> str:
    """The first heading, or the file's name."""
    return _said(path, path.stat().st_mtime_ns)[0]


def notebook_budget(path: Path) -> float | None:
    """Seconds that it says it takes at `laptop` (“**Budget** …: 13 minutes.”); None where it does not say."""
    return _said(path, path.stat().st_mtime_ns)[1]


@cache
def _said(path: Path, changed: int) -> tuple[str, float | None]:
    """Title and budget, read once for many times that the index is written."""
    texts = [cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown"]
    headings = [re.search(r"^# +(.+)$", text, re.MULTILINE) for text in texts]
    budgets = [re.search(r"\*\*Budget\*\*[^.]*: (a|\d+) minutes?\.", text) for text in texts]
    title = next((found[1].strip() for found in headings if found), path.stem)
    return title, next((60.0 * (1 if found[1] == "a" else int(found[1])) for found in budgets if found), None)


def _parameter_lines(path: Path, nb) -> list[ast.stmt]:
    """The statements of the one cell tagged `parameters`."""
    cells = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ReportError(f"{path.name}: needs exactly one cell tagged `parameters`, has {len(cells)}")
    try:
        return ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ReportError(f"{path.name}: line {error.lineno} of the parameters: {error.msg}") from None


def _assigned(line: ast.stmt) -> list[str]:
    """The plain names that a statement assigns."""
    targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def check_parameters(path: Path, parameters: dict) -> None:
    """An error for a parameter that the notebook does not have (papermill would only warn), or that is no number, whole
    number or list where the notebook's own is one.
    """
    lines = _parameter_lines(path, read_notebook(path))
    own = {name: literal(line.value) for line in lines if isinstance(line, ast.Assign) for name in _assigned(line)}
    unknown = [name for name in parameters if name not in own]
    if unknown:
        raise ReportError(f"{path.name}: unknown parameter {', '.join(unknown)}; allowed: {', '.join(own)}")
    for name, value in parameters.items():
        for kinds, words in ((int, "a whole number"), ((int, float), "a number"), ((list, tuple), "a list")):
            if isinstance(own[name], kinds) and not isinstance(value, kinds):
                raise ReportError(f"{path.name}: {name}={value!r}; allowed: {words}, as {own[name]!r}")


def literal(words: str | ast.expr):
    """A parameter's value from words of a command line or a part of code: a number, a list …; else these themselves."""
    try:
        return ast.literal_eval(words)
    except (ValueError, SyntaxError):
        return words


def check_stored(path: Path) -> None:
    """An error for a notebook that is not fit to be stored.

    Fit: exactly one `parameters` cell, which assigns literals only, `profile` first; no outputs, no execution counts.
    """
    nb = read_notebook(path)
    lines = _parameter_lines(path, nb)
    for line in lines:
        value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
        if value is None or literal(value) is value or len(_assigned(line)) != 1:
            raise ReportError(f"{path.name}: `{ast.unparse(line)}` among the parameters; allowed: name = literal")
    first = _assigned(lines[0])[0] if lines else "missing"
    if first != "profile":
        raise ReportError(f"{path.name}: the first parameter is {first}; allowed: profile")
    ran = [str(i) for i, c in enumerate(nb.cells, 1) if c.get("outputs") or c.get("execution_count") is not None]
    if ran:
        strip = f"jupyter nbconvert --clear-output --inplace {path}"
        raise ReportError(f"{path.name}: cell {', '.join(ran)} is stored with its run; `{strip}` strips it")


# ---------------------------------------------------------------------------------------------------- values for people


def number(value) -> str:
    """A value for people: 4 decimals, fewer from 10 on, commas in what is long; – for what is missing, ∞ for inf.

    True is `yes`, false blank; the minus is a minus sign.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        size = abs(value)
        if math.isinf(value):
            text = f"{value}".replace("inf", "∞")
        elif size >= 1e6 or 0 < size < 1e-2:
            text = f"{value:.3g}"
        elif 10 <= size and value.is_integer():
            text = f"{value:,.0f}"
        else:
            text = f"{value:.4f}" if size < 10 else f"{value:,.1f}"
    else:
        text = {"True": "yes", "False": ""}.get(str(value), str(value))
        text = f"{int(text):,}" if re.fullmatch(r"-?\d{5,}", text) else text
    return re.sub(r"^-(?=[\d∞])|(?<=e)-", "−", text)


def numbers(values: Sequence[float]) -> Callable[[float], str]:
    """`number` for a column: all with as many decimals, four where the largest is below 10, fewer above."""
    sizes = [abs(float(value)) for value in values if math.isfinite(value)]
    top, whole = max(sizes, default=0.0), all(map(float.is_integer, sizes))
    if top < 1e-2 or top >= 1e6 and not (whole and top < 1e9):
        return number
    decimals = 0 if whole or top >= 1000 else 1 if top >= 100 else 2 if top >= 10 else 4
    form = f",.{decimals}f" if top >= 1e4 or not whole else ".0f"
    return lambda value: f"{value:{form}}".replace("-", "−") if math.isfinite(value) else number(value)


def short(value: float | None) -> str:
    """A value in three digits or three decimals, one digit below 0.001: for where no interval fits in."""
    if value is None or not 0 < abs(value) < 10:
        return number(value if value is None else float(f"{value:.3g}"))
    decimals = 3 if abs(value) >= 9.5e-4 else -math.floor(math.log10(abs(value)))
    return f"{value:.{decimals}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as `8 s`, `3 min 20 s` or `1 h 05 min`."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def trained(runs: int | None, before: float | None = None) -> str:
    """How many runs a notebook's time holds, in words, and what it took `before`; nothing where that is not known."""
    if runs is None:
        return ""
    last = f" (with training: {duration(before)})" if before is not None else ""
    return f"{f'{runs:,}' if runs else 'no'} run{'s' if runs > 1 else ''} trained meanwhile{last}"


def when(iso: str) -> str:
    """`2025-01-31T09:05:07+00:00` as `2025-01-31 09:05 UTC`."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso else ""


def interval(claim: dict) -> str:
    """`0.107 [0.091, 0.123]`: two digits of the interval's width, three decimals or more (one from 10 on), so that no
    end reads as 0.
    """
    ends = [claim["value"], claim["ci_low"], claim["ci_high"]]
    if None in ends or not all(map(math.isfinite, ends)) or ends[1] == ends[2]:
        return number(claim["value"])
    decimals = min(max(1 - math.floor(math.log10(abs(ends[2] - ends[1]))), 3 if abs(ends[0]) < 10 else 1), 6)
    while decimals < 6 and 0 < min(map(abs, ends)) < 0.5 * 10**-decimals:  # no end reads as 0 that has a sign
        decimals += 1
    value, low, high = (f"{end:,.{decimals}f}".replace("-", "−") for end in ends)
    return f"{value} [{low}, {high}]"


# ------------------------------------------------------------------------------------------------------ parts of a page


def data_uri(png: Path, width: int | None = None) -> str | None:
    """A picture as an address that holds it, scaled down to `width` pixels; None without such a file."""
    return _encoded(png, width, png.stat().st_mtime_ns) if png.exists() else None


@cache
def _encoded(png: Path, width: int | None, changed: int) -> str:
    """The same, made once for many times that the index is written."""
    data, kind = png.read_bytes(), "png"
    if width:
        from PIL import Image

        image = Image.open(png).convert("RGB")
        image.thumbnail((width, 2 * width))
        buffer, kind = io.BytesIO(), "webp"
        image.save(buffer, kind, quality=80, method=6)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def smaller(html: str) -> str:
    """The page with the PNGs that it holds as WebP: the same pixels in three quarters of the bytes.

    What is no whole PNG, an animated one, or has more than eight bits a channel stays as it is.
    """
    from PIL import Image

    def webp(match: re.Match) -> str:
        buffer = io.BytesIO()
        try:
            image = Image.open(io.BytesIO(base64.b64decode(match[1])))
            if getattr(image, "n_frames", 1) > 1 or image.mode.startswith(("I", "F")):
                return match[0]
            image.save(buffer, "webp", lossless=True, exact=True)
        except (OSError, ValueError, SyntaxError, KeyError):
            return match[0]
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    return re.sub(r"data:image/png;base64,([A-Za-z0-9+/=\n]+)", webp, html)


def mathml(latex: str, display: str) -> str:
    """LaTeX as MathML; the source as code where it can't be converted."""
    from html import escape

    from latex2mathml.converter import convert

    known = re.sub(r"{(aligned|gathered|eqnarray\*?)}", "{split}", latex.strip())
    try:
        return convert(known, display=display).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    except Exception:  # the converter's errors have no common base; a page must not fail on one formula
        return f"<code>{escape(latex)}</code>"


def markdown_html(words: str, folder: str | Path = "", attachments: dict | None = None) -> str:
    """HTML of Markdown, with MathML in place of MathJax; `folder` is where its pictures are looked up."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body):
            return mathml(body, "block")

        def inline_math(self, body):
            return mathml(body, "inline")

        def latex_environment(self, name, body):
            if name.rstrip("*") == "equation":
                return mathml(body, "block")
            return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

        def heading(self, text, level, **attributes):
            slug = re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]+>", "", text)).strip().lower().replace(" ", "-")
            return f'<h{level} id="{slug}">{text}</h{level}>\n'

        def table(self, text):
            return f'<div class="scroll"><table>{text}</table></div>'

        # The parent's two parse each tag by itself, which would close it at once.
        def inline_html(self, html):
            return super().inline_html(html) if "<img" in html else html

        def block_html(self, html):
            return super().block_html(html) if "<img" in html else html

    about: dict = dict(escape=False, embed_images=True, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=Renderer(**about, path=str(folder), attachments=attachments or {})).render(words)


def words_html(title: str, markdown: str, folder: Path) -> str:
    """A document of Markdown as a page; `folder` is where its pictures are looked up. Its first heading is left out."""
    _, _, rest = markdown.lstrip().partition("\n")
    rest = re.sub(r"\(\.\./notebooks/(\w+)\.ipynb\)", r"(\1.html)", rest)  # to pages, as these are
    return _template("words.html.j2").render(title=title, css=_css(), body=markdown_html(rest, folder))


def _exporter():
    """nbconvert's HTML exporter with this folder as its template and `markdown_html`."""
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    class PageExporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context, source):
            folder = context["resources"]["metadata"]["path"]
            return markdown_html(source, folder, context.get("cell", {}).get("attachments"))

    return PageExporter(
        config=Config(CoalesceStreamsPreprocessor={"enabled": True}),  # progress bars in their last state
        template_name=TEMPLATES.name,
        extra_template_basedirs=[str(TEMPLATES.parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def _css() -> str:
    """Our style sheet, with the colours of code for light and for dark screens."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    ours = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ours}"  # ours decides about backgrounds


def tables(html: str, fold: int = 40) -> str:
    """HTML whose tables a narrow screen can show: names break at underscores, long words get room, long tables fold,
    and so do those of trials.
    """
    if "<table" not in html or 'class="rows' in html:  # those of claims are made for it
        return html
    html = re.sub(r'<td id="\w+" class="data row\d+ (col\d+)"', r'<td class="\1"', html)  # half of a table's bytes
    html = re.sub(r"(<th\b[^>]*>)([^<]{9,})", lambda found: found[1] + found[2].replace("_", "_<wbr>"), html)
    html = re.sub(r"(<td\b[^>]*>)([^<]{30,})", r'\1<div class="long">\2</div>', html)
    rows = html.count("<tr") - 1
    caption = re.search(r"<caption>([^<]+)", html)
    words = f"{caption[1] if caption else 'table'} ({rows} rows)"
    long = rows > fold or words.startswith("Every trial")
    return f"<details><summary>{words}</summary>{html}</details>" if long else html


def folded(markdown: str) -> str:
    """Markdown whose parts that begin with **Rules** or **Earlier runs**, up to what is bold next, can be unfolded.

    They stand before what was found, as rules must; a reader of the page wants that first.
    """
    parts = re.split(r"(?<=\n\n)(?=\*\*|#)", markdown)
    for i, part in enumerate(parts):
        if found := re.match(r"\*\*((?:Rule|Earlier run)s?)\b", part):
            words = "Rules of the verdicts" if found[1].startswith("Rule") else "Earlier runs"
            parts[i] = f"<details><summary>{words}</summary>\n\n{part.rstrip()}\n\n</details>\n\n"
    return "".join(parts)


def _together(cells: list) -> list:
    """Cells of a notebook; code that shows nothing goes together with the code after it, to be folded away once."""
    result: list = []
    for cell in cells:
        if cell.cell_type == "code" and result and result[-1].cell_type == "code" and not result[-1].outputs:
            cell.source = f"{result.pop().source}\n\n{cell.source}"
        result.append(cell)
    return result


def _tidy(nb):
    """The notebook without title and error cells."""
    nb.cells = [c for c in nb.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    for cell in nb.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):  # a page is shown to others: of a path its end
            cell.source = re.sub(r'"/[^"]*/([^"/]+)"', r'"…/\1"', cell.source)
    texts = [cell for cell in nb.cells if cell.cell_type == "markdown"]
    for cell in texts:
        cell.source = folded(re.sub(r"(\d) %", "\\1\u00a0%", cell.source))
    if title := next((cell for cell in texts if cell.source.lstrip().startswith("# ")), None):
        title.source = title.source.lstrip().partition("\n")[2]  # the page's header shows it
    nb.cells = _together(nb.cells)
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        if "text/html" in (data := output.get("data", {})):
            data["text/html"] = tables(data["text/html"])
    return nb


# ---------------------------------------------------------------------------------------------------------- whole pages


def notebook_html(
    nb,
    status: dict,
    folder: Path,
    claims: Sequence[dict] = (),
    previous: tuple[str, str] | None = None,
    next: tuple[str, str] | None = None,
    made_by: str = "",
) -> str:
    """The page of an executed notebook: what was found of its `claims` comes first; `made_by` a commit.

    `folder` is where its markdown's pictures are looked up; `previous` and `next`, name and title of other pages.
    """
    commits = sorted({commit for claim in claims for commit in claim["commit"].split(", ")})  # whose code made its runs
    facts = [
        duration(status["seconds"]),
        trained(status.get("trained"), status.get("before")),
        f"profile {status['profile']}",
        status["device"],
        f"run by commit {status['commit']}",
        when(status["finished"]),
        f"trained by commit{'s'[: len(commits) > 1]} {', '.join(commits)}" if commits else "",
        f"page made by commit {made_by}" if made_by not in ("", status["commit"]) else "",
    ]
    page = {
        "css": _css(),
        "status": status,
        "facts": [f for f in facts if f],
        "found": claims_html([("", claims)], brief=True) if claims else "",
        "counted": counted(claims),
        "legend": LEGEND,
        "previous": previous,
        "next": next,
    }
    resources = {"page": page, "metadata": {"name": status["notebook"], "path": str(folder)}}
    html, _ = _exporter().from_notebook_node(_tidy(nb), resources)
    return smaller(html)


# ids of the paper's own claims: smaller and better than universal, the more the smaller; the source is kept; transfer
PAPERS = re.compile(r"headline\.(d\d+|widens\..+)|source\.kept|transfer\.(glyphs|classes)\..+|generators\.sizes\..+")


# start of a claim's id: its figure, empty for none; of others the first one of their notebook
FIGURES = {
    r"headline\.(each|clusters)|explained\.alike|stability\.spread": "",
    r"cost\.(generation|break_even)|conditioning\.(wrong|support|clusters|classes)": "",
    r"source\.kept_whole|(longer|given|taught)\.kept": "",
    r"headline\.(d\d|hypernetwork)": "headline",
    r"headline\.widens": "gap",
    r"headline": "gaps",
    r"explained\.(source|task)": "control_gaps",
    r"transfer\.(?:(?:source|hypernetwork)\.)?(glyphs|classes)": r"transfer_gaps_\1",
    r"transfer\.growth": "growth",
    r"transfer\.support.*(glyphs|classes)": r"transfer_support_\1",
    r"scarce\..*(glyphs|classes)": r"transfer_scarce_\1",
    r"direct\.(start|tuned)": "direct_training",
    r"direct\.cut_compute|cost\.(hypernetwork|one_width)": "compute_gaps",
    r"direct\.cut": "cut_gaps",
    r"generators\.(?!family)": "factors",
    r"stability\.(agreement|source)": "agreement",
    r"stability\.smooth": "between_tasks",
    r"source\.depth": "source_depth",
    r"source\.masked": "source_masked",
    r"source\.mixture": "source_mixture",
    r"multimodal\.caption": "captions",
    r"multimodal": "captions_loss",
    r"brings\.again": "brings_again",
    r"longer\.(universal|widens|gap)": "longer_gap",
    r"given\.compute": "given_compute",
    r"given\.(random|fades)": "given_source",
    r"given\.(distilled|both_distilled)": "given",
    r"taught": "taught_gaps",
    r"given": "given_gaps",
}


IN_SHORT = {  # the index's first table: questions under headings, each the id of claims at several widths
    "Projected models against others of their size, equal examples": {
        "headline": "the best universal model",
        "headline.specialists": "specialists, tuned from that",
        "direct.examples": "specialists from scratch",
        "headline.hypernetwork": "a hypernetwork, no source behind it",
    },
    "… that are trained for the compute of source and projections": {
        "headline.matched": "the best universal model",
        "direct.compute": "specialists from scratch",
        "direct.cut_compute": "specialists cut from the fully trained source",
        "cost.hypernetwork": "a hypernetwork",
    },
    "… elsewhere": {
        "longer.universal": "the best universal model, four times the steps",
        "given.universal": "the best universal model, 200 steps, a trained source at hand",
        "given.cut_distilled": "specialists that are cut from that source and distilled from it",
        "given.compute.hypernetwork": "a hypernetwork with the compute of these 200 steps",
        **{
            f"scarce.{kind}.n{n}": f"the best rival on {words}, {n} images each (short runs, linear maps)"
            for kind, words in (("glyphs", "letters of unseen scripts"), ("classes", "unseen classes"))
            for n in (5, 25, 100)
        },
        "text": "the best universal model on text, nats per character (short runs)",
    },
    "Projections that learn from their source's answers, too, against": {
        "taught.projected": "plain ones",
        "taught.hypernetwork": "a hypernetwork, no source behind it",
        "taught.both": "a hypernetwork that learns from a source's answers",
    },
    "What explains it": {
        "explained.maps": "maps that depend on the task, beside gains and shifts that do",
        "brings.start.kept": "the source's inner weights trained for 200 steps alone, over random ones",
        "given.random": "… for 1,000 steps alone, then 200 with projections",
    },
}
SETTINGS = {
    "laptop": "Fashion-MNIST, its ten classes as tasks, an image as 49 tokens out of 128; a source of width 64 with 2 "
    "layers; small models of width 8, 16 and 32; 5 seeds for the headline.",
    "gpu": "Fashion-MNIST, its ten classes as tasks, an image as 49 tokens out of 256; a source of width 128 with 3 "
    "layers; small models of width 8, 16, 32 and 64; 3 seeds.",
}
KINDS = {
    "reference": "the reference run",
    "earlier": "the reference run before this one",
    "another": "the comparison run",
    "third": "a third run",
}


def kind(file: str) -> str:
    """A kept run in words, from the name of its file, claims_NAME_run.csv."""
    name = file.removeprefix("claims_").removesuffix("_run.csv")
    return KINDS.get(name, f"the run “{name}”")


def in_short(claims: Sequence[dict]) -> tuple[list[int], list[tuple[str, list[tuple[str, list[dict | None]]]]]]:
    """The first table of the index: widths, and under each heading (words, the claim at each width or None).

    Of `IN_SHORT` what there are claims of.
    """
    found = {claim["id"]: claim for claim in claims}
    ids = [id for asked in IN_SHORT.values() for id in asked]
    widths = sorted({int(m[2]) for id in found if (m := re.fullmatch(r"(.+)\.d(\d+)", id)) and m[1] in ids})
    groups = []
    for heading, asked in IN_SHORT.items():
        rows = [(words, [found.get(f"{id}.d{width}") for width in widths]) for id, words in asked.items()]
        if rows := [(words, row) for words, row in rows if any(row)]:
            groups.append((heading, rows))
    return widths, groups


def with_claims(markdown: str, claims: Sequence[dict], differ: Collection[str] = ()) -> str:
    """Markdown with its tables of claims made anew; † marks those that `differ`, by their ids.

    Each stands between a comment, `<!-- claims: HEADING`, a line `id | words` for every row and `-->`, and
    `<!-- /claims -->`: a column for each width or pair of widths, – where there is no such claim. Tables stay where
    there are no claims at all, and so does what is no such block.
    """
    if not claims:
        return markdown
    found: dict[str, dict[str, dict]] = {}
    for claim in claims:
        id, at = re.fullmatch(r"(.+?)(?:\.(d\d+|\d+_\d+))?", claim["id"]).groups("")  # type: ignore[union-attr]
        found.setdefault(id, {})[at] = claim

    def cell(claim: dict) -> str:  # to be broken before the bracket alone
        words = f"{VERDICTS[claim['verdict']]} {interval(claim)}{' †' if claim['id'] in differ else ''}"
        return words.replace(" ", "\u00a0").replace("\u00a0[", " [")

    def table(match: re.Match) -> str:
        asked = [line.split(" | ", 1) for line in match["rows"].splitlines()]
        widths = {at for id, _ in asked for at in found.get(id, {})}
        columns = sorted(widths, key=lambda at: (at.count("_"), [int(n) for n in re.findall(r"\d+", at)]))
        names = [f"width {at[1:]}" if at.startswith("d") else at.replace("_", " against ") or "found" for at in columns]
        rows = [[match["heading"], *names, "seeds", "page"], ["---"] * (len(columns) + 3)]
        for id, words in asked:
            its = found.get(id, {})
            cells = [cell(its[at]) if at in its else "–" for at in columns]
            seeds = " or ".join(map(str, sorted({claim["seeds"] for claim in its.values()}))) or "–"
            pages = sorted({claim["notebook"] for claim in its.values()})
            links = [f"[{name[:2]}](../notebooks/{name}.ipynb)" for name in pages]
            rows.append([words, *cells, seeds, ", ".join(links) or "–"])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([match["comment"], "", *lines, "", match["end"]])

    comment = r"(?P<comment><!-- claims: (?P<heading>[^\n]*)\n(?P<rows>(?:[\w.]+ \| [^\n]*\n)+)-->)"
    return re.sub(comment + r"(?:(?!<!-- )[\s\S])*(?P<end><!-- /claims -->)", table, markdown)


def claim_groups(claims: list[dict]) -> list[tuple[str, list[dict]]]:
    """The paper's claims, what its abstract and caption say and what we take them to imply; then harder tests of ours.

    Each in the order of the notebooks; no group without any.
    """
    papers = [claim for claim in claims if PAPERS.fullmatch(claim["id"])]
    others = [claim for claim in claims if claim not in papers]
    groups = [("The paper's claims, as we read them", papers), ("Harder tests of ours", others)]
    return [(heading, group) for heading, group in groups if group]


Family = tuple[str, str, list[tuple[str, dict]]]  # words, statistic, (“width 8”, claim) of each


WIDTHS = r"(,? (of|at) )?width \d+(?= |$|,|:)| from width \d+ to \d+"  # in the words of a claim


def _parts(id: str) -> tuple[str, str, str]:
    """Of a claim's id: what is asked, the number of images and the width, empty where it ends in none.

    `scarce.glyphs.n5.d8` → (scarce.glyphs, 5, 8); `headline.widens.8_16` → (headline.widens, "", 8 against 16).
    """
    found = re.fullmatch(r"(.+?)(?:\.n(\d+))?(?:\.(?:d(\d+)|(\d+_\d+)))?", id)
    asked, images, width, pair = found.groups("")  # type: ignore[union-attr]
    return asked, images, width or pair.replace("_", " against ")


def claim_families(claims: Sequence[dict], whole: bool = False) -> list[Family]:
    """Claims that differ in width and number of images only, together.

    Apart where their words differ, or their statistics, as the arms do that were chosen; `whole`: those together, too.
    """
    few, width = partial(re.sub, r"^With \d+ images", "With few images"), partial(re.sub, WIDTHS, "")
    families: dict[tuple[str, str, str], list[dict]] = {}
    for claim in claims:  # of one question, in the same words, and one statistic
        statistic = re.sub(r" at \d+", "", claim["statistic"]) * (not whole)
        families.setdefault((_parts(claim["id"])[0], few(width(claim["claim"])), statistic), []).append(claim)
    result = []
    for members in families.values():
        words, names = members[0]["claim"], [""] * len(members)
        said = {re.sub(r" at \d+", "", member["statistic"]) for member in members}
        statistic = members[0]["statistic"] if len(members) == 1 else said.pop() if len(said) == 1 else ""
        _, images, widths = zip(*(_parts(claim["id"]) for claim in members), strict=True)
        if len(set(images)) > 1:
            names = [f"{n} images, " for n in images]
            words = few(words)
        if len(set(widths)) > 1:
            names = [f"{name}width {size}" for name, size in zip(names, widths, strict=True)]
            words = width(words)
        names = [name.removesuffix(", ") for name in names]
        result.append((words, statistic, list(zip(names, members, strict=True))))
    return result


def in_brief(claims: Sequence[dict]) -> list[tuple[list[str], list[tuple[str, str, list[dict | None]]]]]:
    """Claims as tables: the names of columns, and rows of words, unit and the claim of each column or None.

    A table for those of one kind: of widths, of widths and images, or of nothing. The unit is empty where it is
    nats per token.
    """
    tables: dict[str, tuple[list[str], list]] = {}  # of one kind, as columns are called, numbers apart
    for words, statistic, found in claim_families(claims, whole=True):
        width = _parts(found[0][1]["id"])[2]
        alone = f"width {width}" if width else "value"  # where a claim without others belongs
        of_columns = {name or alone: claim for name, claim in found}
        columns, rows = tables.setdefault(re.sub(r"\d+", "", [*of_columns][0]), ([], []))
        columns.extend(name for name in of_columns if name not in columns)
        rows.append((words, "" if "nats per token" in statistic else statistic, of_columns))
    result = []
    for columns, rows in tables.values():
        columns.sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        result.append((columns, [(words, unit, [found.get(name) for name in columns]) for words, unit, found in rows]))
    return result


def counted(claims: Sequence[dict]) -> str:
    """`✓ 13 reproduced, ? 7 inconclusive`."""
    verdicts = [claim["verdict"] for claim in claims]
    found = [(mark, verdicts.count(verdict), verdict) for verdict, mark in VERDICTS.items() if verdict in verdicts]
    return ", ".join(f"{mark} {count} {verdict}" for mark, count, verdict in found)


def claims_html(
    groups: Sequence[tuple[str, Sequence[dict]]],
    thumbs: dict[str, tuple[str, str | None] | None] | None = None,
    brief: bool = False,
) -> str:
    """Claims by group as a table, a row for those alike but for width and images; with `thumbs`, address and picture by
    claim, as the index has it; `brief`: the first group's verdicts and values only.
    """
    return _template("found.html.j2").render(groups=groups, thumbs=thumbs, brief=brief, marks=VERDICTS)


@cache
def _template(name: str):
    """One of our templates, with what it calls."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters.update(interval=interval, duration=duration, trained=trained, when=when)
    environment.filters.update(families=claim_families, counted=counted, slug=lambda words: words.replace(" ", "-"))
    environment.filters.update(in_brief=in_brief, short=short, kind=kind)
    return environment.get_template(name)


def index_html(
    profile: str,
    claims: list[dict],
    notebooks: list[dict],
    figures: Path,
    speed: list[dict],
    others: Sequence[dict] = (),
    profiles: Sequence[tuple[str, str]] = (),
    findings: bool = False,
) -> str:
    """The index: headline figure, a row for claims alike but for width or images, a notebook, a benchmark (`speed`).

    `others`: the claims beside those of other runs (`reporting.another_run`); `profiles`: words and address of the
    index of other profiles; `findings`: whether the page that `words_html` makes is there.
    """
    first = {status["notebook"]: status["figure"] for status in notebooks}
    thumbs: dict[str, tuple[str, str | None] | None] = {}
    for claim in claims:
        fits = [found.expand(name) for start, name in FIGURES.items() if (found := re.match(start, claim["id"]))]
        names = [] if "" in fits else [*fits, first.get(claim["notebook"], "")]
        path = next(filter(Path.exists, (figures / f"{name}.png" for name in names)), None)
        thumbs[claim["id"]] = (f"figures/{path.name}", data_uri(path, 288)) if path else None
    groups = claim_groups(claims)
    refuted = [claim for claim in claims if claim["verdict"] == "not reproduced"]
    widths, short_groups = in_short(claims)
    return _template("claims.html.j2").render(
        title="Projectable models",
        css=_css(),
        profile=profile,
        setting=SETTINGS.get(profile, "") if claims else "",  # not of one's own images
        legend=LEGEND,
        marks=VERDICTS,
        findings=findings,
        widths=widths,
        in_short=short_groups,
        kept=[claim for claim in claims if claim["id"] == "source.kept"],
        headline=data_uri(figures / "headline.png"),
        claims=claims_html(groups, thumbs) if claims else "",
        groups=groups,
        refuted=claims_html([("", refuted)], brief=True) if refuted else "",
        notebooks=[status for status in notebooks if status["status"] != "not run yet"],
        waiting=[status["notebook"] for status in notebooks if status["status"] == "not run yet"],
        profiles=profiles,
        speed=speed,
        others=[other for other in others if other["both"]],
    )
