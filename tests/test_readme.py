"""The README as a newcomer takes it: each command works at a small size, and each link, name and
number is true.

Commands are read from the README itself. One that no entry of `HOW` can run fails, so none is added
without a test.
"""

import ast
import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import transformers
import yaml
from tiny import WORDS, save_checkpoint, save_dataset, word_tokenizer

from qlutils import facts as data
from qlutils import paths, run
from qlutils.checks import METHODS
from qlutils.driver import plan, running
from qlutils.driver.arguments import parser
from qlutils.driver.jobs import plan_jobs
from qlutils.model import pretrained
from qlutils.model.loading import BUNDLED
from qlutils.study.parameters import declared_parameters

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LIST = (ROOT / "notebooks/README.md").read_text("utf-8")
MADE = (ROOT / "figures/README.md").read_text("utf-8")
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PARAREL = ROOT.parent / "shared" / "data" / "pararel" / "data"
PAPER = {
    "gpt2": transformers.GPT2Config(),
    "meta-llama/Llama-2-7b-hf": transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "meta-llama/Meta-Llama-3-8B": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
PROGRAMS = r"(\./run_all\.sh|\.venv/bin/\w+|mamba|conda|hf|pip|python3?|jupyter|git|sudo|apt-get)\s"


# --- what the README says -------------------------------------------------------------------------


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def spans(text):
    """Code spans of the prose, also those that a line break cuts."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return [
        span
        for part in prose.split("\n\n")
        for span in re.findall(r"`([^`]+)`", " ".join(part.split()))
    ]


def commands(text):
    """Every command of a text's bash blocks and code spans, once, without comments."""
    lines = [
        line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [span for span in spans(text) if re.match(PROGRAMS, span)]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return list(dict.fromkeys(shlex.join(part) for part in parts if part))


def table(text, heading):
    """The first Markdown table after a heading, as dicts."""
    lines = text.split(heading, 1)[1].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def committed(folder, name, **where):
    """Rows of a committed CSV below figures/ in which columns have these texts."""
    with open(paths.FIGURES / folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    assert rows, f"{folder}/{name}.csv has no row with {where}"
    return rows


# --- running the commands -------------------------------------------------------------------------

HOW = {}  # pattern of a command: the function that runs it small


def runs_commands(pattern):
    def keep(function):
        HOW[pattern] = function
        return function

    return keep


def runner(command):
    for pattern, function in HOW.items():
        if re.fullmatch(pattern, command):
            return function
    pytest.fail(f"README.md: no test knows how to run this command: {command}")


@pytest.fixture
def room(tmp_path, runs, monkeypatch, capsys):
    """An empty folder to work in, with results going nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return SimpleNamespace(folder=tmp_path, runs=runs, patch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("command", commands(README + MADE))
def test_every_command_does_what_the_readme_says(command, room):
    runner(command)(shlex.split(command), room)


def shell(*command, **options):
    """A program's output; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def script(room, *options, extra=""):
    """Output of the real run_all.sh, which must not install anything: where it would, of the
    program behind it."""
    env = {**os.environ, "VIRTUAL_ENV": "" if Path(sys.prefix) == ROOT / ".venv" else sys.prefix}
    stamp, want = (
        Path(sys.prefix, f".qlutils-installed{extra}"),
        shell("cksum", ROOT / "pyproject.toml").split()[:2],
    )
    if (
        Path(sys.prefix) == ROOT / ".venv"
        and stamp.exists()
        and stamp.read_text().split()[-2:] == want
    ):
        return shell(ROOT / "run_all.sh", *options, cwd=room.folder, env=env)
    module = ["pytest", *options[1:]] if options[:1] == ("test",) else ["qlutils.run", *options]
    return shell(sys.executable, "-m", *module, cwd=ROOT, env=env)


@runs_commands(r"\./run_all\.sh")
def default_run(words, room):
    """The real script, with one notebook for one fact; and the plan of all of it."""
    said = script(
        room,
        "--models",
        "demo/gpt2",
        "--methods",
        "ig",
        "--relations",
        "P36",
        "--facts-per-relation",
        "1",
        "--only",
        "01",
    )
    assert (
        re.search(r"01_localize demo/gpt2 ig +done", said)
        and (room.runs / "default/notebooks").is_dir()
    )
    jobs = jobs_of([])
    assert count(jobs) == {"01": 9, "02": 3, "03": 3, "04": 3, "05": 3, "06": 3, "07": 3, "re": 1}
    assert {job.model for job in jobs} - {None} == set(BUNDLED)
    assert (
        jobs[-1].parameters["output"] == "default"
        and jobs[-1].parameters["facts_per_relation"] == 2
    )


def jobs_of(options):
    return plan_jobs(parser().parse_args(options), paths.NOTEBOOKS)[0]


def count(jobs):
    numbers = [job.notebook.stem[:2] for job in jobs]
    return {number: numbers.count(number) for number in numbers}


@runs_commands(r"\./run_all\.sh test")
def collected(words, room):
    said = script(room, "test", "--collect-only", "-q", "tests/show/test_stats.py", extra="[test]")
    assert re.search(r"tests/show/test_stats\.py(::|: \d+)", said)


@runs_commands(r"\./run_all\.sh --help")
def explained(words, room):
    said = script(room, "--help")
    for option in parser()._option_string_actions:
        assert option in said


def use_pararel(room):
    """ParaRel where this machine has it, else a small folder in its layout, as if downloaded."""
    folder = PARAREL
    if not folder.is_dir():
        folder = Path(save_dataset(room.folder / "pararel"))
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.jsonl")]
        room.patch.setattr(data, "pararel_registry", lambda: dict.fromkeys(files))
    room.patch.setenv("QLUTILS_CACHE", str(folder))


@runs_commands(r"\./run_all\.sh --models gpt2 .*--data pararel.*")
def papers_run(words, room):
    """Needs a GPU and gated weights: the real parser and planner instead, every job with its
    parameters."""
    use_pararel(room)
    jobs = jobs_of(words[1:])
    assert count(jobs) == {"01": 9, "02": 3, "03": 3, "04": 3, "05": 3, "06": 3, "07": 3, "re": 1}
    assert {job.model for job in jobs} - {None} == set(PAPER)
    for job in jobs:
        assert (job.parameters["data"], job.parameters["facts_per_relation"]) == ("pararel", None)


@runs_commands(r"\./run_all\.sh --models pretrained/.*")
def pretrained_run(words, room):
    """Fetches hundreds of MB (tests/model/test_pretrained.py): here the real parser and planner."""
    use_pararel(room)
    jobs = jobs_of(words[1:])
    assert {job.model for job in jobs} - {None} <= set(pretrained.SOURCES)
    assert len({job.model for job in jobs} - {None}) == sum("pretrained/" in word for word in words)
    for job in jobs:
        if job.notebook.stem == "01_localize":
            known = 3 * ("--known-prompts" in words)
            rule = "converged" if "converged" in words else None
            assert (job.parameters["known_prompts"], job.parameters.get("rule")) == (known, rule)


@runs_commands(r"\./run_all\.sh --output sample")
def sample_run(words, room):
    assert count(jobs_of(words[1:])) == count(jobs_of([]))


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
    room.patch.setattr(
        plan, "matmul_rate", lambda device, dtype, shape: ("a device", "bfloat16", 1e15)
    )
    assert run.main(words[1:]) == 0
    by_table = room.capsys.readouterr().out
    for name, config in PAPER.items():
        config.save_pretrained(room.folder / name)
    assert run.main(words[1:]) == 0
    assert room.capsys.readouterr().out == by_table
    for name in PAPER:
        assert len(re.findall(rf"^ *{name} +(?:ig|sig|amig) ", by_table, re.M)) == 3
    assert "Nothing was started" in by_table and not list(room.runs.glob("*"))


@runs_commands(r"\./run_all\.sh --models \./my-model --data \./my-facts .*")
def own_model_and_facts(words, room):
    """The driver itself on a folder model and folder facts; the notebooks run in this process,
    without a kernel."""
    save_checkpoint(room.folder / "my-model", tokenizer=word_tokenizer(WORDS))
    save_dataset(room.folder / "my-facts")

    def execute(notebook, output, parameters, *_):
        run_cells(notebook, parameters)
        nbformat.write(nbformat.v4.new_notebook(), output)
        return ""

    room.patch.setattr(running, "execute", execute)
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
    assert (ROOT / words[-1]).is_file() and Path(sys.executable).with_name("jupyter").exists()
    assert re.search(r"^\d+\.\d+", shell(sys.executable, "-m", "jupyterlab", "--version"))


@runs_commands(r"\.venv/bin/pip install -e '?\.\[\w+\]'?")
def extra(words, room):
    [name] = re.findall(r"\[(\w+)\]", words[-1])
    assert any(need.startswith("dask-jobqueue") for need in PROJECT["optional-dependencies"][name])


@runs_commands(r"mamba env create -f environment\.yml")
def conda_environment(words, room):
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, packages = wanted["dependencies"]
    assert python.split(",")[0] == f"python{PROJECT['requires-python']}" and pip == "pip"
    assert packages == {"pip": ["-e ."]}  # so that pyproject.toml stays the one list of versions


@runs_commands(r"conda activate \S+")
def activated(words, room):
    assert (
        yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["name"]
        == words[-1]
        == PROJECT["name"]
    )


@runs_commands(r"hf auth login")
def login(words, room):
    program = Path(sys.executable).with_name("hf")
    assert "token" in shell(program, *words[1:], "--help").lower()


def test_a_command_that_no_test_runs_is_named():
    added = (
        README
        + "\nThen `./run_all.sh --frobnicate`.\n\n```bash\n.venv/bin/qlutils go  # fast\n```\n"
    )
    new = [command for command in commands(added) if command not in commands(README)]
    assert new == [".venv/bin/qlutils go", "./run_all.sh --frobnicate"]
    for command in new:
        with pytest.raises(pytest.fail.Exception, match=f"no test knows .*{command}"):
            runner(command)


def test_no_block_hides_from_the_tests():
    assert set(re.findall(r"^```(\w*)$", README, re.M)) - {""} == {"bash", "python", "bibtex"}
    assert README.count("```") == 2 * sum(
        len(blocks(README, kind)) for kind in ("bash", "python", "bibtex")
    )
    assert len(blocks(README, "python")) == 3


def test_every_option_and_parameter_named_in_prose_exists():
    known = parser()._option_string_actions
    named = [span.split()[0] for span in spans(README) if span.startswith("--")]
    assert named and set(named) <= set(known)
    declared = {name for path in NOTEBOOKS for name in declared_parameters(path)}
    choices = [row["here"] for row in table(README, "## Where we differ")]
    given = [
        name
        for cell in choices
        for inside in re.findall(r"\(([^()]*)\)", cell)
        for name in spans(inside)
    ]
    assert len(given) >= 6 and set(given) <= declared


# --- Python ---------------------------------------------------------------------------------------


def test_the_python_example_runs_as_it_stands_and_shows_an_answer_that_changes(capsys):
    [example] = [block for block in blocks(README, "python") if "scale_neurons" in block]
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    cs1, cs2 = (float(re.search(rf"{name}=([\d.]+)", said)[1]) for name in ("cs1", "cs2"))
    assert 0 <= cs1 <= cs2 <= 1
    before, after = (
        list(map(float, re.findall(r"[\d.]+(?:e-?\d+)?", inside)))
        for inside in re.findall(r"tensor\(\[(.*?)\]", said)
    )
    assert len(before) == len(after) == 2 and all(0 <= p <= 1 for p in before + after)
    assert (
        min(before) > 0.5 and after[0] < before[0] / 2
    )  # it knows the answers, and forgets the first


def test_the_counterfact_example_makes_a_file_of_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    }
    record = {
        "case_id": 0,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [
            "Shayna does this and Yossel goes still. Danielle Darrieux, a native",
            "Danielle Darrieux spoke the language",
        ],
    }
    (tmp_path / "counterfact.json").write_text(json.dumps([record]))
    [example] = [block for block in blocks(README, "python") if "counterfact" in block]
    exec(compile(example, "README.md", "exec"), {})
    [fact] = data.load_facts("facts.jsonl")
    assert (fact.relation, fact.subject, fact.object) == ("P103", "Danielle Darrieux", "French")
    first, *others = fact.prompts
    assert (
        first == "The mother tongue of Danielle Darrieux is"
        and others == record["paraphrase_prompts"]
    )


def test_the_slurm_example_is_a_call_that_dask_jobqueue_takes():
    [example] = [block for block in blocks(README, "python") if "dask" in block]
    tree = ast.parse(example)
    [call] = [
        node
        for node in ast.walk(tree)
        if ast.unparse(getattr(node, "func", node)) == "SLURMCluster" and isinstance(node, ast.Call)
    ]
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("compiled only: dask_jobqueue is not installed (extra `cluster`)")
    from dask_jobqueue.slurm import SLURMJob

    header = SLURMJob("tcp://127.0.0.1:1", "worker", **given).job_script()
    assert "#SBATCH --gres=gpu:1" in header and f"#SBATCH -t {given['walltime']}" in header


# --- notebooks on their own -----------------------------------------------------------------------


def run_cells(notebook, parameters):
    """Run a notebook's code here, as papermill would: in order, with `parameters` after its own,
    in place of those that it was run with before."""
    names = {"__name__": "__main__", "display": lambda *_, **__: None}
    for cell in nbformat.read(notebook, as_version=4).cells:
        tags = cell.metadata.get("tags", ())
        injected = "injected-parameters" in tags
        sources = [cell.source] if cell.cell_type == "code" and not injected else []
        if "parameters" in tags:
            sources.append(
                "# Parameters\n"
                + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            )
        for source in sources:
            exec(compile(source, Path(notebook).name, "exec"), names)


def runs_alone(notebook):
    """Run a notebook on an empty output with tiny parameters. True, or the message that says what
    to run first."""
    tiny = dict(
        model="demo/gpt2",
        models=["demo/gpt2"],
        methods=["ig"],
        relations=["P36"],
        facts_per_relation=2,
        output="alone",
        device="cpu",
        dtype="float32",
        n_locality=2,
        ppl_entries=1,
        more_controls_facts=1,
        control_models=False,
        control_queries=2,
    )
    try:
        run_cells(
            notebook,
            {name: tiny[name] for name in declared_parameters(notebook) if name in tiny},
        )
    except ValueError as error:
        assert re.search(r"run notebook 0\d", str(error), re.I), error
        return str(error)
    return True


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS[1:], ids=lambda path: path.stem
)  # 01 runs alone in `default_run`
def test_a_notebook_runs_alone_or_says_what_to_run_first(notebook, runs, capsys):
    result = runs_alone(notebook)
    if result is True and not notebook.stem.startswith("explore"):  # which writes nothing
        assert list((runs / "alone" / "results").rglob("*.csv"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_begins_with_its_question_its_inputs_and_what_it_writes(self, notebook):
        first = nbformat.read(notebook, as_version=4).cells[0].source
        assert first.startswith("# ") and "*Inputs:*" in first and "*Writes:*" in first

    def test_is_in_the_list_that_jupyter_lab_shows(self, notebook):
        assert f"({notebook.name})" in LIST


def test_a_notebook_that_breaks_is_not_taken_for_one_that_asks(tmp_path, runs):
    for raised in ("KeyError('queries')", "ValueError('no such column')"):
        cells = [
            nbformat.v4.new_code_cell("t = 0.2", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(f"raise {raised}"),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "02_broken.ipynb")
        with pytest.raises((KeyError, AssertionError)):
            runs_alone(tmp_path / "02_broken.ipynb")


# --- links, files, numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["README.md", "notebooks/README.md", "figures/README.md", "qlutils/demo/MODEL_CARD.md"],
)
def test_every_relative_link_leads_to_a_file(name):
    text, folder = (ROOT / name).read_text("utf-8"), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []


def test_every_file_of_the_project_that_is_named_exists():
    named = [
        span for span in spans(README) if re.match(r"(tests|qlutils|notebooks|figures)/", span)
    ]
    text = (ROOT / "tests/FAULTS.md").read_text("utf-8")
    faults = [f"tests/{span}" for span in spans(text) if span.endswith(".py")]
    assert len(named) > 8 and len(faults) > 10
    assert [name for name in named + faults if not (ROOT / name).exists()] == []


def test_every_promise_names_what_proves_it():
    promises = table(README, "## What it promises")
    assert len(promises) > 10
    proofs = {row["promise"]: spans(row["proved in `tests/` by"]) for row in promises}
    assert all(proofs.values()), proofs
    named = {name for names in proofs.values() for name in names}
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
    assert {
        "test_hostile.py",
        "test_security.py",
        "test_invariants.py",
        "test_readme.py",
        "driver/test_kills.py",
        "study/test_faults.py",
        "explorer/test_browser.py",
    } <= named


KNOWN, ANY, BUNDLED_FACTS = "known-pararel", "paper-pararel", "notebooks"
COLUMNS = {  # of the README's tables: the folder below figures/ and the model
    "SmolLM2-135M": (KNOWN, "pretrained/smollm2-135m"),
    "Gemma 3 270M": (KNOWN, "pretrained/gemma-3-270m"),
    "SmolLM2, bundled facts": (BUNDLED_FACTS, "pretrained/smollm2-135m"),
}
ALL = {"threshold": "all", "class": "all"}
GROUPS = (
    "the fact's own queries",
    "one pattern, different objects",
    "different patterns and objects, different relations",
)
EDITED = ("local", "global", "cas", "local (random)")  # a row of the table each


def own_folder(folder, model):
    return f"{folder}/{model.replace('/', '--')}"


def share(row, name):
    """A share in percent; "–" where it was not measured."""
    return f"{100 * float(row[name]):.0f} %" if row[name] else "–"


def percent(values):
    """Shares as "96 / 94 / 37 %", each "–" where it was not measured."""
    return " / ".join(f"{100 * float(one):.0f}" if one else "–" for one in values) + " %"


def numbers(values):
    return " / ".join(f"{float(one):.2f}" for one in values)


def interval(row, name, digits=2):
    value, *bounds = (f"{float(row[name + end]):.{digits}f}" for end in ("", "_low", "_high"))
    return f"{value} [{', '.join(bounds)}]"


def of_all_facts(rows, name):
    """The mean of a column over classes that together hold all facts."""
    counted = [(int(row["n"]), float(row[name])) for row in rows if row["n"] not in ("", "0")]
    return sum(n * value for n, value in counted) / sum(n for n, _ in counted)


def found_neurons(folder, model):
    """The rows on KNs of a column of the table."""
    own, where = own_folder(folder, model), dict(model=model, method="ig")
    [localised] = committed(own, "ig/localisation")
    [agreement] = committed(own, "all/consistency", method="ig")
    [static] = committed(own, "all/table1", threshold="static", method="ig")
    [otsu] = committed(own, "all/table1", threshold="otsu", method="ig")
    [noise] = committed(own, "all/otsu_null", method="ig")
    groups = [committed(folder, "control1_null", **where, kind=kind)[0] for kind in GROUPS]
    two = ("variants", "neighbours")
    alike = [committed(folder, "control2_noise", **where, kind=kind)[0] for kind in two]
    queries = int(localised["n_queries"])
    answered = 100 * int(localised["n_known"]) / queries
    yield f"{agreement['n']}, {queries:,} ({answered:.0f} %)"
    yield interval(agreement, "cs2")
    yield numbers(group["cs2"] for group in groups)
    yield numbers(one["cs2"] for one in alike)
    low, high = (100 * float(static[f"R_II_{end}"]) for end in ("low", "high"))
    yield f"{share(static, 'R_II')} [{low:.0f}, {high:.0f}]"
    yield f"{share(otsu, 'R_II')} ({share(noise, 'R_II')})"


def changed_answers(folder, model):
    """What edits, attention and the rule of the integral do, the other rows."""
    own = own_folder(folder, model)
    whole = (paths.FIGURES / own / "ig/table3.csv").is_file()  # was notebook 07 run for it?

    def edit(op, neurons):
        [row] = committed(own, f"ig/table{2 + whole}", **ALL, op=op, neurons=neurons)
        return row

    for neurons in EDITED:
        if neurons == "cas" and not whole:
            yield "–"
            continue
        row = edit("erasure", neurons)
        size = float(row["neurons_edited"])
        yield f"{percent(row[name] for name in ('rel', 'gen', 'loc'))} ({size:.0f})"
    [kept] = committed(own, "ig/table2_loc", op="erase", neurons="local")
    yield percent(kept[name] for name in ("loc_same", "loc_other"))
    updated = edit("update", "local")
    [said] = committed(own, "ig/table2_loc", op="update", neurons="local")
    yield percent((updated["rel"], updated["gen"], said["loc_new"]))
    [texts] = committed(own, "ig/table2", **ALL, op="update", neurons="local")
    yield share(texts, "broken")
    most = committed(own, "ig/fig5_values", threshold="otsu")
    yield percent(of_all_facts(most, name) for name in ("predominance", "predominance_rest"))
    names = ("share in column 0", "jaccard", "jaccard_rest")
    first, *alike = (committed(own, "ig/synapses", quantity=name)[0] for name in names)
    yield f"{share(first, 'mean')}; {numbers(row['mean'] for row in alike)}"
    rules = [committed(own, "all/by_rule", rule=rule)[0] for rule in ("right", "converged")]
    yield f"{float(rules[0]['jaccard']):.2f}; {numbers(row['cs2'] for row in rules)}"


def agreement(cs2, share_ii):
    return f"{cs2:.2f}; {100 * share_ii:.0f} %"


def paper_agreement():
    """CS2 of all facts, the mean of the classes', and K_II by the static threshold, as printed."""
    values = json.loads((ROOT / "qlutils/show/paper_values.json").read_text("utf-8"))["tables"]
    for name, model in zip(("GPT-2", "LLaMA-2-7B", "LLaMA-3-8B"), PAPER, strict=True):
        cells = []
        for method in METHODS:
            share_i, cs2_i, share_ii, cs2_ii, *_ = values["1"]["rows"][f"{model}|static|{method}"]
            cells.append(agreement(share_i * cs2_i + share_ii * cs2_ii, share_ii))
        yield f"{name}, the paper", *cells


def measured_agreement():
    for facts, folder in (("any fact", ANY), ("facts it knows", KNOWN)):
        for name in list(COLUMNS)[:2]:
            own, cells = own_folder(folder, COLUMNS[name][1]), {}
            for row in committed(own, "all/consistency"):
                where = dict(threshold="static", method=row["method"])
                [static] = committed(own, "all/table1", **where)
                cells[row["method"]] = agreement(float(row["cs2"]), float(static["R_II"]))
            yield f"{name}, {facts}", *(cells.get(method, "–") for method in METHODS)


def test_the_first_table_is_the_papers_and_the_committed_ones():
    rows = table(README, "## What it finds on real models")
    assert [(*row.values(),) for row in rows] == [*paper_agreement(), *measured_agreement()]


def test_the_table_of_real_models_is_the_committed_one():
    rows = table(README, "### In numbers")
    there = {path.name for path in (paths.FIGURES / KNOWN).glob("pretrained--*")}
    assert {own_folder("", model)[1:] for _, model in COLUMNS.values()} == there
    for name, where in COLUMNS.items():
        assert [row[name] for row in rows] == [*found_neurons(*where), *changed_answers(*where)]


def test_what_the_paper_found_is_what_it_prints():
    """CS2 of all facts is the mean of the classes', by the static threshold and `ig`."""
    values = json.loads((ROOT / "qlutils/show/paper_values.json").read_text("utf-8"))["tables"]
    models = ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B")
    static, otsu = (
        [values["1"]["rows"][f"{model}|{threshold}|ig"] for model in models]
        for threshold in ("static", "otsu")
    )

    def edits(op, neurons, columns=3):
        cells = []
        for name in ("I", "II"):
            row = values["3"]["rows"][f"gpt2|{op}|{neurons}|{name}"]
            cells.append(f"{name}: {percent(row[:columns])}")
        return "; ".join(cells)

    wanted = {
        1: ", ".join(f"{r_1 * s_1 + r_2 * s_2:.2f}" for r_1, s_1, r_2, s_2, *_ in static),
        4: ", ".join(f"{100 * row[2]:.0f} %" for row in static),
        5: ", ".join(f"{100 * row[2]:.0f} %" for row in otsu),
        6: edits("erasure", "local"),
        7: edits("erasure", "global"),
        8: edits("erasure", "cas"),
        11: edits("update", "local", 2),
    }
    rows = table(README, "### In numbers")
    assert {place: rows[place]["the paper"] for place in wanted} == wanted


def marks(folder, model):
    """A claim's mark by `ig` and, where it was run and differs, by `amig`."""
    for row in committed(folder, "scoreboard", model=model, method="ig"):
        claim = dict(model=model, claim=row["claim"])
        other = {one["method"]: one["mark"] for one in committed(folder, "scoreboard", **claim)}
        by_amig = other.get("amig", row["mark"])
        yield row["mark"] + f" (`amig`: {by_amig})" * (by_amig != row["mark"])


def test_the_marks_of_the_claims_are_the_committed_ones():
    rows = table(README, "### Which of the paper's claims hold")
    for name, where in COLUMNS.items():
        assert [row[name] for row in rows] == [*marks(*where)]


def told(name, pattern):
    """What the first sentence of a column's "In short" that fits says in the pattern's groups."""
    folder, model = COLUMNS[name]
    for row in committed(folder, "in_short", model=model):
        if found := re.search(pattern, row["sentence"]):
            return found.groups()
    raise AssertionError(f"In short of {name} has no sentence with {pattern!r}")


def sentences():
    """Measured numbers of the README's sentences, as they are written there."""
    small, large, varied = COLUMNS
    scanned = []
    for name, lead in ((small, "SmolLM2 knows"), (large, "Gemma")):
        rows = committed(own_folder(*COLUMNS[name]), "ig/known_facts")
        looked, known = (sum(int(row[key]) for row in rows) for key in ("scanned", "known"))
        scanned.append(f"{lead} {known} of {looked:,}")
    yield f"{scanned[0]} facts looked at, {scanned[1]} "
    inside = [told(name, r"in (\d+ %) of the facts the answer")[0] for name in (small, large)]
    yield f"in {' and '.join(inside)} of those kept the answer stands in the subject"
    answered = [told(name, r"against three others .*: (.*) more")[0] for name in (small, large)]
    yield f"{answered[0]} higher than of three others of the same facts in SmolLM2, {answered[1]} in"
    known = []
    for name in (small, large):
        [localised] = committed(own_folder(ANY, COLUMNS[name][1]), "ig/localisation")
        known.append(localised["n_known"])
    queries = f"{int(localised['n_queries']):,}"
    yield f"answer few ({' and '.join(known)} of {queries} queries of *any fact*)"
    [cs2] = committed(own_folder(*COLUMNS[varied]), "all/consistency", method="ig")
    static = dict(threshold="static", method="ig")
    [row] = committed(own_folder(*COLUMNS[varied]), "all/table1", **static)
    yield f"share least ({float(cs2['cs2']):.2f}, {share(row, 'R_II')} K_II"
    kept = []
    for name in (small, large):
        own = own_folder(*COLUMNS[name])
        edits = dict(**ALL, op="erasure")
        for neurons in ("local", "local (random)"):
            [row] = committed(own, "amig/table3", **edits, neurons=neurons)
            kept.append(share(row, "loc"))
    yield f"{kept[0]} of other facts stay (random ones {kept[1]}); in Gemma {kept[2]}"
    overlap = []
    sizes = []
    moved = {KNOWN: [], ANY: []}
    for name in (small, large):
        own = own_folder(*COLUMNS[name])
        rules = {row["rule"]: row for row in committed(own, "all/by_rule", method="amig")}
        overlap.append(f"{float(rules['right']['jaccard']):.2f}")
        neurons = (float(rules[rule]["mean_size"]) for rule in ("right", "converged"))
        sizes.append(" in place of ".join(f"{size:.0f}" for size in neurons))
        for folder, found in moved.items():
            own = own_folder(folder, COLUMNS[name][1])
            one, other = committed(own, "all/by_rule", method="ig")
            found.append(abs(float(one["cs2"]) - float(other["cs2"])))
    known, some = (f"{max(found):.2f}" for found in moved.values())
    yield f"CS2 moves by at most {known} (12 known facts) and {some} (10 of *any fact*)"
    yield f"a Jaccard index of {overlap[0]} with the converged ones in SmolLM2 ({sizes[0]} neurons)"
    yield f"of {overlap[1]} in Gemma ({sizes[1]}; {rules['right']['n']} known facts each)"
    where = dict(model=COLUMNS[small][1], method="amig")
    one, _, unrelated = (
        committed(KNOWN, "control1_null", **where, kind=kind)[0] for kind in GROUPS
    )
    yield (
        f"by `amig` in SmolLM2 unrelated queries share {float(unrelated['cs2']):.2f}, one fact's "
        f"{float(one['cs2']):.2f}"
    )
    about = dict(model=COLUMNS[small][1], topic="Are the classes more than a cut?")
    [classes] = committed(ANY, "in_short", **about)
    within = re.search(r"by Otsu's .*, within relations (.*?) more", classes["sentence"])[1]
    yield f"within relations only those of SmolLM2's *any fact* do ({within})"
    halves = [told(name, r"by Otsu's (.*?) more")[0] for name in (small, large)]
    yield f"CS2 of the other half, by {halves[0]} and {halves[1]}"
    groups = [
        [
            float(committed(folder, "control1_null", model=model, kind=kind)[0]["cs2"])
            for kind in GROUPS[1::-1]
        ]
        for folder, model in COLUMNS.values()
    ]
    yield f"({groups[2][0]:.2f} against {groups[2][1]:.2f}"
    assert all(0.55 < pattern / fact < 0.65 for pattern, fact in groups[:2])  # three fifths
    kinds = (
        r"by -(\d+ %) \[[^]]*\] when a query's own",
        r"not its own -(\d+ %)",
        r"what they share -(\d+ %)",
    )
    off = [told(small, kind)[0] for kind in kinds]
    yield (
        f"the own off takes {off[0]} of P(answer), the other wordings' that are not its own "
        f"{off[1]}, another fact's of the relation {off[2]}"
    )
    first = [told(name, r"suppressed (.*?) more")[0] for name in (small, large)]
    yield f"({first[0]} in SmolLM2, {first[1]} in Gemma)"
    up = [told(name, r"Enhanced, .*? by -(\d+ %)")[0] for name in (small, large)]
    yield f"lowers P(answer), too, by {' and '.join(up)}"
    for name, model in ((small, "SmolLM2"), (large, "Gemma")):
        own = own_folder(*COLUMNS[name])
        by_size = {
            row["metric"]: interval(row, "difference", digits=3)
            for row in committed(own, "ig/cas_by_size", op="erase", facts="all facts")
        }
        yield f"{by_size['gen']} in the other wordings, {by_size['loc']} in other facts ({model}"
    relations = [told(name, r"relations resampled .* is (.*?) \(")[0] for name in (small, large)]
    yield f"relations resampled, CS2 is {relations[0]} and {relations[1]}"
    toy = dict(model="demo/gpt2")
    [alike] = committed("sample", "table1_all", **toy, method="ig", threshold="static")
    assert float(alike["R_I"]) == 1  # so that K_I's mean is that of all facts
    [erased] = committed("sample", "table2_all", **toy, **ALL, op="erasure", neurons="local")
    yield (
        f"(`demo/gpt2`: CS2 {float(alike['S_I']):.2f}), but erasing one wording's neurons makes only "
        f"{share(erased, 'gen')}"
    )


def test_every_measured_number_is_the_committed_one():
    text, found = " ".join(README.split()), list(sentences())
    assert len(found) == 20 and [one for one in found if one not in text] == []


def of_rules(method):
    """README's line on the rules of the integral, of the benchmark's tables."""
    measured = (ROOT / "tests/benchmarks/results/rules.md").read_text("utf-8")
    cells = [f"`{method}`"]
    for rule in ("`right` 20 (the paper)", "`converged`"):
        for model in ("SmolLM2-135M", "Gemma 3 270M"):
            rows = table(measured, f"## {model}, `{method}`")
            answered, other = (row for row in rows if row["rule"] == rule)
            assert (answered["queries"], other["queries"]) == ("answered", "other")
            cell = f"{answered['mean Jaccard index']} / {other['mean Jaccard index']}"
            if rule == "`converged`":
                cell += f" by {answered['evaluations']} / {other['evaluations']}"
            cells.append(cell)
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_the_rules_is_the_measured_table(method):
    assert of_rules(method) in README.splitlines()


def test_the_readme_is_short():
    assert (
        len(README.encode()) <= 29_000
    )  # 5,000 of them tables of findings, 2,000 that of model families
