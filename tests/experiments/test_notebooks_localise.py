"""Notebooks 01 and 02 as a user runs them, with papermill: what they write is what the package
computes directly."""

import json
import re

import pandas as pd
import pytest

from qlutils import load_model, paths
from qlutils.driver.execute import execute, kernel_environment
from qlutils.experiments.consistency import classified_facts, consistency_summary, table_1, table_4
from qlutils.experiments.localize import localisation_summary, localise
from qlutils.neurons.sets import kn_sets
from qlutils.study.notebook import Study

MODEL, STEPS = "demo/gpt2", 4
COMMON = dict(
    model=MODEL,
    relations=["P36", "P103", "P1412"],
    facts_per_relation=1,
    device="cpu",
    dtype="float32",
    output="nb",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def run(folder):
    """run(notebook, name, parameters) -> (what failed, the executed notebook)."""
    threads = dict(OMP_NUM_THREADS=1, QLUTILS_THREADS=1)
    env = kernel_environment(folder / "jupyter", QLUTILS_RUNS=folder / "runs", **threads)

    def papermill(notebook, name, parameters):
        source, output = paths.NOTEBOOKS / f"{notebook}.ipynb", folder / f"{name}.ipynb"
        problem = execute(source, output, parameters, env, folder / f"{name}.log")
        return problem, json.loads(output.read_text(encoding="utf-8"))

    return papermill


@pytest.fixture(scope="module")
def localised(run):
    problem, book = run("01_localize", "01", dict(COMMON, method="ig", steps=STEPS))
    assert problem == ""
    return book


@pytest.fixture(scope="module")
def compared(run, folder, localised):
    """Notebook 02 after two of the three methods; `amig` was localised outside of a notebook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder / "runs")
        localise(Study("01_localize", **COMMON, method="amig"), steps=STEPS)
    problem, book = run("02_consistency", "02", COMMON)
    assert problem == ""
    return book


def results(folder, method):
    return folder / "runs" / "nb" / "results" / "demo--gpt2" / method


def outputs(book):
    return [item for cell in book["cells"] for item in cell.get("outputs", ())]


def printed(book):
    return "".join("".join(item.get("text", ())) for item in outputs(book))


def assert_is(file, table):
    """A table's CSV is `table`."""
    pd.testing.assert_frame_equal(pd.read_csv(file), table, check_dtype=False, rtol=1e-4)


def assert_no_errors(book):
    assert not [item for item in outputs(book) if item["output_type"] == "error"]
    assert not [item for item in outputs(book) if item.get("name") == "stderr"], "it warns"
    assert all(cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code")


def test_01_writes_what_the_package_computes(folder, localised, runs):
    assert_no_errors(localised)
    where = results(folder, "ig")
    queries = pd.read_parquet(where / "queries.parquet")
    computed = localise(Study("01_localize", **COMMON, method="ig"), steps=STEPS)
    pd.testing.assert_frame_equal(queries, computed, check_dtype=False, rtol=1e-4)
    assert_is(where / "localisation.csv", localisation_summary(queries, kn_sets(queries)))
    difference = re.search(r"largest difference over largest score: (\S+)", printed(localised))
    assert float(difference[1]) < 1e-4  # of the plain algorithm and the fast one
    record = json.loads((where / "run.json").read_text())["01_localize"]
    assert record["parameters"]["steps"] == STEPS and record["parameters"]["model"] == MODEL
    fingerprint = load_model(MODEL, device="cpu", dtype="float32").fingerprint
    assert record["model"]["fingerprint"] == fingerprint and record["model"]["dtype"] == "float32"
    assert record["versions"]["torch"] and record["facts"] == 3


def test_01_draws_figure_1_and_compares_the_rules(folder, localised):
    where = results(folder, "ig")
    assert all((where / f"fig1.{suffix}").stat().st_size > 100 for suffix in ("png", "pdf", "csv"))
    rules = pd.read_csv(where / "quadrature.csv")
    first = rules.drop_duplicates("rule").set_index("rule")
    right, converged = first.loc["right"], first.loc["converged"]
    assert converged["error"] < right["error"] and converged["gap"] < right["gap"]
    assert converged["evaluations"] < right["evaluations"] == 20
    assert rules["jaccard"].between(0, 1).all() and (rules["n"] == 3).all()
    other = pd.read_parquet(where / "other_rule.parquet")
    assert set(other["rule"]) == {"converged"} and other["converged"].astype(bool).all()
    assert [item for item in outputs(localised) if "image/png" in item.get("data", {})]


def test_02_makes_its_tables_from_what_01_found_and_names_a_method_that_has_not_run(
    folder, compared
):
    assert_no_errors(compared)
    assert re.search(r"sig: not run yet for demo/gpt2.*missing below", printed(compared))
    facts = {}
    for method in ("ig", "amig"):
        queries = pd.read_parquet(results(folder, method) / "queries.parquet")
        facts[method] = classified_facts(queries)
    where = results(folder, "all")
    assert_is(where / "table1.csv", table_1(facts, MODEL))
    assert_is(where / "table4.csv", table_4(facts, MODEL))
    assert_is(where / "consistency.csv", consistency_summary(facts))
    for stem in ("table1", "table4", "table5"):
        assert all((where / f"{stem}.{suffix}").stat().st_size for suffix in ("csv", "md", "tex"))
    assert sorted(path.stem for path in where.glob("fig[389].png")) == ["fig3", "fig9"]
    for stem in ("fig3", "fig9"):
        assert (where / f"{stem}.pdf").exists() and len(pd.read_csv(where / f"{stem}.csv")) == 3
    assert not list(where.glob("*sig*"))


def test_02_localises_by_its_first_method_where_nothing_was_localised(run, folder):
    few = dict(relations=["P36"], facts_per_relation=2, output="empty", methods=["amig", "ig"])
    problem, book = run("02_consistency", "02-alone", COMMON | few)
    assert problem == "" and "ig: not run yet" in printed(book)
    assert "localising by the paper's rule" in printed(book)
    where = folder / "runs" / "empty" / "results" / "demo--gpt2"
    assert (where / "amig" / "queries.parquet").exists() and not (where / "ig").exists()
    assert pd.read_csv(where / "all" / "table1.csv")["method"].unique().tolist() == ["amig"]


def test_a_mistake_ends_a_notebook_at_its_first_cells_and_is_named(run):
    problem, book = run("02_consistency", "wrong", COMMON | dict(method="ig"))
    assert "unknown parameter 'method'" in problem
    counts = [cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code"]
    assert counts[3:].count(None) == len(counts) - 3  # parameters, papermill's, that which fails


def test_saved_results_are_found_again_only_for_the_same_inputs(folder, compared, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", folder / "runs")
    assert Study("02_consistency", **COMMON).methods_done() == ["ig", "amig"]
    assert Study("02_consistency", **COMMON | {"facts_per_relation": 2}).methods_done() == []
