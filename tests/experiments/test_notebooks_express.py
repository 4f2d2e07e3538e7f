"""Notebooks 04-06 as a user runs them, with papermill: their numbers are those of one query and one
set at a time."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from qlutils import (
    answer_probability,
    find_synapses,
    load_model,
    paths,
    scale_neurons,
    scale_synapses,
)
from qlutils.driver.execute import execute, kernel_environment
from qlutils.experiments.consistency import classified_facts
from qlutils.files import read_parquet
from qlutils.model.passes import attention_implementation
from qlutils.neurons.sets import kn_sets, neighbour_sets

MODEL, RELATIONS = "demo/gpt2", ["P36", "P103", "P1412"]
COMMON = dict(
    model=MODEL,
    relations=RELATIONS,
    facts_per_relation=1,
    device="cpu",
    dtype="float32",
    output="nb",
)
NOTEBOOKS = ("04_query_kn_mapping", "05_attention_predominance", "06_knowledge_synapses")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """{notebook: text of its outputs}, and the folder of results; the three share one
    localisation."""
    folder = tmp_path_factory.mktemp("express")
    env = kernel_environment(
        folder / "jupyter",
        QLUTILS_RUNS=folder / "runs",
        OMP_NUM_THREADS=1,
        QLUTILS_THREADS=1,
        JUPYTER_PLATFORM_DIRS=1,
    )
    texts = {}
    for name in NOTEBOOKS:
        target = folder / f"{name}.ipynb"
        assert (
            execute(paths.NOTEBOOKS / f"{name}.ipynb", target, COMMON, env, folder / f"{name}.log")
            == ""
        )
        cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
        texts[name] = "".join(
            "".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", [])
        )
    return texts, folder / "runs" / "nb" / "results" / "demo--gpt2" / "ig"


@pytest.fixture(scope="module")
def lm():
    return load_model(MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def queries(books):
    return read_parquet(books[1] / "queries.parquet")[0].to_pandas()


def probability(lm, row):
    return float(answer_probability(lm, [row["prompt"]], [row["object"]])[0])


def known_of_class(queries, threshold, name):
    facts = classified_facts(queries)
    chosen = facts.loc[facts[f"class_{threshold}"] == name, "fact"]
    return queries[queries["known"] & queries["fact"].isin(chosen)]


def test_figure_4_is_the_mean_over_queries_changed_one_by_one(books, queries, lm):
    drawn = pd.read_csv(books[1] / "fig4.csv")
    checked = 0
    for name in ("self", "refine"):
        for class_ in ("I", "II"):
            rates = []
            for _, row in known_of_class(queries, "otsu", class_).iterrows():
                group = queries[queries["fact"] == row["fact"]].reset_index(drop=True)
                place = group.index[group["prompt_index"] == row["prompt_index"]][0]
                before = probability(lm, row)
                with scale_neurons(lm, neighbour_sets(kn_sets(group), place)[name], 0.0):
                    rates.append((before - probability(lm, row)) / before)
            cell = drawn[
                (drawn["set"] == name)
                & (drawn["direction"] == "suppress")
                & (drawn["threshold"] == "otsu")
                & (drawn["class"] == class_)
            ].iloc[0]
            assert cell["n"] == len(rates)
            if rates:
                assert cell["mean"] == pytest.approx(np.mean(rates), abs=1e-4)
                checked += 1
    assert checked >= 2


def test_figure_5_is_predominance_over_transformers_own_attention(books, queries, lm):
    drawn = pd.read_csv(books[1] / "fig5.csv").set_index("fact")
    for fact, group in queries.groupby("fact"):
        winners = {"predominance": [], "predominance_rest": []}
        for prompt in group["prompt"]:
            ids = lm.encode_prompt(prompt)
            with torch.no_grad(), attention_implementation(lm.model, "eager"):
                seen = lm.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
            total = torch.stack(seen)[:, 0].mean((0, 1)).sum(0)
            winners["predominance"].append(ids[int(total.argmax())])
            winners["predominance_rest"].append(ids[1 + int(total[1:].argmax())])
        for name, tokens in winners.items():
            assert drawn.loc[fact, name] == pytest.approx(
                max(map(tokens.count, tokens)) / len(tokens)
            )


def test_figure_6_is_the_mean_over_queries_changed_one_by_one(books, queries, lm):
    drawn = pd.read_csv(books[1] / "fig6.csv")
    rates, values = [], []
    for _, row in known_of_class(queries, "static", "I").iterrows():
        neurons = kn_sets(pd.DataFrame([row]))[0]
        with scale_synapses(lm, set(), 1):
            before, value = probability(lm, row), mean_activation(lm, row["prompt"], neurons)
        with scale_synapses(lm, find_synapses(lm, row["prompt"]), 2.0):
            rates.append((probability(lm, row) - before) / before)
            values.append((mean_activation(lm, row["prompt"], neurons) - value) / value)
    part = drawn[
        (drawn["set"] == "self") & (drawn["direction"] == "enhance") & (drawn["class"] == "I")
    ]
    for panel, expected in (("Prob", rates), ("Value", values)):
        cell = part[part["panel"].str.contains(panel)].iloc[0]
        assert cell["n"] == len(expected) > 0
        assert cell["mean"] == pytest.approx(np.mean(expected), abs=2e-4)


def mean_activation(lm, prompt, neurons):
    ids, kept = lm.encode_prompt(prompt), {}
    handles = [
        down.register_forward_pre_hook(lambda _, x, l=l: kept.__setitem__(l, x[0][0, -1]))
        for l, down in enumerate(lm.downs)
    ]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return float(np.mean([abs(float(kept[l][n])) for l, n in neurons]))


@pytest.mark.parametrize(
    "stem",
    ["fig4", "fig5", "fig6", "fig6_otsu", "fig7", "fig10", "fig10_activation", "synapse_places"],
)
def test_every_figure_is_written_in_three_formats(books, stem):
    assert all((books[1] / f"{stem}.{kind}").stat().st_size > 200 for kind in ("png", "pdf", "csv"))
    assert (books[1] / f"{stem}.png").stat().st_size < 200_000


def test_sentences_are_computed_and_name_no_undefined_number(books):
    for name in NOTEBOOKS:
        assert len(books[0][name]) > 200 and not re.search(r"\bnan\b", books[0][name])
