"""The command line of ./run_all.sh."""

import argparse

from qlutils.checks import DTYPES, METHODS

MODELS = ("demo/gpt2", "demo/llama2", "demo/llama3")
SAMPLE = 2  # facts a relation without --full
DESCRIPTION = """\
Run the study's notebooks: 01 for each model and method, 02 for each model, 03-07 for
each model and downstream method, then the report. What is done is not run again."""
EPILOG = """\
Results: runs/<output>/results; executed notebooks: runs/<output>/notebooks; the report:
runs/<output>/report.html. A run with a name has its tables and figures in figures/<output>, too.
QLUTILS_RUNS moves runs, and figures beside it; QLUTILS_THREADS sets the threads of each process
(default: the cores, divided by --jobs).

`./run_all.sh test [pytest options]` runs the tests. Examples:
  ./run_all.sh --models demo/gpt2 --only 01 02
  ./run_all.sh --models gpt2 meta-llama/Llama-2-7b-hf --data pararel --full --output paper"""
HELP = {
    "models": "bundled or pretrained names, Hugging Face ids, folders or GGUF files, smallest "
    "first (default: the three bundled models)",
    "methods": "how knowledge neurons are localised, in 01 and 02 (default: all)",
    "downstream": "whose neurons 03-07 use (default: ig, as in the paper)",
    "data": "the facts (default: demo, bundled)",
    "sample": f"size of a seeded sample of each relation (default: {SAMPLE})",
    "known": "only facts of which the model answers at least K prompts (default: 0, all facts)",
    "dtype": "of the weights (default: float32 on a CPU, else the checkpoint's)",
    "only": "only these notebooks, by number: 01 02, or report",
    "output": "name of the run's folder (default: default)",
    "parameter": "set another notebook parameter, in every notebook that has it",
    "plan": "print what the localisation would cost on this device, start nothing",
    "refresh": "make the committed notebooks' outputs and figures/notebooks anew (maintainers)",
    "jobs": "notebooks at a time (default: as many as cores, at most 4, for bundled models; "
    "else 1)",
    "workers": "compute in N local processes, one a GPU where there are GPUs (extra `cluster`)",
}


def parser():
    """The parser of ./run_all.sh."""
    made = argparse.ArgumentParser(
        prog="./run_all.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add, names, methods = made.add_argument, {"nargs": "+"}, {"nargs": "+", "choices": METHODS}
    add("--models", **names, default=list(MODELS), metavar="MODEL", help=HELP["models"])
    add("--methods", **methods, default=list(METHODS), help=HELP["methods"])
    add(
        "--downstream-methods", **methods, default=["ig"], metavar="METHOD", help=HELP["downstream"]
    )
    add("--data", default="demo", metavar="demo|pararel|FOLDER|FILE.jsonl", help=HELP["data"])
    add("--relations", **names, metavar="P36", help="only these relations (default: all)")
    size = made.add_mutually_exclusive_group()
    sample = {"type": int, "default": SAMPLE, "metavar": "N"}
    size.add_argument("--facts-per-relation", **sample, help=HELP["sample"])
    size.add_argument("--full", action="store_true", help="all facts of each relation")
    add("--known-prompts", type=int, default=0, metavar="K", help=HELP["known"])
    add("--seed", type=int, default=0, help="of every random choice (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    add("--dtype", choices=DTYPES, help=HELP["dtype"])
    add("--only", **names, metavar="NN", help=HELP["only"])
    add("--output", default="default", metavar="NAME", help=HELP["output"])
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    add("-p", "--parameter", **pair, help=HELP["parameter"])
    add("--plan", action="store_true", help=HELP["plan"])
    add("--refresh", action="store_true", help=HELP["refresh"])
    add("--jobs", type=int, metavar="N", help=HELP["jobs"])
    where = made.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help=HELP["workers"])
    address = {"metavar": "tcp://HOST:PORT", "help": "compute on a running dask cluster"}
    where.add_argument("--scheduler", **address)
    return made
