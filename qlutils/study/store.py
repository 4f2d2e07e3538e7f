"""Units of work: one unit, one parquet file, named by a hash of all that determines its content.

Present and valid means done, so a run that was stopped at any moment goes on where it was.
"""

import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

from tqdm.auto import tqdm

from qlutils import paths
from qlutils.files import StoreError, as_frame, canonical, locked, read_table, sha256, write_table

UNIT_FACTS = 24  # batches of equal lengths are full from there on
UNIT_FLOPS = {"cpu": 1e13, "cuda": 1e15}  # a unit: about a minute, on two cores and on a GPU
# Of what notebooks make of the units: statistics, tables, claims. Raise it when those numbers move.
RESULTS_VERSION = 1
_BUSY = threading.Lock()  # a model carries hooks: one task at a time in a process


def run_units(
    task,
    model_name,
    units,
    config=None,
    *,
    root,
    desc,
    device=None,
    dtype=None,
    client=None,
    info=None,
):
    """DataFrame of the rows of `task(lm, unit, **config)` over all units, in order; a unit is
    computed once.

    task: a top-level function returning a DataFrame (columns of numbers, text, lists of numbers).
        Its `VERSION` stands for its code: units of another version are computed again.
    units: lists of JSON-able dicts. config: JSON-able keyword arguments of `task`.
    client: a dask.distributed client whose workers compute; default: the scheduler that
        QLUTILS_SCHEDULER names; without one, units are computed here, one after the other.
    root: the run's folder; a unit with a valid file in `<root>/units` is read, not computed.
    info: a dict to fill with the model's identity and the counts.

    StoreError: the folder cannot be written, or another run is computing the same. Whatever `task`
    raises comes through, and finished units stay.
    """
    folder = Path(root) / "units"
    units, config = json.loads(canonical(list(units))), json.loads(canonical(config or {}))
    client = client or _client(os.environ.get("QLUTILS_SCHEDULER"))
    job = (f"{task.__module__}:{task.__qualname__}", model_name, device, dtype)
    who = client.submit(identity, *job[1:], pure=False).result() if client else identity(*job[1:])
    # by the task's name, not its module's: code that moves within the package keeps its results
    same = {
        "task": task.__qualname__,
        "fingerprint": who["fingerprint"],
        "device": who["device"],
        "dtype": who["dtype"],
        "config": config,
        "version": task_version(task),
    }
    keys = [sha256({**same, "unit": unit}) for unit in units]
    files, tables = {key: folder / f"{key}.parquet" for key in keys}, {}

    def read(some):
        found = {key: read_table(files[key], key)[0] for key in some if files[key].exists()}
        tables.update((key, table) for key, table in found.items() if table is not None)
        return found

    absent, todo = files.keys() - read(files), []
    if len(tables) < len(files):
        with locked(folder / f".{sha256(same)[:16]}.lock"), _resumable(folder, desc) as done:
            read(absent)  # what another run has finished since
            todo = [
                (*job, unit, config, files[key], key)
                for key, unit in dict(zip(keys, units)).items()
                if key not in tables
            ]
            for key in _progress(
                _compute(todo, client, who["threads"]), desc, len(files), len(tables)
            ):
                tables[key], problem = read_table(files[key], key)
                if tables[key] is None:
                    raise StoreError(
                        f"{files[key]} was just written, but: {problem}. Check the disk, and "
                        "that every worker sees this folder"
                    )
                done.append(key)
    if info is not None:
        info.update(who, units=len(files), computed=len(todo), version=same["version"])
    return as_frame([tables[key] for key in keys])


def cached_model(name, device=None, dtype=None):
    """The process's one loaded model, loaded anew when the files of a local one have changed."""
    from qlutils.study.notebook import model_content

    local = str(name).startswith("demo/") or paths.is_local(name)
    return _loaded(name, device, dtype, model_content(name) if local else None)


@lru_cache(maxsize=1)
def _loaded(name, device, dtype, content):
    """QLUTILS_THREADS, if set, fixes torch's number of threads."""
    from qlutils.model.loading import load_model

    if os.environ.get("QLUTILS_THREADS"):
        import torch

        torch.set_num_threads(int(os.environ["QLUTILS_THREADS"]))
    return load_model(name, device=device, dtype=dtype)


def identity(model_name, device=None, dtype=None):
    """What results owe to the model: fingerprint, device kind, dtype; and the process's number of
    threads."""
    lm = cached_model(model_name, device, dtype)
    lm.check_untouched()
    torch = sys.modules.get("torch")
    return {
        "fingerprint": lm.fingerprint,
        "device": lm.device.type,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if torch else 1,
    }


@cache
def code_versions():
    """{task: its VERSION, ..., "results": RESULTS_VERSION}: what results owe to the code.

    Read from the package's text, so that a notebook that only reads results need not import torch.
    """
    found = {"results": RESULTS_VERSION}
    for file in sorted(paths.PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for task, number in re.findall(r"(?m)^(\w+)\.VERSION = (\d+)\b", text):
            found[task] = int(number)
    return found


def task_version(task):
    """The integer that stands for the code of `task` in a unit's key; ValueError where it has
    none."""
    version = getattr(task, "VERSION", None)
    if type(version) is not int:
        name = task.__qualname__
        raise ValueError(
            f"task {name} has no VERSION, so results of an older code could be taken for its "
            f"own: write {name}.VERSION = 1 below it, and raise it when its numbers change"
        )
    return version


def packed(task, lm, facts, config):
    """Units of work: the facts in order, about `UNIT_FLOPS` a unit, but 1 to `UNIT_FACTS` facts.

    `task.passes(lm, fact, config)` says how many tokens a fact sends through the model; a pass of a
    token costs two operations a parameter. No machine is timed: a unit's facts are part of its key.
    """
    parameters = lm.arch.head.weight.numel()
    parameters += sum(p.numel() for layer in lm.layers for p in layer.parameters())
    most = UNIT_FLOPS.get(lm.device.type, UNIT_FLOPS["cpu"]) / (2 * parameters)
    units, room = [], 0
    for fact in facts:
        passes = task.passes(lm, fact, config)
        if not units or len(units[-1]) == UNIT_FACTS or passes > room:
            units.append([])
            room = most
        units[-1].append(fact)
        room -= passes
    return units


def _compute(todo, client, threads):
    """Yield the key of each unit once its file is written."""
    if client is None:
        for item in todo:
            yield _work(*item)
        return
    from distributed import as_completed

    for future in as_completed(
        [client.submit(_work, *item, threads, pure=False) for item in todo], loop=client.loop
    ):
        yield future.result()


def _work(task, model_name, device, dtype, unit, config, file, key, threads=None):
    """Compute one unit and write it, in this process or in a worker; only the key travels back."""
    module, name = task.split(":")
    with _BUSY:
        lm = cached_model(model_name, device, dtype)
        if (
            threads and "torch" in sys.modules
        ):  # float sums depend on it: workers use as many as the caller
            sys.modules["torch"].set_num_threads(threads)
        try:
            frame = getattr(importlib.import_module(module), name)(lm, unit, **config)
        except Exception as error:
            error.add_note(f"(in unit {key[:12]} of {name}, {model_name}; finished units are kept)")
            raise
        write_table(frame, file, key, task=task, model=model_name)
    return key


@contextmanager
def _resumable(folder, desc):
    """Say how to go on when interrupted; SIGTERM ends a run as Ctrl-C does, with nothing
    half-written."""
    done = []
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def stop(*_):
        raise SystemExit(128 + signal.SIGTERM)

    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield done
    except (KeyboardInterrupt, SystemExit):
        print(
            f"{desc}: stopped; {len(done)} new units are kept in {folder}, the same command "
            f"resumes",
            file=sys.stderr,
        )
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _progress(keys, desc, total, initial):
    """A bar on a terminal and in JupyterLab; under the driver, a file says what a bar would."""
    note, started = os.environ.get("QLUTILS_PROGRESS"), time.time()
    bar = tqdm(
        keys,
        desc=desc,
        total=total,
        initial=initial,
        unit="unit",
        disable=bool(note),
        mininterval=1,
        delay=0 if sys.stderr.isatty() else 5,
    )  # a short run leaves no bar in a notebook

    def say(done):
        left = None
        if done > initial:
            left = (time.time() - started) / (done - initial) * (total - done)
        now = json.dumps({"done": done, "units": total, "seconds_left": left})
        with suppress(OSError):  # only shown; no reason to stop
            Path(note).write_text(now, encoding="utf-8")

    if note:
        say(initial)
    for done, key in enumerate(bar, initial + 1):
        if note:
            say(done)
        yield key


@lru_cache(maxsize=1)
def _client(address):
    if not address:
        return None
    from distributed import Client

    return Client(address, set_as_default=False)
