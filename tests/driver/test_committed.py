"""The notebooks as committed: executed in order, from the very cells they hold, and clean."""

import base64
import re
import statistics

import nbformat
import pytest

from qlutils import paths
from qlutils.driver.stamps import cells_hash

NAMES = """01_localize 02_consistency 03_kn_modification 04_query_kn_mapping
05_attention_predominance 06_knowledge_synapses 07_cas_editing explore_fact report""".split()


def test_all_notebooks_are_there():
    assert NAMES == sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_run_in_order_from_these_cells_clean_and_in_short_cells(name):
    book = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    fresh = book.metadata.get("executed_source") == cells_hash(book.cells)
    assert fresh, "run ./run_all.sh --refresh"
    assert not {"papermill", "widgets"} & book.metadata.keys()
    assert not any("papermill" in cell.metadata for cell in book.cells)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    lengths = [len(cell.source.split("\n")) for cell in code if not cell.metadata.get("tags")]
    assert max(lengths) <= 25 and statistics.median_low(lengths) <= 9
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for out in (out for cell in code for out in cell.outputs):
        assert out.output_type != "error" and out.get("name") != "stderr"
        text, data = str(out.get("text", "")), out.get("data", {})
        assert not any("widget" in kind for kind in data)
        text += "".join(map(str, data.values()))
        assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/[\w.-]+|it/s\]", text)
        assert len(base64.b64decode(data.get("image/png", ""))) <= 170_000
