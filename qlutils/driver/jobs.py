"""What is to be done: the notebooks of a run, each with its parameters and what it reads."""

import ast
import os
import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import qlutils
from qlutils import paths
from qlutils.facts import perplexity_texts
from qlutils.files import sha256
from qlutils.study.identity import model_content
from qlutils.study.known import check_known_prompts
from qlutils.study.notebook import Study
from qlutils.study.parameters import check_given, declared_parameters

# 01 runs per model and method, 02 per model; the others per model and downstream method
FIRST = "01"
LAST = "report"


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
        return paths.job_name(self.notebook.stem, self.model, self.method)

    @property
    def label(self):
        """As `name`, for a reader."""
        return " ".join(filter(None, [self.notebook.stem, self.shown, self.method]))

    def is_of(self, number):
        """Whether this is the notebook with a number, or the report."""
        return self.notebook.stem.startswith(number)

    def overlaps(self, other):
        """Whether both may write into one folder, or one reads what the other makes; 02 is of all
        methods, the report of all models."""
        pairs = (self.model, other.model), (self.method, other.method)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)

    def reads(self, other):
        """Whether this job reads what another made: the report of all, the others of 01."""
        if self.is_of(LAST):
            return not other.is_of(LAST)
        makes = other.is_of(FIRST) and other.model == self.model and not self.is_of(FIRST)
        return makes and self.method in (None, other.method)


def plan_jobs(args, folder):
    """(jobs in order, hash of the facts). ValueError, before anything starts, for whatever cannot
    be run.

    Every notebook of the folder becomes jobs, so that each knows what it `needs`; those of the
    notebooks asked for (`--only`) are returned: what they need and nobody makes they make
    themselves."""
    shared = shared_parameters(args)
    extra = extra_parameters(args)
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb")) + sorted(folder.glob(f"{LAST}.ipynb"))
    chosen = []
    for prefix in args.only or [""]:
        these = [notebook for notebook in found if notebook.stem.startswith(prefix)]
        if not these:
            known = ", ".join(notebook.stem for notebook in found)
            raise ValueError(f"--only {prefix}: there are {known or 'no notebooks'} in {folder}")
        chosen += these
    declared = {notebook: declared_parameters(notebook) for notebook in found}
    check_extra(extra, [declared[notebook] for notebook in chosen], shared)
    facts = facts_of_run(shared, extra)
    jobs = []
    for notebook in found:
        for model, method in models_and_methods(notebook.stem, shared):
            wanted = {**shared, "model": model, "method": method, **extra}
            given = {name: wanted[name] for name in declared[notebook] if name in wanted}
            shown = model and paths.label(model, shared["models"])
            jobs.append(Job(notebook, model, method, given, shown))
    for job in jobs:
        job.needs = [other.name for other in jobs if job.reads(other)]
    return [job for job in jobs if job.notebook in chosen], facts


def models_and_methods(stem, shared):
    """The (model, method) pairs for which a notebook runs."""
    if stem == LAST:
        return [(None, None)]
    methods = {FIRST: shared["methods"], paths.COMPARES: [None]}
    return product(shared["models"], methods.get(stem[:2], shared["downstream_methods"]))


def shared_parameters(args):
    """{name: value} of the parameters that options of their own set."""
    for model in args.models:
        model_content(model)  # ValueError for a bundled model or a folder that is not there
    models = [_absolute(model) if paths.is_local(model) else model for model in args.models]
    downstream = args.downstream_methods or (["ig"] if "ig" in args.methods else args.methods)
    lists = dict(models=models, methods=args.methods, downstream_methods=downstream)
    same = "relations known_prompts seed device dtype output".split()
    return {
        **{name: getattr(args, name) for name in same},
        "data": _absolute(args.data, "demo", "pararel"),
        "facts_per_relation": None if args.full else args.facts_per_relation,
        **{name: list(dict.fromkeys(given)) for name, given in lists.items()},
    }


def extra_parameters(args):
    """{name: value} of the options -p: Python literals, or else texts."""
    extra = {}
    for name, value in args.parameter:
        if name in extra:
            raise ValueError(f"-p {name} is given twice: which of its values counts?")
        extra[name] = literal(value)
    if "corpus" in extra:
        extra["corpus"] = _absolute(str(extra["corpus"]), "demo", "wikitext-2")
    return extra


def check_extra(extra, declared, shared):
    """ValueError unless some notebook has each parameter of -p, of this type and range."""
    others = {name: default for known in declared for name, default in known.items()}
    for name in (*shared, "model", "method"):
        others.pop(name, None)
        if name in extra:
            raise ValueError(f"-p {name}: an option of its own sets it, see --help")
    check_given(extra, others)


def facts_of_run(shared, extra):
    """A hash of the facts of a run and of all facts of their relations, from which edits draw new
    objects. Says how many facts there are."""
    count = shared["facts_per_relation"]
    known = shared["known_prompts"]
    study = Study("run", **shared, **extra)
    facts = study.candidates(None if known else count)
    check_known_prompts(known, facts)
    relations = {fact.relation for fact in facts}
    taken = f"{len(facts)} facts of {len(relations)} relations from {study.data}"
    wanted = f"{count} a relation" if count else "all"
    if known:
        taken += f"; each model looks for {wanted} of which it answers {known} prompts or more"
    elif count:
        taken += f": {wanted}, --full takes all"
    print(taken, file=sys.stderr)
    return sha256([[asdict(fact) for fact in facts], study.objects])


def fetch_inputs(jobs):
    """Download and check what the jobs will read beside the facts: models with their tokenizers,
    and the text for perplexity. ValueError names what cannot be had: a run of hours must not fail
    for want of it at its end."""
    models, corpora = {}, {}  # as ordered sets
    for job in jobs:
        known = {**declared_parameters(job.notebook), **job.parameters}
        computes = known.get("models", ()) if known.get("control_models") else ()  # the report
        models |= dict.fromkeys([job.model] if job.model else computes)
        if "corpus" in known:
            corpora[known["corpus"]] = None
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


def _absolute(name, *bundled):
    """The path of what is there, since notebooks run in their own folder; other names, and those
    of what is `bundled`, as they are."""
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) and name not in bundled else name
