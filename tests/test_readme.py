"""The README as a newcomer takes it: each command works at a small size, and each link, name and
number is true.

Commands are read from the README itself. One that no entry of `HOW` can run fails, so none is added
without a test.
"""

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import transformers
import yaml
from tiny import (
    WORDS,
    readme_table,
    run_cells,
    save_checkpoint,
    save_dataset,
    without_kernels,
    word_tokenizer,
)

from qlutils import facts as data
from qlutils import paths, run
from qlutils.checks import METHODS
from qlutils.driver import plan
from qlutils.driver.arguments import parser
from qlutils.driver.jobs import plan_jobs
from qlutils.model import pretrained
from qlutils.model.loading import BUNDLED
from qlutils.paths import ROOT
from qlutils.study.parameters import declared_parameters

README = (ROOT / "README.md").read_text("utf-8")
MADE = (ROOT / "figures/README.md").read_text("utf-8")
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PAPER = {
    "gpt2": transformers.GPT2Config(),
    "meta-llama/Llama-2-7b-hf": transformers.LlamaConfig(),  # its defaults are these shapes
    "meta-llama/Meta-Llama-3-8B": transformers.LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
    ),
}
PROGRAMS = r"(\./run_all\.sh|\.venv/bin/\w+|mamba|conda|hf|pip|python3?|jupyter|git|sudo|apt-get)\s"


# --- what the README says -------------------------------------------------------------------------
def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def spans(text):
    """Code spans of the prose, also those that a line break cuts."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    found = re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", prose)
    return [" ".join(span.split()) for span in found]


def commands(text):
    """Every command of a text's bash blocks and code spans, once, without comments."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += [span for span in spans(text) if re.match(PROGRAMS, span)]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return list(dict.fromkeys(shlex.join(part) for part in parts if part))


def example(word):
    """The block of Python that has a word."""
    [found] = [block for block in blocks(README, "python") if word in block]
    return found


# --- running the commands -------------------------------------------------------------------------
HOW = {}  # pattern of a command: the function that runs it small


def runs_commands(pattern):
    return lambda function: HOW.setdefault(pattern, function)


@pytest.fixture
def room(tmp_path, runs, monkeypatch, capsys):
    """An empty folder to work in, with results going nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return SimpleNamespace(folder=tmp_path, runs=runs, patch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("command", commands(README + MADE))
def test_every_command_does_what_the_readme_says(command, room):
    how = [function for pattern, function in HOW.items() if re.fullmatch(pattern, command)]
    assert how, "no test knows how to run this command"
    how[0](shlex.split(command), room)


def shell(*command, **options):
    """A program's output; it must succeed."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def script(room, *options, extra=""):
    """Output of the real run_all.sh, which must not install anything: where it would, of the
    program behind it."""
    own, stamp = Path(sys.prefix) == ROOT / ".venv", Path(sys.prefix, f".qlutils-installed{extra}")
    env = {**os.environ, "VIRTUAL_ENV": "" if own else sys.prefix}
    want = shell("cksum", ROOT / "pyproject.toml").split()[:2]
    if own and stamp.exists() and stamp.read_text().split()[-2:] == want:
        return shell(ROOT / "run_all.sh", *options, cwd=room.folder, env=env)
    module = ["pytest", *options[1:]] if options[:1] == ("test",) else ["qlutils.run", *options]
    return shell(sys.executable, "-m", *module, cwd=ROOT, env=env)


def jobs_of(options):
    return plan_jobs(parser().parse_args(options), paths.NOTEBOOKS)[0]


def check_whole(jobs, models):
    """They are a whole run: 01 by three methods, 02 of all of them, the others by one."""
    later = dict.fromkeys(("02", "03", "04", "05", "06", "07"), len(models))
    wanted = {"01": 3 * len(models), **later, "re": 1}
    assert Counter(job.notebook.stem[:2] for job in jobs) == wanted
    assert {job.model for job in jobs} - {None} == set(models)


@runs_commands(r"\./run_all\.sh")
def default_run(words, room):
    """The real script, with one notebook for one fact; and the plan of all of it."""
    few = "--models demo/gpt2 --methods ig --relations P36 --facts-per-relation 1 --only 01"
    assert re.search(r"01_localize demo/gpt2 ig +done", script(room, *few.split()))
    executed = nbformat.read(*(room.runs / "default/notebooks").glob("*.ipynb"), as_version=4)
    shown = [one for cell in executed.cells for one in cell.get("outputs", ())]
    assert any("image/png" in one.get("data", {}) for one in shown)
    assert not [one for one in shown if one.get("name") == "stderr"], "it warns"
    check_whole(jobs := jobs_of([]), BUNDLED)
    given = jobs[-1].parameters
    assert (given["output"], given["facts_per_relation"]) == ("default", 2)


@runs_commands(r"\./run_all\.sh test")
def collected(words, room):
    said = script(room, "test", "--collect-only", "-q", "tests/test_house.py", extra="[test]")
    assert re.search(r"tests/test_house\.py(::|: \d+)", said)


@runs_commands(r"\./run_all\.sh --help")
def explained(words, room):
    said = script(room, "--help")
    assert [one for one in parser()._option_string_actions if one not in said] == []


def use_pararel(room):
    """ParaRel where this machine has it, else a small folder in its layout, as if downloaded."""
    folder = ROOT.parent / "shared/data/pararel/data"
    if not folder.is_dir():
        folder = Path(save_dataset(room.folder / "pararel"))
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.jsonl")]
        room.patch.setattr(data, "pararel_registry", lambda: dict.fromkeys(files))
    room.patch.setenv("QLUTILS_CACHE", str(folder))


@runs_commands(r"\./run_all\.sh --(models (gpt2|pretrained/)|output sample).*")
def planned(words, room):
    """Needs a GPU, gated weights, hundreds of MB or hours: the real parser and planner instead,
    every job with its parameters."""
    use_pararel(room)
    jobs = jobs_of(words[1:])
    models = [word for word in words if word in PAPER or word.startswith("pretrained/")] or BUNDLED
    assert set(models) <= {*PAPER, *pretrained.SOURCES, *BUNDLED}
    if not {"--methods", "--only"} & set(words):
        check_whole(jobs, models)
    assert {job.model for job in jobs} - {None} == set(models)
    for given in (job.parameters for job in jobs):
        assert given["data"] == ("pararel" if "pararel" in words else "demo")
        assert (given["facts_per_relation"] is None) == ("--full" in words)
    for given in (job.parameters for job in jobs if job.is_of("01")):
        assert given["known_prompts"] == 3 * ("--known-prompts" in words)
        assert given.get("rule") == ("converged" if "converged" in words else None)


@runs_commands(r"\./run_all\.sh --refresh")
def refreshed(words, room):
    """What it writes is in driver/test_committed.py; that it would run, here."""
    called = []
    room.patch.setattr(run, "refresh", lambda: called.append(1) or 0)
    assert run.main(words[1:]) == 0 and called


@runs_commands(r"\./run_all\.sh --plan .*")
def papers_plan(words, room):
    """From configurations that transformers writes, as from the table of shapes; with a given speed
    of the device."""
    use_pararel(room)
    room.patch.setattr(plan, "matmul_rate", lambda *_: ("a device", "bfloat16", 1e15))
    assert run.main(words[1:]) == 0
    by_table = room.capsys.readouterr().out
    for name, config in PAPER.items():
        config.save_pretrained(room.folder / name)
        assert len(re.findall(rf"^ *{name} +(?:ig|sig|amig) ", by_table, re.M)) == 3
    assert run.main(words[1:]) == 0
    assert room.capsys.readouterr().out == by_table
    assert "Nothing was started" in by_table and not list(room.runs.glob("*"))


@runs_commands(r"\./run_all\.sh --models \./my-model --data \./my-facts .*")
def own_model_and_facts(words, room):
    """The driver itself on a folder model and folder facts; the notebooks run in this process,
    without a kernel."""
    save_checkpoint(room.folder / "my-model", tokenizer=word_tokenizer(WORDS))
    save_dataset(room.folder / "my-facts")

    without_kernels(room.patch)
    assert run.main([*words[1:], "--methods", "ig"]) == 0
    assert "2 done in" in room.capsys.readouterr().out
    [table1] = (room.runs / "mine" / "results").rglob("table1.csv")
    assert "ig" in table1.read_text()


@runs_commands(r"\./run_all\.sh --scheduler \S+")
def cluster(words, room):
    assert parser().parse_args(words[1:]).scheduler


@runs_commands(r"\.venv/bin/jupyter lab \S+")
def lab(words, room):
    """What happens then is in explorer/test_browser.py."""
    programs = [Path(sys.executable).with_name(name) for name in ("jupyter", "jupyter-lab")]
    assert (ROOT / words[-1]).is_file() and all(program.exists() for program in programs)


@runs_commands(r"\.venv/bin/pip install -e '?\.\[\w+\]'?")
def extra(words, room):
    [name] = re.findall(r"\[(\w+)\]", words[-1])
    assert any(need.startswith("dask-jobqueue") for need in PROJECT["optional-dependencies"][name])


@runs_commands(r"mamba env create -f environment\.yml|conda activate \S+")
def conda_environment(words, room):
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, packages = wanted["dependencies"]
    assert python.split(",")[0] == f"python{PROJECT['requires-python']}" and pip == "pip"
    assert packages == {"pip": ["-e ."]}  # so that pyproject.toml stays the one list of versions
    assert wanted["name"] == PROJECT["name"] and words[-1] in ("environment.yml", wanted["name"])


@runs_commands(r"hf auth login")
def login(words, room):
    program = Path(sys.executable).with_name("hf")
    assert "token" in shell(program, *words[1:], "--help").lower()


def test_no_command_or_block_hides_from_the_tests():
    kinds = ("bash", "python", "bibtex")
    assert set(re.findall(r"^```(\w*)$", README, re.M)) - {""} == set(kinds)
    assert README.count("```") == 2 * sum(len(blocks(README, kind)) for kind in kinds)
    assert len(blocks(README, "python")) == 3
    some = (
        "Then `./run_all.sh\n--so` and `so`.\n\n```bash\n.venv/bin/go \\\n  on && hf x # y\n```\n"
    )
    assert commands(some) == [".venv/bin/go on", "hf x", "./run_all.sh --so"]


def test_every_option_and_parameter_named_in_prose_exists():
    named = [span.split()[0] for span in spans(README) if span.startswith("--")]
    assert named and set(named) <= set(parser()._option_string_actions)
    declared = {name for path in NOTEBOOKS for name in declared_parameters(path)}
    choices = "\n".join(row["here"] for row in readme_table("## Where we differ"))
    given = [name for inside in re.findall(r"\(([^()]*)\)", choices) for name in spans(inside)]
    assert len(given) >= 6 and set(given) <= declared


# --- Python ---------------------------------------------------------------------------------------
def test_the_python_example_runs_as_it_stands_and_shows_an_answer_that_changes(capsys):
    exec(compile(example("scale_neurons"), "README.md", "exec"), {})
    said = capsys.readouterr().out
    cs1, cs2 = (float(re.search(rf"{name}=([\d.]+)", said)[1]) for name in ("cs1", "cs2"))
    assert 0 <= cs1 <= cs2 <= 1
    shown = re.findall(r"tensor\(\[(.*?)\]", said)
    before, after = (list(map(float, re.findall(r"[\d.]+(?:e-?\d+)?", one))) for one in shown)
    assert len(before) == len(after) == 2 and all(0 <= p <= 1 for p in before + after)
    # it knows the answers, and forgets the first
    assert min(before) > 0.5 and after[0] < before[0] / 2


def test_the_counterfact_example_makes_a_file_of_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subject = "Danielle Darrieux"
    rewrite = dict(prompt="The mother tongue of {} is", relation_id="P103", subject=subject)
    rewrite |= dict(target_new={"str": "English"}, target_true={"str": "French", "id": "Q150"})
    others = [f"Shayna does this. {subject}, a native", f"{subject} spoke the language"]
    record = dict(case_id=0, requested_rewrite=rewrite, paraphrase_prompts=others)
    Path("counterfact.json").write_text(json.dumps([record]))
    exec(compile(example("counterfact"), "README.md", "exec"), {})
    [fact] = data.load_facts("facts.jsonl")
    assert (fact.relation, fact.subject, fact.object) == ("P103", subject, "French")
    assert fact.prompts == (f"The mother tongue of {subject} is", *others)


def test_the_slurm_example_is_a_call_that_dask_jobqueue_takes():
    calls = [node for node in ast.walk(ast.parse(example("dask"))) if isinstance(node, ast.Call)]
    [call] = [call for call in calls if ast.unparse(call.func) == "SLURMCluster"]
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    slurm = pytest.importorskip("dask_jobqueue.slurm", reason="read only: extra `cluster` missing")
    header = slurm.SLURMJob("tcp://127.0.0.1:1", "worker", **given).job_script()
    assert "#SBATCH --gres=gpu:1" in header and f"#SBATCH -t {given['walltime']}" in header


# --- notebooks on their own -----------------------------------------------------------------------
TINY = dict(model="demo/gpt2", models=["demo/gpt2"], methods=["ig"], relations=["P36"])
TINY |= dict(facts_per_relation=2, control_models=False, control_queries=2, output="alone")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_introduced_and_runs_alone(notebook, runs, monkeypatch):
    """The report here, 01 in `default_run`, the others in experiments/test_notebooks.py and
    explorer/test_explorer.py."""
    first = nbformat.read(notebook, as_version=4).cells[0].source
    assert first.startswith("# ") and "*Inputs:*" in first and "*Writes:*" in first
    assert f"({notebook.name})" in (ROOT / "notebooks/README.md").read_text("utf-8")
    if notebook.stem == "report":
        monkeypatch.setenv("QLUTILS_MODELS", "[]")
        declared = declared_parameters(notebook)
        run_cells(notebook, {name: TINY[name] for name in declared if name in TINY})
        assert any((runs / "alone" / "results").rglob("*.csv"))


# --- files ----------------------------------------------------------------------------------------
def test_every_file_that_is_linked_named_or_said_to_prove_a_promise_exists():
    files = []
    for name in ("README", "notebooks/README", "figures/README", "qlutils/demo/MODEL_CARD"):
        page = ROOT / f"{name}.md"
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
        files += [page.parent / link for link in links if "://" not in link]
    folders = ("tests/", "qlutils/", "notebooks/", "figures/")
    files += [ROOT / span for span in spans(README) if span.startswith(folders)]
    faults = spans((ROOT / "tests/FAULTS.md").read_text("utf-8"))
    proofs = [spans(row["proved in `tests/` by"]) for row in readme_table("## What it promises")]
    assert all(proofs)
    named = {name for names in [*proofs, faults] for name in names if name.endswith(".py")}
    files += [ROOT / "tests" / name for name in named]
    assert len(files) > 60 and [str(path) for path in files if not path.exists()] == []
    wanted = "test_hostile test_security test_invariants test_readme driver/test_kills"
    wanted += " study/test_faults"
    assert {f"{name}.py" for name in wanted.split()} <= {name for one in proofs for name in one}


# --- numbers --------------------------------------------------------------------------------------
KNOWN, ANY, VARIED = "known-pararel", "paper-pararel", "notebooks"  # folders below figures/
FEW, BY_SIG, OURS = "paper-amig-pararel", "known-sig-pararel", "known-bundled"
SMALL, LARGE = "pretrained/smollm2-135m", "pretrained/gemma-3-270m"
COLUMNS = {  # of the README's tables
    "SmolLM2-135M": (KNOWN, SMALL),
    "Gemma 3 270M": (KNOWN, LARGE),
    "SmolLM2, bundled facts": (VARIED, SMALL),
}
ALL = {"threshold": "all", "class": "all"}
GROUPS = (
    "the fact's own queries",
    "one pattern, different objects",
    "different patterns and objects, different relations",
)


def rows(folder, name, **where):
    """Rows of a committed CSV below figures/ in which columns have these texts."""
    with open(paths.FIGURES / folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    assert found, f"{folder}/{name}.csv has no row with {where}"
    return found


def row(folder, name, **where):
    [found] = rows(folder, name, **where)
    return found


def of(folder, model):
    return f"{folder}/{model.replace('/', '--')}"


def percent(*values):
    """Shares as "96 / 94 / 37 %", each "–" where it was not measured."""
    return " / ".join(f"{100 * float(one):.0f}" if one else "–" for one in values) + " %"


def share(row, name):
    return percent(row[name]) if row[name] else "–"


def numbers(*values, digits=2):
    return " / ".join(f"{float(one):.{digits}f}" for one in values)


def interval(row, name, digits=2):
    value, low, high = (numbers(row[name + end], digits=digits) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def of_all_facts(rows, name):
    """The mean of a column over classes that together hold all facts."""
    counted = [(int(row["n"]), float(row[name])) for row in rows if row["n"] not in ("", "0")]
    return sum(n * value for n, value in counted) / sum(n for n, _ in counted)


def control(number, name, folder, model, kinds, method="ig"):
    """The CS2 of kinds of groups."""
    where = dict(model=model, method=method)
    return [row(folder, f"control{number}_{name}", **where, kind=kind)["cs2"] for kind in kinds]


def found_neurons(folder, model):
    """The rows on KNs of a column of the table."""
    own = of(folder, model)
    localised = row(own, "ig/localisation")
    consistency = row(own, "all/consistency", method="ig")
    classes = {name: row(own, "all/table1", threshold=name, method="ig") for name in THRESHOLDS}
    answered = int(localised["n_known"]) / int(localised["n_queries"])
    yield f"{consistency['n']}, {int(localised['n_queries']):,} ({percent(answered)})"
    yield interval(consistency, "cs2")
    yield numbers(*control(1, "null", folder, model, GROUPS))
    yield numbers(*control(2, "noise", folder, model, ("variants", "neighbours")))
    low, high = (100 * float(classes["static"][f"R_II_{end}"]) for end in ("low", "high"))
    yield f"{share(classes['static'], 'R_II')} [{low:.0f}, {high:.0f}]"
    noise = row(own, "all/otsu_null", method="ig")
    yield f"{share(classes['otsu'], 'R_II')} ({share(noise, 'R_II')})"


def changed_answers(folder, model):
    """What edits, attention and the rule of the integral do, the other rows."""
    own = of(folder, model)
    whole = (paths.FIGURES / own / "ig/table3.csv").is_file()  # was notebook 07 run for it?

    def edit(op, neurons):
        return row(own, f"ig/table{2 + whole}", **ALL, op=op, neurons=neurons)

    for neurons in ("local", "global", "cas", "local (random)"):
        if neurons == "cas" and not whole:
            yield "–"
            continue
        done = edit("erasure", neurons)
        size = float(done["neurons_edited"])
        yield f"{percent(done['rel'], done['gen'], done['loc'])} ({size:.0f})"
    erased, said = (row(own, "ig/table2_loc", op=op, neurons="local") for op in ("erase", "update"))
    yield percent(erased["loc_same"], erased["loc_other"])
    updated = edit("update", "local")
    yield percent(updated["rel"], updated["gen"], said["loc_new"])
    yield share(row(own, "ig/table2", **ALL, op="update", neurons="local"), "broken")
    most = rows(own, "ig/fig5_values", threshold="otsu")
    yield percent(*(of_all_facts(most, name) for name in ("predominance", "predominance_rest")))
    names = ("share in column 0", "jaccard", "jaccard_rest")
    first, every, rest = (row(own, "ig/synapses", quantity=name)["mean"] for name in names)
    yield f"{percent(first)}; {numbers(every, rest)}"
    paper, converged = (rows(own, "all/by_rule", rule=rule)[0] for rule in ("right", "converged"))
    yield f"{numbers(paper['jaccard'])}; {numbers(paper['cs2'], converged['cs2'])}"


def agreement(cs2, share_ii):
    return f"{cs2:.2f}; {100 * share_ii:.0f} %"


THRESHOLDS = ("static", "otsu")
PRINTED = json.loads((ROOT / "qlutils/show/paper_values.json").read_text("utf-8"))["tables"]


def paper_agreement(threshold, method="ig"):
    """CS2 of all facts, the mean of the classes', and the share of K_II, of the paper's models."""
    for model in PAPER:
        key = f"{model}|{threshold}|{method}"
        share_i, cs2_i, share_ii, cs2_ii, *_ = PRINTED["1"]["rows"][key]
        yield share_i * cs2_i + share_ii * cs2_ii, share_ii


def measured_agreement():
    runs = (ANY, "any fact"), (KNOWN, "facts it knows"), (OURS, "bundled facts it knows")
    for (folder, facts), name in product(runs, list(COLUMNS)[:2]):
        cells = dict.fromkeys(METHODS, "–")
        for other in (folder, BY_SIG) if folder == KNOWN else (folder,):
            own = of(other, COLUMNS[name][1])
            for found in rows(own, "all/consistency"):
                method = found["method"]
                static = row(own, "all/table1", threshold="static", method=method)
                cells[method] = agreement(float(found["cs2"]), float(static["R_II"]))
        yield f"{name}, {facts}", *cells.values()


def test_the_first_table_is_the_papers_and_the_committed_ones():
    by_method = [[agreement(*one) for one in paper_agreement("static", name)] for name in METHODS]
    names = [f"{name}, the paper" for name in ("GPT-2", "LLaMA-2-7B", "LLaMA-3-8B")]
    wanted = [*zip(names, *by_method), *measured_agreement()]
    found = readme_table("## What it finds on real models")
    assert [(*one.values(),) for one in found] == wanted


def test_the_table_of_real_models_is_the_committed_one():
    table = readme_table("### In numbers")
    there = {path.name for path in (paths.FIGURES / KNOWN).glob("pretrained--*")}
    assert {of("", model)[1:] for _, model in COLUMNS.values()} == there
    for name, where in COLUMNS.items():
        assert [one[name] for one in table] == [*found_neurons(*where), *changed_answers(*where)]


def test_what_the_paper_found_is_what_it_prints():
    def edits(op, neurons, columns=3):
        printed = PRINTED["3"]["rows"]
        values = {name: printed[f"gpt2|{op}|{neurons}|{name}"][:columns] for name in ("I", "II")}
        return "; ".join(f"{name}: {percent(*some)}" for name, some in values.items())

    cs2, static = zip(*paper_agreement("static"))
    wanted = {
        1: ", ".join(numbers(one) for one in cs2),
        4: ", ".join(percent(one) for one in static),
        5: ", ".join(percent(one) for _, one in paper_agreement("otsu")),
        6: edits("erasure", "local"),
        7: edits("erasure", "global"),
        8: edits("erasure", "cas"),
        11: edits("update", "local", 2),
    }
    table = readme_table("### In numbers")
    assert {place: table[place]["the paper"] for place in wanted} == wanted


def marks(folder, model):
    """A claim's mark by `ig` and, where it was run and differs, by `amig`."""
    for one in rows(folder, "scoreboard", model=model, method="ig"):
        others = rows(folder, "scoreboard", model=model, claim=one["claim"])
        by_amig = {other["method"]: other["mark"] for other in others}.get("amig", one["mark"])
        yield one["mark"] + f" (`amig`: {by_amig})" * (by_amig != one["mark"])


def test_the_marks_of_the_claims_are_the_committed_ones():
    table = readme_table("### Which of the paper's claims hold")
    for name, where in COLUMNS.items():
        assert [one[name] for one in table] == [*marks(*where)]


def told(pattern, folder=KNOWN, models=(SMALL, LARGE)):
    """What the first sentence of "In short" that fits says in the pattern's group, by model."""
    for model in models:
        said = (one["sentence"] for one in rows(folder, "in_short", model=model))
        yield next(found[1] for one in said if (found := re.search(pattern, one)))


def gaps_by_size():
    """What CAS gains over as many neurons, in the other wordings and in other facts: a row a run of
    a real model, method and operation, where there are facts enough for an interval."""
    for path in paths.FIGURES.glob("*/pretrained--*/*/cas_by_size.csv"):
        with path.open(encoding="utf-8") as file:
            for gap in csv.DictReader(file):
                if gap["facts"] == "all facts" and gap["metric"] in ("gen", "loc"):
                    if gap["difference_low"]:
                        yield gap | {"model": of(path.parts[-4], path.parts[-3])}


def sentences():
    """The README's sentences with measured numbers, as they must stand there."""
    erased_local = dict(**ALL, op="erasure", neurons="local")
    both = [of(KNOWN, SMALL), of(KNOWN, LARGE)]
    known = []
    for own in both:
        facts = rows(own, "ig/known_facts")
        few, looked = (sum(int(one[name]) for one in facts) for name in ("known", "scanned"))
        known.append(f"{few} of {looked:,}")
    yield "SmolLM2 knows {} facts looked at, Gemma {} ".format(*known)
    inside = told(r"in (\d+ %) of the facts the answer")
    yield "in {} and {} of those kept the answer stands in the subject".format(*inside)
    more = told(r"against three others .*: (.*) more")
    yield "{} higher than of three others of the same facts in SmolLM2, {} in".format(*more)
    small, large = (row(of(ANY, model), "ig/localisation") for model in (SMALL, LARGE))
    queries = f"{int(large['n_queries']):,} queries of *any fact*"
    yield f"answer few ({small['n_known']} and {large['n_known']} of {queries})"
    varied = [of(OURS, model) for model in (SMALL, LARGE)]
    counts = " and ".join(row(own, "all/consistency", method="ig")["n"] for own in varied)
    yield f"*Bundled facts*: {counts} of this repository's, asked in more varied words"

    capitals = {}
    for folder, model in product((OURS, KNOWN), (SMALL, LARGE)):
        found = rows(folder, "fig3_all", model=model, relation="P36")
        cs2 = [float(one["cs2"]) for one in found]
        capitals[folder, model] = f"{sum(cs2) / len(cs2):.2f}"
    small, large, small_known, large_known = capitals.values()
    gemma = f"in Gemma {large} for {large_known}"
    yield f"in capitals {small} for ParaRel's {small_known}, {gemma}"

    kept = []
    for own in both:
        for neurons in ("local", "local (random)"):
            erased = row(own, "amig/table3", **ALL, op="erasure", neurons=neurons)
            kept.append(share(erased, "loc"))
    yield "by `amig` {} of them in SmolLM2 (random: {}), {} in Gemma".format(*kept[:3])
    sig = [row(of(BY_SIG, model), "sig/table2", **erased_local) for model in (SMALL, LARGE)]
    fail, stay, n = ([one[name] for one in sig] for name in ("gen", "loc", "n"))
    fail, stay = (percent(*some).replace(" /", " and") for some in (fail, stay))
    yield f"By `sig` {fail} fail, and {stay} of other facts stay (n = {', '.join(n)})"
    few = [of(FEW, model) for model in (SMALL, LARGE)]
    kept = [share(row(own, "amig/table2", **erased_local), "loc") for own in few]
    asked = " and ".join(row(own, "amig/localisation")["n_known"] for own in few)
    yield f"by `amig` {' and '.join(kept).replace(' %', '', 1)} stay (of {asked} queries)"
    others = {}
    for method, model in product(("ig", "sig"), (SMALL, LARGE)):
        erased = row(of(ANY, model), f"{method}/table2", **erased_local)
        others.setdefault(method, []).append(share(erased, "gen").removesuffix(" %"))
        others.setdefault("n", []).append(erased["n_gen"])
    assert others["ig"] == ["100", "100"]
    by_sig = f"{' and '.join(others['sig'])} % by `sig` (n = {' and '.join(others['n'][:2])})"
    yield f"Of *any fact* all others fail by `ig`, {by_sig}"
    yield f"where {share(erased, 'loc')} of Gemma's other facts stay"

    moved = []
    for folder in (KNOWN, ANY):
        rules = [rows(of(folder, one), "all/by_rule", method="ig") for one in (SMALL, LARGE)]
        moved.append(max(abs(float(one["cs2"]) - float(other["cs2"])) for one, other in rules))
    yield "CS2 moves by at most {:.2f} (12 known facts) and {:.2f} (10 of *any fact*)".format(
        *moved
    )
    by_amig = []
    for own in both:
        rules = {one["rule"]: one for one in rows(own, "all/by_rule", method="amig")}
        sizes = (numbers(rules[name]["mean_size"], digits=0) for name in ("right", "converged"))
        by_amig += [numbers(rules["right"]["jaccard"]), " in place of ".join(sizes)]
    yield "a Jaccard index of {} with the converged ones in SmolLM2 ({} neurons)".format(*by_amig)
    n = rules["right"]["n"]
    yield "of {} in Gemma ({}; {} known facts each)".format(*by_amig[2:], n)

    one, _, unrelated = control(1, "null", KNOWN, SMALL, GROUPS, "amig")
    shared = f"share {numbers(unrelated)}, one fact's {numbers(one)}"
    yield f"by `amig` in SmolLM2 unrelated queries {shared}"
    [within] = told(r"by Otsu's .*, within relations (.*?) more", ANY, [SMALL])
    yield f"within relations only SmolLM2's of *any fact* do, by `ig` ({within})"
    yield "CS2 of the other half, by {} and {}".format(*told(r"by Otsu's (.*?) more"))
    one, pattern, _ = control(1, "null", VARIED, SMALL, GROUPS)
    yield f"({numbers(pattern)} against {numbers(one)}"
    for model in (SMALL, LARGE):
        one, pattern, _ = control(1, "null", KNOWN, model, GROUPS)
        assert 0.55 < float(pattern) / float(one) < 0.65  # three fifths

    own, others, relation = (
        next(told(pattern))
        for pattern in (
            r"by -(\d+ %) \[[^]]*\] when a query's own",
            r"not its own -(\d+ %)",
            r"what they share -(\d+ %)",
        )
    )
    words = f"not its own {others}, another fact's of the relation {relation}"
    yield f"the own off takes {own} of P(answer), the other wordings' that are {words}"
    moves = r"without the first token.* suppressed (?:(.*?) more|cannot)"
    yield "({} in SmolLM2, {} in Gemma; of *any fact*".format(*told(moves))
    small, large = told(moves, ANY)
    assert small and not large  # "in SmolLM2 only"
    yield "lowers P(answer), too, by {} and {}".format(*told(r"Enhanced, .*? by -(\d+ %)"))
    for name, own in zip(("SmolLM2", "Gemma"), both):
        gaps = {}
        for gap in rows(own, "ig/cas_by_size", op="erase", facts="all facts"):
            gaps[gap["metric"]] = interval(gap, "difference", digits=3)
        yield f"{gaps['gen']} in the other wordings, {gaps['loc']} in other facts ({name}"
    every = list(gaps_by_size())
    clear = [
        gap
        for gap in every
        if not float(gap["difference_low"]) <= 0 <= float(gap["difference_high"])
    ]
    least, *_, most = sorted(float(gap["difference"]) for gap in clear)
    told_of_few = sum(gap["model"] == of(FEW, SMALL) for gap in clear)
    asked = row(of(FEW, SMALL), "amig/localisation")["n_known"]
    counted = f"{len(clear)} can be told ({ {2: 'two'}[told_of_few] } on {asked} queries)"
    yield f"Of {len(every)} such gaps of all runs {counted}, gains of {least:.2f} to {most:.2f}"
    relations = told(r"relations resampled .*: (.*?) \(")
    yield "relations resampled, CS2 is {} and {}".format(*relations)
    where = dict(model="demo/gpt2", method="ig", threshold="static")
    alike = row("sample", "table1_all", **where)
    assert float(alike["R_I"]) == 1  # so that K_I's mean is that of all facts
    where = dict(model="demo/gpt2", **ALL, op="erasure", neurons="local")
    gen = share(row("sample", "table2_all", **where), "gen")
    cs2 = numbers(alike["S_I"])
    yield f"(`demo/gpt2`: CS2 {cs2}), but erasing one wording's neurons makes only {gen}"


def test_every_measured_number_is_the_committed_one():
    text, found = " ".join(README.split()), list(sentences())
    assert len(found) == 26 and [one for one in found if one not in text] == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_the_rules_is_the_measured_table(method):
    cells = [f"`{method}`"]
    for rule in ("`right` 20 (the paper)", "`converged`"):
        for model in list(COLUMNS)[:2]:
            heading = f"## {model}, `{method}`"
            table = readme_table(heading, "tests/benchmarks/results/rules.md")
            two = {one["queries"]: one for one in table if one["rule"] == rule}

            def pair(name, two=two):
                return f"{two['answered'][name]} / {two['other'][name]}"

            evaluations = f" by {pair('evaluations')}" * (rule == "`converged`")
            cells.append(pair("mean Jaccard index") + evaluations)
    assert f"| {' | '.join(cells)} |" in README.splitlines()


def test_the_readme_is_short():
    # 5,000 bytes of it are tables of findings, 2,000 that of model families
    assert len(README.encode()) <= 29_000
