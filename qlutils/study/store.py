"""Units of work: one unit, one parquet file, named by a hash of what determines it, the key.

The key holds the task's name and VERSION, its configuration, the model's fingerprint, the kind of
device, the dtype and the unit's facts. It does not hold the versions of the libraries, which stand
in the file's footer only, nor the number of threads, which no unit says and on which the last
digits of a sum may depend. Present and valid means done, so a run that was stopped at any moment
goes on where it was.
"""

import json
import os
import sys
import threading
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

import qlutils
from qlutils import paths
from qlutils.files import (
    StoreError,
    as_frame,
    canonical,
    locked,
    read_parquet,
    sha256,
    write_parquet,
)
from qlutils.study.identity import model_content

# A unit: about a minute, on two cores and on a GPU, of so many facts at most. From there on batches
# are full: on a CPU of one length of prompts, on a GPU to its memory.
UNIT_FLOPS = {"cpu": 1e13, "cuda": 1e15}
UNIT_FACTS = {"cpu": 24, "cuda": 240}
_BUSY = threading.Lock()  # a model carries hooks: one task at a time in a process


def run_units(task, model, units, config=None, *, root, desc, device=None, dtype=None, info=None):
    """DataFrame of the rows of `task(lm, unit, **config)` over all units, in order; a unit is
    computed once: here, one after the other, or by the workers of the dask scheduler that
    QLUTILS_SCHEDULER names.

    task: a top-level function returning a DataFrame (columns of numbers, text, lists of numbers).
        Its `VERSION` stands for its code: units of another version are computed again.
    units: lists of JSON-able dicts. config: JSON-able keyword arguments of `task`.
    root: the run's folder; a unit with a valid file in `<root>/units` is read, not computed.
    info: a dict to fill with the model's identity, the task's version and the counts.

    StoreError: the folder cannot be written, or another run is computing the same. Whatever `task`
    raises comes through, and finished units stay."""
    client = _client(os.environ.get("QLUTILS_SCHEDULER"))
    asked = (model, device, dtype)
    loaded = client.submit(identity, *asked, pure=False).result() if client else identity(*asked)
    units, config = json.loads(canonical([list(units), config or {}]))
    # of the task its name, not its module's: code that moves within the package keeps its results
    same = {"task": task.__qualname__, "version": task.VERSION, "config": config}
    same |= {name: loaded[name] for name in ("fingerprint", "device", "dtype")}
    folder = Path(root) / "units"
    files = [folder / f"{sha256({**same, 'unit': unit})}.parquet" for unit in units]
    work = dict(zip(files, units))
    tables = _read(work)
    todo = {}
    if len(tables) < len(work):
        with locked(folder / f".{sha256(same)[:16]}.lock"):
            tables |= _read(work.keys() - tables.keys())  # what another run has finished since
            todo = {file: unit for file, unit in work.items() if file not in tables}
            compute = partial(compute_unit, task, asked, config)
            written = _compute(compute, todo, client, loaded["threads"])
            list(_progress(written, desc, len(work), len(tables)))
            tables |= _read(todo)
    for file in files:
        if file not in tables:
            raise StoreError(f"{file} was just written: check that every worker sees this disk")
    if info is not None:
        info.update(units=len(work), computed=len(todo), identity=loaded, version=task.VERSION)
    return as_frame([tables[file] for file in files])


def _read(files):
    """{file: table} of the units that are there and valid."""
    tables = {file: read_parquet(file, file.stem)[0] for file in files if file.exists()}
    return {file: table for file, table in tables.items() if table is not None}


def cached_model(name, device=None, dtype=None):
    """The process's one loaded model, loaded anew when the files of a local one have changed."""
    local = str(name).startswith("demo/") or paths.is_local(name)
    return _loaded(name, device, dtype, model_content(name) if local else None)


@lru_cache(maxsize=1)
def _loaded(name, device, dtype, content):
    """QLUTILS_THREADS, if set, fixes torch's number of threads."""
    import torch

    if os.environ.get("QLUTILS_THREADS"):
        torch.set_num_threads(int(os.environ["QLUTILS_THREADS"]))
    return qlutils.load_model(name, device=device, dtype=dtype)


def identity(model, device=None, dtype=None):
    """What results owe to the model: fingerprint, device kind, dtype; and the process's number of
    threads."""
    import torch

    lm = cached_model(model, device, dtype)
    lm.check_untouched()
    return {
        "fingerprint": lm.fingerprint,
        "device": lm.device.type,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def packed(task, lm, facts, config):
    """Units of work: the facts in order, about `UNIT_FLOPS` a unit, but 1 to `UNIT_FACTS` facts.

    `task.passes(lm, fact, config)` says how many tokens a fact sends through the model; a pass of a
    token costs two operations a parameter. No machine is timed, as a unit's facts are part of its
    key. So a unit is used again as a whole or not at all: one more fact may move the boundaries of
    all units after it, which are then computed anew.
    """
    parameters = lm.arch.head.weight.numel()
    for layer in lm.layers:
        parameters += sum(weight.numel() for weight in layer.parameters())
    kind = lm.device.type if lm.device.type in UNIT_FACTS else "cpu"
    most = UNIT_FLOPS[kind] / (2 * parameters)
    units = []
    room = 0
    for fact in facts:
        passes = task.passes(lm, fact, config)
        if not units or len(units[-1]) == UNIT_FACTS[kind] or passes > room:
            units.append([])
            room = most
        units[-1].append(fact)
        room -= passes
    return units


def _compute(compute, work, client, threads):
    """Compute units and write each to its file; yields once for each that is written."""
    if client is None:
        yield from map(compute, work.values(), work)
        return
    from distributed import as_completed

    futures = [
        client.submit(compute, unit, file, threads, pure=False) for file, unit in work.items()
    ]
    for future in as_completed(futures, loop=client.loop):
        yield future.result()


def compute_unit(task, model, config, unit, file, threads=None):
    """Compute one unit and write it, in this process or in a worker.

    model: its name, device and dtype. threads: those of the caller, as float sums depend on their
    number."""
    with _BUSY:
        lm = cached_model(*model)
        if threads:
            import torch

            torch.set_num_threads(threads)
        try:
            frame = task(lm, unit, **config)
        except Exception as error:
            error.add_note(
                f"(in unit {file.stem[:12]} of {task.__name__}, {model[0]}; "
                "finished units are kept)"
            )
            raise
        write_parquet(
            frame,
            file,
            file.stem,
            task=f"{task.__module__}:{task.__qualname__}",
            model=model[0],
        )


def _progress(keys, desc, total, initial):
    """A bar; under the driver, a line in the file QLUTILS_PROGRESS says what a bar would."""
    note = os.environ.get("QLUTILS_PROGRESS")
    with open(note, "w") if note else nullcontext(sys.stderr) as stream:
        line = "{n_fmt}/{total_fmt} units, {remaining} left" if note else None
        delay = 0 if note or stream.isatty() else 5  # a short run leaves no bar in a notebook
        yield from tqdm(
            keys,
            desc,
            total=total,
            initial=initial,
            file=stream,
            bar_format=line,
            delay=delay,
            unit="unit",
        )


@lru_cache(maxsize=1)
def _client(address):
    if not address:
        return None
    from distributed import Client

    return Client(address, set_as_default=False)
