"""Units of work: one unit, one parquet file, named by a hash of all that determines its content.

Present and valid means done, so a run that was stopped at any moment goes on where it was.
"""
import ast
import importlib
import inspect
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from tqdm.auto import tqdm

from . import _HOME, paths
from .files import StoreError, as_frame, canonical, locked, read_table, sha256, write_table

# These modules move, name and show results; no number depends on their text.
_NOT_COMPUTING = {"__init__", "paths", "files", "store", "study", "run", "plan", "refresh", "execute", "plots", "tables",
                  "report", "page", "schematic", "claims", "edit_report", "explorer", "explorer_page"}
_BUSY = threading.Lock()  # a model carries hooks: one task at a time in a process


def run_units(task, model_name, units, config=None, *, root, desc, device=None, dtype=None, client=None,
              info=None):
    """DataFrame of the rows of `task(lm, unit, **config)` over all units, in order; a unit is computed once.

    task: a top-level function returning a DataFrame (columns of numbers, text, lists of numbers).
    units: lists of JSON-able dicts. config: JSON-able keyword arguments of `task`.
    client: a dask.distributed client whose workers compute; default: the scheduler that QLUTILS_SCHEDULER
        names; without one, units are computed here, one after the other.
    root: the run's folder; a unit with a valid file in `<root>/units` is read, not computed.
    info: a dict to fill with the model's identity and the counts.

    StoreError: the folder cannot be written, or another run is computing the same. Whatever `task` raises comes
    through, and finished units stay.
    """
    folder = Path(root) / "units"
    units, config = json.loads(canonical(list(units))), json.loads(canonical(config or {}))
    client = client or _client(os.environ.get("QLUTILS_SCHEDULER"))
    job = (f"{task.__module__}:{task.__qualname__}", model_name, device, dtype)
    who = client.submit(identity, *job[1:], pure=False).result() if client else identity(*job[1:])
    same = {"task": job[0], "fingerprint": who["fingerprint"], "device": who["device"], "dtype": who["dtype"],
            "config": config, "source": source_hash(task)}
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
            todo = [(*job, unit, config, files[key], key) for key, unit in dict(zip(keys, units)).items()
                    if key not in tables]
            for key in _progress(_compute(todo, client, who["threads"]), desc, len(files), len(tables)):
                tables[key], problem = read_table(files[key], key)
                if tables[key] is None:
                    raise StoreError(f"{files[key]} was just written, but: {problem}. Check the disk, and "
                                     "that every worker sees this folder")
                done.append(key)
    if info is not None:
        info.update(who, units=len(files), computed=len(todo), source=same["source"])
    return as_frame([tables[key] for key in keys])


def cached_model(name, device=None, dtype=None):
    """The process's one loaded model, loaded anew when the files of a local one have changed."""
    from .study import model_content

    local = str(name).startswith("demo/") or paths.is_local(name)
    return _loaded(name, device, dtype, model_content(name) if local else None)


@lru_cache(maxsize=1)
def _loaded(name, device, dtype, content):
    """QLUTILS_THREADS, if set, fixes torch's number of threads."""
    from .models import load_model

    if os.environ.get("QLUTILS_THREADS"):
        import torch
        torch.set_num_threads(int(os.environ["QLUTILS_THREADS"]))
    return load_model(name, device=device, dtype=dtype)


def identity(model_name, device=None, dtype=None):
    """What results owe to the model: fingerprint, device kind, dtype; and the process's number of threads."""
    lm = cached_model(model_name, device, dtype)
    lm.check_untouched()
    torch = sys.modules.get("torch")
    return {"fingerprint": lm.fingerprint, "device": lm.device.type,
            "dtype": str(lm.dtype).removeprefix("torch."), "threads": torch.get_num_threads() if torch else 1}


def source_hash(task):
    """SHA-256 of the text of the task's module and of every computing qlutils module behind it."""
    texts, queue = {}, [Path(inspect.getsourcefile(task))]
    while queue:
        file = queue.pop()
        if file not in texts:
            texts[file] = file.read_text(encoding="utf-8")
            queue += [found for name in _imports(texts[file]) if name not in _NOT_COMPUTING
                      and (found := paths.PACKAGE.joinpath(*name.split(".")).with_suffix(".py")).is_file()]
    return sha256(sorted([file.name, sha256(text.encode())] for file, text in texts.items()))


def package_source():
    """SHA-256 of the text of every computing qlutils module."""
    files = sorted(file for file in paths.PACKAGE.glob("*.py") if file.stem not in _NOT_COMPUTING)
    return sha256([[file.name, sha256(file.read_bytes())] for file in files])


def _imports(text):
    """Names of qlutils modules that a module's text imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("qlutils.") for a in node.names if a.name.startswith("qlutils."))
        elif isinstance(node, ast.ImportFrom) and (node.level or f"{node.module}.".startswith("qlutils.")):
            module = (node.module or "").removeprefix("qlutils").lstrip(".")
            yield from [module] if module else [_HOME.get(a.name, a.name) for a in node.names]


def _compute(todo, client, threads):
    """Yield the key of each unit once its file is written."""
    if client is None:
        for item in todo:
            yield _work(*item)
        return
    from distributed import as_completed
    for future in as_completed([client.submit(_work, *item, threads, pure=False) for item in todo], loop=client.loop):
        yield future.result()


def _work(task, model_name, device, dtype, unit, config, file, key, threads=None):
    """Compute one unit and write it, in this process or in a worker; only the key travels back."""
    module, name = task.split(":")
    with _BUSY:
        lm = cached_model(model_name, device, dtype)
        if threads and "torch" in sys.modules:  # float sums depend on it: workers use as many as the caller
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
    """Say how to go on when interrupted; SIGTERM ends a run as Ctrl-C does, with nothing half-written."""
    done = []
    ours = (threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

    def stop(*_):
        raise SystemExit(128 + signal.SIGTERM)

    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield done
    except (KeyboardInterrupt, SystemExit):
        print(f"{desc}: stopped; {len(done)} new units are kept in {folder}, the same command resumes",
              file=sys.stderr)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _progress(keys, desc, total, initial):
    """A bar on a terminal and in JupyterLab; under the driver, one line in its progress file instead."""
    note = os.environ.get("QLUTILS_PROGRESS")
    bar = tqdm(keys, desc=desc, total=total, initial=initial, unit="unit", disable=bool(note), mininterval=1,
               delay=0 if sys.stderr.isatty() else 5)  # a short run leaves no bar in a notebook
    for done, key in enumerate(bar, initial + 1):
        if note:
            with suppress(OSError):  # only shown; no reason to stop
                Path(note).write_text(f"{desc} {done}/{total}", encoding="utf-8")
        yield key


@lru_cache(maxsize=1)
def _client(address):
    if not address:
        return None
    from distributed import Client
    return Client(address, set_as_default=False)
