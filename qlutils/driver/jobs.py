"""What is to be done: the notebooks of a run, each with its parameters and what it reads."""

import ast
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import qlutils
from qlutils import paths
from qlutils.checks import check
from qlutils.facts import load_facts, perplexity_texts
from qlutils.files import sha256
from qlutils.study.identity import model_content
from qlutils.study.known import check_known_prompts
from qlutils.study.parameters import check_given, declared_parameters

# 01 runs per model and method, 02 per model; the others per model and downstream method
FIRST, LAST = "01", "report"


@dataclass
class Job:
    """One notebook with its parameters, and how it went."""

    notebook: Path
    model: str | None
    method: str | None
    parameters: dict
    shown: str | None = None  # the model's name in tables and figures
    needs: list = field(default_factory=list)  # names of the jobs whose results this one reads
    status: str = "not run"
    seconds: float = 0.0
    problem: str = ""

    @property
    def name(self):
        """Of the executed notebook and the stamp, without suffix."""
        parts = [self.notebook.stem, self.model and paths.slug(self.model), self.method]
        return "--".join(filter(None, parts))

    @property
    def label(self):
        return " ".join(filter(None, [self.notebook.stem, self.shown or self.model, self.method]))

    def is_of(self, number):
        """Whether this is the notebook with a number, or the report."""
        return self.notebook.stem.startswith(number)

    def reads(self, other):
        """Whether this job reads what another made: the report of all, the others of 01."""
        if self.is_of(LAST):
            return not other.is_of(LAST)
        if self.is_of(FIRST) or not other.is_of(FIRST) or other.model != self.model:
            return False
        return self.is_of(paths.COMPARES) or other.method == self.method


def plan_jobs(args, folder):
    """(jobs in order, hash of the facts). ValueError, before anything starts, for whatever cannot
    be run.

    Every notebook of the folder becomes jobs, so that each knows what it `needs`; those of the
    notebooks asked for (`--only`) are returned, less those of notebook 01 for a method that only
    later notebooks have: what they need and nobody makes they make themselves."""
    shared, extra = shared_parameters(args), extra_parameters(args)
    facts = facts_of_run(args, shared, extra)
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb")) + sorted(folder.glob(f"{LAST}.ipynb"))
    if not found:
        raise ValueError(f"no notebook in {folder}")
    for prefix in args.only or ():
        if not prefix or not any(path.stem.startswith(prefix) for path in found):
            raise ValueError(f"--only {prefix}: there are {', '.join(path.stem for path in found)}")
    only = tuple(args.only or [""])
    chosen = [path for path in found if path.stem.startswith(only)]
    check_extra(extra, [declared_parameters(path) for path in chosen], shared)
    jobs = []
    for notebook in found:
        declared = declared_parameters(notebook)
        for model, method in models_and_methods(notebook.stem, shared):
            wanted = {**shared, "model": model, "method": method, **extra}
            given = {name: wanted[name] for name in declared if name in wanted}
            shown = model and paths.label(model, shared["models"])
            jobs.append(Job(notebook, model, method, given, shown))
    for job in jobs:
        job.needs = [other.name for other in jobs if job.reads(other)]
    planned = [job for job in jobs if job.notebook in chosen]
    unasked = set(shared["downstream_methods"]) - set(shared["methods"])
    return [job for job in planned if not (job.is_of(FIRST) and job.method in unasked)], facts


def models_and_methods(stem, shared):
    """The (model, method) pairs for which a notebook runs; of 01 also those that others need."""
    if stem == LAST:
        return [(None, None)]
    downstream = shared["downstream_methods"]
    every = list(dict.fromkeys(shared["methods"] + downstream))
    methods = {FIRST: every, paths.COMPARES: [None]}.get(stem[:2], downstream)
    return list(product(shared["models"], methods))


def shared_parameters(args):
    """{name: value} of the parameters that options of their own set."""
    for model in args.models:
        model_content(model)  # ValueError for a bundled model or a folder that is not there
    if args.device and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: want cpu, cuda or cuda:N")
    models = [_absolute(model) if paths.is_local(model) else model for model in args.models]
    return {
        "data": args.data if args.data in ("demo", "pararel") else _absolute(args.data),
        "relations": args.relations,
        "facts_per_relation": None if args.full else args.facts_per_relation,
        "known_prompts": args.known_prompts,
        "seed": args.seed,
        "device": args.device,
        "dtype": args.dtype,
        "output": args.output,
        "models": list(dict.fromkeys(models)),
        "methods": list(dict.fromkeys(args.methods)),
        "downstream_methods": list(dict.fromkeys(args.downstream_methods)),
    }


def extra_parameters(args):
    """{name: value} of the options -p: Python literals, or else texts."""
    extra = {name: literal(value) for name, value in args.parameter}
    if extra.get("corpus", "demo") not in ("demo", "wikitext-2"):
        if not os.path.exists(str(extra["corpus"])):
            raise ValueError(
                f"-p corpus {extra['corpus']}: there is no such file or folder; want demo, "
                "wikitext-2, or a text file"
            )
        extra["corpus"] = os.path.realpath(extra["corpus"])  # notebooks run in their own folder
    return extra


def check_extra(extra, declared, shared):
    """ValueError unless some notebook has each parameter of -p, of this type and range."""
    own = {*shared, "model", "method"}
    others = sorted({name for known in declared for name in known} - own)
    for name, value in extra.items():
        if name in own:
            raise ValueError(f"-p {name}: an option of its own sets it, see --help")
        if name not in others:
            raise ValueError(
                f"-p {name}: none of these notebooks has this parameter; they have "
                f"{', '.join(others) or 'none'}"
            )
        for defaults in declared:
            if name in defaults:
                check_given({name: value}, defaults)


def facts_of_run(args, shared, extra):
    """A hash of the facts of a run and of all facts of their relations, from which edits draw new
    objects. Says how many facts there are."""
    count, known = shared["facts_per_relation"], args.known_prompts
    options = {"relations": args.relations, "middle": extra.get("middle", "cut")}
    if count is not None:
        check("--facts-per-relation", count, 1)
    sample = None if known else count
    facts = load_facts(shared["data"], **options, seed=args.seed, facts_per_relation=sample)
    check_known_prompts(known, facts, "--known-prompts")
    taken = f": a sample of {count} a relation, --full takes all" if count else ""
    if known:
        wanted = f"{count} a relation" if count else "all"
        taken = (
            f", in which each model looks for {wanted} with at least {known} prompts that it "
            "answers"
        )
    relations = {fact.relation for fact in facts}
    print(
        f"{len(facts)} facts of {len(relations)} relations from {args.data}{taken}", file=sys.stderr
    )
    every = load_facts(shared["data"], **options, warn=False)
    named = [[fact.relation, fact.subject, fact.object] for fact in every]
    return sha256([[asdict(fact) for fact in facts], named])


def fetch_inputs(jobs):
    """Download and check what the jobs will read beside the facts: models with their tokenizers,
    and the text for perplexity. ValueError names what cannot be had: a run of hours must not fail
    for want of it at its end."""
    models, corpora = {}, {}
    for job in jobs:
        known = {**declared_parameters(job.notebook), **job.parameters}
        if job.model:
            models[job.model] = True
        elif known.get("control_models"):  # the report's controls compute
            models |= dict.fromkeys(known.get("models", ()))
        if "corpus" in known:
            corpora[known["corpus"]] = True
    for model in models:
        if not model.startswith("demo/"):  # bundled
            qlutils.fetch_model(model)
    for corpus in corpora:
        perplexity_texts(corpus)


def literal(text):
    """The Python value that a text writes, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _absolute(name):
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name
