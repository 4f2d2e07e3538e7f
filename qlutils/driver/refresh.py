"""The committed state: notebooks that carry the outputs of the reference run, and the tables and
figures of that run.

The reference run is the notebooks with the parameters below, which papermill puts into a cell of
their own (`injected-parameters`) that stays in the committed notebook and runs when a reader runs
it. `executed_source` in a notebook's metadata is a hash of its cells at that time; a test compares
it with the cells as they are.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

from qlutils import paths
from qlutils.driver.execute import execute, kernel_environment
from qlutils.driver.stamps import cells_hash
from qlutils.experiments.report import copy_results
from qlutils.show.page import without_progress
from qlutils.study.parameters import declared_parameters

REFERENCE_MODEL = "pretrained/smollm2-135m"
REFERENCE = {  # {parameter: value} in every notebook that has it; all bundled facts it knows
    "model": REFERENCE_MODEL,
    "models": [REFERENCE_MODEL],
    "methods": ["ig"],
    "known_prompts": 3,
    "rule": "converged",
    "ppl_max_tokens": 128,
    "fact": "P36|Germany|Berlin",
}
COMMAND = "./run_all.sh --refresh"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cleaned(notebook):
    """An executed notebook without papermill's traces, progress bars and widget views."""
    language = notebook.metadata.get("language_info", {"name": "python"})
    for cell in without_progress(notebook).cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        cell.source = cell.source.rstrip("\n")  # papermill ends its cell with an empty line
    source = cells_hash(notebook.cells)
    notebook.metadata = dict(kernelspec=KERNEL, language_info=language, executed_source=source)
    return notebook


def refresh():
    """Run every notebook of the checkout with the reference parameters and put its outputs into
    it. Returns the exit status, 0; ValueError names the notebook that failed."""
    runs = paths.RUNS / "reference"
    report = paths.NOTEBOOKS / "report.ipynb"
    others = set(paths.NOTEBOOKS.glob("*.ipynb")) - {report}
    notebooks = [*sorted(others), report]  # it reads their results
    (runs / "executed").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(runs / "default" / "results", ignore_errors=True)  # the units stay
    with tempfile.TemporaryDirectory(prefix="qlutils-") as scratch:
        env = kernel_environment(scratch, QLUTILS_RUNS=runs, QLUTILS_COMMAND=COMMAND)
        for notebook in notebooks:
            print(notebook.name, file=sys.stderr)
            output = runs / "executed" / notebook.name
            declared = declared_parameters(notebook)
            given = {name: value for name, value in REFERENCE.items() if name in declared}
            if problem := execute(notebook, output, given, env, Path(scratch, "log")):
                raise ValueError(f"{notebook.name}: {problem}")
            nbformat.write(cleaned(nbformat.read(output, as_version=4)), notebook)
    copy_results(runs / "default" / "results", paths.FIGURES / "notebooks")
    return 0
