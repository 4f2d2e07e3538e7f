"""Units of work: named by what determines them, whole or absent, verified when read, resumable."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import units
from units import (
    UNITS,
    breaks_at_two,
    fake_model,
    lock_of,
    numbers,
    run,
    signed,
    unit_files,
)

from qlutils import files, paths
from qlutils.study import store


def tiny_checkpoint(folder):
    """A random GPT-2 of two layers with a tokenizer of 64 words."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(store, "cached_model", lambda *_: fake_model())


def test_a_result_is_the_same_whether_it_was_computed_or_read(tmp_path, model):
    first, info, _ = run(tmp_path)
    again, info_again, _ = run(tmp_path)
    assert (info["computed"], info_again["computed"], info["units"]) == (4, 0, 4)
    pd.testing.assert_frame_equal(first, again)
    direct = pd.concat([numbers(None, unit) for unit in UNITS], ignore_index=True)
    assert first.dtypes[["count", "single", "double", "known"]].tolist() == [
        np.dtype("int64"),
        np.dtype("float32"),
        np.dtype("float64"),
        np.dtype("bool"),
    ]
    for column in ("name", "count", "single", "double", "known"):
        assert first[column].tolist() == direct[column].tolist()
    for column in ("layer", "score"):
        assert [list(x) for x in first[column]] == [list(x) for x in direct[column]]
    assert first["score"][1].dtype == np.float32
    assert [None if x is None else list(x) for x in first["first_only"]] == [[1.5]] + [None] * 7


def test_units_are_byte_identical_when_made_again(tmp_path, model):
    run(tmp_path / "a"), run(tmp_path / "b")
    assert unit_files(tmp_path / "a") == unit_files(tmp_path / "b") != {}
    assert {path.suffix for path in (tmp_path / "a" / "units").iterdir()} == {".parquet", ".lock"}


@pytest.mark.parametrize("change", ["config", "fingerprint", "dtype", "task", "unit"])
def test_another_input_gives_another_file(tmp_path, model, monkeypatch, change):
    run(tmp_path)
    options = {}
    if change == "config":
        options["config"] = {"scale": 2.0}
    elif change == "task":
        options["task"] = breaks_at_two
        options["units"] = [UNITS[0]]
    elif change == "unit":
        options["units"] = [[{"x": 9, "name": "n"}]]
    else:
        monkeypatch.setattr(
            store,
            "cached_model",
            lambda *_: fake_model(
                **{"fingerprint": {"fingerprint": "other"}, "dtype": {"dtype": "torch.bfloat16"}}[
                    change
                ]
            ),
        )
    assert run(tmp_path, **options)[1]["computed"] == len(options.get("units", UNITS))


def test_a_unit_is_computed_again_when_its_tasks_version_is_raised_and_for_no_other_change(
    tmp_path, model, monkeypatch
):
    first, info, _ = run(tmp_path)
    assert info["version"] == 1

    def numbers(lm, unit, scale=1.0):
        """The task with another docstring."""
        return first

    numbers.__module__, numbers.__qualname__, numbers.VERSION = units.__name__, "numbers", 1
    again, info, _ = run(tmp_path, task=numbers)
    assert info["computed"] == 0
    pd.testing.assert_frame_equal(first, again)
    numbers.VERSION = 2
    assert run(tmp_path, task=numbers)[1]["computed"] == len(UNITS)


@pytest.mark.parametrize("version", [None, "1", True, 1.5])
def test_a_task_without_a_version_is_refused_before_it_computes(tmp_path, model, version):
    def numbers(lm, unit):
        raise AssertionError("it ran")

    if version is not None:
        numbers.VERSION = version
    with pytest.raises(
        ValueError, match=r"task .*numbers has no VERSION.*numbers.VERSION = 1 below it"
    ):
        run(tmp_path, task=numbers)
    assert not (tmp_path / "units").exists()


def sized_model(layers=2, width=10, device="cpu"):
    """Of `layers` layers of width**2 parameters and as many in the unembedding."""
    import torch

    head = torch.nn.Linear(width, width, bias=False)
    return SimpleNamespace(
        arch=SimpleNamespace(head=head),
        layers=[torch.nn.Linear(width, width, bias=False) for _ in range(layers)],
        device=SimpleNamespace(type=device),
    )


def test_a_unit_holds_as_many_facts_as_cost_about_a_minute_and_between_1_and_24():
    def task(lm, unit):
        """Never called."""

    task.passes = lambda lm, fact, config: fact["passes"] * config["times"]
    a_pass = 2 * 300  # operations: two a parameter
    facts = lambda *passes: [{"passes": n} for n in passes]  # noqa: E731

    def sizes(passes, times=1, lm=None):
        units = store.packed(task, lm or sized_model(), facts(*passes), {"times": times})
        assert [fact for unit in units for fact in unit] == facts(*passes)
        return [len(unit) for unit in units]

    minute = 1e13 / a_pass
    assert sizes([1] * 50) == [24, 24, 2]  # small models: as many as fill batches
    assert sizes([minute / 4] * 9) == [4, 4, 1]
    assert sizes([minute / 4] * 4, times=2) == [2, 2]
    assert sizes([minute * 3, minute / 2, minute / 2, minute / 2]) == [1, 2, 1]  # at least one
    assert sizes([minute / 4] * 4, lm=sized_model(layers=23)) == [
        1,
        1,
        1,
        1,
    ]  # eight times the parameters
    assert sizes([minute * 3] * 30, lm=sized_model(device="cuda")) == [24, 6]
    assert sizes([]) == []


def test_no_flipped_bit_and_no_truncation_goes_unnoticed(tmp_path):
    path = tmp_path / "x.parquet"
    files.write_parquet(numbers(None, UNITS[1]), path, "key")
    data = path.read_bytes()
    assert files.read_parquet(path, "key")[0].num_rows == 2
    rng = random.Random(0)
    damaged = [
        data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        for at in range(0, len(data), 5)
    ]
    damaged += [data[:size] for size in (0, 3, 100, len(data) // 2, len(data) - 1)] + [data + b"x"]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="x.parquet"):
            assert files.read_parquet(path, "key")[0] is None


@pytest.mark.parametrize("harm", ["truncate", "flip", "foreign"])
def test_a_damaged_unit_is_named_and_computed_again(tmp_path, model, harm):
    good = run(tmp_path)[0]
    before = unit_files(tmp_path)
    name, other = list(before)[:2]
    bad = {
        "truncate": before[name][:-9],
        "flip": before[name][:99] + b"\xff" + before[name][100:],
        "foreign": before[other],
    }[harm]
    (tmp_path / "units" / name).write_bytes(bad)
    again, info, messages = run(tmp_path)
    assert info["computed"] == 1 and len(messages) == 1 and name in messages[0]
    pd.testing.assert_frame_equal(again, good)
    assert unit_files(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, model, monkeypatch, call):
    run(tmp_path, units=UNITS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            call,
            lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        )
        with pytest.raises(files.StoreError, match="No space left") as caught:
            run(tmp_path)
    assert str(tmp_path / "units") in str(caught.value)
    assert len(unit_files(tmp_path)) == 1
    assert run(tmp_path)[1]["computed"] == 3


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(
    tmp_path, model, monkeypatch
):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "open", read_only, raising=False)
    with pytest.raises(files.StoreError, match="Read-only") as caught:
        run(tmp_path, task=breaks_at_two)
    assert str(tmp_path) in str(caught.value)


def test_finished_units_can_be_read_where_nothing_can_be_written(tmp_path, model, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(files, "write_bytes", None)
    monkeypatch.setattr(store, "locked", None)
    assert run(tmp_path)[1]["computed"] == 0


@pytest.fixture
def lock(tmp_path, model):
    return lock_of(tmp_path)


def test_the_same_work_twice_at_once_is_refused_by_the_name_of_the_lock_and_other_work_is_not(
    tmp_path, lock
):
    with files.locked(lock):
        with pytest.raises(files.StoreError, match=rf"\.lock is held by process {os.getpid()} on "):
            run(tmp_path)
        assert run(tmp_path, config={"scale": 3})[1]["computed"] == 4
    assert run(tmp_path)[1]["computed"] == 4


def test_the_lock_of_a_dead_process_is_free_and_what_writers_left_is_removed(tmp_path, lock):
    code = (
        "import os, sys; from qlutils import files\n"
        "lock = files.locked(sys.argv[1]); lock.__enter__(); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    dead = subprocess.Popen([sys.executable, "-c", code, lock], env=env)
    dead.wait()
    names = [".x.parquet.another.7.tmp", ".y.parquet.another.7.tmp", ".mine.tmp"]
    names += [f".z.parquet.{socket.gethostname()}.{pid}.tmp" for pid in (os.getpid(), dead.pid)]
    left = [tmp_path / "units" / name for name in names]
    for file in left:
        file.write_text("half")
    os.utime(left[0], (0, 0))
    assert run(tmp_path)[1]["computed"] == 4
    assert [file.exists() for file in left] == [False, True, True, True, False]


def test_an_error_names_the_unit_and_earlier_units_stay(tmp_path, model):
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, task=breaks_at_two)
    assert "breaks_at_two" in caught.value.__notes__[0] and len(unit_files(tmp_path)) == 2


@pytest.mark.parametrize(
    "bad", [{"scale": float("nan")}, {"scale": {1, 2}}, {"scale": np.float32(1)}]
)
def test_a_configuration_that_json_cannot_hold_is_refused(tmp_path, model, bad):
    with pytest.raises(ValueError, match="JSON"):
        run(tmp_path, config=bad)


def test_no_units_give_an_empty_table(tmp_path, model):
    assert run(tmp_path, units=[])[0].empty


def hear_interrupts():
    """A shell's background job ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(root, log):
    return subprocess.Popen(
        [sys.executable, "-c", f"import units; units.work_slowly({str(root)!r}, {str(log)!r})"],
        env={**os.environ, "PYTHONPATH": units.IMPORT_PATH},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


def lines(log):
    return log.read_text().split() if log.exists() else []


def test_kills_cost_one_unit_each_and_change_nothing(tmp_path):
    clean, log = tmp_path / "clean", tmp_path / "log"
    log_text = str(log)
    assert start(clean, log_text).wait() == 0
    log.unlink()
    rng, kills = random.Random(1), 0
    for _ in range(4):
        process, before = start(tmp_path / "killed", log_text), len(lines(log))
        while len(lines(log)) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.25)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    process = start(tmp_path / "killed", log_text)
    assert process.wait() == 0
    process.communicate()
    assert kills == 4 and 10 <= len(lines(log)) <= 10 + kills
    assert unit_files(tmp_path / "killed") == unit_files(clean)
    assert {path.suffix for path in (tmp_path / "killed" / "units").iterdir()} == {
        ".parquet",
        ".lock",
    }


def test_a_run_that_is_interrupted_ends_soon_and_says_how_to_resume(tmp_path):
    log = tmp_path / "log"
    process = start(tmp_path, log)
    while len(lines(log)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=15)[1]
    assert process.returncode in (130, -2)
    assert "resumes" in said and str(tmp_path / "units") in said
    assert {path.suffix for path in (tmp_path / "units").iterdir()} == {".parquet", ".lock"}


def test_workers_write_the_same_bytes_as_a_plain_loop(tmp_path, model):
    distributed = pytest.importorskip("distributed")
    plain = run(tmp_path / "plain")[0]
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address=None,
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,  # as the notebooks' own
    ):
        frame, info, _ = run(tmp_path / "workers", client=client)
        assert info["computed"] == 4
        assert run(tmp_path / "workers", client=client)[1]["computed"] == 0
        with pytest.raises(FloatingPointError):
            run(tmp_path / "broken", task=breaks_at_two, client=client)
    pd.testing.assert_frame_equal(frame, plain)
    assert unit_files(tmp_path / "workers") == unit_files(tmp_path / "plain")


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "with a model"]
)
def test_a_worker_killed_while_it_computes_costs_its_unit_and_changes_no_byte(
    tmp_path, monkeypatch, real
):
    distributed = pytest.importorskip("distributed")
    from qlutils.driver.cluster import scheduler

    class WithoutModel(distributed.WorkerPlugin):
        def setup(self, worker):
            units.without_model()

    monkeypatch.setenv("PYTHONPATH", units.IMPORT_PATH)
    log, options, killed = tmp_path / "log", dict(desc="two workers", device="cpu"), []
    checkpoint = tiny_checkpoint(tmp_path / "model") if real else "m"
    if not real:
        monkeypatch.setattr(store, "cached_model", lambda *_: fake_model())

    def kill():
        while not log.exists() or not log.read_text().endswith("\n"):
            time.sleep(0.02)
        killed.append(int(log.read_text().splitlines()[0]))
        os.kill(killed[0], signal.SIGKILL)

    frame = store.run_units(
        signed, checkpoint, UNITS, dict(log=str(log)), root=tmp_path / "plain", **options
    )
    log.unlink()
    killer = threading.Thread(target=kill, daemon=True)
    with scheduler(2, None) as address:
        assert address.startswith("tcp://127.0.0.1:")
        with distributed.Client(address) as client:
            if not real:
                client.register_plugin(WithoutModel())
            client.submit(store.identity, checkpoint, "cpu", None, pure=False).result()
            killer.start()
            start = time.time()
            found = store.run_units(
                signed,
                checkpoint,
                UNITS,
                dict(log=str(log)),
                root=tmp_path / "workers",
                client=client,
                **options,
            )
            took = time.time() - start
    killer.join(5)
    workers = log.read_text().split()
    assert len(killed) == 1 and len(set(workers)) >= 2 and took < 120
    assert len(workers) == 5, "four units, one of them begun twice"
    pd.testing.assert_frame_equal(found, frame)
    assert unit_files(tmp_path / "workers") == unit_files(tmp_path / "plain") and len(found) == 8
    assert {path.suffix for path in (tmp_path / "workers" / "units").iterdir()} == {
        ".parquet",
        ".lock",
    }
