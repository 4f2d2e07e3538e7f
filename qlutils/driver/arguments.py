"""The command line of ./run_all.sh."""

import argparse

from qlutils.checks import DTYPES, METHODS
from qlutils.paths import BUNDLED

SAMPLE = 2  # facts a relation without --full
DESCRIPTION = """\
Run the study's notebooks: 01 for each model and method, 02 for each model, 03-07 for
each model and downstream method, then the report. What is done is not run again."""
EPILOG = """\
Results: runs/<output>/results; executed notebooks: runs/<output>/notebooks; the report:
runs/<output>/report.html. Of a run with a name the report copies tables and figures to
figures/<output>. QLUTILS_RUNS moves runs, and figures beside it; QLUTILS_THREADS sets the
threads of each process (default: the cores, divided by --jobs).

`./run_all.sh test [pytest options]` runs the tests. Examples:
  ./run_all.sh --models demo/gpt2 --only 01 02
  ./run_all.sh --models gpt2 meta-llama/Llama-2-7b-hf --data pararel --full --output paper"""
METHOD_LIST = {"nargs": "+", "choices": METHODS}
NUMBER = {"type": int, "metavar": "N"}
OPTIONS = {
    "--models": {
        "nargs": "+",
        "default": BUNDLED,
        "metavar": "MODEL",
        "help": """bundled or pretrained names, Hugging Face ids, folders or GGUF files, smallest
        first (default: the three bundled models)""",
    },
    "--methods": {
        **METHOD_LIST,
        "default": METHODS,
        "help": "how knowledge neurons are localised, in 01 and 02 (default: all)",
    },
    "--downstream-methods": {
        **METHOD_LIST,
        "help": "whose neurons 03-07 use (default: ig, as in the paper, or --methods without it)",
    },
    "--data": {
        "default": "demo",
        "metavar": "demo|pararel|FOLDER|FILE.jsonl",
        "help": "the facts (default: demo, bundled)",
    },
    "--relations": {
        "nargs": "+",
        "metavar": "P36",
        "help": "only these relations (default: all)",
    },
    "--facts-per-relation": {
        **NUMBER,
        "default": SAMPLE,
        "help": f"size of a seeded sample of each relation (default: {SAMPLE})",
    },
    "--full": {"action": "store_true", "help": "all facts of each relation"},
    "--known-prompts": {
        "type": int,
        "default": 0,
        "metavar": "K",
        "help": "only facts of which the model answers at least K prompts (default: 0, all facts)",
    },
    "--seed": {"type": int, "default": 0, "help": "of every random choice (default: 0)"},
    "--device": {"help": "cpu, cuda, cuda:1 (default: CUDA where there is one)"},
    "--dtype": {
        "choices": DTYPES[:3],  # not float16, in which nothing can be attributed
        "help": """of the weights (default: float32 on a CPU, else the checkpoint's, bfloat16 for
        float16)""",
    },
    "--only": {
        "nargs": "+",
        "metavar": "NN",
        "help": "only these notebooks, by number: 01 02, or report",
    },
    "--output": {
        "default": "default",
        "metavar": "NAME",
        "help": "name of the run's folder (default: default)",
    },
    "-p --parameter": {
        "nargs": 2,
        "action": "append",
        "default": [],
        "metavar": ("NAME", "VALUE"),
        "help": "set another notebook parameter, in every notebook that has it",
    },
    "--plan": {
        "action": "store_true",
        "help": "print what the localisation would cost on this device, start nothing",
    },
    "--refresh": {
        "action": "store_true",
        "help": "make the committed notebooks' outputs and figures/notebooks anew (maintainers)",
    },
    "--jobs": {
        **NUMBER,
        "help": """notebooks at a time (default: as many as cores, at most 4, for bundled models;
        else 1)""",
    },
    "--workers": {
        **NUMBER,
        "help": "compute in N local processes, one a GPU where there are GPUs (extra `cluster`)",
    },
    "--scheduler": {
        "metavar": "tcp://HOST:PORT",
        "help": "compute on a running dask cluster",
    },
}
EXCLUSIVE = [("--facts-per-relation", "--full"), ("--workers", "--scheduler")]


def parser():
    """The parser of ./run_all.sh."""
    made = argparse.ArgumentParser(
        prog="./run_all.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    groups = {}
    for either in EXCLUSIVE:
        groups |= dict.fromkeys(either, made.add_mutually_exclusive_group())
    for flags, options in OPTIONS.items():
        groups.get(flags, made).add_argument(*flags.split(), **options)
    return made
