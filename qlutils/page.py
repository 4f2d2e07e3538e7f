"""An executed notebook as one HTML file: code hidden, nothing fetched from anywhere, formulas as pictures."""

from __future__ import annotations

import base64
import html
import io
import re
from functools import cache
from pathlib import Path

from .files import write_bytes

_TEXT = 10.0  # points at which formulas are set; on the page they scale with the text around them
_MATH = re.compile(r"(`[^`]*`)|\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$]+?)(?<!\s)\$", re.S)
_REFERENCE = re.compile(r"""<[^>]*?\s(?:src|href|srcset|poster|action|data|xlink:href)\s*=\s*["']?\s*([^"'\s>]+)""",
                        re.I)
_STYLE = re.compile(r"""@import\s+["']?([^"';\s]+)|\burl\(\s*["']?([^"')\s]+)""", re.I)
_STYLES = """
:root { color-scheme: light; }
body { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.5rem 6rem; color: #1c2024; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.4rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid #d5d9de; }
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p, ul, ol { max-width: 48rem; }
code { font: .9em "DejaVu Sans Mono", ui-monospace, monospace; background: #f2f4f6;
       padding: .1em .25em; border-radius: 3px; }
pre { font: .82rem/1.5 "DejaVu Sans Mono", ui-monospace, monospace; white-space: pre-wrap; background: #f7f8f9;
      border-left: 3px solid #d5d9de; padding: .5rem .8rem; margin: .6rem 0; }
img { max-width: 100%; height: auto; }
img.math { height: auto; max-width: none; } img.math.block { display: block; margin: 1rem auto; }
.output_html, .rendered_html { overflow-x: auto; }
table { border-collapse: collapse; font-size: .76rem; line-height: 1.35; font-variant-numeric: tabular-nums;
        margin: .8rem 0; }
th, td { padding: .26rem .5rem; border: 0; border-bottom: 1px solid #e4e7ea; text-align: right;
         vertical-align: top; white-space: nowrap; }
thead th { border-bottom: 1.5px solid #1c2024; border-top: 1.5px solid #1c2024; background: #fff;
           vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 1.5px solid #1c2024; }
tbody tr:hover { background: #f2f6fa; }
td.text, th.text { text-align: left; white-space: normal; }
caption { caption-side: top; text-align: left; font-weight: 600; padding: .3rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #0b5cad; }
nav { background: #f7f8f9; padding: .8rem 1.2rem; border-radius: 6px; columns: 2; font-size: .92rem; }
nav a { display: block; color: #0b5cad; text-decoration: none; padding: .1rem 0; }
.holds { background: #d9efe5; } .not { background: #fbe3d6; } .open { background: #eff1f3; color: #59636e; }
@media print { body { max-width: none; } h2 { break-after: avoid; } img, tr { break-inside: avoid; } }
"""


def export_html(notebook, path) -> Path:
    """Write the executed `notebook` to `path` as one HTML file without code. ValueError, naming them, if it would refer
    to anything outside of itself, or if the notebook was not executed."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook, path = Path(notebook), Path(path)
    book = nbformat.read(notebook, as_version=4)
    if not any(cell.cell_type == "code" and cell.get("execution_count") for cell in book.cells):
        raise ValueError(f"{notebook.name} has not been executed: run it first, then export it")
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas(cell.source)
        else:  # progress bars, as texts and as widgets, are no result
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr" and not any(
                "widget" in kind for kind in one.get("data", {}))]
        for output in cell.get("outputs", ()):
            if "text/markdown" in output.get("data", {}):
                output["data"]["text/markdown"] = formulas(output["data"]["text/markdown"])
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True,
                            exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(book)
    page = _page(body.replace('<table border="1" class="dataframe', '<table class="dataframe'))
    outside = external_addresses(page)
    if outside:
        raise ValueError(f"{notebook.name} refers to addresses outside of the file: {', '.join(outside[:5])}")
    write_bytes(path, page.encode("utf-8"))
    return path


def external_addresses(page: str) -> list[str]:
    """Whatever a page would fetch or link to outside of itself; data in the file and anchors are inside."""
    found = [one for one in _REFERENCE.findall(page)]
    for style in re.findall(r"<style[^>]*>(.*?)</style>|style\s*=\s*\"([^\"]*)\"", page, re.S | re.I):
        found += [a or b for a, b in _STYLE.findall("".join(style))]
    found += re.findall(r"<script[^>]*>", page, re.I)
    return [one for one in found if not one.startswith(("data:", "#"))]


def _described(body: str) -> str:
    """Pictures without a description get the last bold words before them ("Figure 4.")."""
    words = ["Figure"]

    def one(match):
        if match[1] is not None:
            words[0] = html.escape(re.sub(r"<[^>]+>", "", match[1]), quote=True)
            return match[0]
        return f'alt="{words[0]}"'

    return re.sub(r'<strong>(.*?)</strong>|alt="No description[^"]*"', one, body, flags=re.S)


def _page(body: str) -> str:
    body = _described(body)
    title = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.S)
    plain = html.escape(html.unescape(re.sub(r"<[^>]+>", "", title[1] if title else "Report")).strip())
    parts = re.split(r"<h2[^>]*>(.*?)</h2>", body, flags=re.S)  # text, heading, text, heading, ...
    links = "".join(f'<a href="#part-{i}">{text.strip()}</a>' for i, text in enumerate(parts[1::2], 1))
    body = parts[0] + "".join(f'<h2 id="part-{i}">{text}</h2>{rest}' for i, (text, rest) in
                              enumerate(zip(parts[1::2], parts[2::2]), 1))
    if title and links:
        body = body.replace(title[0], f"{title[0]}\n<nav>{links}</nav>", 1)
    return ("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
            f"content=\"width=device-width, initial-scale=1\">\n<title>{plain}</title>\n<style>{_STYLES}</style>\n"
            f"</head>\n<body>\n{body}\n</body>\n</html>\n")


def formulas(markdown: str) -> str:
    """Markdown whose $...$ and $$...$$ became pictures that carry their source as text; code spans stay as they are."""
    def one(match):
        code, block, inline = match.groups()
        return code or _picture(" ".join((block or inline).split()), block is not None)

    return _MATH.sub(one, markdown)


@cache
def _picture(tex: str, block: bool) -> str:
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    # matplotlib wants braces that TeX does not need, and knows neither sizes of delimiters nor their names
    braced = re.sub(r"\\(math\w+|text)\s+(\w)", r"\\\1{\2}", tex).replace(r"\mathbb{1}", r"\mathbf{1}")
    braced = re.sub(r"\\(?:[bB]igg?[lr]?|textstyle|displaystyle)(?![a-zA-Z])\s*", "", braced)
    braced = re.sub(r"\\[lr]vert(?![a-zA-Z])", "|", braced)
    svg = io.BytesIO()
    style = {"svg.fonttype": "path", "svg.hashsalt": "formula", "savefig.transparent": True, "savefig.bbox": None,
             "figure.constrained_layout.use": False}
    try:
        with rc_context(style):
            depth = math_to_image(f"${braced}$", svg, dpi=72, format="svg",
                                  prop=FontProperties(size=_TEXT, math_fontfamily="stix"))
    except ValueError:  # beyond what matplotlib sets: the source is still readable
        return f"<code>{html.escape(tex)}</code>"
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", svg.getvalue().decode(), flags=re.S)
    width = float(re.search(r'width="([\d.]+)pt"', text)[1])
    data = base64.b64encode(text.encode()).decode()
    scale = 1.08 / _TEXT
    place = "" if block else f";vertical-align:{-depth * scale:.3f}em"
    alt = html.escape(tex, quote=True).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")
    kind = "math block" if block else "math"
    return (f'<img class="{kind}" alt="{alt}" style="width:{width * scale:.3f}em{place}" '
            f'src="data:image/svg+xml;base64,{data}">')


def table_html(frame, caption="") -> str:
    """A DataFrame of texts, as `tables.display_table` gives it: texts on the left, numbers on the right, and a model,
    method or threshold named once where it stays the same."""
    texts = [not frame[name].map(_numeric).all() for name in frame]
    cells = [[f'<{tag} class="text" style="text-align:left">' if text else f'<{tag} style="text-align:right">'
              for text in texts] for tag in ("th", "td")]
    row = lambda start, values, tag: "<tr>" + "".join(  # noqa: E731
        f"{begin}{html.escape(str(value))}</{tag}>" for begin, value in zip(start, values)) + "</tr>"
    head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    rows, last, named = [], [], [name in ("model", "method", "threshold") for name in frame]
    for values in frame.itertuples(index=False, name=None):
        same = 0  # a group is named once
        while same < len(named) and named[same] and values[:same + 1] == tuple(last[:same + 1]):
            same += 1
        rows.append(row(cells[1], ("",) * same + values[same:], "td"))
        last = values
    return (f'<table>{head}<thead>{row(cells[0], frame.columns, "th")}</thead>\n<tbody>' + "\n".join(rows)
            + "</tbody></table>")


def _numeric(text) -> bool:
    return str(text)[:1] in "0123456789–-" and not any(c.isalpha() and c not in "e" for c in str(text))
