"""The jobs of a run, some side by side, each in a process of its own, and what is said of them."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from qlutils import paths
from qlutils.driver import stamps
from qlutils.driver.execute import execute, kernel_environment
from qlutils.driver.jobs import LAST
from qlutils.experiments.report import publish
from qlutils.files import versions, write_json
from qlutils.study import identity

LOG_SECONDS = 60  # a line this often says what runs
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


@dataclass
class Run:
    """What all jobs of a run share, and how far they are."""

    jobs: list
    root: Path
    facts: str  # a hash of them
    command: str  # what started it
    at_once: int = 1  # notebooks that run side by side
    waiting: list = field(default_factory=list)
    running: dict = field(default_factory=dict)  # {future: job}
    stop: threading.Event = field(default_factory=threading.Event)  # ends what runs
    started: float = field(default_factory=time.time)

    def finished(self):
        """How many jobs, of how many."""
        return f"{len(self.jobs) - len(self.waiting) - len(self.running)}/{len(self.jobs)}"


def run_jobs(run, scheduler=None):
    """Run what is not done; writes the run's record and a summary. The exit status: 1 if a job
    failed. Raises `Stopped` after that, if it was stopped.

    scheduler: the address of the dask scheduler that computes, if any."""
    stopped = None
    (run.root / "notebooks").mkdir(parents=True, exist_ok=True)
    models = {job.model for job in run.jobs if job.model}
    for job in run.jobs:
        models |= set(job.parameters.get("models", ()))
    variables = {
        "QLUTILS_COMMAND": run.command,
        "QLUTILS_RUNS": paths.RUNS,
        "QLUTILS_MODELS": json.dumps(sorted(models)),
        "QLUTILS_SCHEDULER": scheduler or "",
    }
    with tempfile.TemporaryDirectory(prefix="qlutils-") as scratch:
        try:
            _run_all(run, kernel_environment(scratch, **variables), Path(scratch))
        except Stopped as signal_received:
            stopped = signal_received
    record = {
        "command": run.command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - run.started, 1),
        "versions": versions(),
        "code": identity.code_versions(),
        "facts": run.facts,
        "jobs": [asdict(job) for job in run.jobs],
    }
    write_json(run.root / "run.json", record)
    _summary(run)
    if stopped is not None:
        raise stopped
    return int(any(job.status == "failed" for job in run.jobs))


def _run_all(run, env, scratch):
    """Start every job as soon as it may, and say how each went."""
    said, failed, run.waiting = time.time(), set(), list(run.jobs)
    with ThreadPoolExecutor(run.at_once) as pool:
        try:
            while run.waiting or run.running:
                for job in list(run.waiting):
                    if job.needs and failed.issuperset(job.needs) and not job.is_of(LAST):
                        job.problem = f"{', '.join(job.needs)} failed"
                        run.waiting.remove(job)
                    elif len(run.running) < run.at_once and may_start(job, run):
                        run.running[pool.submit(_run_one, job, run, env, scratch)] = job
                        run.waiting.remove(job)
                for future in wait(run.running, 0.2, FIRST_COMPLETED).done:
                    future.result()
                    job = run.running.pop(future)
                    if job.status == "failed":
                        failed.add(job.name)
                    _say(f"[{run.finished()}] {job.label}: {job.status}, {job.seconds:.1f} s", job)
                if time.time() - said >= LOG_SECONDS:
                    said = time.time()
                    told = ", ".join(_at_work(job, scratch) for job in run.running.values())
                    minutes = (said - run.started) / 60
                    _say(f"{minutes:.0f} min, {run.finished()} notebooks done; at work: {told}")
        finally:
            for kind in SIGNALS:  # a second one would lose the record of what was done
                signal.signal(kind, signal.SIG_IGN)
            run.stop.set()


def may_start(job, run):
    """Whether all that a job reads is made, and no running job writes where it does.

    What it reads and this run does not make it makes itself: then no other job of its model may
    run, which might make the same. So 03 and 04 of one model and method never run side by side; 03
    by ig starts beside 04 by sig where 01 has run by ig, and else waits until it is alone."""
    running = run.running.values()
    if not {other.name for other in [*run.waiting, *running]}.isdisjoint(job.needs):
        return False
    made = all(stamps.path_of(run.root, need).exists() for need in job.needs)
    beside = [other for other in running if other.model == job.model]
    return not any(other.method == job.method or not made for other in beside)


def _run_one(job, run, env, scratch):
    """Run one job unless it is done; sets its status, seconds and problem."""
    start, alone = time.time(), run.at_once == 1 or job.is_of(LAST)
    threads = os.environ.get("QLUTILS_THREADS") or ("" if alone else max(1, CORES // run.at_once))
    env = {**env, "QLUTILS_THREADS": str(threads), "QLUTILS_PROGRESS": str(scratch / job.name)}
    try:
        inputs = stamps.inputs_of(job, run.root, run.facts)
        if stamps.is_done(run.root, job.name, inputs):
            job.status = "cached"
        else:
            job.problem = _execute(job, run, env, inputs)
            job.status = "failed" if job.problem else "done"
    except (ValueError, OSError) as error:  # of this job; the others can still run
        job.status, job.problem = "failed", str(error)
    if run.stop.is_set() and job.status == "failed":
        job.status, job.problem = "stopped", ""
    job.seconds = round(time.time() - start, 1)


def _execute(job, run, env, inputs):
    """Execute a job's notebook, and stamp the files it made; what failed in one line, or ""."""
    output, log = run.root / "notebooks" / f"{job.name}.ipynb", f"{env['QLUTILS_PROGRESS']}.log"
    stamps.path_of(run.root, job.name).unlink(missing_ok=True)
    started = time.time()
    if problem := execute(job.notebook, output, job.parameters, env, log, run.stop):
        return problem
    content = job.model and identity.model_content(job.model)  # a first download has one only now
    if content != inputs["model"] and paths.is_local(job.model):
        return f"the files of {job.model} changed while it ran: of which its results are is unknown"
    made = [output]
    if job.is_of(LAST):
        made += publish(output, run.root.name)
    for file in paths.results_folder(run.root, job.model, job.method).glob("[!.]*"):
        # run.json is written by the model's other notebooks, too
        own = file.is_file() and file.name != "run.json"
        if own and file.stat().st_mtime >= started - 1:
            made.append(file)
    stamps.write_stamp(run.root, job.name, {**inputs, "model": content}, made)
    return ""


# -- what is said ----------------------------------------------------------------------------------
def _say(line, job=None):
    problem = f": {job.problem}" if job and job.problem else ""
    print(line + problem, file=sys.stderr, flush=True)


def _at_work(job, scratch):
    """What a running job is at, in short: 03 gpt2 ig; where it computes units, how many are done,
    and how long the others take."""
    parts = [job.notebook.stem[:2], job.model and Path(job.model).name, job.method]
    progress = scratch / job.name
    if progress.exists():
        parts += progress.read_text(encoding="utf-8").splitlines()[-1:]
    return " ".join(filter(None, parts))


def _summary(run):
    width = max(len(job.label) for job in run.jobs)
    print(f"\n{'job':{width}}  status    seconds  what failed")
    for job in run.jobs:
        print(f"{job.label:{width}}  {job.status:8}  {job.seconds:7.1f}  {job.problem}".rstrip())
    counts = Counter(job.status for job in run.jobs)
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{told} in {time.time() - run.started:.0f} s; see {run.root}")
