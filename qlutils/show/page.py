"""HTML: tables, and an executed notebook as one file (no code, nothing fetched from anywhere)."""

import re
from itertools import takewhile

from IPython.display import HTML
from jinja2 import Environment
from markupsafe import Markup, escape

from qlutils.files import write_bytes
from qlutils.paths import packaged
from qlutils.show.tables import display_table, format_value

_NUMBER = re.compile(r"(?:[\d–-](?:e|[\W\d_])*)?")  # or an interval, "–", nothing


def template(name):
    """The Jinja template in a file of the package; what it is given is escaped unless it is Markup.
    {{ x | number }} formats as `format_value` does."""
    templates = Environment(autoescape=True, keep_trailing_newline=True)
    templates.filters["number"] = format_value
    return templates.from_string(packaged(name))


# --- tables ---------------------------------------------------------------------------------------


_TABLE = template("show/table.html")


def table_html(frame, caption=""):
    """A DataFrame of texts, as `tables.display_table` gives it, or of `Markup`: numbers on the
    right, texts on the left, a model, method or threshold named once where it stays the same.
    Whatever is not `Markup` is escaped."""
    texts = frame.copy()
    same = True
    for name in takewhile(("model", "method", "threshold").__contains__, frame):
        same &= frame[name] == frame[name].shift()
        texts[name] = frame[name].mask(same, "")
    numeric = frame.astype(str).map(_NUMBER.fullmatch)
    return Markup(
        _TABLE.render(
            caption=caption,
            names=list(frame),
            rows=texts.to_numpy(),
            left=list(numeric.isna().any()),
        )
    )


def shown(frame, missing=(), caption="", digits=2):
    """A table for the page, intervals in one column, and below it what is missing."""
    table = table_html(display_table(frame, digits), caption) if len(frame) else ""
    return HTML(f"{table}{missing_html(missing)}")


def folded(title, frame, digits=2):
    """HTML of a table that opens when its title is clicked; nothing where it is empty."""
    if frame.empty:
        return Markup("")
    table = table_html(display_table(frame, digits))
    return Markup("<details><summary>{}</summary>{}</details>").format(title, table)


def missing_html(missing):
    """A sentence on what is not there; nothing where all is."""
    return f"<p>Not in this run: {escape('; '.join(missing))}.</p>" if missing else ""


# --- a notebook as one file -----------------------------------------------------------------------


def export_html(notebook, path):
    """Write the executed `notebook` to `path` as one HTML file without code."""
    import nbformat
    from nbconvert import HTMLExporter

    book = without_progress(nbformat.read(notebook, as_version=4))
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_output_prompt=True,
        anchor_link_text="",  # headings get an id
    )
    body, _ = exporter.from_notebook_node(book)
    write_bytes(path, _page(body).encode())
    return path


def without_progress(book):
    """A notebook less its progress bars, and less widgets, which are nothing without a kernel."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _progress(output)]
    return book


def _progress(output):
    return output.get("name") == "stderr" or "widget" in " ".join(output.get("data", ()))


def _page(body):
    """The document: a title (what ends with the first h1), links to its parts, and pictures
    described by the last bold words before them."""
    words = "Figure"

    def described(match):
        nonlocal words
        if match["bold"] is None:
            return f'alt="{words}"'
        words = escape(Markup(match["bold"]).striptags())
        return match[0]

    pictures = r'<strong>(?P<bold>.*?)</strong>|alt="No description[^"]*"'
    body = re.sub(pictures, described, body, flags=re.S)
    title, end, parts = body.partition("</h1>")
    return template("show/page.html").render(
        title=Markup(title + end),
        links=re.findall('<h2 id="(.*?)">(.*?)<a', parts),
        parts=Markup(parts),
    )
