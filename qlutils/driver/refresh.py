"""The committed state: notebooks that carry the outputs of the reference run, and figures/demo.

The reference run is the notebooks as they stand, with their own parameters (demo/gpt2, ig, all
bundled facts). Nothing is injected, so what is committed is exactly what ran: `executed_source` in
a notebook's metadata is a hash of its cells at that time, and a test compares it with the cells as
they are.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from qlutils import paths
from qlutils.experiments.report import copy_results
from qlutils.study.execute import execute, kernel_environment

DROPPED_MIME = "application/vnd.jupyter.widget-view+json"  # a widget is nothing without its kernel


def source_hash(notebook) -> str:
    """SHA-256 of the cells' kinds and sources, in order."""
    return hashlib.sha256(
        "\0".join(f"{cell.cell_type}\1{cell.source}" for cell in notebook.cells).encode()
    ).hexdigest()


def cleaned(notebook):
    """An executed notebook without papermill's traces, progress bars and widget views; cells
    numbered from 1."""
    notebook.metadata = {
        key: notebook.metadata[key]
        for key in ("kernelspec", "language_info")
        if key in notebook.metadata
    }
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    number = 0
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag == "parameters"]
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        cell.outputs = [
            out
            for out in cell.outputs
            if out.get("name") != "stderr" and DROPPED_MIME not in out.get("data", {})
        ]
        for out in cell.outputs:
            if "execution_count" in out:
                out.execution_count = number
    notebook.metadata["executed_source"] = source_hash(notebook)
    return notebook


def refresh() -> int:
    """Run every notebook of the checkout as it stands and put its outputs into it; 1 if one
    failed."""
    runs, started = paths.RUNS / "reference", time.time()
    names = [
        *sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")),
        paths.NOTEBOOKS / "report.ipynb",
        paths.NOTEBOOKS / "explore_fact.ipynb",
    ]
    failed = 0
    (runs / "executed").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qlutils-") as scratch:
        env = kernel_environment(
            scratch,
            QLUTILS_RUNS=runs,
            QLUTILS_PROGRESS=Path(scratch, "progress"),
            QLUTILS_COMMAND="./run_all.sh --refresh",
        )
        for name in names:
            output = runs / "executed" / name.name
            problem = execute(name, output, {}, env, Path(scratch, "log"))
            print(
                f"{name.name}: {problem or 'done'} ({time.time() - started:.0f} s)", file=sys.stderr
            )
            failed += bool(problem)
            if not problem:
                nbformat.write(cleaned(nbformat.read(output, as_version=4)), name)
    if not failed:
        copy_results(runs / "default" / "results", paths.FIGURES / "demo")
    return int(failed > 0)
