"""The notebooks as committed: executed in order, from the very cells they hold, and clean."""

import base64
import re
import statistics

import nbformat
import pytest

from qlutils import paths
from qlutils.driver.refresh import cleaned
from qlutils.driver.stamps import cells_hash

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
NAMES = {
    "01_localize",
    "02_consistency",
    "03_kn_modification",
    "04_query_kn_mapping",
    "05_attention_predominance",
    "06_knowledge_synapses",
    "07_cas_editing",
    "report",
    "explore_fact",
}


def test_all_notebooks_are_there():
    assert NAMES == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCommitted:
    def test_outputs_come_from_these_cells_run_in_order(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata.get("executed_source") == cells_hash(notebook.cells), (
            "run ./run_all.sh --refresh"
        )
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))

    def test_no_error_no_debris_no_machine_path(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
        for cell in notebook.cells:
            assert "papermill" not in cell.metadata
            for out in cell.get("outputs", []):
                assert out.output_type != "error" and out.get("name") != "stderr"
                text = str(out.get("text", "")) + "".join(map(str, out.get("data", {}).values()))
                assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/[\w.-]+", text)
                assert "it/s]" not in text
                image = out.get("data", {}).get("image/png")
                assert image is None or len(base64.b64decode(image)) <= 170_000

    def test_cells_are_short_and_parameters_are_tagged(self, path):
        code = [
            cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
        ]
        lengths = sorted(
            cell.source.count("\n") + 1 for cell in code if not cell.metadata.get("tags")
        )
        assert lengths[-1] <= 25 and statistics.median_low(lengths) <= 9
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


def test_cleaning_removes_what_papermill_and_widgets_leave():
    cell = nbformat.v4.new_code_cell(
        "print(1)",
        execution_count=7,
        outputs=[
            nbformat.v4.new_output("stream", name="stderr", text="10%|# | 1/10 [00:01, 1it/s]"),
            nbformat.v4.new_output(
                "display_data",
                data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"},
            ),
            nbformat.v4.new_output("stream", name="stdout", text="1\n"),
        ],
    )
    cell.metadata["papermill"] = {"duration": 1}
    notebook = cleaned(
        nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {}})
    )
    assert [out.text for out in notebook.cells[0].outputs] == ["1\n"] and notebook.cells[
        0
    ].execution_count == 1
    assert "papermill" not in notebook.metadata and not notebook.cells[0].metadata
