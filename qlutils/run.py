"""The driver behind ./run_all.sh: every notebook for every model and method, each done once.

A job is one notebook with its parameters, run by papermill in a process of its own. It leaves an
executed notebook and a stamp in runs/<output>/notebooks; a job whose stamp fits its inputs and
whose outputs are all there is done.
"""

import os
import shlex
import signal
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from qlutils import paths
from qlutils.checks import check
from qlutils.driver.arguments import parser
from qlutils.driver.cluster import scheduler
from qlutils.driver.jobs import fetch_inputs, literal, plan_jobs
from qlutils.driver.plan import print_plan
from qlutils.driver.refresh import refresh
from qlutils.driver.running import CORES, SIGNALS, Run, Stopped, run_jobs
from qlutils.files import locked


def main(argv=None, notebooks=None):
    """Run the study. Returns 0, 1 if a notebook failed, 2 for what cannot be run, 130 or 143 if
    stopped."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = shlex.join(["./run_all.sh", *argv])
    try:
        with _signals():
            root = paths.run_folder(args.output)
            _check_options(args)
            if args.refresh:
                if len(argv) > 1:
                    raise ValueError("--refresh takes no other option")
                return refresh()
            jobs, facts = plan_jobs(args, Path(notebooks or paths.NOTEBOOKS))
            if args.plan:
                return print_plan(args, jobs)
            fetch_inputs(jobs)
            with locked(root / ".lock"), scheduler(args.workers, args.scheduler) as address:
                # a notebook of a small model keeps a core busy half of its time
                small = address is None and all(name.startswith("demo/") for name in args.models)
                at_once = args.jobs or (min(4, CORES) if small else 1)
                return run_jobs(Run(jobs, root, facts, command, at_once), address)
    except (ValueError, OSError) as error:  # StoreError is one
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\nStopped. What is finished is kept; to go on:\n    {command}", file=sys.stderr)
        return 128 + stopped.args[0]


def _check_options(args):
    """ValueError for what the parser lets through and nothing later would name."""
    if args.output == "notebooks":
        raise ValueError(
            "--output notebooks: figures/notebooks holds the tables and figures of the committed "
            "notebooks; choose another name"
        )
    threads = literal(os.environ.get("QLUTILS_THREADS") or "1")
    numbers = {"QLUTILS_THREADS": threads, "--jobs": args.jobs, "--workers": args.workers}
    for name, number in numbers.items():
        if number is not None:
            check(name, number, 1)
    if (args.workers or args.scheduler) and not find_spec("distributed"):
        raise ValueError("--workers and --scheduler need dask: pip install -e '.[cluster]'")


@contextmanager
def _signals():
    """Ctrl-C and SIGTERM raise `Stopped`."""

    def stop(number, frame):
        raise Stopped(number)

    before = {kind: signal.signal(kind, stop) for kind in SIGNALS}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


if __name__ == "__main__":
    sys.exit(main())
