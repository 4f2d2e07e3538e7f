"""Notebooks 04-06 as a user runs them, with papermill: their numbers are those of one query and one
set at a time."""

import json
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from qlutils import answer_probability, find_synapses, load_model, scale_neurons, scale_synapses
from qlutils.driver.execute import execute, kernel_environment
from qlutils.experiments.consistency import classified_facts
from qlutils.files import read_parquet
from qlutils.model.passes import attention_implementation
from qlutils.neurons.sets import kn_sets, neighbour_sets
from qlutils.paths import NOTEBOOKS
from qlutils.show.tables import pick

CPU = dict(device="cpu", dtype="float32")
COMMON = dict(model="demo/gpt2", relations=["P36", "P103", "P1412"], facts_per_relation=1)
FIGURES = "fig4 fig5 fig6 fig6_otsu fig7 fig10 fig10_activation synapse_places".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of results of the three, which share one localisation; no notebook's text names an
    undefined number, and every figure is written in three formats."""
    folder = tmp_path_factory.mktemp("express")
    threads = dict(OMP_NUM_THREADS=1, QLUTILS_THREADS=1, JUPYTER_PLATFORM_DIRS=1)
    env = kernel_environment(folder / "jupyter", QLUTILS_RUNS=folder / "runs", **threads)
    for name in ("04_query_kn_mapping", "05_attention_predominance", "06_knowledge_synapses"):
        book, target, log = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb", folder / name
        assert execute(book, target, COMMON | CPU | dict(output="nb"), env, log) == ""
        cells = json.loads(target.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        text = "".join("".join(output.get("text", "")) for output in outputs)
        assert len(text) > 200 and not re.search(r"\bnan\b", text)
    return folder / "runs" / "nb" / "results" / "demo--gpt2" / "ig"


@pytest.fixture(scope="module")
def lm():
    return load_model("demo/gpt2", **CPU)


@pytest.fixture(scope="module")
def queries(results):
    return read_parquet(results / "queries.parquet")[0].to_pandas()


def probability(lm, row):
    return float(answer_probability(lm, [row["prompt"]], [row["object"]])[0])


def known_of_class(queries, threshold, name):
    facts = classified_facts(queries)
    chosen = facts.loc[facts[f"class_{threshold}"] == name, "fact"]
    return queries[queries["known"] & queries["fact"].isin(chosen)].to_dict("records")


def test_every_figure_is_written_in_three_formats(results):
    for stem, kind in product(FIGURES, ("png", "pdf", "csv")):
        size = (results / f"{stem}.{kind}").stat().st_size
        assert 200 < size and (kind != "png" or size < 200_000)


def test_figure_4_is_the_mean_over_queries_changed_one_by_one(results, queries, lm):
    drawn, checked = pd.read_csv(results / "fig4.csv"), 0
    for name, class_ in product(("self", "refine"), ("I", "II")):
        rates = []
        for row in known_of_class(queries, "otsu", class_):
            group = queries[queries["fact"] == row["fact"]].reset_index(drop=True)
            place = group.index[group["prompt_index"] == row["prompt_index"]][0]
            before = probability(lm, row)
            with scale_neurons(lm, neighbour_sets(kn_sets(group), place)[name], 0.0):
                rates.append((before - probability(lm, row)) / before)
        keys = dict(set=name, direction="suppress", threshold="otsu", class_=class_)
        cell = pick(drawn, queries="known", **keys)
        assert cell["n"] == len(rates)
        if rates:
            assert cell["mean"] == pytest.approx(np.mean(rates), abs=1e-4)
            checked += 1
    assert checked >= 2


def test_figure_5_is_predominance_over_transformers_own_attention(results, queries, lm):
    drawn = pd.read_csv(results / "fig5.csv").set_index("fact")
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
            share = max(map(tokens.count, tokens)) / len(tokens)
            assert drawn.loc[fact, name] == pytest.approx(share)


def test_figure_6_is_the_mean_over_queries_changed_one_by_one(results, queries, lm):
    drawn = pd.read_csv(results / "fig6.csv")
    rates, values = [], []
    for row in known_of_class(queries, "static", "I"):
        neurons = kn_sets(pd.DataFrame([row]))[0]
        with scale_synapses(lm, set(), 1):
            before, value = probability(lm, row), mean_activation(lm, row["prompt"], neurons)
        with scale_synapses(lm, find_synapses(lm, row["prompt"]), 2.0):
            rates.append((probability(lm, row) - before) / before)
            values.append((mean_activation(lm, row["prompt"], neurons) - value) / value)
    for panel, expected in (("ΔProb", rates), ("ΔValue", values)):
        keys = dict(set="self", direction="enhance", queries="known", class_="I")
        cell = pick(drawn, panel=panel, **keys)
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
