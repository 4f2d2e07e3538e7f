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
    """The jobs of a run and what they share."""

    jobs: list
    root: Path
    facts: str  # a hash of them
    command: str  # what started it
    at_once: int = 1  # notebooks that run side by side
    stop: threading.Event = field(default_factory=threading.Event)  # ends what runs
    started: float = field(default_factory=time.time)

    def jobs_of(self, *statuses):
        return [job for job in self.jobs if job.status in statuses]

    def say(self, text):
        """A line that begins with how many jobs are finished."""
        finished = len(self.jobs) - len(self.jobs_of("not run", "running"))
        print(f"[{finished}/{len(self.jobs)}] {text}", file=sys.stderr, flush=True)


def run_jobs(run, scheduler):
    """Run what is not done; writes the run's record and a summary, also if it is `Stopped`. The
    exit status: 1 if a job failed.

    scheduler: the address of the dask scheduler that computes, if any."""
    (run.root / "notebooks").mkdir(parents=True, exist_ok=True)
    models = set()
    for job in run.jobs:
        models |= {job.model, *job.parameters.get("models", ())} - {None}
    with tempfile.TemporaryDirectory(prefix="qlutils-") as scratch:
        env = kernel_environment(
            scratch,
            QLUTILS_COMMAND=run.command,
            QLUTILS_RUNS=paths.RUNS,
            QLUTILS_MODELS=json.dumps(sorted(models)),
            QLUTILS_SCHEDULER=scheduler or "",
        )
        try:
            _run_all(run, env, Path(scratch))
        finally:
            for job in run.jobs_of("running"):  # stopped before its thread could say so
                job.status = "stopped"
            _write_record(run)
            _print_summary(run)
    return int(bool(run.jobs_of("failed")))


def _run_all(run, env, scratch):
    """Run the jobs, each once those before it that it overlaps with have ended; a line a minute
    says how far they are."""
    left = list(run.jobs)
    begun = {}  # future: its job
    with ThreadPoolExecutor(run.at_once) as pool:
        try:
            while left:
                for place, job in enumerate(left):
                    if job not in begun.values() and not any(map(job.overlaps, left[:place])):
                        begun[pool.submit(_run_job, job, run, env, scratch)] = job
                ended = wait(begun, LOG_SECONDS, FIRST_COMPLETED).done
                for future in ended:
                    future.result()
                    left.remove(begun.pop(future))
                if not ended:
                    told = ", ".join(_at_work(job, scratch) for job in run.jobs_of("running"))
                    run.say(f"{(time.time() - run.started) / 60:.0f} min, at work: {told}")
        finally:
            for kind in SIGNALS:  # a second one would lose the record of what was done
                signal.signal(kind, signal.SIG_IGN)
            run.stop.set()


def _run_job(job, run, env, scratch):
    """Run a job, and say how it went."""
    failed = {other.name for other in run.jobs_of("failed")}
    if run.stop.is_set():
        return
    if job.needs and failed.issuperset(job.needs) and not job.is_of(LAST):
        job.problem = f"{', '.join(job.needs)} failed"
        return
    start = time.time()
    job.status = "running"
    try:
        job.status = _run_one(job, run, env, scratch)
    except (ValueError, OSError) as error:  # of this job; the others can still run
        stopped = run.stop.is_set()
        job.status, job.problem = ("stopped", "") if stopped else ("failed", str(error))
    job.seconds = round(time.time() - start, 1)
    problem = f": {job.problem}" if job.problem else ""
    run.say(f"{job.label}: {job.status}, {job.seconds} s{problem}")


def _run_one(job, run, env, scratch):
    """Run one job unless it is done, and stamp the files it made; its status. ValueError or OSError
    says why it failed."""
    inputs = stamps.inputs_of(job, run.root, run.facts)
    if stamps.is_done(run.root, job.name, inputs):
        return "cached"
    paths.stamp_file(run.root, job.name).unlink(missing_ok=True)
    output = run.root / "notebooks" / f"{job.name}.ipynb"
    progress = str(scratch / job.name)
    alone = run.at_once == 1 or job.is_of(LAST)
    threads = os.environ.get("QLUTILS_THREADS") or ("" if alone else max(1, CORES // run.at_once))
    env = {**env, "QLUTILS_THREADS": str(threads), "QLUTILS_PROGRESS": progress}
    results = paths.results_folder(run.root, job.model, job.method)
    before = _times(results)
    if problem := execute(job.notebook, output, job.parameters, env, f"{progress}.log", run.stop):
        raise ValueError(problem)
    content = job.model and identity.model_content(job.model)  # a first download has one only now
    if content != inputs["model"] and paths.is_local(job.model):
        raise ValueError(
            f"the files of {job.model} changed while it ran: of which its results are is unknown"
        )
    made = [output]
    if job.is_of(LAST):
        made += publish(output, run.root.name)
    made += [file for file, time in _times(results).items() if before.get(file) != time]
    stamps.write_stamp(run.root, job.name, {**inputs, "model": content}, made)
    return "done"


def _times(folder):
    """{file: when it was written} of the results in a folder, but for run.json, which the model's
    other notebooks write, too. Compared with one another: a file server has its own clock."""
    files = [file for file in folder.glob("[!.]*.*") if file.name != "run.json"]
    return {file: file.stat().st_mtime_ns for file in files}


def _at_work(job, scratch):
    """What a running job is at; where it computes units, how many are done, and how long the others
    take."""
    progress = scratch / job.name
    units = progress.read_text("utf-8").splitlines() if progress.exists() else []
    return " ".join([job.label, *units[-1:]])


def _write_record(run):
    write_json(
        run.root / "run.json",
        {
            "command": run.command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - run.started, 1),
            "versions": versions(),
            "code": identity.code_versions(),
            "facts": run.facts,
            "jobs": [asdict(job) for job in run.jobs],
        },
    )


def _print_summary(run):
    width = max(len(job.label) for job in run.jobs)
    print(f"\n{'job':{width}}  status    seconds  what failed")
    for job in run.jobs:
        print(f"{job.label:{width}}  {job.status:8}  {job.seconds:7.1f}  {job.problem}".rstrip())
    counts = Counter(job.status for job in run.jobs)
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{told} in {time.time() - run.started:.0f} s; see {run.root}")
