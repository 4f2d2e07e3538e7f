"""The study killed at random moments, and started again: same bytes, at most one unit lost a kill.

A fork server imports torch and loads the model once, so that a start costs milliseconds. All
compute in one thread, as threads do not survive a fork.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlutils import load_facts, paths
from qlutils.experiments import attention_predominance, effects, knowledge_synapses
from qlutils.experiments.consistency import classified_facts
from qlutils.experiments.edit_tables import measures_table
from qlutils.experiments.effects import FIGURE_4_SETS
from qlutils.experiments.kn_modification import run_edits
from qlutils.experiments.localize import localise
from qlutils.experiments.query_kn_mapping import scale_kns
from qlutils.files import read_parquet
from qlutils.study import identity, store
from qlutils.study.notebook import Study
from qlutils.study.results import read_record

ROOT = paths.ROOT
RELATIONS = ["P36", "P19", "P103"]
PARAMETERS = dict(model="demo/gpt2", method="ig")  # and data, a file of three facts
PARAMETERS |= dict(t=0.2, steps=3, lambda1=2.0, lambda2=2.0, embedding="input", n_locality=4)
PARAMETERS |= dict(controls=["random"], corpus="demo", ppl_entries=1, ppl_max_tokens=32)
UNITS = 5 * 3  # five tasks, a unit a fact


# -- what is killed --------------------------------------------------------------------------------
def small_study(parameters):
    """Localisation, edits, query-KN mapping, attention and synapses of three facts, one fact a
    unit, with tables."""
    store.UNIT_FACTS = {"cpu": 1}
    study, t = Study("small", **parameters), parameters["t"]
    few = dict(directions=("average",), thresholds=("otsu",))
    queries = localise(study, steps=parameters["steps"])
    classes = classified_facts(queries, t, 0.1)
    edits, _ = run_edits(study, queries, ["local", "global"])
    study.save(edits, "edits")
    table = measures_table(edits, classes, study.model, sets=("local",), controls=())
    study.table(table, "table2")

    def moved(task, config=None, **more):
        frame = study.run(task, effects.units(queries, t, **more), config, desc=task.__name__)
        return effects.beside_queries(frame, queries, t, 0.1)

    scaled = effects.rates(moved(scale_kns, other=0))
    study.table(effects.summary(scaled, FIGURE_4_SETS, **few), "fig4")
    winners = study.run(attention_predominance.attend, effects.units(queries), desc="attend")
    study.table(effects.top_tokens(winners), "attended")
    scaled = moved(knowledge_synapses.scale_synapse_columns, dict(renormalise=False), irrelevant=0)
    scaled = effects.rates(scaled[scaled["set"] != "none"])
    study.table(effects.summary(scaled, ("self", "irrelevant"), **few), "fig6")
    study.record()


def child(runs, parameters, threads):
    """Every unit logs its key before it is computed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    paths.RUNS, compute = runs, store.compute_unit

    def logged(*given):
        with open(f"{runs}.log", "a") as log:
            log.write(f"{given[-1].stem}\n")
        return compute(*given)

    store.compute_unit = logged
    small_study(parameters)


# -- who kills it ----------------------------------------------------------------------------------
IMPORT_PATH = os.pathsep.join(map(str, [Path(__file__).parent, ROOT / "tests", ROOT]))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_kills", "loaded_model"])


def start(runs, parameters=PARAMETERS, threads=1):
    process = SERVER.Process(target=child, args=(runs, parameters, threads))
    process.start()
    return process


def finish(runs, **more):
    process = start(runs, **more)
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, seconds) of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORT_PATH)
        server = SERVER.Process(target=int)
        server.start()
        server.join()
    facts = load_facts("demo", relations=RELATIONS, facts_per_relation=1)
    lines = [json.dumps(asdict(replace(fact, prompts=fact.prompts[:3]))) for fact in facts]
    PARAMETERS["data"] = str(folder / "facts.jsonl")
    Path(PARAMETERS["data"]).write_text("\n".join(lines), encoding="utf-8")
    runs, begun = folder / "undisturbed", time.time()
    finish(runs)
    assert len(computed(runs)) == len(set(computed(runs))) == UNITS
    return runs, time.time() - begun


def computed(runs):
    """The keys of the units whose computing began, in order."""
    log = Path(f"{runs}.log")
    return log.read_text().split() if log.exists() else []


def results(runs):
    """{relative path: bytes} of all result files; records hold times, so they are left out."""
    kinds = (".csv", ".md", ".tex", ".parquet")
    files = [path for path in runs.rglob("[!.]*.*") if path.suffix in kinds]
    return {str(path.relative_to(runs)): path.read_bytes() for path in sorted(files)}


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_cost_one_unit_each_at_most_and_change_no_byte_of_any_result(
    undisturbed, tmp_path, kills
):
    clean, seconds = results(undisturbed[0]), undisturbed[1]
    assert len(clean) >= UNITS + 4 * 3 + 3
    rng, done, rounds, lost = random.Random(kills), 0, 0, 0
    while done < kills:
        runs, before, status = tmp_path / f"round{rounds}", done, -9
        while status == -9:
            process = start(runs)
            process.join(rng.random() * 0.4 * seconds if done < kills else None)
            process.kill()
            process.join()
            status = process.exitcode
            done += status == -9
        assert status == 0 and results(runs) == clean
        assert UNITS <= len(computed(runs)) <= UNITS + done - before
        lost, rounds = lost + len(computed(runs)) - UNITS, rounds + 1
    assert lost > 0, "no kill hit a unit at work, so nothing was tried"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, -15), (signal.SIGINT, 1)])
def test_a_study_that_is_asked_to_stop_does_so_in_seconds_and_resumes(
    undisturbed, tmp_path, number, status
):
    runs = tmp_path / "asked"
    process = start(runs)
    while len(computed(runs)) < 4:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(15)
    assert process.exitcode == status
    kept = results(runs)
    finish(runs)
    assert results(runs) == results(undisturbed[0]) and kept.items() <= results(runs).items()
    assert len(computed(runs)) <= UNITS + 1


# -- reproducible ----------------------------------------------------------------------------------
def test_a_fresh_process_makes_the_same_bytes_from_what_the_record_holds(undisturbed, tmp_path):
    """Another process with another hash seed: no order of a set can hide in a result."""
    folder = undisturbed[0] / "default" / "results" / "demo--gpt2" / "ig"
    entry = read_record(folder / "run.json")["small"]
    assert {"torch", "transformers", "numpy", "python", "qlutils"} <= set(entry["versions"])
    identified = "name revision fingerprint device dtype threads".split()
    assert sorted(entry["model"]) == sorted(identified)
    assert all(len(entry["inputs"][name]) == 64 for name in ("content", "facts"))
    assert entry["inputs"]["code"] == identity.code_versions() and entry["inputs"]["seed"] == 0
    assert entry["command"] and entry["seconds"] > 0 and entry["platform"]
    assert sum(work["units"] for work in entry["work"].values()) == UNITS
    assert all(work["version"] >= 1 and work["seconds"] >= 0 for work in entry["work"].values())
    env = {"PYTHONPATH": IMPORT_PATH, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2"}
    again = f"pathlib.Path({str(tmp_path / 'again')!r}), {entry['parameters']!r}, 1"
    code = f"import pathlib, test_kills; test_kills.child({again})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, check=True)
    assert results(tmp_path / "again") == results(undisturbed[0])


def test_two_threads_find_the_knowledge_neurons_of_one(undisturbed, tmp_path):
    """Float sums depend on the number of threads: a score may move by 1e-4 of the query's largest,
    and a neuron leave or enter the set only if its score is that close to the threshold."""
    finish(tmp_path / "two", threads=2)
    queries = Path("default", "results", "demo--gpt2", "ig", "queries.parquet")
    one, two = (
        read_parquet(runs / queries)[0].to_pandas() for runs in (undisturbed[0], tmp_path / "two")
    )
    assert (one["prompt"] == two["prompt"]).all() and (one["known"] == two["known"]).all()
    for pair in zip(one.itertuples(), two.itertuples()):
        a, b = (dict(zip(zip(q.layer, q.neuron), q.score / q.score.max())) for q in pair)
        for neuron in a.keys() | b.keys():
            # what is stored lies above 0.05
            first, second = a.get(neuron, 0.05), b.get(neuron, 0.05)
            assert abs(first - second) < 1e-4, neuron
            assert (first > 0.2) == (second > 0.2) or abs(first - 0.2) < 1e-4
        assert np.isclose(pair[0].probability, pair[1].probability, rtol=1e-5)
