"""The driver, on tiny notebooks: order, parameters, kernel, what is done, what failed, what is
stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from tiny import FACTS, PATTERNS, save_checkpoint, save_dataset

from qlutils import load_facts, paths, run
from qlutils.driver.arguments import parser
from qlutils.driver.jobs import Job, fetch_inputs, plan_jobs
from qlutils.driver.running import Run, may_start
from qlutils.files import locked
from qlutils.study import identity
from qlutils.study.identity import model_content
from qlutils.study.notebook import Study
from qlutils.study.parameters import declared_parameters, parameters_of

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = (
    "model = 'demo/gpt2'\nmethod = 'ig'\ndata = 'demo'\nrelations = None\nfacts_per_relation = "
    "3\nseed = 0\n"
    "output = 'default'\nt = 0.2"
)
OPEN = "from qlutils.study.notebook import Study\nstudy = Study.open('{}', globals())"
LOCALIZE = (
    "import os, sys\nimport pandas as pd\nif os.path.exists({fail!r} + study.method):\n"
    "    raise RuntimeError('no such luck\\nmore')\n"
    "study.save(pd.DataFrame({{'t': [t], 'kernel': [sys.executable]}}), "
    "'queries')\nstudy.record(note=1)"
)
COMPARE = (
    "import pandas as pd\nrows = [study.load('queries', m) for m in study.methods_done()]\n"
    "frame = pd.concat(rows).assign(method=study.methods_done())\nstudy.save(frame, 'comparison')"
)


def write_notebook(folder, name, parameters, *cells, kernel="python3"):
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": kernel, "display_name": "x", "language": "python"}}
    )
    book.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell{number}"
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.fixture
def books(tmp_path):
    """A folder of notebooks whose name holds a space and a brace."""
    folder = tmp_path / "note {books}"
    folder.mkdir()
    write_localize(folder)
    write_notebook(
        folder,
        "02_consistency",
        PARAMETERS.replace("method = 'ig'", "methods = ['ig', 'sig', 'amig']"),
        OPEN.format("02_consistency"),
        COMPARE,
    )
    return folder


def write_localize(folder, more=""):
    """A notebook that fails for the methods m for which a file `fail-m` lies beside it."""
    fail = str(folder / "fail-")
    write_notebook(
        folder,
        "01_localize",
        PARAMETERS,
        OPEN.format("01_localize"),
        LOCALIZE.format(fail=fail) + more,
    )


@pytest.fixture
def model(tmp_path):
    return save_checkpoint(tmp_path / "tiny model")


def options(model, *more):
    return [
        "--models",
        model,
        "--methods",
        "ig",
        "sig",
        "--relations",
        "P36",
        "--facts-per-relation",
        "1",
        *more,
    ]


def table(text):
    """{job: (status, what failed)} of the summary."""
    rows = [
        re.fullmatch(r"(.+?) +(done|cached|failed|stopped|not run) +[\d.]+ *(.*)", line).groups()
        for line in text.split("what failed\n")[1].splitlines()[:-1]
    ]
    return {job: (status, problem) for job, status, problem in rows}


def test_a_run_goes_through_models_and_methods_once_and_names_what_failed(
    books, model, runs, capsys, monkeypatch, tmp_path
):
    # a `python3` kernel that is not ours is what Jupyter would find first
    decoy = tmp_path / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(decoy.parents[1]))
    (books / "fail-sig").touch()
    assert run.main(options(model), books) == 1
    said = capsys.readouterr()
    slug = paths.slug(model)
    results = runs / "default" / "results" / slug
    rows = table(said.out)
    assert rows == {
        "01_localize tiny model ig": ("done", ""),
        "02_consistency tiny model": ("done", ""),
        "01_localize tiny model sig": ("failed", "RuntimeError: no such luck (In [4])"),
    }
    assert "1 facts of 1 relations" in said.err and "sig: failed" in said.err
    frame = pd.read_parquet(results / "all" / "comparison.parquet")
    assert frame.method.tolist() == ["ig"] and frame.kernel.tolist() == [sys.executable]
    record = json.loads((results / "ig" / "run.json").read_text())["01_localize"]
    assert record["parameters"]["model"] == model and record["command"].startswith(
        "./run_all.sh --models"
    )
    assert (
        record["facts"] == 1
        and record["note"] == 1
        and record["inputs"]["content"] == model_content(model)
    )
    made = sorted(path.name for path in (runs / "default" / "notebooks").iterdir())
    assert made == [
        f"01_localize--{slug}--ig.ipynb",
        f"01_localize--{slug}--ig.json",
        f"01_localize--{slug}--sig.ipynb",
        f"02_consistency--{slug}.ipynb",
        f"02_consistency--{slug}.json",
    ]

    # mended: what failed runs, what was done does not, and 02 sees that there is more to compare
    (books / "fail-sig").unlink()
    stamp = runs / "default" / "notebooks" / made[-1]
    stamp.write_bytes(stamp.read_bytes()[:-9])
    assert run.main(options(model), books) == 0
    said = capsys.readouterr()
    assert [status for status, _ in table(said.out).values()] == ["cached", "done", "done"]
    assert pd.read_parquet(results / "all" / "comparison.parquet").method.tolist() == ["ig", "sig"]
    assert run.main(options(model), books) == 0
    assert [status for status, _ in table(capsys.readouterr().out).values()] == ["cached"] * 3

    # a lost result is made again; a notebook parameter reaches the notebooks that have it
    (results / "sig" / "queries.parquet").unlink()
    assert (
        run.main(options(model, "-p", "t", "0.3", "--only", "01", "--methods", "sig"), books) == 0
    )
    assert pd.read_parquet(results / "sig" / "queries.parquet").t.tolist() == [0.3]
    summary = json.loads((runs / "default" / "run.json").read_text())
    assert summary["jobs"][0]["parameters"]["t"] == 0.3 and summary["jobs"][0]["status"] == "done"
    # and the record's command means these very jobs
    args = parser().parse_args(shlex.split(summary["command"])[1:])
    again, facts = plan_jobs(args, books)
    assert [job.parameters for job in again] == [job["parameters"] for job in summary["jobs"]]
    assert facts == summary["facts"]
    assert {"torch", "python", "papermill"} <= set(summary["versions"]) and summary["seconds"] > 0


def test_what_the_data_leaves_out_is_said_once(books, model, runs, caplog, tmp_path):
    """A sample's facts and all facts are loaded, the latter because edits draw new objects from
    them."""
    patterns = {**PATTERNS, "P3": ["[X] is near [Y] .", "[X] is by [Y] ."]}
    data = save_dataset(tmp_path / "facts", patterns, {**FACTS, "P3": [("ann", "rome")]})
    args = parser().parse_args(["--models", model, "--data", data, "--facts-per-relation", "1"])
    plan_jobs(args, books)
    study = Study(
        "01_localize", model=model, method="ig", data=data, facts_per_relation=1, embedding="input"
    )
    assert caplog.text.count("1 relations left out") == 1
    caplog.clear()
    study.facts(), study.inputs()
    assert caplog.text.count("1 relations left out") == 1


def test_a_job_is_done_while_its_cells_and_the_versions_of_the_code_stay(
    books, model, runs, capsys, monkeypatch
):
    """Whatever else changes in the package or in a notebook's outputs, nothing is run again."""
    arguments, statuses = options(model, "--only", "01", "--methods", "ig"), []

    def drive():
        assert run.main(arguments, books) == 0
        statuses.extend(status for status, _ in table(capsys.readouterr().out).values())

    drive()
    book = nbformat.read(books / "01_localize.ipynb", 4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="said")]
    nbformat.write(book, books / "01_localize.ipynb")
    drive()
    book.cells[1].source += "\n"
    nbformat.write(book, books / "01_localize.ipynb")
    drive()
    versions = identity.code_versions()
    monkeypatch.setattr(identity, "code_versions", lambda: {**versions, "scale_kns": 0})
    drive()
    assert statuses == ["done", "cached", "done", "done"]


@pytest.mark.parametrize(
    "bad, said",
    [
        (
            ["-p", "steps", "20"],
            "-p steps: none of these notebooks has this parameter; they have t",
        ),
        (["-p", "seed", "1"], "-p seed: an option"),
        (["-p", "t", "high"], "t='high'"),
        (["--models", "demo/gpt9"], "demo/gpt9"),
        (["--models", "./nowhere"], "./nowhere"),
        (["--models", "~nouser/x"], "there is no model '~nouser/x'"),
        (["--models", "a" * 300], "there is no model 'aaa"),
        (["--models", "a\0b"], r"there is no model 'a\x00b'"),
        (["--models", "a b"], "there is no model 'a b'"),
        (["--relations", "P9999"], "P9999"),
        (["--facts-per-relation", "0"], "--facts-per-relation 0: want an integer"),
        (["--data", "nowhere"], "nowhere"),
        (["--only", "09"], "--only 09: there are 01_localize, 02_consistency"),
        (["--output", "../elsewhere"], "../elsewhere"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_bad_input_is_named_before_anything_starts(books, model, runs, capsys, bad, said):
    assert run.main(options(model, *bad), books) == 2
    assert said in capsys.readouterr().err and not (runs / "default" / "notebooks").exists()


@pytest.mark.parametrize(
    "bad",
    [
        ["--methods", "lrp"],
        ["--dtype", "int8"],
        ["--full", "--facts-per-relation", "1"],
        ["--steps", "3"],
        ["--model", "demo/gpt2"],
    ],
)
def test_an_unknown_option_or_value_is_refused(bad):
    with pytest.raises(SystemExit) as caught:
        run.main(bad)
    assert caught.value.code == 2


def test_the_committed_figures_are_nobody_s_output(capsys):
    assert run.main(["--only", "report", "--output", "notebooks"]) == 2
    assert "figures/notebooks holds the tables" in capsys.readouterr().err


def test_a_model_whose_files_change_while_a_notebook_runs_gives_no_result(
    books, model, runs, capsys
):
    config = Path(model, "config.json")
    write_localize(books, f"\nopen({str(config)!r}, 'a').write(' ')")
    assert run.main(options(model, "--only", "01"), books) == 1
    assert all(
        "changed while it ran" in problem for _, problem in table(capsys.readouterr().out).values()
    )
    write_localize(books)
    assert run.main(options(model, "--only", "01"), books) == 0
    assert {status for status, _ in table(capsys.readouterr().out).values()} == {"done"}


def test_a_job_runs_again_when_its_corpus_changes_which_may_be_named_from_here(
    books, model, runs, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one")
    write_notebook(
        books,
        "01_localize",
        PARAMETERS + '\ncorpus = "demo"',
        OPEN.format("01_localize"),
        "assert open(corpus).read()",
    )
    arguments = options(model, "--only", "01", "-p", "corpus", "./text.txt")
    for wanted in ("done", "cached"):
        assert run.main(arguments, books) == 0
        assert {status for status, _ in table(capsys.readouterr().out).values()} == {wanted}
    Path("text.txt").write_text("two")
    assert run.main(arguments, books) == 0
    assert {status for status, _ in table(capsys.readouterr().out).values()} == {"done"}


def test_a_job_runs_again_when_facts_that_were_not_sampled_or_a_corpus_folder_change(
    books, model, runs, capsys, tmp_path
):
    """Edits draw new objects from all facts of a relation, and texts from a folder's test.txt."""
    data, corpus = Path(save_dataset(tmp_path / "facts")), tmp_path / "corpus"
    corpus.mkdir()
    write_notebook(
        books, "01_localize", PARAMETERS + '\ncorpus = "demo"', OPEN.format("01_localize")
    )
    relation = sorted((data / "trex_lms_vocab").glob("*.jsonl"))[0]
    arguments = [
        "--models",
        model,
        "--methods",
        "ig",
        "--data",
        str(data),
        "--relations",
        relation.stem,
        "--facts-per-relation",
        "1",
        "--only",
        "01",
        "-p",
        "corpus",
        str(corpus),
    ]
    sampled = load_facts(data, relations=[relation.stem], facts_per_relation=1)
    (corpus / "test.txt").write_text("one")
    statuses = []

    def drive():
        assert run.main(arguments, books) == 0
        statuses.extend(status for status, _ in table(capsys.readouterr().out).values())

    drive()
    drive()
    (corpus / "test.txt").write_text("two")
    drive()
    lines = [json.loads(line) for line in relation.read_text().splitlines()]
    other = next(line for line in lines if line["sub_label"] != sampled[0].subject)
    other["obj_label"] = "elsewhere"
    relation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_facts(data, relations=[relation.stem], facts_per_relation=1) == sampled
    drive()
    assert statuses == ["done", "cached", "done", "done"]
    assert run.main([*arguments[:-1], "nowhere"], books) == 2
    assert "-p corpus nowhere: there is no such file" in capsys.readouterr().err


def test_every_01_comes_before_the_first_02_and_03_takes_the_downstream_methods(books, model, runs):
    write_notebook(books, "03_editing", PARAMETERS)
    write_notebook(books, "report", "output = 'default'")
    other = Path(model).with_name("other")
    other.mkdir()
    (other / "config.json").write_text("{}")
    args = parser().parse_args(
        [
            "--models",
            model,
            str(other),
            "--relations",
            "P36",
            "--full",
            "--methods",
            "ig",
            "amig",
            "--downstream-methods",
            "amig",
        ]
    )
    jobs, _ = plan_jobs(args, books)
    assert [(job.notebook.stem[:2], Path(job.model or "").name, job.method) for job in jobs] == [
        ("01", "tiny model", "ig"),
        ("01", "tiny model", "amig"),
        ("01", "other", "ig"),
        ("01", "other", "amig"),
        ("02", "tiny model", None),
        ("02", "other", None),
        ("03", "tiny model", "amig"),
        ("03", "other", "amig"),
        ("re", "", None),
    ]
    assert jobs[0].parameters["facts_per_relation"] is None and jobs[-1].parameters == {
        "output": "default"
    }
    assert jobs[4].parameters["methods"] == ["ig", "amig"] and "method" not in jobs[4].parameters
    assert jobs[6].needs == [f"01_localize--{paths.slug(model)}--amig"] and len(jobs[-1].needs) == 8


def start(books, model, runs, *more):
    call = f"run.main({options(model, *more)!r}, {str(books)!r})"
    code = f"import sys; from qlutils import run; sys.exit({call})"
    env = {**os.environ, "QLUTILS_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_killed_kernel_and_a_killed_notebook_process_fail_alone(
    books, model, runs, capsys, tmp_path
):
    """As the system kills them when memory runs out."""
    pids = tmp_path / "pids"
    write_localize(
        books,
        more=f"\nimport os, signal, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "if study.method == 'ig':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if study.method == 'sig':\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(60)",
    )
    assert run.main([*options(model, "--only", "01"), "--methods", "ig", "sig"], books) == 1
    (_, first), (_, second) = table(capsys.readouterr().out).values()
    assert (
        "DeadKernelError: Kernel died" in first
        and second == "its process was killed by signal 9 (out of memory?)"
    )
    until = time.time() + 20
    while any(is_running(int(pid)) for pid in pids.read_text().split()) and time.time() < until:
        time.sleep(0.05)
    assert not any(is_running(int(pid)) for pid in pids.read_text().split())


def test_a_model_that_does_not_load_or_is_gone_ends_its_own_row_only(books, model, runs, capsys):
    broken, gone = (
        Path(save_checkpoint(Path(model).with_name(name))) for name in ("broken", "gone")
    )
    weights = str(broken / "model.safetensors")
    write_localize(
        books,
        more=f"\nif 'broken' in study.model:\n    import shutil\n    shutil.rmtree({str(gone)!r})\n"
        f"    open({weights!r}, 'w').close()\n    study.lm()",
    )
    chosen = ["--models", str(broken), str(gone), model, "--methods", "ig", "--only", "01"]
    assert run.main([*options(model), *chosen], books) == 1
    rows = table(capsys.readouterr().out)
    assert [status for status, _ in rows.values()] == ["failed", "failed", "done"]
    assert "ValueError: could not load model" in rows["01_localize broken ig"][1]
    assert (
        "there is no model" in rows["01_localize gone ig"][1]
        or "gone" in rows["01_localize gone ig"][1]
    )


def unreachable(*_, **__):
    raise OSError("no route to host")


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "spoil, named",
    [
        (
            lambda patch, folder: patch.setattr("huggingface_hub.hf_hub_download", unreachable),
            "WikiText-2 .*no route to host",
        ),
        (
            lambda patch, folder: patch.setattr(
                "qlutils.model.loading.snapshot_download", unreachable
            ),
            "model 'some/model'.*no route",
        ),
        (
            lambda patch, folder: cut_short(folder / "model.safetensors"),
            "could not load model .*tiny model",
        ),
        (
            lambda patch, folder: (folder / "tokenizer.json").write_text("{}"),
            "could not load model .*tiny model",
        ),
    ],
)
def test_what_a_run_would_miss_hours_later_is_missed_before_it_starts(
    spoil, named, books, model, runs, capsys, monkeypatch
):
    write_notebook(books, "03_editing", PARAMETERS + '\ncorpus = "demo"', OPEN.format("03_editing"))
    spoil(monkeypatch, Path(model))
    chosen = [
        "--models",
        "demo/gpt2",
        *(["some/model"] if "some" in named else [model]),
        "--methods",
        "ig",
    ]
    assert run.main([*options(model), *chosen, "-p", "corpus", "wikitext-2"], books) == 2
    assert re.search(f"run_all.sh: .*{named}", capsys.readouterr().err)
    assert not list((runs / "default").rglob("*.ipynb"))


def test_what_the_chosen_notebooks_do_not_read_is_not_fetched(books, model, monkeypatch):
    write_notebook(books, "03_editing", PARAMETERS + '\ncorpus = "wikitext-2"')
    fetched = []
    monkeypatch.setattr("qlutils.driver.jobs.perplexity_texts", fetched.append)
    for only, wanted in (("01", []), ("03", ["wikitext-2"])):
        jobs, _ = plan_jobs(parser().parse_args([*options(model), "--only", only]), books)
        fetch_inputs(jobs)
        assert fetched == wanted


def test_tables_and_figures_name_a_local_model_by_the_end_of_its_path(
    books, model, runs, tmp_path, capsys
):
    twins = [save_checkpoint(tmp_path / where / "twin") for where in ("a", "b")]
    write_localize(
        books,
        "\nfrom pathlib import Path\ntable = pd.DataFrame({'model': [study.model], 'n': [1]})\n"
        "study.table(table, 'shown', f'Table 1. Of {model}, {method}')\n"
        "(study.results / 'legend.csv').write_text(study.label)",
    )
    assert (
        run.main(
            [*options(model), "--models", model, *twins, "--methods", "ig", "--only", "01"], books
        )
        == 0
    )
    for folder, label in ((model, "tiny model"), (twins[0], "a/twin"), (twins[1], "b/twin")):
        results = runs / "default" / "results" / paths.slug(folder) / "ig"
        assert pd.read_csv(results / "shown.csv")["model"].tolist() == [label]
        assert (results / "legend.csv").read_text() == label
        texts = [(results / f"shown{suffix}").read_text() for suffix in (".md", ".tex")]
        assert all(label in text and str(tmp_path) not in text for text in texts)
        record = json.loads((results / "run.json").read_text())["01_localize"]
        assert record["model"]["name"] == folder == record["parameters"]["model"]
    assert set(table(capsys.readouterr().out)) == {
        f"01_localize {name} ig" for name in ("tiny model", "a/twin", "b/twin")
    }


def test_what_a_notebook_prints_names_the_model_by_its_label():
    for path in sorted(paths.NOTEBOOKS.glob("0*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            shown = [line for line in cell["source"] if "print(" in line and "{model}" in line]
            assert cell["cell_type"] != "code" or not shown, path.name


@pytest.mark.parametrize(
    "model, among, label",
    [
        ("demo/gpt2", [], "demo/gpt2"),
        ("meta-llama/Llama-2-7b-hf", [], "meta-llama/Llama-2-7b-hf"),
        ("/x/run/gpt2", ["gpt2"], "run/gpt2"),
        ("/x/run/gpt2", ["/x/run/gpt2", "demo/gpt2"], "run/gpt2"),
        ("/x/m.gguf", ["/y/n.gguf"], "m.gguf"),
        ("/a/x/m", ["/b/x/m", "/c/m"], "a/x/m"),
    ],
)
def test_a_label_is_as_short_as_the_other_models_allow(model, among, label):
    assert paths.label(model, among) == label


def test_notebooks_run_side_by_side_but_not_before_what_they_read_nor_into_one_folder(
    books, model, runs, capsys
):
    """Each 01 waits until the other is there; a 03 and a 04 of one model and method never
    overlap."""
    alone = (
        "import os, time\nfor _ in range(20):\n"
        "    os.mkdir({0!r}); time.sleep(0.02); os.rmdir({0!r})"
    )
    write_localize(
        books,
        more=f"\nimport os, time\nopen({str(books / 'here-')!r} + study.method, "
        f"'w').close()\nuntil = time.time() + 60\n"
        f"while not all(os.path.exists({str(books / 'here-')!r} + m) for m in ('ig', 'sig')):\n"
        "    assert time.time() < until\n    time.sleep(0.02)",
    )
    for stem in ("03_edit", "04_more"):
        write_notebook(
            books,
            stem,
            PARAMETERS,
            OPEN.format(stem),
            'study.load("queries")\n' + alone.format(str(books / "one")),
        )
    assert run.main(options(model, "--only", "01", "02", "03", "04", "--jobs", "3"), books) == 0
    assert [status for status, _ in table(capsys.readouterr().out).values()] == 5 * ["done"]
    assert (
        run.main(options(model, "--jobs", "0"), books) == 2
        and "--jobs 0" in capsys.readouterr().err
    )


def test_what_needs_a_failed_job_is_not_run_and_a_path_that_cannot_be_written_fails_alone(
    books, model, runs, capsys
):
    (books / "fail-ig").touch()
    write_notebook(books, "03_edit", PARAMETERS, OPEN.format("03_edit"))
    blocked = (
        runs
        / "default"
        / "notebooks"
        / f"{Job(Path('02_consistency'), model, None, {}).name}.ipynb"
    )
    blocked.mkdir(parents=True)
    assert run.main(options(model, "--only", "01", "02", "03", "--jobs", "2"), books) == 1
    rows = table(capsys.readouterr().out)
    assert [status for status, _ in rows.values()] == ["failed", "done", "failed", "not run"]
    problems = [problem for _, problem in rows.values()]
    assert "Is a directory" in problems[2] and problems[3].endswith("failed")
    assert json.loads((runs / "default" / "run.json").read_text())["jobs"][3]["problem"].startswith(
        "01_localize--"
    )


def test_two_jobs_that_would_both_make_what_they_need_do_not_run_side_by_side(tmp_path):
    one, two = (
        Job(Path(f"{stem}.ipynb"), "m", method, {}, needs=["01_localize--m--ig"])
        for stem, method in (("02_consistency", None), ("03_edit", "ig"))
    )
    assert may_start(one, Run([], tmp_path, "", ""))
    beside = Run([], tmp_path, "", "", running={0: one})
    assert not may_start(two, beside)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_localize--m--ig.json").touch()
    assert may_start(two, beside)


@pytest.mark.parametrize("given", [["--workers", "0"], ["--workers", "-1"], ["--only", ""]])
def test_numbers_and_names_that_mean_nothing_are_refused_before_anything_starts(
    books, model, runs, capsys, given
):
    assert run.main(options(model, *given), books) == 2 and given[0] in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "'abc'", "-2", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused_by_name(
    books, model, runs, capsys, monkeypatch, threads
):
    monkeypatch.setenv("QLUTILS_THREADS", threads)
    assert (
        run.main(options(model), books) == 2
        and f"QLUTILS_THREADS {threads}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "number, status, held",
    [
        (signal.SIGINT, 130, ["sig"]),
        (signal.SIGKILL, -9, ["sig"]),
        (signal.SIGTERM, 143, ["ig", "sig"]),
    ],
)
def test_stopping_the_driver_ends_its_kernels_soon_and_the_next_run_goes_on(
    books, model, runs, tmp_path, number, status, held
):
    """`held`: the methods whose notebooks run, asleep, when the driver is stopped."""
    pid_file = str(tmp_path / "pid-")
    write_localize(
        books,
        more=f"\nimport os, time\nif study.method in {held} and not os.path.exists({pid_file!r} + "
        f"study.method):\n"
        f"    open({pid_file!r} + study.method, 'w').write(str(os.getpid()))\n    time.sleep(60)",
    )
    driver = start(books, model, runs, "--jobs", str(len(held)))
    files = [Path(pid_file + method) for method in held]
    while not all(file.exists() and file.read_text() for file in files):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    driver.send_signal(number)
    said = driver.communicate(timeout=30)[1]
    assert driver.returncode == status
    if status > 0:
        assert "to go on:\n    ./run_all.sh --models" in said
    until = time.time() + 20
    while any(is_running(int(file.read_text())) for file in files) and time.time() < until:
        time.sleep(0.05)
    assert not any(is_running(int(file.read_text())) for file in files)
    if status > 0:
        assert [
            job["status"] for job in json.loads((runs / "default" / "run.json").read_text())["jobs"]
        ] == [*["stopped" if method in held else "done" for method in ("ig", "sig")], "not run"]
        assert run.main(options(model, "--only", "01"), books) == 0
        summary = json.loads((runs / "default" / "run.json").read_text())
        assert [job["status"] for job in summary["jobs"]] == [
            "done" if "ig" in held else "cached",
            "done",
        ]


def test_two_drivers_on_one_output_are_refused(books, model, runs, capsys):
    with locked(runs / "default" / ".lock"):
        assert run.main(options(model), books) == 2
    assert str(runs / "default" / ".lock") in capsys.readouterr().err


# -- what a notebook checks by itself, without the driver ------------------------------------------
def opened(monkeypatch, folder, declared, **given):
    """What a notebook with these declared parameters has, opened with others given."""
    write_notebook(folder, "01_localize", declared)
    monkeypatch.chdir(folder)
    namespace = {"In": [], "__name__": "__main__", "_dh": []}  # as a kernel has them
    exec(declared, namespace)
    return parameters_of("01_localize", {**namespace, **given})


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 20}, "unknown parameter 'steps'; this notebook knows model, "),
        ({"t": "0.3"}, "t='0.3'"),
        ({"seed": True}, "seed=True"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"model": None}, "model=None"),
        ({"t": 0.01}, "parameter t 0.01: want a share of the largest score that results keep"),
        ({"t": 1}, "parameter t 1: want"),
        ({"seed": -1}, "parameter seed -1: want an integer, at least 0"),
        ({"method": "lrp"}, "method 'lrp' is unknown"),
    ],
)
def test_a_notebook_refuses_parameters_it_does_not_know(tmp_path, monkeypatch, given, said):
    with pytest.raises(ValueError) as caught:
        opened(monkeypatch, tmp_path, PARAMETERS, **given)
    assert said in str(caught.value)


def test_given_values_win_none_means_all_and_a_notebook_can_be_opened_again(tmp_path, monkeypatch):
    declared, given = f"{PARAMETERS}\nlambda1 = 2.0", dict(facts_per_relation=None, lambda1=1)
    values = opened(monkeypatch, tmp_path, declared, **given)
    assert values["facts_per_relation"] is None and values["lambda1"] == 1
    assert values["model"] == "demo/gpt2" and "In" not in values
    # names that later cells set are no parameters
    again = opened(monkeypatch, tmp_path, declared, **given, study=object(), present=5)
    assert again == values


@pytest.mark.parametrize(
    "line", ["relations = 'P36 P17'.split()", "t: float = 0.2", "import os", "t = s = f()", "t ="]
)
def test_a_parameters_cell_that_is_not_literal_is_refused(tmp_path, line):
    write_notebook(tmp_path, "01_localize", f"{PARAMETERS}\n{line}")
    with pytest.raises(ValueError, match="parameters cell") as caught:
        declared_parameters(tmp_path / "01_localize.ipynb")
    assert line in str(caught.value)


def test_a_notebook_whose_parameters_cell_was_not_run_says_so(tmp_path, monkeypatch):
    write_notebook(tmp_path, "01_localize", PARAMETERS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="parameter model is not set: run the parameters cell"):
        parameters_of("01_localize", {})


def test_a_plan_costs_what_the_options_ask_for_and_each_model_and_method_once(
    books, model, runs, capsys, monkeypatch
):
    write_notebook(books, "01_localize", f"{PARAMETERS}\nsteps = 20\nanswer = 'all'")

    def flops(*more):
        assert (
            run.main(
                ["--plan", "--models", "demo/gpt2", "demo/gpt2", "--methods", "ig", "ig", *more],
                books,
            )
            == 0
        )
        columns, row, _ = capsys.readouterr().out.splitlines()
        return float(row.split()[columns.split().index("PFLOP")])

    with monkeypatch.context() as patch:
        patch.setattr("qlutils.driver.plan.matmul_rate", lambda *_: ("a device", "float32", 1e15))
        assert flops() == pytest.approx(4 * flops("-p", "steps", "5"), rel=1e-2)
    for said, more in {
        "device 'cuda:99' is not there": ["--device", "cuda:99"],
        "none of these notebooks": ["-p", "stepz", "5"],
        "steps is 0": ["-p", "steps", "0"],
        "answer 'lst' is unknown": ["-p", "answer", "lst"],
    }.items():
        assert run.main(["--plan", "--models", "demo/gpt2", *more], books) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not runs.exists() or not list(runs.glob("*"))


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "lrp"},
        {"methods": ["ig", "x"]},
        {"dtype": "int8"},
        {"output": "a/b"},
        {"output": ".."},
        {"model": ""},
    ],
)
def test_a_study_names_a_parameter_it_cannot_use(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).rstrip("s")):
        Study("01_localize", **{"model": "demo/gpt2", **bad})


def test_results_from_other_inputs_are_not_read(model, runs):
    settings = dict(model=model, method="ig", relations=["P36"], facts_per_relation=2)
    study = Study("01_localize", **settings)
    frame = pd.DataFrame({"x": [1.5], "layer": [[1, 2]]})
    study.save(frame, "queries")
    assert study.load("queries").x.tolist() == [1.5] and study.methods_done() == ["ig"]
    other = Study("02_consistency", **{**settings, "method": None, "seed": 1})
    assert other.methods_done() == []
    with pytest.raises(ValueError, match="other .*seed"):
        other.load("queries", "ig")
    with pytest.raises(ValueError, match="sig .*not made yet"):
        study.load("queries", "sig")
    (Path(model) / "config.json").write_text('{"changed": 1}')
    assert study.methods_done() == []
    path = study.results / "queries.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with (
        pytest.warns(UserWarning, match="queries.parquet"),
        pytest.raises(ValueError, match="damaged"),
    ):
        study.load("queries")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("demo/gpt2", "demo--gpt2"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama--Llama-2-7b-hf"),
        ("../../none/x", "--..--none--x"),
        ("a b", "a_b"),
        ("...", "_"),
        ("~nouser/x", "_nouser--x"),
        ("a" * 300, "a" * 300),
        ("a\0b", "a_b"),
    ],
)
def test_the_folder_of_a_model_stays_in_the_run(name, folder):
    assert paths.slug(name) == folder


def test_a_model_folder_with_a_long_name_keeps_a_short_one(tmp_path):
    long, other = tmp_path / ("m" * 250), tmp_path / ("m" * 251)
    long.mkdir()
    other.mkdir()
    first, second = paths.slug(str(long)), paths.slug(str(other))
    assert first != second and len(first) < 60 and first.startswith("mmm")
    (tmp_path / f"03_kn_modification--{first}--amig.ipynb").touch()


def test_a_results_notebook_opens_without_torch(runs):
    code = (
        "import sys, qlutils, qlutils.study.notebook, qlutils.run\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert said.stdout.strip() == "set()", said.stderr


# -- run_all.sh -----------------------------------------------------------------------------------
@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder with a space: the script, and a link to this package."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    (folder / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    (folder / "qlutils").symlink_to(ROOT / "qlutils")
    return folder


def shell(checkout, cwd, *arguments, **env):
    return subprocess.run(
        [shutil.which("bash"), checkout / "run_all.sh", *arguments],
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
    )


def test_the_script_uses_an_active_environment_that_has_the_project(checkout, tmp_path):
    said = shell(
        checkout,
        tmp_path,
        "--help",
        VIRTUAL_ENV=sys.prefix,
        PYTHONPATH=str(checkout),
        PATH=os.environ["PATH"],
    )
    assert said.returncode == 0 and "--facts-per-relation" in said.stdout, said.stderr
    assert not (checkout / ".venv").exists()


def test_the_script_says_in_one_line_what_to_install(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "uname", "cat", "cksum", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    said = shell(checkout, tmp_path, PATH=str(tools))
    assert (
        said.returncode == 1
        and said.stderr.count("\n") == 1
        and "needs Python 3.11 or newer" in said.stderr
    )
    broken = tools / "python3"  # a Python without venv, as on a bare Debian
    broken.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec \'{sys.executable}\' "$@"\n')
    broken.chmod(0o755)
    said = shell(checkout, tmp_path, PATH=str(tools))
    assert (
        said.returncode == 1
        and said.stderr.count("\n") == 1
        and "apt-get install python3-venv" in said.stderr
    )
    assert not (checkout / ".venv").exists()


def test_the_plan_of_a_gpu_is_what_was_measured_on_one():
    """Every row of the H200's table by the paper's rule, from the matmul rate that was measured
    beside it."""
    from qlutils.driver.plan import SHAPES, query_seconds

    text = (ROOT / "tests/benchmarks/results/h200.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert {(shape, method) for shape, method, *_ in rows} == {
        (shape, method) for shape in SHAPES for method in ("ig", "sig", "amig")
    }
    for shape, method, milliseconds, speed, share, _ in rows:
        rate = float(speed) * 1e12 / (float(share.rstrip("%")) / 100)
        planned = 1e3 * query_seconds(SHAPES[shape], method, 20, 10, rate, gpu=True)
        assert planned == pytest.approx(float(milliseconds), rel=0.2), (shape, method)


def test_folders_of_other_letters_work_in_a_bare_c_locale(books, model, tmp_path):
    folder = tmp_path / "l\u00e4ufe \u6771"
    ours = ("LC_", "LANG", "PYTHON")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    bare |= {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
        "QLUTILS_RUNS": str(folder),
    }
    start = (
        "import sys; from qlutils import run; run.in_utf8()\n"
        f"sys.exit(run.main(None, {str(books)!r}))"
    )
    command = [sys.executable, "-c", start]
    asked = [*options(model, "--only", "01"), "--output", "\u00fc"]
    done = subprocess.run([*command, *asked], env=bare, capture_output=True, timeout=120)
    said = done.stdout.decode("utf-8")
    assert done.returncode == 0 and f"see {folder}/\u00fc" in said, (said, done.stderr)
    record = json.loads((folder / "\u00fc" / "run.json").read_text(encoding="utf-8"))
    assert shlex.split(record["command"])[-1] == "\u00fc"
    script = (
        "from qlutils.study.notebook import Study\n"
        "from qlutils.study.results import read_record\nimport pandas as pd\n"
        "study = Study('01_localize', model='demo/gpt2', method='ig', facts_per_relation=1)\n"
        "study.save(pd.DataFrame({'a': [1]}), 'queries')\n"
        "study.load('queries'); study.record()\n"
        "assert list(read_record(study.results / 'run.json')) == ['01_localize']"
    )
    alone = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        timeout=120,
        env=bare | {"QLUTILS_COMMAND": "./run_all.sh --output \u00fc"},
    )
    assert alone.returncode == 0, alone.stderr
