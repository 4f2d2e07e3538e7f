"""The study killed at random moments, and started again: same bytes, at most one unit lost a kill.

One process imports torch and loads the model once; it forks a child for every start, so that a
start costs milliseconds. All of them compute in one thread, as threads do not survive a fork.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from qlutils import paths
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

ROOT = Path(__file__).resolve().parents[2]
TABLES = (".csv", ".md", ".tex")
RELATIONS = ["P36", "P19", "P103"]
PARAMETERS = dict(
    model="demo/gpt2",
    method="ig",
    relations=RELATIONS,
    facts_per_relation=1,
    t=0.2,
    steps=3,
    lambda1=2.0,
    lambda2=2.0,
    embedding="input",
    n_locality=4,
    controls=["random"],
    corpus="demo",
    ppl_entries=1,
    ppl_max_tokens=32,
)
UNITS = 5 * 3  # five tasks, a unit a fact


# -- what is killed --------------------------------------------------------------------------------
def small_study(parameters):
    """Localisation, edits, query-KN mapping, attention and synapses of three facts, one fact a
    unit, with tables."""
    store.UNIT_FACTS = 1
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


def serve():
    """Load the model once, fork a child for each line that comes in, and say how it ended."""
    torch.set_num_threads(1)
    store.cached_model("demo/gpt2")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            child(**order)


def child(runs, parameters, threads=1):
    status = 1
    try:
        said = os.open(runs + ".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        torch.set_num_threads(threads)
        paths.RUNS, compute = Path(runs), store.compute_unit

        def logged(unit):
            with open(runs + ".log", "a") as log:
                log.write(f"{unit.key}\n")
            return compute(unit)

        store.compute_unit = logged
        small_study(parameters)
        status = 0
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# -- who kills it ----------------------------------------------------------------------------------
class Server:
    """Starts children, one after the other."""

    def __init__(self, hash_seed):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(hash_seed),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_kills; test_kills.serve()"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # a shell's background job ignores Ctrl-C, and so would all that it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, runs, parameters=PARAMETERS, **more):
        self.process.stdin.write(
            json.dumps(dict(runs=str(runs), parameters=parameters, **more)) + "\n"
        )
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self, patience):
        """Whether the child ends within `patience` seconds; its status is then to be read with
        `status`."""
        return bool(select.select([self.process.stdout], [], [], patience)[0])

    def status(self):
        return int(self.process.stdout.readline())

    def run(self, runs, **more):
        self.start(runs, **more)
        assert self.status() == 0, said(runs)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server(1)
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """(folder, seconds) of a run that nobody disturbs."""
    runs, start = tmp_path_factory.mktemp("kills") / "undisturbed", time.time()
    server.run(runs)
    assert len(computed(runs)) == len(set(computed(runs))) == UNITS
    return runs, time.time() - start


def said(runs):
    return Path(f"{runs}.said").read_text()


def computed(runs):
    """The keys of the units whose computing began, in order."""
    log = Path(f"{runs}.log")
    return log.read_text().split() if log.exists() else []


def results(runs, suffixes=(*TABLES, ".parquet")):
    """{relative path: bytes} of all result files; records hold times, so they are left out."""
    return {
        str(path.relative_to(runs)): path.read_bytes()
        for path in sorted(Path(runs).rglob("*"))
        if path.suffix in suffixes
    }


def kill_at_random(server, undisturbed, folder, kills, seed):
    clean, seconds = results(undisturbed[0]), undisturbed[1]
    assert len(clean) >= UNITS + 4 * 3 + 3
    rng, done, rounds, lost = random.Random(seed), 0, 0, 0
    while done < kills:
        runs, before, finished = folder / f"round{rounds}", done, False
        while not finished:
            pid, fatal = server.start(runs), done < kills and rng.random() * 0.4 * seconds
            finished = server.ended(fatal) if done < kills else server.ended(60)
            if not finished:
                os.kill(pid, signal.SIGKILL)
            status = server.status()
            assert status == (0 if finished else -9) or status == 0, said(runs)
            finished, done = status == 0, done + (status == -9)
        assert results(runs) == clean
        assert not [
            path
            for path in runs.rglob(".*")
            if path.suffix == ".tmp" and path.parent.name == "units"
        ]
        assert UNITS <= len(computed(runs)) <= UNITS + done - before
        lost, rounds = lost + len(computed(runs)) - UNITS, rounds + 1
        shutil.rmtree(runs)
        Path(f"{runs}.log").unlink()
    assert done == kills
    assert lost > 0, "no kill hit a unit at work, so nothing was tried"


def test_20_kills_cost_one_unit_each_at_most_and_change_no_byte_of_any_result(
    server, undisturbed, tmp_path
):
    kill_at_random(server, undisturbed, tmp_path, 20, seed=0)


@pytest.mark.slow
def test_100_kills_cost_one_unit_each_at_most_and_change_no_byte_of_any_result(
    server, undisturbed, tmp_path
):
    kill_at_random(server, undisturbed, tmp_path, 100, seed=1)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_study_that_is_asked_to_stop_does_so_in_seconds_and_resumes(
    server, undisturbed, tmp_path, number, status
):
    runs = tmp_path / "asked"
    pid = server.start(runs)
    while len(computed(runs)) < 4:
        time.sleep(0.01)
    asked = time.time()
    os.kill(pid, number)
    assert server.status() == status and time.time() - asked < 15
    if number == signal.SIGINT:
        assert f"kept in {runs / 'default' / 'units'}, the same command resumes" in said(runs)
    kept = results(runs, (".parquet",))
    server.run(runs)
    assert results(runs) == results(undisturbed[0]) and kept.items() <= results(runs).items()
    assert len(computed(runs)) <= UNITS + 1


# -- reproducible ----------------------------------------------------------------------------------
def test_a_fresh_process_makes_the_same_bytes_from_what_the_record_holds(
    server, undisturbed, tmp_path
):
    """Another process with another hash seed, so that no order of a set can hide in a result."""
    entry = read_record(undisturbed[0] / "default" / "results" / "demo--gpt2" / "ig" / "run.json")[
        "small"
    ]
    assert {"torch", "transformers", "numpy", "python", "qlutils"} <= set(entry["versions"])
    assert entry["model"].keys() == {
        "name",
        "revision",
        "fingerprint",
        "device",
        "dtype",
        "threads",
    }
    assert all(len(entry["inputs"][name]) == 64 for name in ("content", "facts"))
    assert entry["inputs"]["code"] == identity.code_versions()
    assert (
        entry["inputs"]["seed"] == 0
        and entry["command"]
        and entry["seconds"] > 0
        and entry["platform"]
    )
    assert sum(work["units"] for work in entry["work"].values()) == UNITS
    assert all(work["version"] >= 1 and work["seconds"] >= 0 for work in entry["work"].values())
    fresh = Server(2)
    try:
        fresh.run(tmp_path / "again", parameters=entry["parameters"])
    finally:
        fresh.close()
    assert results(tmp_path / "again") == results(undisturbed[0])


def test_two_threads_find_the_knowledge_neurons_of_one(server, undisturbed, tmp_path):
    """Float sums depend on the number of threads, so a score may move by 1e-4 of the query's
    largest; a neuron may then leave or enter the set only if its score is that close to the
    threshold."""
    server.run(tmp_path / "two", threads=2)
    one, two = (
        read_parquet(runs / "default" / "results" / "demo--gpt2" / "ig" / "queries.parquet")[
            0
        ].to_pandas()
        for runs in (undisturbed[0], tmp_path / "two")
    )
    assert (one["prompt"] == two["prompt"]).all() and (one["known"] == two["known"]).all()
    for a, b in zip(one.itertuples(), two.itertuples()):
        scores = [
            dict(zip(zip(row.layer, row.neuron), row.score / row.score.max())) for row in (a, b)
        ]
        for neuron in scores[0].keys() | scores[1].keys():
            first, second = (
                part.get(neuron, 0.05) for part in scores
            )  # what is stored lies above 0.05
            assert abs(first - second) < 1e-4, (a.prompt, neuron)
            assert (first > 0.2) == (second > 0.2) or abs(first - 0.2) < 1e-4
        assert np.isclose(a.probability, b.probability, rtol=1e-5)


# -- through the driver ----------------------------------------------------------------------------
OPEN = """
import os, time
from qlutils.experiments import localize
from qlutils.study import store
from qlutils.study.notebook import Study
study = Study.open("{}", globals())
"""
LOCALISE = """
store.UNIT_FACTS, compute = 1, store.compute_unit
def slowly(unit):
    with open({log!r}, "a") as log:
        log.write(unit.key + "\\n")
    time.sleep({pause})
    return compute(unit)
store.compute_unit = slowly
queries = localize.localise(study, steps=steps)
study.table(queries[["fact", "prompt", "probability"]], "localisation")
"""
COMPARE = """
from qlutils.experiments.consistency import consistency_summary, classified_facts
facts = {{name: classified_facts(study.load("queries", name)) for name in study.methods_done()}}
study.table(consistency_summary(facts), "table1")
"""
HEAD = (
    "model = 'demo/gpt2'\n{}\ndata = 'demo'\nrelations = None\nfacts_per_relation = None\nseed = "
    "0\n"
    "output = 'default'\nsteps = 3"
)


def write_books(folder, log, pause):
    """Notebooks 01 and 02, small; every unit logs its key and first sleeps."""
    folder.mkdir()
    for name, method, code in (
        ("01_localize", "method = 'ig'", LOCALISE),
        ("02_consistency", "methods = ['ig']", COMPARE),
    ):
        kernel = {"name": "x", "display_name": "x", "language": "python"}
        book = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        book.cells = [
            nbformat.v4.new_code_cell(HEAD.format(method), metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(OPEN.format(name) + code.format(log=str(log), pause=pause)),
        ]
        for number, cell in enumerate(book.cells):
            cell["id"] = f"cell{number}"
        nbformat.write(book, folder / f"{name}.ipynb")
    return folder


def drive(books, runs, log_seconds=60):
    options = [
        "--models",
        "demo/gpt2",
        "--methods",
        "ig",
        "--relations",
        *RELATIONS,
        "--facts-per-relation",
        "1",
    ]
    env = {**os.environ, "QLUTILS_RUNS": str(runs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from qlutils import run; from qlutils.driver import running; "
        f"running.LOG_SECONDS = {log_seconds}; "
        f"sys.exit(run.main({options!r}, {str(books)!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_driver_killed_and_then_asked_to_stop_while_the_kernel_computes_loses_no_more(
    undisturbed, tmp_path
):
    books, runs = write_books(tmp_path / "books", tmp_path / "runs.log", 0.4), tmp_path / "runs"
    for begun, number, status in ((1, signal.SIGKILL, -9), (3, signal.SIGTERM, 143)):
        driver = drive(books, runs)
        while len(computed(runs)) < begun:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        driver.send_signal(number)
        asked, output = time.time(), driver.communicate(timeout=30)
        assert driver.returncode == status and time.time() - asked < 20
        assert (
            number == signal.SIGKILL
            or "to go on:\n    ./run_all.sh --models demo/gpt2" in output[1]
        )
    driver = drive(books, runs)
    output = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    assert 3 <= len(computed(runs)) <= 3 + 2 and len(set(computed(runs))) == 3
    # the same units, to the byte, as in a plain process
    units = {name: data for name, data in results(runs).items() if "/units/" in name}
    assert len(units) == 3 and units.items() <= results(undisturbed[0]).items()
    made = runs / "default" / "results" / "demo--gpt2"
    assert {path.name for path in made.rglob("*.csv")} == {"localisation.csv", "table1.csv"}
    assert {path.suffix for path in runs.rglob(".*") if path.is_file()} <= {".lock", ""}


def test_a_log_says_again_and_again_what_runs_how_far_it_is_and_for_how_long(tmp_path):
    """On a terminal a bar does; a log gets a line a minute, here every 0.1 seconds."""
    books, runs = write_books(tmp_path / "books", tmp_path / "runs.log", 0.5), tmp_path / "runs"
    driver = drive(books, runs, log_seconds=0.1)
    said = driver.communicate(timeout=120)[1]
    assert driver.returncode == 0, said
    lines = [line for line in said.splitlines() if "notebooks done; at work: " in line]
    told = "\n".join(re.sub(r"^\d+ min, ", "", line) for line in lines)
    first, left = "0/2 notebooks done; at work: 01 gpt2 ig", r", [\d:]+ left"
    for state in (
        first,
        rf"{first} 0/3 units, \? left",
        f"{first} 1/3 units{left}",
        f"{first} 2/3 units{left}",
        "1/2 notebooks done; at work: 02 gpt2",
    ):
        assert re.search(f"^{state}$", told, re.M), (state, told)
