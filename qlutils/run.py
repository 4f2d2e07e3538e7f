"""The driver behind ./run_all.sh: every notebook for every model and method, each done once.

A job is one notebook with its parameters, run by papermill in a process of its own. It leaves an
executed notebook and a stamp in runs/<output>/notebooks; a job whose stamp fits its inputs and
whose outputs are all there is done.
"""

import argparse
import ast
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

from tqdm import tqdm

from qlutils import paths
from qlutils.files import is_sealed, locked, sealed, sha256, versions, write_json
from qlutils.study.execute import execute, kernel_environment
from qlutils.study.notebook import DTYPES, METHODS, check_values, literals, model_content
from qlutils.study.store import code_versions

MODELS = ("demo/gpt2", "demo/llama2", "demo/llama3")
SAMPLE = 2  # facts a relation without --full
LOG_SECONDS = 60  # on a log, a line this often says what runs; a terminal has a bar
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PER_METHOD, COMPARES, LAST = (
    "01",
    "02",
    "report",
)  # the other notebooks run per model and downstream method


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


@dataclass
class Job:
    """One notebook with its parameters, and how it went."""

    notebook: Path
    model: str | None
    method: str | None
    parameters: dict
    needs: list  # names of the jobs whose results this one reads
    shown: str | None = None  # the model's name in tables and figures
    status: str = "not run"
    seconds: float = 0.0
    problem: str = ""

    @property
    def name(self):
        return job_name(self.notebook.stem, self.model, self.method)

    @property
    def label(self):
        return " ".join(filter(None, [self.notebook.stem, self.shown or self.model, self.method]))


def job_name(stem, model, method):
    """File name of a job's executed notebook and stamp, without suffix."""
    return "--".join(filter(None, [stem, model and paths.slug(model), method]))


def main(argv=None, notebooks=None):
    """Run the study. Returns 0, 1 if a notebook failed, 2 for what cannot be run, 130 or 143 if
    stopped."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    command = shlex.join(["./run_all.sh", *argv])
    try:
        with _signals():
            root = paths.run_folder(args.output)
            if args.output == "demo":
                raise ValueError(
                    "--output demo: figures/demo holds the reference run's tables and figures; "
                    "choose another name"
                )
            for name, number in {
                "--jobs": args.jobs,
                "--workers": args.workers,
                "QLUTILS_THREADS": os.environ.get("QLUTILS_THREADS") or None,
            }.items():
                if number is not None and not re.fullmatch(r"[1-9]\d*", str(number)):
                    raise ValueError(f"{name} {number}: want a whole number of at least 1")
            if args.refresh:
                from qlutils.driver.refresh import refresh

                return refresh()
            jobs, data_hash = plan_jobs(args, Path(notebooks or paths.NOTEBOOKS))
            if args.plan:
                return _plan(
                    args, [job for job in jobs if job.notebook.stem.startswith(PER_METHOD)]
                )
            fetch_inputs(jobs)
            with locked(root / ".lock"), _scheduler(args) as address:
                return _run(jobs, root, data_hash, command, address, _at_once(args, address))
    except (ValueError, OSError) as error:  # StoreError is one
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\nStopped. What is finished is kept; to go on:\n    {command}", file=sys.stderr)
        return 128 + stopped.args[0]


def _parser():
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the study's notebooks: 01 for each model and method, 02 for each model, "
        "03-07 for\n"
        "each model and downstream method, then the report. What is done is not run again.",
        epilog="Results: runs/<output>/results; executed notebooks: runs/<output>/notebooks; the "
        "report:\n"
        "runs/<output>/report.html. A run with a name has its tables and figures in "
        "figures/<output>, too.\n"
        "QLUTILS_RUNS moves runs, and figures beside it; QLUTILS_THREADS sets the threads of each "
        "process\n"
        "(default: the cores, divided by --jobs).\n\n"
        "`./run_all.sh test [pytest options]` runs the tests. Examples:\n"
        "  ./run_all.sh --models demo/gpt2 --only 01 02\n"
        "  ./run_all.sh --models gpt2 meta-llama/Llama-2-7b-hf --data pararel --full --output "
        "paper",
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=list(MODELS),
        metavar="MODEL",
        help="bundled or pretrained names, Hugging Face ids, folders or GGUF files, smallest "
        "first\n"
        "(default: the three bundled models)",
    )
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=METHODS,
        help="how knowledge neurons are localised, in 01 and 02 (default: all)",
    )
    add(
        "--downstream-methods",
        nargs="+",
        default=["ig"],
        choices=METHODS,
        metavar="METHOD",
        help="whose neurons 03-07 use (default: ig, as in the paper)",
    )
    add(
        "--data",
        default="demo",
        metavar="demo|pararel|FOLDER|FILE.jsonl",
        help="the facts (default: demo, bundled)",
    )
    add("--relations", nargs="+", metavar="P36", help="only these relations (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--facts-per-relation",
        type=int,
        default=SAMPLE,
        metavar="N",
        help=f"size of a seeded sample of each relation (default: {SAMPLE})",
    )
    size.add_argument("--full", action="store_true", help="all facts of each relation")
    add(
        "--known-prompts",
        type=int,
        default=0,
        metavar="K",
        help="only facts of which the model answers at least K prompts (default: 0, all facts)",
    )
    add("--seed", type=int, default=0, help="of every random choice (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: float32 on a CPU, else the checkpoint's)",
    )
    add("--only", nargs="+", metavar="NN", help="only these notebooks, by number: 01 02, or report")
    add(
        "--output",
        default="default",
        metavar="NAME",
        help="name of the run's folder (default: default)",
    )
    add(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set another notebook parameter, in every notebook that has it",
    )
    add(
        "--plan",
        action="store_true",
        help="print what the localisation would cost on this device, start nothing",
    )
    add(
        "--refresh",
        action="store_true",
        help="run the notebooks as they stand and write their outputs into notebooks/ and "
        "figures/demo (maintainers)",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="notebooks at a time (default: as many as cores, at most 4, for bundled models; else "
        "1)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="compute in N local processes, one a GPU where there are GPUs (extra `cluster`)",
    )
    where.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="compute on a running dask cluster"
    )
    return parser


def _plan(args, jobs):
    from qlutils.attribution.attribute import Spec
    from qlutils.driver.plan import plan

    if not jobs:
        raise ValueError("--plan: with these options nothing is localised")
    given = jobs[0].parameters
    Spec(
        **{
            name: given[name]
            for name in ("steps", "rule", "answer", "site", "amig_factor")
            if name in given
        }
    )  # or ValueError
    matter = (
        "data",
        "relations",
        "facts_per_relation",
        "known_prompts",
        "seed",
        "steps",
        "middle",
        "answer",
    )
    costs = plan(
        list(dict.fromkeys(args.models)),
        list(dict.fromkeys(args.methods)),
        device=args.device,
        dtype=args.dtype,
        **{name: given[name] for name in matter if name in given},
    )
    print(
        costs.to_string(index=False, float_format=lambda x: f"{x:,.3g}" if x < 1e4 else f"{x:,.0f}")
    )
    print(
        f"Hours in all: {costs['hours'].sum():,.3g} for localisation on one such device; "
        f"notebooks 03-07 and the report "
        "come on top. Nothing was started."
    )
    if args.known_prompts:
        print(
            "Which facts a model knows, and so how many there are to localise, is not known "
            "before it is asked: the numbers above are for as many facts as may be kept, and a "
            "model may know fewer.\n"
            f"Looking for them takes {costs['scan hours'].max():,.3g} hours a model at most, "
            "when every fact is asked."
        )
    return 0


# -- what is to be done ----------------------------------------------------------------------------
def plan_jobs(args, folder):
    """(jobs in order, hash of the facts). ValueError, before anything starts, for whatever cannot
    be run."""
    from qlutils.facts import load_facts
    from qlutils.study.known import check_known_prompts

    for model in args.models:
        model_content(model)  # ValueError for a bundled model or a folder that is not there
    if args.device and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: want cpu, cuda or cuda:N")
    methods, downstream = (
        list(dict.fromkeys(names)) for names in (args.methods, args.downstream_methods)
    )
    models = list(dict.fromkeys(_absolute(m) if paths.is_local(m) else m for m in args.models))
    data = args.data if args.data in ("demo", "pararel") else _absolute(args.data)
    count = None if args.full else args.facts_per_relation
    extra = {name: _literal(value) for name, value in args.parameter}
    if "corpus" in extra and extra["corpus"] not in ("demo", "wikitext-2"):
        if not os.path.exists(str(extra["corpus"])):
            raise ValueError(
                f"-p corpus {extra['corpus']}: there is no such file or folder; want demo, "
                f"wikitext-2, or a text file"
            )
        extra["corpus"] = os.path.realpath(extra["corpus"])  # notebooks run in their own folder
    middle = extra.get("middle", "cut")
    facts = load_facts(
        data,
        relations=args.relations,
        seed=args.seed,
        middle=middle,
        facts_per_relation=None if args.known_prompts else count,
    )
    check_known_prompts(args.known_prompts, facts, "--known-prompts")
    every = facts  # edits draw new objects from all
    if count:
        every = load_facts(data, relations=args.relations, middle=middle, warn=False)
    shared = {
        "data": data,
        "relations": args.relations,
        "facts_per_relation": count,
        "known_prompts": args.known_prompts,
        "seed": args.seed,
        "device": args.device,
        "dtype": args.dtype,
        "output": args.output,
        "models": models,
        "methods": methods,
        "downstream_methods": downstream,
    }
    print(
        f"{len(facts)} facts of {len({fact.relation for fact in facts})} relations from {args.data}"
        + _taken(args.known_prompts, count),
        file=sys.stderr,
    )
    notebooks = _chosen(folder, args.only)
    declared = {notebook: declared_parameters(notebook) for notebook in notebooks}
    for name, value in extra.items():
        knowing = [known for known in declared.values() if name in known]
        if not knowing or name in (*shared, "model", "method"):
            known = sorted(
                {p for known in declared.values() for p in known} - {*shared, "model", "method"}
            )
            raise ValueError(
                f"-p {name}: "
                + (
                    "an option of its own sets it, see --help"
                    if knowing
                    else f"none of these notebooks has this parameter; they have "
                    f"{', '.join(known) or 'none'}"
                )
            )
        for defaults in knowing:
            check_values({name: value}, defaults)
    jobs, localised = (
        [],
        [path.stem for path in _chosen(folder, None) if path.stem.startswith(PER_METHOD)],
    )

    def pairs(notebook):
        chosen = {PER_METHOD: methods, COMPARES: [None]}.get(notebook.stem[:2], downstream)
        return list(product(models, chosen)) if notebook.stem != LAST else [(None, None)]

    for notebook in notebooks:
        number = notebook.stem[:2]
        for model, method in pairs(notebook):
            wanted = {**shared, "model": model, "method": method, **extra}
            reads = product(models, methods) if number == COMPARES else [(model, method)]
            needs = [
                job_name(stem, *pair)
                for pair in reads
                for stem in localised
                if number != PER_METHOD
            ]
            if notebook.stem == LAST:
                needs = [
                    job_name(other.stem, *pair)
                    for other in _chosen(folder, None)
                    if other.stem != LAST
                    for pair in pairs(other)
                ]  # also those that --only leaves out
            given = {name: wanted[name] for name in declared[notebook] if name in wanted}
            shown = model and paths.label(model, models)
            jobs.append(Job(notebook, model, method, given, needs, shown))
    return jobs, sha256(
        [
            [asdict(fact) for fact in facts],
            [[fact.relation, fact.subject, fact.object] for fact in every],
        ]
    )


def _taken(known_prompts, count):
    """Which of the facts a run takes, in words."""
    if known_prompts:
        return (
            f", in which each model looks for {f'{count} a relation' if count else 'all'} "
            f"with at least {known_prompts} prompts that it answers"
        )
    return f": a sample of {count} a relation, --full takes all" if count else ""


def _chosen(folder, only):
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb")) + sorted(folder.glob(f"{LAST}.ipynb"))
    if not found:
        raise ValueError(f"no notebook in {folder}")
    for prefix in only or ():
        if not prefix or not any(path.stem.startswith(prefix) for path in found):
            raise ValueError(f"--only {prefix}: there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not only or path.stem.startswith(tuple(only))]


def declared_parameters(notebook):
    """{name: default} of a notebook's cell tagged `parameters`; {} without one."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            found = literals("".join(cell["source"]))
            if found is None:
                raise ValueError(
                    f"{notebook.name}: parameters cell must hold `name = literal` lines only"
                )
            return found
    return {}


def fetch_inputs(jobs):
    """Download and check what the jobs will read beside the facts: models with their tokenizers,
    and the text for perplexity. ValueError names what cannot be had: a run of hours must not fail
    for want of it at its end."""
    models, corpora = [], []
    for job in jobs:
        known = {**declared_parameters(job.notebook), **job.parameters}
        if job.model:
            models.append(job.model)
        elif known.get("control_models"):  # the report's controls compute
            models += known.get("models", [])
        corpora += [known["corpus"]] if "corpus" in known else []
    for model in dict.fromkeys(models):
        if not model.startswith("demo/"):  # bundled
            from qlutils.model.loading import fetch_model

            fetch_model(model)
    for corpus in dict.fromkeys(corpora):
        from qlutils.facts import perplexity_texts

        perplexity_texts(corpus)


def _absolute(name):
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- doing it --------------------------------------------------------------------------------------
def _at_once(args, address):
    """How many notebooks run at a time. A notebook of a small model is busy with one core for half
    of its time."""
    small = address is None and all(model.startswith("demo/") for model in args.models)
    return args.jobs or (min(4, CORES) if small else 1)


def _run(jobs, root, data_hash, command, address, at_once):
    started, stopped, stop = time.time(), None, threading.Event()
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    models = {job.model for job in jobs} | {
        m for job in jobs for m in job.parameters.get("models", ())
    }
    variables = {
        "QLUTILS_COMMAND": command,
        "QLUTILS_RUNS": paths.RUNS,
        "QLUTILS_MODELS": json.dumps(sorted(models - {None})),
        **({"QLUTILS_SCHEDULER": address} if address else {}),
    }
    if at_once > 1:
        variables["QLUTILS_THREADS"] = os.environ.get("QLUTILS_THREADS") or max(1, CORES // at_once)
    said = started
    bar = tqdm(total=len(jobs), unit="notebook", disable=None, dynamic_ncols=True)
    with (
        tempfile.TemporaryDirectory(prefix="qlutils-") as scratch,
        ThreadPoolExecutor(at_once) as pool,
    ):
        env, running, waiting, failed = (
            kernel_environment(scratch, **variables),
            {},
            list(jobs),
            set(),
        )
        try:
            while running or waiting:
                for job in [
                    job
                    for job in waiting
                    if job.needs and failed.issuperset(job.needs) and job.notebook.stem != LAST
                ]:
                    waiting.remove(job)
                    bar.update()
                    job.problem = f"{', '.join(job.needs)} failed"
                while len(running) < at_once and (job := _next(waiting, running.values(), root)):
                    waiting.remove(job)
                    running[pool.submit(_one, job, root, data_hash, env, Path(scratch), stop)] = job
                for future in wait(running, 0.2, FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    failed |= {job.name} if job.status == "failed" else set()
                    bar.update()
                    tqdm.write(
                        f"[{len(jobs) - len(waiting) - len(running)}/{len(jobs)}] {job.label}: "
                        f"{job.status}, "
                        f"{job.seconds:.1f} s" + (f": {job.problem}" if job.problem else ""),
                        file=sys.stderr,
                    )
                at_work = [_progress(job, Path(scratch)) for job in running.values()]
                bar.set_postfix_str(", ".join(at_work))
                if bar.disable and running and time.time() - said >= LOG_SECONDS:
                    said, done = time.time(), len(jobs) - len(waiting) - len(running)
                    print(
                        f"{(said - started) / 60:.0f} min, {done} of {len(jobs)} notebooks done; "
                        f"at work: {', '.join(at_work)}",
                        file=sys.stderr,
                        flush=True,
                    )
        except Stopped as signal_received:
            stopped = signal_received
        finally:
            for kind in SIGNALS:  # a second one would lose the record of what was done
                signal.signal(kind, signal.SIG_IGN)
            stop.set()
            bar.close()
    write_json(
        root / "run.json",
        {
            "command": command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 1),
            "versions": versions(),
            "code": code_versions(),
            "facts": data_hash,
            "jobs": [
                {
                    "notebook": job.notebook.stem,
                    "status": job.status,
                    "seconds": round(job.seconds, 1),
                    "problem": job.problem,
                    "parameters": job.parameters,
                }
                for job in jobs
            ],
        },
    )
    _summary(jobs, time.time() - started, root)
    if stopped is not None:
        raise stopped
    return int(any(job.status == "failed" for job in jobs))


def _next(waiting, running, root):
    """The first waiting job that reads nothing that is still to come and writes where no running
    job does, or None. What a job needs and is not there it makes itself, so no other that needs it
    runs beside it."""
    coming, busy = (
        {job.name for job in [*waiting, *running]},
        {(job.model, job.method) for job in running},
    )
    making = {
        need
        for job in running
        for need in job.needs
        if not (root / "notebooks" / f"{need}.json").exists()
    }
    return next(
        (
            job
            for job in waiting
            if not (coming | making).intersection(job.needs) and (job.model, job.method) not in busy
        ),
        None,
    )


def _progress(job, scratch):
    """What a running job is at, in short: 03 gpt2 ig; where it computes units, how many are done,
    and how long the others take."""
    label = " ".join(
        filter(None, [job.notebook.stem[:2], job.model and Path(job.model).name, job.method])
    )
    try:
        now = json.loads((scratch / job.name).read_bytes())
    except (OSError, ValueError):  # none yet, or half of one
        return label
    left = now["seconds_left"]
    soon = (
        f", about {left / 60:.0f} min left" if left and left >= 60 else ", less than a minute left"
    )
    return f"{label} {now['done']}/{now['units']} units{soon if left else ''}"


def _one(job, root, data_hash, env, scratch, stop):
    """Run one job unless its stamp says that it is done; sets its status, seconds and problem.
    `stop` ends it early."""
    start, name = time.time(), job.name
    output, stamp = (root / "notebooks" / f"{name}{suffix}" for suffix in (".ipynb", ".json"))
    results = root / "results"
    if job.model:
        results = results / paths.slug(job.model) / (job.method or "all")
    env = {**env, "QLUTILS_PROGRESS": str(scratch / name)}
    if job.notebook.stem == LAST:  # it runs alone
        env["QLUTILS_THREADS"] = os.environ.get("QLUTILS_THREADS", "")

    try:
        inputs = {
            "notebook": _cells(job.notebook),
            "parameters": job.parameters,
            "code": code_versions(),
            "data": data_hash,
            "model": job.model and model_content(job.model),
            "shown": job.shown,
            "corpus": _content(job.parameters.get("corpus")),
            "needs": {need: _stamp(root, need).get("inputs") for need in job.needs},
        }
        if _is_done(_stamp(root, name), inputs, root):
            job.status, job.seconds = "cached", time.time() - start
            return
        stamp.unlink(missing_ok=True)
        job.problem, made = (
            execute(job.notebook, output, job.parameters, env, scratch / f"{name}.log", stop),
            [output],
        )
        if stop.is_set():
            job.status, job.seconds, job.problem = "stopped", time.time() - start, ""
            return
        now = job.model and model_content(job.model)
        if not job.problem and now != inputs["model"] and paths.is_local(job.model):
            job.problem = f"the files of {job.model} changed while it ran: which of them its results are of is not known"
        if job.notebook.stem == LAST and not job.problem:
            from qlutils.experiments.report import publish

            made += publish(output, root.name)
        if not job.problem:
            inputs["model"] = now  # a first download has a revision only now
            made += [
                file
                for file in sorted(results.glob("[!.]*"))
                if file.is_file() and file.stat().st_mtime >= start - 1 and file.name != "run.json"
            ]  # which the model's other notebooks write, too
            write_json(
                stamp,
                sealed(
                    {
                        "inputs": sha256(inputs),
                        "made_from": inputs,
                        "outputs": {
                            file.relative_to(root).as_posix(): sha256(file.read_bytes())
                            for file in made
                        },
                    }
                ),
            )
    except (ValueError, OSError) as error:  # of this job; the others can still run
        job.problem = str(error)
    job.status, job.seconds = "failed" if job.problem else "done", time.time() - start


def _cells(notebook):
    """A hash of a notebook's cells; of its outputs nothing depends."""
    cells = json.loads(notebook.read_bytes())["cells"]
    return sha256(
        [
            [cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])]
            for cell in cells
        ]
    )


def _content(corpus):
    """A hash of a text of one's own for perplexity; None for those that have a name."""
    if not isinstance(corpus, str) or not os.path.exists(corpus):
        return None
    path = Path(corpus)
    return sha256((path / "test.txt" if path.is_dir() else path).read_bytes())


def _stamp(root, name):
    path = root / "notebooks" / f"{name}.json"
    try:
        if is_sealed(stamp := json.loads(path.read_bytes())):
            return stamp
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    tqdm.write(f"{path} is damaged: its notebook runs again", file=sys.stderr)
    return {}


def _is_done(known, inputs, root):
    if known.get("inputs") != sha256(inputs):
        return False
    for name, digest in known["outputs"].items():
        file = root / name
        if not file.is_file() or sha256(file.read_bytes()) != digest:
            tqdm.write(f"{file} is gone or was changed: its notebook runs again", file=sys.stderr)
            return False
    return True


def _summary(jobs, seconds, root):
    width = max(len(job.label) for job in jobs)
    print(f"\n{'job':{width}}  status    seconds  what failed")
    for job in jobs:
        print(f"{job.label:{width}}  {job.status:8}  {job.seconds:7.1f}  {job.problem}".rstrip())
    counts = Counter(job.status for job in jobs)
    print(
        ", ".join(f"{n} {status}" for status, n in counts.items())
        + f" in {seconds:.0f} s; see {root}"
    )


@contextmanager
def _signals():
    def stop(number, frame):
        raise Stopped(number)

    before = {kind: signal.signal(kind, stop) for kind in SIGNALS}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _scheduler(args):
    """Address of the dask scheduler that computes, or None: units are then computed in the
    notebooks."""
    if not args.workers and not args.scheduler:
        yield None
        return
    try:
        from distributed import Nanny, Scheduler, SpecCluster
    except ImportError:
        raise ValueError(
            "--workers and --scheduler need dask: pip install -e '.[cluster]'"
        ) from None
    if args.scheduler:
        yield args.scheduler
        return
    import torch

    gpus, local = torch.cuda.device_count(), {"host": "127.0.0.1", "dashboard": False}
    workers = {
        i: {
            "cls": Nanny,
            "options": {
                "host": "127.0.0.1",
                "nthreads": 1,
                "memory_limit": 0,
                "silence_logs": 40,
                "env": {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {},
            },
        }
        for i in range(args.workers)
    }
    with SpecCluster(workers, {"cls": Scheduler, "options": local}, silence_logs=40) as cluster:
        yield cluster.scheduler_address


def _in_utf8():
    """Start again in Python's UTF-8 mode where the locale has another encoding (a bare C locale):
    names of folders and models go into notebooks and records, which are UTF-8. What this process
    starts inherits the mode."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _in_utf8()
    sys.exit(main())
