"""Units of work: named by what determines them, whole or absent, verified when read, resumable."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import units
from units import (
    UNITS,
    breaks_at_two,
    damaged,
    fake_model,
    lock_of,
    numbers,
    run,
    signed,
    unit_files,
)

from qlutils import files
from qlutils.study import store


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(store, "cached_model", lambda *_: fake_model())


def test_a_result_is_the_same_computed_or_read_and_can_be_read_where_nothing_can_be_written(
    tmp_path, model, monkeypatch
):
    first, info, _ = run(tmp_path)
    monkeypatch.setattr(files, "write_bytes", None)
    monkeypatch.setattr(store, "locked", None)
    again, info_again, _ = run(tmp_path)
    assert (info["computed"], info_again["computed"], info["units"]) == (4, 0, 4)
    pd.testing.assert_frame_equal(first, again)
    direct = pd.concat([numbers(None, unit) for unit in UNITS], ignore_index=True)
    plain = ["name", "count", "single", "double", "known"]
    pd.testing.assert_frame_equal(first[plain], direct[plain])
    for column in ("layer", "score"):
        assert [list(x) for x in first[column]] == [list(x) for x in direct[column]]
    assert first["score"][1].dtype == np.float32
    assert [None if x is None else list(x) for x in first["first_only"]] == [[1.5]] + [None] * 7
    assert run(tmp_path, units=[])[0].empty


CHANGES = {
    "config": dict(config={"scale": 2.0}),
    "task": dict(task=breaks_at_two, units=[UNITS[0]]),
    "unit": dict(units=[[{"x": 9, "name": "n"}]]),
    "fingerprint": {},
    "dtype": {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_input_gives_another_file(tmp_path, model, monkeypatch, change):
    run(tmp_path)
    other = {} if CHANGES[change] else {change: "other"}
    monkeypatch.setattr(store, "cached_model", lambda *_: fake_model(**other))
    info = run(tmp_path, **CHANGES[change])[1]
    assert info["computed"] == info["units"]


def test_a_unit_is_computed_again_when_its_tasks_version_is_raised_and_for_no_other_change(
    tmp_path, model
):
    first, info, _ = run(tmp_path)
    assert info["version"] == 1

    def numbers(lm, unit, scale=1.0):
        """The task with another docstring."""
        return first

    numbers.__module__, numbers.__qualname__ = units.__name__, "numbers"
    with pytest.raises(AttributeError, match="VERSION"):
        run(tmp_path, task=numbers)
    numbers.VERSION = 1
    again, info, _ = run(tmp_path, task=numbers)
    assert info["computed"] == 0
    pd.testing.assert_frame_equal(first, again)
    numbers.VERSION = 2
    assert run(tmp_path, task=numbers)[1]["computed"] == len(UNITS)


def sized_model(layers=2, width=10, device="cpu"):
    """Of `layers` layers of width**2 parameters and as many in the unembedding."""
    weights = [torch.nn.Linear(width, width, bias=False) for _ in range(layers + 1)]
    arch, device = SimpleNamespace(head=weights[0]), SimpleNamespace(type=device)
    return SimpleNamespace(arch=arch, layers=weights[1:], device=device)


MINUTE = 1e13 / (2 * 300)  # of passes: two operations a parameter


@pytest.mark.parametrize(
    "passes, times, lm, sizes",
    [
        ([1] * 50, 1, {}, [24, 24, 2]),  # small models: as many as fill batches
        ([MINUTE / 4] * 9, 1, {}, [4, 4, 1]),
        ([MINUTE / 4] * 4, 2, {}, [2, 2]),
        ([MINUTE * 3, MINUTE / 2, MINUTE / 2, MINUTE / 2], 1, {}, [1, 2, 1]),  # at least one
        ([MINUTE / 4] * 4, 1, {"layers": 23}, [1, 1, 1, 1]),  # eight times the parameters
        ([MINUTE / 4] * 250, 1, {"device": "cuda"}, [240, 10]),
        ([MINUTE * 50] * 5, 1, {"device": "cuda"}, [2, 2, 1]),
        ([1] * 30, 1, {"device": "mps"}, [24, 6]),  # as on a CPU
        ([], 1, {}, []),
    ],
)
def test_a_unit_holds_as_many_facts_as_cost_about_a_minute_and_fill_batches(
    passes, times, lm, sizes
):
    task = SimpleNamespace(passes=lambda lm, fact, config: fact["passes"] * config["times"])
    facts = [{"passes": n} for n in passes]
    packed = store.packed(task, sized_model(**lm), facts, {"times": times})
    assert [fact for unit in packed for fact in unit] == facts
    assert [len(unit) for unit in packed] == sizes


def test_no_flipped_bit_and_no_truncation_goes_unnoticed(tmp_path):
    path = tmp_path / "x.parquet"
    files.write_parquet(numbers(None, UNITS[1]), path, "key")
    data = path.read_bytes()
    assert files.read_parquet(path, "key")[0].num_rows == 2
    for bad in damaged(data, 5):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="x.parquet"):
            assert files.read_parquet(path, "key")[0] is None


@pytest.mark.parametrize("harm", ["cut short", "flipped bits", "another unit"])
def test_a_damaged_unit_is_named_and_computed_again(tmp_path, model, harm):
    good = run(tmp_path)[0]
    before = unit_files(tmp_path)
    name, other = list(before)[:2]
    flipped = before[name][:99] + b"\xff" + before[name][100:]
    bad = {"cut short": before[name][:-9], "flipped bits": flipped, "another unit": before[other]}
    (tmp_path / "units" / name).write_bytes(bad[harm])
    again, info, messages = run(tmp_path)
    assert info["computed"] == 1 and messages and all(name in said for said in messages)
    pd.testing.assert_frame_equal(again, good)
    assert unit_files(tmp_path) == before


def test_the_lock_of_a_dead_process_is_free_and_what_writers_left_is_removed(tmp_path, model):
    lock = lock_of(tmp_path)
    code = (
        "import os, sys; from qlutils import files\n"
        "lock = files.locked(sys.argv[1]); lock.__enter__(); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": units.IMPORT_PATH}
    assert subprocess.run([sys.executable, "-c", code, lock], env=env).returncode == -9
    assert "held" not in lock.read_text() and "process" in lock.read_text()
    left = [tmp_path / "units" / f".{name}.parquet.host.7.tmp" for name in "xy"]
    for file in left:
        file.write_text("half")
    os.utime(left[0], (0, 0))
    assert run(tmp_path)[1]["computed"] == 4
    assert [file.exists() for file in left] == [False, True]


def test_an_error_names_the_unit_and_earlier_units_stay(tmp_path, model):
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, task=breaks_at_two)
    assert "breaks_at_two" in caught.value.__notes__[0] and len(unit_files(tmp_path)) == 2


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, np.float32(1)])
def test_a_configuration_that_json_cannot_hold_is_refused(tmp_path, model, bad):
    with pytest.raises(ValueError, match="JSON"):
        run(tmp_path, config={"scale": bad})


def test_workers_write_the_bytes_of_a_plain_loop_and_a_worker_killed_costs_its_unit_only(
    tmp_path, monkeypatch, model
):
    distributed = pytest.importorskip("distributed")
    from qlutils.driver.cluster import scheduler

    class WithoutModel(distributed.WorkerPlugin):
        def setup(self, worker):
            units.without_model()

    monkeypatch.setenv("PYTHONPATH", units.IMPORT_PATH)
    log = tmp_path / "log"
    config = dict(log=str(log), pause=0.5)

    def kill():
        while not log.exists() or not log.read_text().endswith("\n"):
            time.sleep(0.02)
        os.kill(int(log.read_text().split()[0]), signal.SIGKILL)

    plain = run(tmp_path / "plain", signed, config)[0]
    log.unlink()
    killer = threading.Thread(target=kill, daemon=True)
    with scheduler(2, None) as address, distributed.Client(address) as client:
        assert address.startswith("tcp://127.0.0.1:")
        monkeypatch.setattr("qlutils.study.store._client", lambda _: client)
        client.register_plugin(WithoutModel())
        killer.start()
        found = run(tmp_path / "workers", signed, config)[0]
        with pytest.raises(FloatingPointError):
            run(tmp_path / "broken", breaks_at_two)
    killer.join(5)
    workers = log.read_text().split()
    assert len(set(workers)) >= 2 and len(workers) == 5, "four units, one of them begun twice"
    pd.testing.assert_frame_equal(found, plain)
    assert unit_files(tmp_path / "workers") == unit_files(tmp_path / "plain") and len(found) == 8
