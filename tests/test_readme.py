"""The README as a newcomer takes it: each command works at a small size, and each link, name and
number is true.

Commands are read from the README itself. One that no entry of `HOW` can run fails, so none is added
without a test.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
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
    pages = "README notebooks/README figures/README figures/FINDINGS qlutils/demo/MODEL_CARD"
    for name in pages.split():
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
    assert len(files) > 50 and [str(path) for path in files if not path.exists()] == []
    wanted = "test_hostile test_security test_invariants test_readme test_findings"
    wanted += " driver/test_kills study/test_faults"
    assert {f"{name}.py" for name in wanted.split()} <= {name for one in proofs for name in one}


def test_the_readme_is_short():
    assert len(README.encode()) <= 24_500
