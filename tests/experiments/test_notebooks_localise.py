"""Notebooks 01 and 02 as a user runs them, with papermill: what they write is what the package
computes directly."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from qlutils import attribute, consistency, knowledge_neurons, load_facts, load_model, paths
from qlutils.driver.execute import execute, kernel_environment
from qlutils.experiments.localize import localise
from qlutils.study.notebook import Study

MODEL, RELATIONS, STEPS = "demo/gpt2", ["P36", "P103", "P1412"], 4
COMMON = dict(
    model=MODEL,
    relations=RELATIONS,
    facts_per_relation=1,
    device="cpu",
    dtype="float32",
    output="nb",
)


MISTAKES = {  # name: (notebook, parameters, what the error says)
    "unknown in 01": ("01_localize", dict(COMMON, stepz=3), "unknown parameter 'stepz'"),
    "unknown in 02": ("02_consistency", dict(COMMON, method="ig"), "unknown parameter 'method'"),
    "another type": (
        "01_localize",
        dict(COMMON, facts_per_relation="many"),
        "facts_per_relation 'many': want .*",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def run(folder):
    """run(notebook, name, parameters) -> (what failed, the executed notebook)."""
    env = kernel_environment(
        folder / "jupyter", QLUTILS_RUNS=folder / "runs", OMP_NUM_THREADS=1, QLUTILS_THREADS=1
    )

    def papermill(notebook, name, parameters):
        output = folder / f"{name}.ipynb"
        problem = execute(
            paths.NOTEBOOKS / f"{notebook}.ipynb", output, parameters, env, folder / f"{name}.log"
        )
        return problem, json.loads(output.read_text(encoding="utf-8"))

    return papermill


@pytest.fixture(scope="module", autouse=True)
def pool(run):
    """The notebooks with a mistake in their parameters run beside the others."""
    with ThreadPoolExecutor(1) as executor:
        yield {
            name: executor.submit(run, notebook, name, parameters)
            for name, (notebook, parameters, _) in MISTAKES.items()
        }


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


@pytest.fixture(scope="module")
def direct():
    """{method: [(fact, attribution result)]}, computed here."""
    lm = load_model(MODEL, device="cpu", dtype="float32")
    facts = load_facts("demo", relations=RELATIONS, facts_per_relation=1)
    assert len(facts) == 3
    return {
        method: [
            (
                fact,
                attribute(
                    lm,
                    list(fact.prompts),
                    [fact.object] * len(fact.prompts),
                    method=method,
                    steps=STEPS,
                ),
            )
            for fact in facts
        ]
        for method in ("ig", "amig")
    }


def results(folder, method):
    return folder / "runs" / "nb" / "results" / "demo--gpt2" / method


def printed(book):
    return "".join(
        "".join(item.get("text", ())) for cell in book["cells"] for item in cell.get("outputs", ())
    )


def assert_no_errors(book):
    outputs = [item for cell in book["cells"] for item in cell.get("outputs", ())]
    assert not [item for item in outputs if item["output_type"] == "error"]
    assert not [item for item in outputs if item.get("name") == "stderr"], (
        "warnings in a finished notebook"
    )
    assert all(cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code")


def test_01_writes_what_the_package_computes(folder, localised, direct, method="ig"):
    assert_no_errors(localised)
    queries = pd.read_parquet(results(folder, method) / "queries.parquet")
    assert queries["fact"].unique().tolist() == [fact.id for fact, _ in direct[method]]
    sizes = []
    for fact, result in direct[method]:
        rows = queries[queries["fact"] == fact.id]
        assert rows["prompt"].tolist() == list(fact.prompts)
        for (_, row), scores, p in zip(
            rows.iterrows(), result.scores.numpy(), result.probability.tolist()
        ):
            top, stored = scores.max(), np.zeros_like(scores)
            stored[row["layer"], row["neuron"]] = row["score"]
            kept = scores > 0.051 * top  # what is stored, less what rounding decides
            assert (
                np.abs(stored - scores)[kept].max() <= 1e-4 * top
                and not stored[scores < 0.049 * top].any()
            )
            assert row["probability"] == pytest.approx(p, rel=1e-4)
        sizes += [len(one) for one in knowledge_neurons(result.scores, 0.2)]
    summary = pd.read_csv(results(folder, method) / "localisation.csv").iloc[0]
    assert summary["n_queries"] == len(queries) and summary["median KNs"] == pytest.approx(
        np.median(sizes), abs=1
    )
    probabilities = np.concatenate([result.probability.numpy() for _, result in direct[method]])
    assert summary["mean P"] == pytest.approx(probabilities.mean(), rel=1e-3)
    gaps = np.concatenate([result.completeness_gap.mean(1).numpy() for _, result in direct[method]])
    assert summary["mean completeness gap"] == pytest.approx(gaps.mean(), rel=1e-3)


def test_01_shows_that_the_fast_algorithm_is_the_plain_one(localised):
    difference = re.search(r"largest difference over largest score: (\S+)", printed(localised))
    assert float(difference[1]) < 1e-4


def test_01_draws_figure_1_and_compares_the_rules(folder, localised):
    for suffix in ("png", "pdf", "csv"):
        assert (results(folder, "ig") / f"fig1.{suffix}").stat().st_size > 100
    rules = pd.read_csv(results(folder, "ig") / "quadrature.csv")
    right, converged = (rules[rules["rule"] == name].iloc[0] for name in ("right", "converged"))
    assert converged["error"] < right["error"] and converged["gap"] < right["gap"]
    assert converged["evaluations"] < right["evaluations"] == 20
    assert rules["jaccard"].between(0, 1).all() and (rules["n"] == 5).all()
    other = pd.read_parquet(results(folder, "ig") / "other_rule.parquet")
    assert set(other["rule"]) == {"converged"} and other["converged"].astype(bool).all()
    images = [
        item
        for cell in localised["cells"]
        for item in cell.get("outputs", ())
        if "image/png" in item.get("data", {})
    ]
    assert images


def test_01_records_all_that_is_needed_to_run_it_again(folder, localised):
    record = json.loads((results(folder, "ig") / "run.json").read_text())["01_localize"]
    assert record["parameters"]["steps"] == STEPS and record["parameters"]["model"] == MODEL
    assert (
        record["model"]["fingerprint"]
        == load_model(MODEL, device="cpu", dtype="float32").fingerprint
    )
    assert (
        record["model"]["dtype"] == "float32"
        and record["versions"]["torch"]
        and record["facts"] == 3
    )


def test_02_makes_table_1_from_what_01_found(folder, compared, direct):
    assert_no_errors(compared)
    where = results(folder, "all")
    table = pd.read_csv(where / "table1.csv").set_index(["threshold", "method"])
    assert sorted({method for _, method in table.index}) == ["amig", "ig"]
    for method in ("ig", "amig"):
        cs2 = np.array(
            [consistency(knowledge_neurons(result.scores, 0.2)).cs2 for _, result in direct[method]]
        )
        row = table.loc[("static", method)]
        assert (row["n"], row["n_I"], row["n_II"]) == (3, (cs2 > 0.1).sum(), (cs2 <= 0.1).sum())
        assert row["R_II"] == pytest.approx((cs2 <= 0.1).mean(), abs=0.005)
        if (cs2 > 0.1).any():
            assert row["S_I"] == pytest.approx(cs2[cs2 > 0.1].mean(), abs=0.006)
        if not (cs2 <= 0.1).any():
            assert np.isnan(row["S_II"]) and np.isnan(row["t"])
        assert np.isnan(row["cap_II"])  # sig has not run
        summary = pd.read_csv(where / "consistency.csv").set_index("method").loc[method]
        cs1 = [
            consistency(knowledge_neurons(result.scores, 0.2)).cs1 for _, result in direct[method]
        ]
        assert summary["n"] == 3
        assert summary["cs1"] == pytest.approx(np.mean(cs1), abs=0.006)
    for stem in ("table1", "table4", "table5"):
        for suffix in ("csv", "md", "tex"):
            assert (where / f"{stem}.{suffix}").stat().st_size > 0


def test_02_names_a_method_that_has_not_run_and_assumes_nothing_about_it(folder, compared):
    assert re.search(r"sig: not run yet for demo/gpt2.*missing below", printed(compared))
    where = results(folder, "all")
    assert [stem for stem in ("fig3", "fig8", "fig9") if (where / f"{stem}.png").exists()] == [
        "fig3",
        "fig9",
    ]
    for stem in ("fig3", "fig9"):
        assert (where / f"{stem}.pdf").exists() and len(pd.read_csv(where / f"{stem}.csv")) == 3
    assert not list(where.glob("*sig*"))


def test_02_localises_by_its_first_method_where_nothing_was_localised(run, folder):
    parameters = dict(
        COMMON,
        methods=["amig", "ig"],
        facts_per_relation=2,
        relations=RELATIONS[:1],
        output="empty",
    )
    problem, book = run("02_consistency", "02-alone", parameters)
    assert (
        problem == ""
        and "ig: not run yet" in printed(book)
        and "localising by the paper's rule" in printed(book)
    )
    where = folder / "runs" / "empty" / "results" / "demo--gpt2"
    assert (where / "amig" / "queries.parquet").exists() and not (where / "ig").exists()
    assert pd.read_csv(where / "all" / "table1.csv")["method"].unique().tolist() == ["amig"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_a_notebook_at_its_first_cells_and_is_named(pool, name):
    problem, book = pool[name].result()
    assert re.search(MISTAKES[name][2], problem), problem
    run = [cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code"]
    assert sum(count is not None for count in run) <= 3, (
        "it went on"
    )  # the parameters, papermill's, the one that fails


def test_saved_results_are_found_again_only_for_the_same_inputs(folder, compared, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", folder / "runs")
    assert Study("02_consistency", **COMMON).methods_done() == ["ig", "amig"]
    assert Study("02_consistency", **{**COMMON, "facts_per_relation": 2}).methods_done() == []
