"""The driver, on tiny notebooks: order, parameters, kernel, what is done, failed or stopped.

Where a test is not about processes the notebooks run in this one."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import units
from tiny import save_checkpoint, save_dataset, without_kernels, write_notebook

from qlutils import load_facts, paths, run
from qlutils.driver import running
from qlutils.driver.arguments import parser
from qlutils.driver.jobs import Job, plan_jobs
from qlutils.driver.plan import SHAPES, query_seconds
from qlutils.files import locked
from qlutils.study import identity, store
from qlutils.study.notebook import Study
from qlutils.study.parameters import parameters_of
from qlutils.study.results import read_record

ROOT = paths.ROOT
PARAMETERS = """\
model = 'demo/gpt2'
method = 'ig'
data = 'demo'
relations = None
facts_per_relation = 3
seed = 0
output = 'default'
t = 0.2"""
COMPARING = PARAMETERS.replace("method = 'ig'", "methods = ['ig', 'sig', 'amig']")
OPEN = """\
from qlutils.study.notebook import Study
study = Study.open({name!r}, globals())"""
LOCALIZE = """\
import os, sys
import pandas as pd
if os.path.exists({fail!r} + study.method):
    raise RuntimeError('no such luck\\nmore')
study.save(pd.DataFrame({{'t': [t], 'kernel': [sys.executable]}}), 'queries')
study.record(note=1)
"""
COMPARE = """\
import pandas as pd
rows = [study.load('queries', m) for m in study.methods_done()]
study.save(pd.concat(rows).assign(method=study.methods_done()), 'comparison')
"""


def write(folder, name, parameters, *cells):
    write_notebook(folder, name, parameters, OPEN.format(name=name), *cells)


def write_localize(folder, more=""):
    """A notebook that fails for the methods m for which a file `fail-m` lies beside it."""
    write(folder, "01_localize", PARAMETERS, LOCALIZE.format(fail=str(folder / "fail-")) + more)


@pytest.fixture
def books(tmp_path):
    """A folder of notebooks whose name holds a space and a brace."""
    folder = tmp_path / "note {books}"
    folder.mkdir()
    write_localize(folder)
    write(folder, "02_consistency", COMPARING, COMPARE)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_checkpoint(tmp_path / "tiny model")


def options(model, *more):
    given = ["--models", model, "--methods", "ig", "sig", "--relations", "P36"]
    return [*given, "--facts-per-relation", "1", *more]


@pytest.fixture
def drive(books, model, runs, capsys, monkeypatch):
    """Runs the driver, which ends with a status; {job: (its status, what failed)}. Without kernels
    unless they are asked for."""

    def start(*more, status=0, kernels=False):
        with monkeypatch.context() as patch:
            if not kernels:
                without_kernels(patch)
            assert run.main(options(model, *more), books) == status
        start.said = capsys.readouterr()
        lines = start.said.out.split("what failed\n")[1].splitlines()[:-1]
        pattern = r"(.+?) +(done|cached|failed|stopped|not run) +[\d.]+ *(.*)"
        rows = [re.fullmatch(pattern, line).groups() for line in lines]
        return {job: (ended, problem) for job, ended, problem in rows}

    return start


def statuses(rows):
    return [status for status, _ in rows.values()]


def run_record(runs):
    return json.loads((runs / "default" / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def decoy(tmp_path, monkeypatch):
    """A `python3` kernel that is not ours is what Jupyter would find first."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    kernel = {"argv": ["false"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_a_run_goes_through_models_and_methods_once_and_names_what_failed(
    books, model, runs, drive, decoy
):
    (books / "fail-sig").touch()
    assert drive(status=1, kernels=True) == {
        "01_localize tiny model ig": ("done", ""),
        "02_consistency tiny model": ("done", ""),
        "01_localize tiny model sig": ("failed", "RuntimeError: no such luck (In [4])"),
    }
    assert "1 facts of 1 relations" in drive.said.err and "sig: failed" in drive.said.err
    slug = paths.slug(model)
    results, notebooks = (runs / "default" / name for name in ("results", "notebooks"))
    compared = results / slug / "all" / "comparison.parquet"
    frame = pd.read_parquet(compared)
    assert frame.method.tolist() == ["ig"] and frame.kernel.tolist() == [sys.executable]
    record = read_record(results / slug / "ig" / "run.json")["01_localize"]
    assert record["parameters"]["model"] == model and record["facts"] == record["note"] == 1
    assert record["command"].startswith("./run_all.sh --models")
    assert record["inputs"]["content"] == identity.model_content(model)
    first, second = f"01_localize--{slug}", f"02_consistency--{slug}"
    made = [f"{first}--ig.ipynb", f"{first}--ig.json", f"{first}--sig.ipynb"]
    made += [f"{second}.ipynb", f"{second}.json"]
    assert sorted(path.name for path in notebooks.iterdir()) == made

    # mended: what failed runs, what was done does not, and 02 sees that there is more to compare
    (books / "fail-sig").unlink()
    stamp = notebooks / made[-1]
    stamp.write_bytes(stamp.read_bytes()[:-9])
    assert statuses(drive()) == ["cached", "done", "done"]
    assert pd.read_parquet(compared).method.tolist() == ["ig", "sig"]
    assert statuses(drive()) == ["cached"] * 3

    # a lost result is made again; a notebook parameter reaches the notebooks that have it
    lost = results / slug / "sig" / "queries.parquet"
    lost.unlink()
    assert statuses(drive("--only", "01")) == ["cached", "done"] and lost.exists()
    drive("-p", "t", "0.3", "--only", "01", "--methods", "sig")
    assert pd.read_parquet(lost).t.tolist() == [0.3]
    # and the record's command means these very jobs
    record = run_record(runs)
    again, facts = plan_jobs(parser().parse_args(shlex.split(record["command"])[1:]), books)
    assert [job.parameters for job in again] == [job["parameters"] for job in record["jobs"]]
    assert facts == record["facts"] and {"torch", "papermill"} <= set(record["versions"])


def test_a_job_is_done_while_cells_code_versions_texts_and_all_facts_stay(
    books, model, runs, drive, monkeypatch, tmp_path
):
    """Edits draw new objects from all facts of a relation, and texts from a folder's test.txt."""
    data = save_dataset(tmp_path / "facts")
    relation = tmp_path / "facts" / "trex_lms_vocab" / "P1.jsonl"
    (tmp_path / "corpus").mkdir()
    text = tmp_path / "corpus" / "test.txt"
    text.write_text("one")
    write(books, "01_localize", PARAMETERS + '\ncorpus = "demo"', "assert open")
    monkeypatch.chdir(tmp_path)
    asked = ["--only", "01", "--methods", "ig", "--data", data, "--relations", "P1"]

    def ended():
        return statuses(drive(*asked, "-p", "corpus", "./corpus"))

    assert ended() == ["done"]
    book = nbformat.read(books / "01_localize.ipynb", 4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="said")]
    nbformat.write(book, books / "01_localize.ipynb")
    assert ended() == ["cached"]
    book.cells[1].source += "\n"
    nbformat.write(book, books / "01_localize.ipynb")
    assert ended() == ["done"]
    text.write_text("two")
    assert ended() == ["done"] and ended() == ["cached"]
    sampled = load_facts(data, relations=["P1"], facts_per_relation=1)
    lines = [json.loads(line) for line in relation.read_text().splitlines()]
    other = next(line for line in lines if line["sub_label"] != sampled[0].subject)
    other["obj_label"] = "elsewhere"
    relation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_facts(data, relations=["P1"], facts_per_relation=1) == sampled
    assert ended() == ["done"]
    versions = identity.code_versions()
    monkeypatch.setattr(identity, "code_versions", lambda: {**versions, "scale_kns": 0})
    assert ended() == ["done"]


@pytest.mark.parametrize(
    "chosen, ran",
    [("", ["ig"]), ("--methods sig ig", ["ig"]), ("--methods amig sig", ["amig", "sig"])],
)
def test_03_runs_for_ig_or_for_the_methods_that_leave_it_out(books, model, chosen, ran):
    write(books, "03_editing", PARAMETERS)
    asked = ["--models", model, "--only", "03", "--relations", "P36", *chosen.split()]
    jobs, _ = plan_jobs(parser().parse_args(asked), books)
    assert [job.method for job in jobs] == ran


@pytest.mark.parametrize(
    "bad, said",
    [
        ("-p steps 20", "unknown parameter 'steps'"),
        ("-p seed 1", "-p seed: an option"),
        ("-p t high", "t='high'"),
        ("--models demo/gpt9", "there is no model 'demo/gpt9'"),
        ("--models ./nowhere", "./nowhere"),
        ("--models ~nouser/x", "there is no model '~nouser/x'"),
        ("--models a\0b", r"there is no model 'a\x00b'"),
        ("--models " + "a" * 300, "there is no model 'aaa"),
        ("--relations P9999", "P9999"),
        ("--facts-per-relation 0", "facts_per_relation 0: want an integer"),
        ("--data nowhere", "nowhere"),
        ("--only 09", "--only 09: there are 01_localize, 02_consistency"),
        ("--output ../elsewhere", "../elsewhere"),
        ("--output notebooks", "figures/notebooks holds the tables"),
        ("--jobs 0", "--jobs 0"),
        ("--refresh", "--refresh takes no other option"),
        ("--workers 0", "--workers 0"),
        ("--known-prompts 99", "no fact has more than"),
        ("-p seed_of_mine 1 -p seed_of_mine 2", "-p seed_of_mine is given twice"),
    ],
)
def test_bad_input_is_named_before_anything_starts(books, model, runs, capsys, bad, said):
    assert run.main(options(model, *bad.split(" ")), books) == 2
    assert said in capsys.readouterr().err and not (runs / "default" / "notebooks").exists()


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("rule", "foo", "rule 'foo' is unknown; use one of right"),
        ("tolerance", "2.0", "parameter tolerance 2.0: want a share"),
        ("cas_score", "sum", "cas_score 'sum' is unknown; use one of raw, max"),
        ("cas_threshold", "0.01", "parameter cas_threshold 0.01: want a share"),
        ("lambda1", "1e999", "parameter lambda1 inf: want a finite number"),
        ("suppress", "2.0", "parameter suppress 2.0: want a factor that suppresses"),
        ("enhance", "0.0", "parameter enhance 0.0: want a factor that enhances"),
    ],
)
def test_a_value_that_its_notebook_would_refuse_after_hours_is_refused_first(name, value, said):
    asked = parser().parse_args(["--models", "demo/gpt2", "-p", name, value])
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_jobs(asked, paths.NOTEBOOKS)


def test_a_dtype_in_which_nothing_can_be_attributed_is_not_offered(books, model, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(options(model, "--dtype", "float16"), books)
    assert "--dtype: invalid choice: 'float16'" in capsys.readouterr().err


def test_each_job_has_its_parameters_what_it_reads_and_what_it_waits_for(books, model, runs):
    for stem in ("03_editing", "04_mapping"):
        write(books, stem, PARAMETERS)
    write_notebook(books, "report", "output = 'default'")
    other = save_checkpoint(Path(model).with_name("other"))
    chosen = "--relations P36 --full --methods ig amig --downstream-methods amig".split()
    jobs, _ = plan_jobs(parser().parse_args(["--models", model, other, *chosen]), books)
    brief = {}
    for job in jobs:
        brief[job.name] = f"{job.notebook.stem[:2]} {Path(job.model or '').name} {job.method}"
    waits = {}
    for place, job in enumerate(jobs):
        waits[brief[job.name]] = [brief[one.name] for one in jobs[:place] if job.overlaps(one)]
    for name in ("tiny model", "other"):
        ig, amig, both = f"01 {name} ig", f"01 {name} amig", f"02 {name} None"
        assert waits[ig] == waits[amig] == [] and waits[both] == [ig, amig]
        assert waits[f"03 {name} amig"] == [amig, both]
        assert waits[f"04 {name} amig"] == [amig, both, f"03 {name} amig"]
    assert waits["re  None"] == list(waits)[:-1] and len(waits) == 11
    assert jobs[0].parameters["facts_per_relation"] is None
    assert jobs[-1].parameters == {"output": "default"} and len(jobs[-1].needs) == 10
    assert jobs[4].parameters["methods"] == ["ig", "amig"] and "method" not in jobs[4].parameters
    assert [brief[name] for name in jobs[4].needs] == ["01 tiny model ig", "01 tiny model amig"]
    assert [brief[name] for name in jobs[6].needs] == ["01 tiny model amig"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def assert_ended(pids):
    until = time.time() + 20
    while any(map(is_running, pids)) and time.time() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_killed_kernel_or_notebook_ends_its_own_row_only(books, model, drive, tmp_path):
    """The system kills a process when memory runs out."""
    pids = tmp_path / "pids"
    write_localize(
        books,
        f"""
import signal, time
open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')
os.kill(os.getpid() if study.method == 'ig' else os.getppid(), signal.SIGKILL)
time.sleep(60)""",
    )
    rows = drive("--only", "01", status=1, kernels=True)
    problems = ["DeadKernelError: Kernel died", "its process was killed by signal 9 (out of mem"]
    for said, (status, problem) in zip(problems, rows.values(), strict=True):
        assert status == "failed" and said in problem
    assert_ended(pids.read_text().split())


def test_a_model_that_fails_or_changes_ends_its_own_row_only(books, model, drive):
    others = [save_checkpoint(Path(model).with_name(name)) for name in ("broken", "gone", "new")]
    more = f"""
import shutil
broken, gone, changed = {others!r}
if study.model == broken:
    shutil.rmtree(gone)
    open(broken + '/model.safetensors', 'w').close()
    study.lm()
if study.model == changed:
    open(changed + '/config.json', 'a').write(' ')"""
    write_localize(books, more)
    rows = drive("--models", *others, model, "--methods", "ig", "--only", "01", status=1)
    assert statuses(rows) == 3 * ["failed"] + ["done"]
    problems = ["could not load model", "gone", "changed while it ran"]
    assert all(said in problem for said, (_, problem) in zip(problems, rows.values()))


def unreachable(*_, **__):
    raise OSError("no route to host")


@pytest.mark.parametrize(
    "spoil, named",
    [
        ("huggingface_hub.hf_hub_download", "WikiText-2 .*no route to host"),
        ("no corpus", "no perplexity text at 'no corpus'"),
        ("qlutils.model.loading.snapshot_download", "model 'some/model'.*no route"),
        ("model.safetensors", "could not load model .*tiny model"),
        ("tokenizer.json", "could not load model .*tiny model"),
    ],
)
def test_what_a_run_would_miss_hours_later_is_missed_before_it_starts(
    spoil, named, books, model, runs, capsys, monkeypatch
):
    write(books, "03_editing", PARAMETERS + '\ncorpus = "demo"')
    if "_download" in spoil:
        monkeypatch.setattr(spoil, unreachable)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again
    else:
        Path(model, spoil).write_text("{}")
    chosen = ["--models", "demo/gpt2", "some/model" if "some" in named else model]
    corpus = spoil if "corpus" in spoil else "wikitext-2"
    assert run.main([*options(model), *chosen, "-p", "corpus", corpus], books) == 2
    assert re.search(f"run_all.sh: .*{named}", capsys.readouterr().err)
    assert not list((runs / "default").rglob("*.ipynb"))


def test_tables_and_figures_name_a_local_model_by_the_end_of_its_path(
    books, model, runs, tmp_path, drive
):
    twins = [save_checkpoint(tmp_path / where / "twin") for where in ("a", "b")]
    more = """
table = pd.DataFrame({'model': [study.model], 'n': [1]})
study.table(table, 'shown', f'Table 1. Of {model}, {method}')
(study.results / 'legend.csv').write_text(study.label)"""
    write_localize(books, more)
    rows = drive("--models", model, *twins, "--methods", "ig", "--only", "01")
    labels = {model: "tiny model", twins[0]: "a/twin", twins[1]: "b/twin"}
    assert list(rows) == [f"01_localize {label} ig" for label in labels.values()]
    for folder, label in labels.items():
        results = runs / "default" / "results" / paths.slug(folder) / "ig"
        assert pd.read_csv(results / "shown.csv")["model"].tolist() == [label]
        assert (results / "legend.csv").read_text() == label
        texts = [(results / f"shown{suffix}").read_text() for suffix in (".md", ".tex")]
        assert all(label in text and str(tmp_path) not in text for text in texts)


def test_notebooks_run_side_by_side_but_not_before_what_they_read_nor_into_one_folder(
    books, model, drive
):
    """Each 01 waits until the other is there; a 03 and a 04 of one method never overlap."""
    here, one = str(books / "here-"), str(books / "one")
    meet = f"""
import time
open({here!r} + study.method, 'w').close()
until = time.time() + 60
while not all(os.path.exists({here!r} + m) for m in ('ig', 'sig')):
    assert time.time() < until
    time.sleep(0.02)"""
    alone = f"""
import os, time
study.load("queries")
for _ in range(20):
    os.mkdir({one!r}); time.sleep(0.02); os.rmdir({one!r})"""
    write_localize(books, meet)
    write(books, "03_edit", PARAMETERS, alone)
    write(books, "04_more", PARAMETERS, alone)
    rows = drive("--only", "01", "02", "03", "04", "--jobs", "3")
    assert statuses(rows) == 5 * ["done"]


def test_a_model_goes_on_while_another_is_still_localised(books, model, drive, tmp_path):
    edited = str(books / "edited")
    slow = f"""
import time
until = time.time() + 60
while study.model.endswith('slow') and not os.path.exists({edited!r}):
    assert time.time() < until
    time.sleep(0.02)"""
    write_localize(books, slow)
    write(books, "03_edit", PARAMETERS, f"open({edited!r}, 'w').close()")
    models = ["--models", model, save_checkpoint(tmp_path / "slow"), "--methods", "ig"]
    assert statuses(drive(*models, "--only", "01", "03", "--jobs", "2")) == 4 * ["done"]


def test_what_needs_a_failed_job_is_not_run_and_a_path_that_cannot_be_written_fails_alone(
    books, model, runs, drive
):
    (books / "fail-ig").touch()
    write(books, "03_edit", PARAMETERS)
    blocked = Job(Path("02_consistency"), model, None, {}).name + ".ipynb"
    (runs / "default" / "notebooks" / blocked).mkdir(parents=True)
    rows = drive("--only", "01", "02", "03", "--jobs", "2", status=1)
    assert statuses(rows) == ["failed", "done", "failed", "not run"]
    problems = [problem for _, problem in rows.values()]
    assert "Is a directory" in problems[2] and problems[3].endswith("failed")
    assert run_record(runs)["jobs"][3]["problem"].startswith("01_localize--")


@pytest.mark.parametrize(
    "number, status, held",
    [(signal.SIGKILL, -9, ["sig"]), (signal.SIGINT, 130, ["ig", "sig"])],
)
def test_stopping_the_driver_ends_its_kernels_soon_and_the_next_run_goes_on(
    books, model, runs, drive, tmp_path, number, status, held
):
    """`held`: the methods whose notebooks run, asleep, when the driver is stopped."""
    asleep = str(tmp_path / "pid-")
    more = f"""
import time
if study.method in {held} and not os.path.exists({asleep!r} + study.method):
    open({asleep!r} + study.method, 'w').write(str(os.getpid()))
    time.sleep(60)"""
    write_localize(books, more)
    if held == ["sig"]:
        drive("--methods", "ig", "--only", "01")
    call = f"run.main({options(model, '--jobs', str(len(held)))!r}, {str(books)!r})"
    code = f"import sys; from qlutils import run; sys.exit({call})"
    env = {**os.environ, "QLUTILS_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver = subprocess.Popen([sys.executable, "-c", code], env=env, **piped)
    files = [Path(asleep + method) for method in held]
    while not all(file.exists() and file.read_text() for file in files):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    driver.send_signal(number)
    said = driver.communicate(timeout=30)[1]
    assert driver.returncode == status
    assert_ended([file.read_text() for file in files])
    if status > 0:
        assert "to go on:\n    ./run_all.sh --models" in said
        assert [job["status"] for job in run_record(runs)["jobs"]] == [*2 * ["stopped"], "not run"]
    assert statuses(drive("--only", "01")) == ["done" if "ig" in held else "cached", "done"]


def test_no_job_is_on_record_as_running_once_its_run_has_ended(tmp_path, monkeypatch):
    """A signal in the moment in which its thread begins."""
    job = Job(Path("01_localize.ipynb"), "demo/gpt2", "ig", {})

    def begin(*_):
        job.status = "running"
        raise running.Stopped

    monkeypatch.setattr(running, "_run_all", begin)
    with pytest.raises(running.Stopped):
        running.run_jobs(running.Run([job], tmp_path, "facts", "command"), None)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [one["status"] for one in record["jobs"]] == ["stopped"]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_stop_the_driver_like_it_and_say_how_to_go_on(
    books, model, runs, drive, capsys, monkeypatch, number, status
):
    def stopped(notebook, output, parameters, env, log, stop):
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, number)
        assert stop.wait(20)
        return "its process was killed"

    with monkeypatch.context() as patch:
        patch.setattr(running, "execute", stopped)
        assert run.main(options(model), books) == status
    assert "to go on:\n    ./run_all.sh --models" in capsys.readouterr().err
    left = [job["status"] for job in run_record(runs)["jobs"]]
    assert left == ["stopped", "not run", "not run"]
    assert statuses(drive("--only", "01")) == ["done", "done"]


def test_a_log_says_again_and_again_what_runs_how_far_it_is_and_for_how_long(
    books, model, drive, tmp_path, monkeypatch
):
    """On a terminal a bar does; a log gets a line a minute, here every 0.1 seconds."""
    monkeypatch.setattr(running, "LOG_SECONDS", 0.1)
    monkeypatch.setattr(store, "cached_model", lambda *_: units.fake_model())
    work = f"""
import time, units
time.sleep(0.3)
study.run(units.signed, units.UNITS, dict(log={str(tmp_path / "log")!r}, pause=0.3))"""
    write_localize(books, work)
    write(books, "02_consistency", COMPARING, COMPARE, "import time; time.sleep(0.4)")
    drive("--methods", "ig", "--only", "01", "02")
    first = r"\[0/2\] \d min, at work: 01_localize tiny model ig"
    done = [f" {n}/4 units, {r'[?]' if n == 0 else '[0-9:]+'} left" for n in range(4)]
    last = r"\[1/2\] \d min, at work: 02_consistency tiny model"
    for line in (first, *(first + one for one in done), last):
        assert re.search(f"^{line}$", drive.said.err, re.M), (line, drive.said.err)


def test_two_drivers_on_one_output_are_refused(books, model, runs, capsys):
    with locked(runs / "default" / ".lock"):
        assert run.main(options(model), books) == 2
    assert str(runs / "default" / ".lock") in capsys.readouterr().err


# -- what a notebook checks by itself, without the driver ------------------------------------------
@pytest.fixture
def opened(tmp_path, monkeypatch):
    """What a notebook with these declared parameters has, opened with others given."""
    monkeypatch.chdir(tmp_path)

    def start(declared=PARAMETERS, run_first=True, **given):
        write_notebook(tmp_path, "01_localize", declared)
        namespace = {"In": [], "Out": {}, "__name__": "__main__", "_dh": []}  # as a kernel has them
        if run_first:
            exec(declared, namespace)
        return parameters_of("01_localize", {**namespace, **given})

    return start


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 20}, "unknown parameter 'steps'; this notebook knows model, "),
        ({"Model": "demo/llama2"}, "unknown parameter 'Model'"),
        ({"t": "0.3"}, "t='0.3'"),
        ({"seed": True}, "seed=True"),
        ({"model": None}, "model=None"),
        ({"t": 0.01}, "parameter t 0.01: want a share of the largest score that results keep"),
        ({"seed": -1}, "parameter seed -1: want an integer, at least 0"),
        ({"method": "lrp"}, "method 'lrp' is unknown"),
        ({"run_first": False}, "is not set: run the parameters cell"),
    ],
)
def test_a_notebook_refuses_parameters_it_does_not_know(opened, given, said):
    with pytest.raises(ValueError, match=said):
        opened(**given)


def test_given_values_win_none_means_all_and_a_notebook_can_be_opened_again(opened):
    declared, given = f"{PARAMETERS}\nlambda1 = 2.0", dict(facts_per_relation=None, lambda1=1)
    values = opened(declared, **given)
    assert values["facts_per_relation"] is None and values["lambda1"] == 1
    assert values["model"] == "demo/gpt2" and "In" not in values
    # names that later cells set are no parameters
    assert opened(declared, **given, study=object(), present=5) == values


def test_a_notebook_without_the_driver_tells_models_apart(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QLUTILS_COMMAND", raising=False)
    monkeypatch.setenv("QLUTILS_MODELS", "[]")  # as it was afterwards
    models = [str(tmp_path / folder / "last") for folder in "ab"]
    write_notebook(tmp_path, "report", "models = []")
    study = Study.open("report", {"models": models})
    assert [study.beside(model).label for model in models] == ["a/last", "b/last"]


def test_a_plan_costs_what_the_options_ask_for_and_each_model_and_method_once(
    books, runs, capsys, monkeypatch
):
    write(books, "01_localize", f"{PARAMETERS}\nsteps = 20\nanswer = 'all'\ndevice = None")
    plan = ["--plan", "--models", "demo/gpt2", "demo/gpt2", "--methods", "ig", "ig"]

    def flops(*more):
        assert run.main([*plan, *more], books) == 0
        columns, row, _ = capsys.readouterr().out.splitlines()
        return float(row.split()[columns.split().index("PFLOP")])

    with monkeypatch.context() as patch:
        patch.setattr("qlutils.driver.plan.matmul_rate", lambda *_: ("a device", "float32", 1e15))
        assert flops() == pytest.approx(4 * flops("-p", "steps", "5"), rel=1e-2)
    for said, more in {
        "device 'cuda:99' is unknown or not there": ["--device", "cuda:99"],
        "unknown parameter 'stepz'": ["-p", "stepz", "5"],
        "parameter steps 0: want an integer, at least 2": ["-p", "steps", "0"],
        "answer 'lst' is unknown": ["-p", "answer", "lst"],
    }.items():
        assert run.main([*plan, *more], books) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not runs.exists() or not list(runs.glob("*"))


def test_the_plan_of_a_gpu_is_what_was_measured_on_one():
    """Every row of the H200's table, from the matmul rate that was measured beside it."""
    text = (ROOT / "tests/benchmarks/results/h200.md").read_text(encoding="utf-8")
    found = set()
    for line in re.findall(r"^\| `.*$", text, re.M):
        shape, method, milliseconds, speed, share, _ = (
            cell.strip(" `") for cell in line.split("|")[1:-1]
        )
        rate = float(speed) * 1e12 / (float(share.rstrip("%")) / 100)
        planned = 1e3 * query_seconds(SHAPES[shape], method, 20, 10, rate, gpu=True)
        assert planned == pytest.approx(float(milliseconds), rel=0.2), (shape, method)
        found.add((shape, method))
    assert len(found) == 9


def test_results_from_other_inputs_are_not_read(model, runs):
    settings = dict(model=model, method="ig", relations=["P36"], facts_per_relation=2)
    study = Study("01_localize", **settings)
    study.save(pd.DataFrame({"x": [1.5], "layer": [[1, 2]]}), "queries")
    assert study.load("queries").x.tolist() == [1.5] and study.methods_done() == ["ig"]
    other = Study("02_consistency", **{**settings, "method": None, "seed": 1})
    assert other.methods_done() == []
    with pytest.raises(ValueError, match="other .*seed"):
        other.load("queries", "ig")
    with pytest.raises(ValueError, match="sig .*not made yet"):
        study.load("queries", "sig")
    Path(model, "config.json").write_text('{"changed": 1}')
    assert study.methods_done() == []
    path = study.results / "queries.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    warned = pytest.warns(UserWarning, match="queries.parquet")
    with warned, pytest.raises(ValueError, match="dama"):
        study.load("queries")


def test_a_models_folder_stays_in_the_run_and_its_label_is_as_short_as_the_others_allow(tmp_path):
    """See also test_security.py."""
    named = {"demo/gpt2": "demo--gpt2", "../../none/x": "--..--none--x", "...": "_", "a\0b": "a_b"}
    assert {name: paths.slug(name) for name in named} == named
    twins = [tmp_path / ("m" * length) for length in (250, 251)]
    for folder in twins:
        folder.mkdir()
    one, other = (paths.slug(str(folder)) for folder in twins)
    assert one != other and one.startswith("mmm") and len(one) == len(other) < 60
    assert paths.label("meta-llama/Llama-2-7b-hf", []) == "meta-llama/Llama-2-7b-hf"
    assert paths.label("/x/run/gpt2", ["gpt2"]) == "run/gpt2"
    assert paths.label("/x/m.gguf", ["/y/n.gguf"]) == "m.gguf"
    assert paths.label("/a/x/m", ["/b/x/m", "/c/m"]) == "a/x/m"


def test_a_results_notebook_opens_without_torch(runs):
    code = (
        "import sys, qlutils, qlutils.study.notebook, qlutils.run\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120)
    assert said.stdout.strip() == b"set()", said.stderr


# -- run_all.sh -----------------------------------------------------------------------------------
@pytest.fixture
def shell(tmp_path):
    """Runs the script of a checkout in a folder with a space, which links to this package."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    shutil.copyfile(ROOT / "run_all.sh", folder / "run_all.sh")
    (folder / "qlutils").symlink_to(ROOT / "qlutils")

    def start(*arguments, **env):
        command = [shutil.which("bash"), folder / "run_all.sh", *arguments]
        options = dict(cwd=tmp_path, text=True, capture_output=True)
        said = subprocess.run(command, env={"PYTHONPATH": str(folder), **env}, **options)
        assert not (folder / ".venv").exists()
        return said

    return start


def test_the_script_uses_an_active_environment_that_has_the_project(shell):
    said = shell("--help", VIRTUAL_ENV=sys.prefix, PATH=os.environ["PATH"])
    assert said.returncode == 0 and "--facts-per-relation" in said.stdout, said.stderr


def test_the_script_says_in_one_line_what_to_install(shell, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "uname", "cat", "cksum", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    for wanted in ("needs Python 3.11 or newer", "apt-get install python3-venv"):
        said = shell(PATH=str(tools))
        assert said.returncode == 1 and said.stderr.count("\n") == 1 and wanted in said.stderr
        broken = tools / "python3"  # a Python without venv, as on a bare Debian
        broken.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec \'{sys.executable}\' "$@"\n')
        broken.chmod(0o755)


def test_folders_of_other_letters_work_in_a_bare_c_locale(books, model, tmp_path):
    folder = tmp_path / "l\u00e4ufe \u6771"
    ours = ("LC_", "LANG", "PYTHON")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    bare |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    bare |= {"PYTHONPATH": str(ROOT), "QLUTILS_RUNS": str(folder)}
    start = f"import sys; from qlutils import run; sys.exit(run.main(None, {str(books)!r}))"
    asked = options(model, "--methods", "ig", "--only", "01", "--output", "\u00fc")
    asked = [sys.executable, "-c", start, *asked]
    as_the_script = ["bash", "-c", 'eval "$(grep ^export "$0")"; exec "$@"', ROOT / "run_all.sh"]
    done = subprocess.run([*as_the_script, *asked], env=bare, capture_output=True, timeout=300)
    said = done.stdout.decode("utf-8")
    assert done.returncode == 0 and f"see {folder}/\u00fc" in said, (said, done.stderr)
    record = json.loads((folder / "\u00fc" / "run.json").read_text(encoding="utf-8"))
    assert shlex.split(record["command"])[-1] == "\u00fc"
