"""Faults on purpose: of the disk at every step, of files, of memory, of numbers, of workers. See
FAULTS.md."""

import errno
import os
import shutil
import signal
import time
import warnings
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from tiny import hooked, tiny_lm, trusted, watched_rows
from units import EFFECTS_UNIT, UNITS, damaged, fake_model, numbers, run, signed

from qlutils import files
from qlutils.experiments import (
    attention_predominance,
    kn_modification,
    knowledge_synapses,
    localize,
)
from qlutils.experiments import query_kn_mapping as mapping
from qlutils.study import identity, store
from qlutils.study.notebook import Study
from qlutils.study.results import read_record


# -- a small run that leaves every kind of result --------------------------------------------------
@pytest.fixture
def small(runs, tmp_path, monkeypatch):
    """Makes the run; `small.kept()` are its results, whole files that anyone could read."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(store, "cached_model", lambda *_: fake_model())
    given = dict(model=str(tmp_path / "tiny"), method="ig", relations=["P36"], facts_per_relation=1)

    def make_run():
        study = Study("01_localize", **given)
        frame = study.run(numbers, UNITS[:3], desc="small")
        study.save(frame, "queries")
        study.table(frame[["name", "count"]], "table1")
        study.record()
        return study, study.work["small"]["computed"]

    def kept():
        made = [path for path in runs.rglob("[!.]*.*") if path.name != "run.json"]
        return {str(path.relative_to(runs)): path.read_bytes() for path in sorted(made)}

    make_run.kept = kept
    return make_run


def in_a_child(work):
    """Its process number; it ends with status 0, or 1 if `work` fails, and never comes back."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


class Disk:
    """Counts what is asked of the disk; from step `at` on (or at that step alone) it fails with
    `error`, after half of what is to be written. With `kill` the process is killed there."""

    def __init__(self, patch, at, error=errno.ENOSPC, once=False, kill=False):
        self.at, self.error, self.once, self.kill, self.steps = at, error, once, kill, 0
        steps = ["fsync", "replace", "mkdir"] + ["unlink"] * (error == errno.EROFS or kill)
        for name in steps:
            patch.setattr(os, name, self.failing(getattr(os, name)))
        patch.setattr(files, "open", self.open, raising=False)

    def step(self, half=lambda: None):
        self.steps += 1
        if self.steps == self.at or (self.steps > self.at and not self.once):
            half()
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.error, os.strerror(self.error))

    def failing(self, call):
        return lambda *args, **kwargs: (self.step(), call(*args, **kwargs))[1]

    def open(self, path, mode="r", **options):
        if mode != "r":
            self.step()
        stream, disk = open(path, mode, **options), self

        class Stream:
            def __getattr__(self, name):
                return getattr(stream, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def write(self, data):
                disk.step(lambda: (stream.write(data[: len(data) // 2]), stream.flush()))
                return stream.write(data)

        return Stream()


@pytest.mark.parametrize(
    "error, once", [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EROFS, False)]
)
def test_whichever_write_fails_the_folder_is_named_and_a_later_run_gives_the_same_bytes(
    small, runs, monkeypatch, error, once
):
    small()
    clean, at, failed, steps = small.kept(), 0, 0, 1
    while at <= steps:
        at += 1
        shutil.rmtree(runs)
        with monkeypatch.context() as patch:
            disk = Disk(patch, at, error, once)
            try:
                small()
            except files.StoreError as refused:
                failed += 1
                for said in (os.strerror(error), str(runs)):
                    assert said in str(refused), (at, refused)
            else:
                assert disk.steps < at or once or error == errno.EROFS, f"step {at} was not heard"
        steps, partial = disk.steps, small.kept()
        assert partial.items() <= clean.items(), f"step {at} left something half-written"
        done = sum("/units/" in name for name in partial)
        assert small()[1] == 3 - done, f"step {at}: finished units are kept"
        assert small.kept() == clean
    assert failed >= 25, failed


def test_killed_at_any_step_of_any_write_it_goes_on_with_the_same_bytes(small, runs, monkeypatch):
    small()
    clean, at, status, lost = small.kept(), 0, -9, 0
    monkeypatch.setattr(files, "LEFT_BEHIND", 0)
    while status == -9:
        at += 1
        shutil.rmtree(runs)
        pid = in_a_child(lambda: (Disk(monkeypatch, at, kill=True), small()))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        partial = small.kept()
        assert partial.items() <= clean.items(), f"step {at} left something half-written"
        lost += any(runs.rglob(".*.tmp"))
        assert small()[1] == 3 - sum("/units/" in name for name in partial)
        with files.locked(runs / "default" / ".lock"):  # the driver sweeps the whole run
            assert not any(runs.rglob(".*.tmp"))
        assert small.kept() == clean
    assert status == 0 and at > 40 and lost > 5, (status, at, lost)


def test_a_file_system_without_locks_is_named(small, runs, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.raises(files.StoreError, match="No locks available.*another output") as caught:
        small()
    assert str(runs) in str(caught.value)


# -- damaged and foreign files ---------------------------------------------------------------------
def test_no_damage_to_a_record_is_read_as_a_record(small):
    study, _ = small()
    path = study.results / "run.json"
    [entry], whole = read_record(path).values(), path.read_bytes()
    assert read_record(path.with_name("none")) == {}
    for bad in damaged(whole, 11):
        path.write_bytes(bad)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_record(path)
        if found:  # such as 1e-05 for 1E-05
            assert found == {"01_localize": entry}
        else:
            assert "run.json is damaged" in str(caught[0].message)
    path.write_bytes(whole.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.warns(UserWarning, match="01_localize is left out"):
        small()
    assert list(read_record(path)) == ["01_localize"]


def test_a_frame_of_an_older_code_version_is_refused_by_that_name(small, monkeypatch):
    versions = identity.code_versions()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "code_versions", lambda: {**versions, "localise_unit": 0})
        study, _ = small()
    with pytest.raises(ValueError, match="made from other code. Run the notebook that makes it"):
        study.load("queries")
    small()
    study.load("queries")


# -- two at once -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pause, held", [(1.2, True), (0.4, False)], ids=["refused", "let in and finds it done"]
)
def test_of_two_runs_started_at_once_the_second_is_refused_or_finds_the_work_done(
    tmp_path, monkeypatch, pause, held
):
    monkeypatch.setattr(store, "cached_model", lambda *_: fake_model())
    config = dict(log=str(tmp_path / "log"), pause=pause)
    first = in_a_child(lambda: run(tmp_path, signed, config))
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    if held:
        with pytest.raises(files.StoreError, match=rf"\.lock is held by process {first} on "):
            run(tmp_path, signed, config)
        assert run(tmp_path, numbers)[1]["computed"] == 4  # other work goes on
    else:
        assert run(tmp_path, signed, config)[1]["computed"] == 0
    assert os.waitpid(first, 0)[1] == 0
    assert run(tmp_path, signed, config)[1]["computed"] == 0
    assert (tmp_path / "log").read_text().split() == 4 * [str(first)]


# -- memory ----------------------------------------------------------------------------------------
PROMPTS = ["5 6 7", "8 9 10 11", "5 7 9 11"]
FACTS = [
    dict(relation="P1", subject=f"s{i}", object=f"{i + 30} {i + 50}", prompts=PROMPTS)
    for i in range(4)
]


def edit_plans():
    queries = [
        dict(prompt=prompt, object=fact["object"], known=True, same=True)
        for fact in FACTS[1:]
        for prompt in PROMPTS
    ]
    edits = [dict(neurons="local", control="none", set=[[0, 3], [1, 5]])]
    same = dict(known=[True] * 3, query=0, new_object="33 40", texts=[], edits=edits)
    same["locality"] = queries[:4]
    return [{**fact, **same, "fact": f"P1|{fact['subject']}|{fact['object']}"} for fact in FACTS]


TASKS = {
    "mapping": lambda lm: mapping.scale_kns(lm, EFFECTS_UNIT),
    "synapses": lambda lm: knowledge_synapses.scale_synapse_columns(
        lm, [{**EFFECTS_UNIT[0], "irrelevant": ["9 8 7 6"] * 3}]
    ),
    "attention": lambda lm: attention_predominance.attend(lm, EFFECTS_UNIT),
    "edits": lambda lm: kn_modification.edit_facts(lm, edit_plans()),
    "localise": lambda lm: localize.localise_unit(lm, FACTS, method="ig", steps=4),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_unit_that_runs_out_of_memory_goes_on_in_smaller_batches_with_its_numbers(
    task,
):
    lm, work = tiny_lm("gpt2"), TASKS[task]
    work(lm)  # the checks of a model's first use are over
    with watched_rows(lm) as seen:
        wanted = work(lm)
    limit = seen["most"] // 2
    with watched_rows(lm, limit=limit) as seen:
        found = work(lm)
    assert seen["most"] > limit, "nothing ran out of memory"
    if task == "localise":  # which records how large its batches were
        assert (found.pop("row_budget") < wanted.pop("row_budget")).all()
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=1e-7, atol=1e-9)
    with watched_rows(lm, limit=0), pytest.raises(torch.OutOfMemoryError):
        work(lm)


# -- numbers ---------------------------------------------------------------------------------------
@contextmanager
def broken_for(lm, token, value):
    """The residual stream is `value` wherever `token` is read."""

    def spoil(_, inputs, output):
        return torch.where((inputs[0] == token)[..., None], torch.full_like(output, value), output)

    with hooked(lm.model.get_input_embeddings().register_forward_hook(trusted(spoil))):
        yield


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", TASKS)
def test_numbers_that_are_not_finite_stop_the_unit_and_name_the_query(task, value):
    lm, work = tiny_lm("gpt2", torch.float32), TASKS[task]
    work(lm)
    query, token = ("8 9 10 11", 10) if task in ("edits", "localise") else ("9 13 30 12", 30)
    with broken_for(lm, token, value), pytest.raises(ValueError, match="finite|NaN") as caught:
        work(lm)
    assert query in str(caught.value), caught.value
