"""HTML: tables, and an executed notebook as one file (no code, nothing fetched from anywhere)."""

from __future__ import annotations

import html
import re
from itertools import takewhile
from pathlib import Path

from IPython.display import HTML
from jinja2 import Environment, Template
from markupsafe import Markup, escape

from qlutils.files import write_bytes
from qlutils.show.tables import display_table, format_value

_MATH = re.compile(r"(`[^`]*`)|(?<!\\)\$\$?(?!\s)([^$]+?)(?<!\s)\$\$?", re.S)
_SHIFT = {"_": "sub", "^": "sup"}
_ADDRESS = re.compile(
    r"""<[^>]*?\s(?:src|href|srcset|poster|action|data|xlink:href)\s*=\s*["']?\s*([^"'\s>]+)""",
    re.I,
)
_STYLE = re.compile(r"<style[^>]*>(.*?)</style>|style\s*=\s*\"([^\"]*)\"", re.S | re.I)
_STYLE_ADDRESS = re.compile(r"""@import\s+["']?([^"';\s]+)|\burl\(\s*["']?([^"')\s]+)""", re.I)


def template(path) -> Template:
    """The Jinja template in a file; what it is given is escaped unless it is Markup. {{ x | number
    }} formats as `format_value` does."""
    templates = Environment(autoescape=True, keep_trailing_newline=True)
    templates.filters["number"] = format_value
    return templates.from_string(Path(path).read_text("utf-8"))


# --- tables ---------------------------------------------------------------------------------------


_TABLE = template(Path(__file__).with_name("table.html"))


def table_html(frame, caption="") -> Markup:
    """A DataFrame of texts, as `tables.display_table` gives it, or of `Markup`: numbers on the
    right, texts on the left, a model, method or threshold named once where it stays the same.
    Whatever is not `Markup` is escaped."""
    texts = frame.copy()
    same = True
    for name in takewhile(("model", "method", "threshold").__contains__, frame):
        same &= frame[name] == frame[name].shift()
        texts[name] = frame[name].mask(same, "")
    table = _TABLE.render(
        caption=caption,
        names=list(frame),
        rows=list(texts.itertuples(index=False, name=None)),
        left=[not frame[name].map(_numeric).all() for name in frame],
    )
    return Markup(table)


def _numeric(cell) -> bool:
    text = str(cell)
    letters = set(filter(str.isalpha, text))
    return text[:1] in "0123456789–-" and letters <= {"e"}


def shown(frame, missing=(), caption="", digits=2) -> HTML:
    """A table for the page, intervals in one column, and below it what is missing."""
    table = table_html(display_table(frame, digits), caption) if len(frame) else ""
    return HTML(f"{table}{missing_html(missing)}")


def folded(title, frame, digits=2) -> HTML:
    """A table that opens when its title is clicked; nothing where it is empty."""
    if frame.empty:
        return HTML("")
    table = table_html(display_table(frame, digits))
    return HTML(f"<details><summary>{escape(title)}</summary>{table}</details>")


def missing_html(missing) -> str:
    """A sentence on what is not there; nothing where all is."""
    return f"<p>Not in this run: {escape('; '.join(missing))}.</p>" if missing else ""


# --- a notebook as one file -----------------------------------------------------------------------


def export_html(notebook, path) -> Path:
    """Write the executed `notebook` to `path` as one HTML file without code. ValueError, naming
    them, if it would refer to anything outside of itself, or if the notebook was not executed."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = Path(notebook)
    path = Path(path)
    book = nbformat.read(notebook, as_version=4)
    if not any(cell.get("execution_count") for cell in book.cells):
        raise ValueError(f"{notebook.name} has not been executed: run it first, then export it")
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas(cell.source)
        else:
            cell.outputs = [output for output in cell.outputs if not _progress(output)]
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    body, _ = exporter.from_notebook_node(book)
    page = _page(body)
    outside = ", ".join(external_addresses(page)[:5])
    if outside:
        raise ValueError(f"{notebook.name} refers to addresses outside of the file: {outside}")
    write_bytes(path, page.encode("utf-8"))
    return path


def _progress(output) -> bool:
    """Whether an output is a progress bar, as text or as a widget."""
    return output.get("name") == "stderr" or "widget" in " ".join(output.get("data", ()))


def external_addresses(page: str) -> list[str]:
    """Whatever a page would fetch or link to outside of itself; data in the file and anchors are
    inside."""
    found = _ADDRESS.findall(page) + re.findall(r"<script[^>]*>", page, re.I)
    for style in _STYLE.findall(page):
        found += ["".join(address) for address in _STYLE_ADDRESS.findall("".join(style))]
    return [one for one in found if not one.startswith(("data:", "#"))]


def _page(body: str) -> str:
    """The document: a title, links to its parts, and pictures described by the last bold words
    before them."""
    words = "Figure"
    links = []

    def described(match):
        nonlocal words
        if match["bold"] is None:
            return f'alt="{words}"'
        words = escape(_plain(match["bold"]))
        return match[0]

    def linked(match):
        links.append(match[1])
        return f'<h2 id="part-{len(links)}">{match[1]}</h2>'

    pictures = r'<strong>(?P<bold>.*?)</strong>|alt="No description[^"]*"'
    body = re.sub(pictures, described, body, flags=re.S)
    body = re.sub(r"<h2[^>]*>(.*?)</h2>", linked, body, flags=re.S)
    title = re.search(r"<h1[^>]*>.*?</h1>", body, re.S)
    end = title.end() if title else 0
    document = template(Path(__file__).with_name("page.html"))
    return document.render(
        title=_plain(title[0]) if title else "Report",
        head=Markup(body[:end]),
        links=[Markup(link).strip() for link in links],
        body=Markup(body[end:]),
    )


def _plain(text: str) -> str:
    return Markup(text).striptags()


def formulas(markdown: str) -> str:
    """Markdown whose $...$ became HTML: letters, indices and Greek letters, all that the report
    has; a formula beyond that stays readable as its source. Code spans stay as they are."""

    def shifted(match):
        tag = _SHIFT[match[1]]
        return f"<{tag}>{match[2] or match[3]}</{tag}>"

    def one(match):
        code, tex = match.groups()
        if code:
            return code
        text = re.sub(r"\\(?:mathcal|mathrm|mathbf|text)(?=\s*\{)", "", html.escape(tex))
        text = re.sub(r"\\([a-z]+)(?![a-zA-Z])", r"&\1;", text)  # \beta is &beta;
        text = re.sub(r"([_^])(?:\{(.*?)\}|(\w))", shifted, text)
        text = re.sub(r"\{(.*?)\}", r"\1", text)
        plain = not set("\\&^_") & set(html.unescape(text))
        shown = f"<i>{text}</i>" if plain else f"<code>{html.escape(tex)}</code>"
        return shown.replace("|", "&#124;").replace("*", "&#42;")  # else Markdown takes them

    return _MATH.sub(one, markdown)
