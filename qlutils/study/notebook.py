"""What a notebook opens: its checked parameters, its facts, its units of work, and where its
results go.

    study = Study.open("02_consistency", globals())

Light on purpose: nothing here imports torch, so a notebook that only reads results starts at once.
"""

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property

import pandas as pd

from qlutils import paths
from qlutils.checks import METHODS
from qlutils.facts import load_facts
from qlutils.files import read_metadata, sha256, versions, write_json
from qlutils.show.plots import save_figure
from qlutils.show.tables import display_table, write_table
from qlutils.study import identity, store
from qlutils.study.known import known_facts
from qlutils.study.parameters import check_values, parameters_of
from qlutils.study.results import Missing, load_frame, read_record, save_frame, write_record

DEFAULTS = {
    "model": None,
    "method": None,
    "methods": None,
    "data": "demo",
    "relations": None,
    "facts_per_relation": None,
    "known_prompts": 0,
    "seed": 0,
    "device": None,
    "dtype": None,
    "output": "default",
}


class Study:
    """One notebook's part of a run, of one model and method.

    Every parameter of DEFAULTS is an attribute; whatever else the notebook declares stays in
    `parameters`. A notebook that compares methods has `methods` and no method.

    Other attributes: results, the folder of this model and method; may_scan, whether it may run the
    model to find the facts that it knows; scan, what was found (see `known.known_facts`).
    ValueError names a parameter that is not usable."""

    def __init__(self, notebook, **parameters):
        check_values(parameters)
        self.notebook = notebook
        self.parameters = {**DEFAULTS, **parameters}
        for name in DEFAULTS:
            setattr(self, name, self.parameters[name])
        self.methods = list(METHODS if self.methods is None else self.methods)
        self.root = paths.run_folder(self.output)
        self.results = self._folder(self.method)
        self.may_scan = True
        self.scan = None
        self.work = {}  # {kind of work: counts and seconds}, for the record
        self._started = time.time()
        self._facts = None
        self._identity = {}

    @classmethod
    def open(cls, notebook, namespace):
        """The study of a notebook, from its `globals()`; its tables show whole prompts."""
        pd.set_option("display.max_colwidth", 120)
        study = cls(notebook, **parameters_of(notebook, namespace))
        # which models `paths.label` tells apart; the driver has said so already
        if "QLUTILS_COMMAND" not in os.environ:
            others = [*study.parameters.get("models", ()), *study.parameters.get("beside", ())]
            os.environ["QLUTILS_MODELS"] = json.dumps([study.model or "", *others])
        return study

    def beside(self, model, **changes):
        """This study for another model of the same run, to read its results; `changes`: other
        parameters."""
        other = Study(self.notebook, **{**self.parameters, "model": model, **changes})
        other.may_scan = False
        return other

    @property
    def label(self):
        """The model's name in tables and figures."""
        return paths.label(self.model)

    def lm(self):
        """The model, loaded once a process."""
        return store.cached_model(self.model, self.device, self.dtype)

    # -- facts -------------------------------------------------------------------------------------
    def facts(self):
        """The facts of this run: those of `load_facts` with the run's parameters. With
        `known_prompts` those that the model knows (`known.known_facts`), found once a run; without
        a model all that would be looked at."""
        if self._facts is None and self.known_prompts and self.model:
            self._facts, self.scan = known_facts(self)
            if self.may_scan:
                print(self.facts_note())
        elif self._facts is None:
            self._facts = self.candidates(None if self.known_prompts else self.facts_per_relation)
        return self._facts

    def candidates(self, facts_per_relation=None):
        """The facts of the run's data and relations, or a seeded sample of each relation, whether
        the model knows them or not."""
        return load_facts(
            self.data,
            relations=self.relations,
            seed=self.seed,
            facts_per_relation=facts_per_relation,
            middle=self.parameters.get("middle", "cut"),
        )

    def known_counts(self):
        """{model: {facts, scanned, known, kept, queries, answered}} of this run's models for which
        known facts were looked for; {} for a run of all facts."""
        found = {}
        models = [self.model] if self.model else self.parameters.get("models", ())
        for name in models if self.known_prompts else ():
            one = self if self.model else self.beside(name)
            with suppress(ValueError):
                one.facts()
                found[name] = one.scan.drop(columns="relation").sum().to_dict()
        return found

    def facts_note(self):
        """One sentence on how many facts were looked at and kept, to stand beside results; "" for
        a run of all facts."""
        counts = []
        for name, n in self.known_counts().items():
            known = f"{n['kept']} kept, {n['known']} known of {n['scanned']} scanned"
            counts.append(f"{paths.label(name)} {known}")
        what = f"Facts with at least {self.known_prompts} prompts answered by greedy decoding"
        return f"{what}: {'; '.join(counts)}." if counts else ""

    # -- what results are made from ----------------------------------------------------------------
    def origin(self, facts):
        """What determines a result about `facts` that no method or other choice is part of."""
        return {
            "model": self.model,
            "content": self.model and identity.model_content(self.model),
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "code": identity.code_versions(),
            "facts": sha256([asdict(fact) for fact in facts]),
        }

    @cached_property
    def objects(self):
        """All facts of the relations, less their prompts: edits draw new objects from them."""
        return [[fact.relation, fact.subject, fact.object] for fact in self.candidates()]

    def inputs(self, localised=True, method=None):
        """What this run's results are made from, apart from the method; `load` compares it.

        localised: with the choices of the localisation they are about, by `method`, this study's
        own or, where it has none, all; and all facts of the relations where edits draw new objects
        from them."""
        made = self.origin(self.facts())
        if localised and "embedding" in self.parameters:
            made["objects"] = sha256(self.objects)
        if localised and self.model:
            own = method or self.method
            specs = {name: self.localisation(name) for name in ([own] if own else METHODS)}
            made["localisation"] = {name: spec for name, spec in specs.items() if spec}
        return made

    def localisation(self, method=None):
        """The choices beside the method with which the saved "queries" were localised, as
        `qlutils.Spec` takes them; {} where none are saved."""
        made = read_metadata(self._folder(method or self.method) / "queries.parquet")
        return made.get("localisation", {})

    # -- work and results --------------------------------------------------------------------------
    def run(self, task, units, config=None, desc=None):
        """`run_units` with this run's model, device, dtype and folder; the record gets counts and
        seconds. The facts of a task that says what a fact costs are packed into units by
        `store.packed`."""
        start = time.time()
        info = {}
        if hasattr(task, "passes"):
            facts = [fact for unit in units for fact in unit]
            units = store.packed(task, self.lm(), facts, config or {})
        desc = desc or f"{self.notebook} {self.model} {self.method or ''}".strip()
        frame = store.run_units(
            task,
            self.model,
            units,
            config,
            root=self.root,
            desc=desc,
            device=self.device,
            dtype=self.dtype,
            info=info,
        )
        self._identity = info["identity"]
        done = self.work.setdefault(desc, {"units": 0, "computed": 0, "seconds": 0.0})
        done["version"] = info["version"]
        done["units"] += info["units"]  # one notebook may do the same kind of work twice
        done["computed"] += info["computed"]
        done["seconds"] = round(done["seconds"] + time.time() - start, 2)
        return frame

    def _begin(self):
        """Before a result is written: where the notebook ran with other parameters, its record and
        its stamp go, as until it ends what is there is of both runs."""
        path = self.results / "run.json"
        entries = read_record(path)
        entry = entries.pop(self.notebook, None)
        if entry and sha256(entry["parameters"]) != sha256(self.parameters):
            write_json(path, entries)
            name = paths.job_name(self.notebook, self.model, self.method)
            paths.stamp_file(self.root, name).unlink(missing_ok=True)

    def save(self, frame, name, **more):
        """Keep a DataFrame as `<results>/<name>.parquet` for other notebooks, with what it was made
        from (and `more`)."""
        self._begin()
        save_frame(
            frame,
            self.results / f"{name}.parquet",
            self.inputs(name != "queries"),
            parameters=self.parameters,
            **more,
        )

    def load(self, name, method=None):
        """A DataFrame kept with `save`; `Missing` if it is not there, damaged, or made from other
        inputs."""
        method = method or self.method
        path = self._folder(method) / f"{name}.parquet"
        try:
            inputs = self.inputs(name != "queries", method) if path.exists() else {}
            return load_frame(path, inputs)
        except ValueError as problem:
            raise Missing(
                f"no usable {name!r} of {self.model} by {method} in run {self.output!r}: "
                f"{problem}. Run the notebook that makes it first, with these parameters"
            ) from None

    def methods_done(self, name="queries"):
        """Those of `methods` whose saved `name` was made for this model from these very inputs."""
        done = []
        for method in self.methods:
            with suppress(ValueError):
                self.load(name, method)
                done.append(method)
        return done

    def _folder(self, method):
        return paths.results_folder(self.root, self.model, method)

    def table(self, frame, stem, caption="", note="", *, digits=2):
        """Write a table as CSV, Markdown and LaTeX under `results`; returns it as shown, for
        display. The path of a local model becomes its label. Where a run takes known facts only,
        its note says so."""
        self._begin()
        if self.model:
            caption = caption.replace(self.model, self.label)
        if "model" in frame:
            frame = frame.assign(model=frame["model"].map(paths.label))
        note = f"{note} {self.facts_note()}".strip()
        write_table(frame, stem, self.results, caption, note, digits=digits)
        return display_table(frame, digits)

    def figure(self, figure, stem, data):
        """Write a figure as PNG and PDF and its numbers as CSV under `results`."""
        self._begin()
        save_figure(figure, stem, self.results, data)

    def record(self, **extra):
        """Write `<results>/run.json`, one entry a notebook: all that is needed to run it again."""
        if counts := self.known_counts():
            extra["known_facts"] = counts
        entry = {
            "parameters": self.parameters,
            "inputs": self.inputs(),
            "facts": len(self.facts()),
            "model": {
                "name": self.model,
                "revision": identity.revision(self.model),
                **self._identity,
            },
            "work": self.work,
            "versions": versions(),
            "platform": platform.platform(),
            "command": os.environ.get("QLUTILS_COMMAND", "the notebook alone"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 2),
        }
        write_record(self.results / "run.json", self.notebook, {**entry, **extra})
