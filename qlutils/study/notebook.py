"""What a notebook opens: its checked parameters, its facts, its units of work, and where its
results go.

    study = Study.open("02_consistency", In)      # In: IPython's list of the cells run so far

Light on purpose: nothing here imports torch, so a notebook that only reads results starts at once.
"""

import ast
import json
import os
import platform
import re
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pandas as pd

from qlutils import paths
from qlutils.files import (
    as_frame,
    folder_hash,
    is_sealed,
    read_metadata,
    read_table,
    sealed,
    sha256,
    versions,
    write_json,
    write_table,
)
from qlutils.study import store

METHODS = ("ig", "sig", "amig")
NULLABLE = (
    "relations",
    "facts_per_relation",
    "device",
    "dtype",
)  # None: all, all, the best, the device's
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Study:
    """One notebook's part of a run.

    Known parameters: model, method (or methods, a list), data, relations, facts_per_relation,
    known_prompts, seed, device, dtype, output; whatever else a notebook declares stays in
    `parameters`. Attributes: every known parameter by its name, and `results`, the folder of this
    model and method ("all" where a notebook compares methods); `may_scan`, whether it may run the
    model to find the facts that it knows. ValueError names a parameter that is not usable.
    """

    def __init__(
        self,
        notebook,
        *,
        model=None,
        method=None,
        methods=None,
        data="demo",
        relations=None,
        facts_per_relation=None,
        known_prompts=0,
        seed=0,
        device=None,
        dtype=None,
        output="default",
        **others,
    ):
        for name in [method] * (method is not None) + list(methods or ()):
            _one_of("method", name, METHODS)
        if dtype is not None:
            _one_of("dtype", dtype, DTYPES)
        self.notebook, self.model, self.method = notebook, model, method
        self.methods = list(methods if methods is not None else METHODS)
        self.data, self.relations, self.facts_per_relation = data, relations, facts_per_relation
        self.known_prompts, self.may_scan, self.scan = known_prompts, True, None
        self.seed, self.device, self.dtype, self.output = seed, device, dtype, output
        self.parameters = {
            "model": model,
            "method": method,
            "methods": methods,
            "data": data,
            "relations": relations,
            "facts_per_relation": facts_per_relation,
            "known_prompts": known_prompts,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "output": output,
            **others,
        }
        self.root = paths.run_folder(output)
        self.results = self._folder(method)
        self._started, self._work, self._facts, self._identity = time.time(), {}, None, {}

    @classmethod
    def open(cls, notebook, cells):
        """Study of a notebook from its executed cells (`In`); see `check_parameters`. Its tables
        show whole prompts."""
        pd.set_option("display.max_colwidth", 120)
        return cls(notebook, **check_parameters(cells))

    @property
    def label(self):
        """The model's name in tables and figures."""
        return paths.label(self.model)

    # -- inputs ------------------------------------------------------------------------------------
    def facts(self):
        """The facts of this run: those of `load_facts` with the run's parameters. With
        `known_prompts` those that the model knows (`known.known_facts`), found once a run; without
        a model all that would be looked at."""
        if self._facts is None:
            if self.known_prompts and self.model:
                from qlutils.study.known import known_facts

                self._facts, self.scan = known_facts(self)
                if self.may_scan:
                    print(self.facts_note())
            else:
                size = None if self.known_prompts else self.facts_per_relation
                self._facts = self.candidates(size)
        return self._facts

    def candidates(self, facts_per_relation=None, warn=True):
        """The facts of the run's data and relations, or a seeded sample of each relation, whether
        the model knows them or not."""
        from qlutils.facts import load_facts

        return load_facts(
            self.data,
            relations=self.relations,
            seed=self.seed,
            facts_per_relation=facts_per_relation,
            warn=warn,
            middle=self.parameters.get("middle", "cut"),
        )

    def known_counts(self):
        """{model: {facts, scanned, known, kept, queries, answered}} of this run's models for which
        known facts were looked for; {} for a run of all facts."""
        names = [self.model] if self.model else self.parameters.get("models") or ()
        found = {}
        for name in names if self.known_prompts else ():
            one = self if name == self.model else self.beside(name)
            with suppress(ValueError):
                one.facts()
                found[name] = one.scan.drop(columns="relation").sum().to_dict()
        return found

    def facts_note(self):
        """One sentence on how many facts were looked at and kept, to stand beside results; "" for
        a run of all facts."""
        counts = [
            f"{paths.label(name)} {n['kept']} kept, {n['known']} known of {n['scanned']} scanned"
            for name, n in self.known_counts().items()
        ]
        if not counts:
            return ""
        what = f"Facts with at least {self.known_prompts} prompts answered by greedy decoding"
        return f"{what}: {'; '.join(counts)}."

    @cached_property
    def _objects(self):
        """Hash of all facts of these relations, sampled or not: edits draw new objects from
        them."""
        return sha256(
            [[fact.relation, fact.subject, fact.object] for fact in self.candidates(warn=False)]
        )

    def beside(self, model):
        """This study for another model of the same run, to read its results."""
        other = Study(self.notebook, **{**self.parameters, "model": model})
        other.may_scan = False
        return other

    def lm(self):
        """The model, loaded once a process."""
        return store.cached_model(self.model, self.device, self.dtype)

    def inputs(self, localised=True):
        """What this run's results are made from, apart from the method; `load` compares it.
        `localised`: with the choices of the localisation they are about."""
        made = self.origin(self.facts())
        if localised and "embedding" in self.parameters:
            made["objects"] = self._objects
        if localised and self.model:
            specs = {
                method: self.localisation(method)
                for method in ([self.method] if self.method else METHODS)
            }
            made["localisation"] = {method: spec for method, spec in specs.items() if spec}
        return made

    def origin(self, facts):
        """What determines a result about `facts` that no method or other choice is part of."""
        return {
            "model": self.model,
            "content": self.model and model_content(self.model),
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "code": store.code_versions(),
            "facts": sha256([asdict(fact) for fact in facts]),
        }

    def localisation(self, method=None):
        """The choices beside the method with which the saved "queries" were localised, as
        `attribution.Spec` takes them; {} where none are saved."""
        return read_metadata(self._folder(method or self.method) / "queries.parquet").get(
            "localisation", {}
        )

    # -- work and results --------------------------------------------------------------------------
    def run(self, task, units, config=None, desc=None):
        """`run_units` with this run's model, device, dtype and folder; the record gets counts and
        seconds. The facts of a task that says what a fact costs are packed into units by
        `store.packed`."""
        start, info = time.time(), {}
        if hasattr(task, "passes"):
            facts = [fact for unit in units for fact in unit]
            units = store.packed(task, self.lm(), facts, config or {})
        desc = desc or f"{self.notebook} {self.model} {self.method or ''}".strip()
        frame = store.run_units(
            task,
            self.model,
            units,
            config,
            desc=desc,
            device=self.device,
            dtype=self.dtype,
            root=self.root,
            info=info,
        )
        self._identity = {
            key: info.pop(key) for key in ("fingerprint", "device", "dtype", "threads")
        }
        known = self._work.get(desc, {})  # one notebook may do the same kind of work twice
        info |= {name: info[name] + known.get(name, 0) for name in ("units", "computed")}
        self._work[desc] = {
            **info,
            "seconds": round(time.time() - start + known.get("seconds", 0), 2),
        }
        return frame

    def save(self, frame, name, **more):
        """Keep a DataFrame as `<results>/<name>.parquet` for other notebooks, with what it was made
        from (and `more`)."""
        inputs = self.inputs(localised=name != "queries")
        write_table(
            frame,
            self.results / f"{name}.parquet",
            sha256(inputs),
            inputs=inputs,
            parameters=self.parameters,
            **more,
        )

    def load(self, name, method=None):
        """A DataFrame kept with `save`; ValueError if it is missing, damaged, or made from other
        inputs."""
        frame, problem = self._find(name, method := method or self.method)
        if frame is None:
            raise ValueError(
                f"no usable {name!r} of {self.model} by {method} in run {self.output!r}: "
                f"{problem}. Run the notebook that makes it first, with these parameters"
            )
        return frame

    def methods_done(self, name="queries"):
        """Those of `methods` whose saved `name` was made for this model from these very inputs."""
        return [method for method in self.methods if self._find(name, method)[0] is not None]

    def _folder(self, method):
        where = self.root / "results"
        return where if self.model is None else where / paths.slug(self.model) / (method or "all")

    def _find(self, name, method):
        path = self._folder(method) / f"{name}.parquet"
        if not path.exists():
            return None, "it was not made yet"
        table, meta = read_table(path)
        if table is None:
            return None, meta
        try:
            inputs = self.inputs(localised=name != "queries")
        except ValueError as error:  # the model is gone, or knows none of the facts
            return None, str(error)
        differ = [key for key, ours in inputs.items() if meta.get("inputs", {}).get(key) != ours]
        return (
            (None, f"it was made from other {', '.join(differ)}")
            if differ
            else (as_frame([table]), None)
        )

    def table(self, frame, stem, caption="", note="", *, digits=2):
        """Write a table as CSV, Markdown and LaTeX under `results`; returns it as shown, for
        display. The path of a local model becomes its label. Where a run takes known facts only,
        its note says so."""
        from qlutils.show.tables import display_table
        from qlutils.show.tables import write_table as write

        if self.model:
            caption = caption.replace(self.model, self.label)
        if "model" in frame:
            frame = frame.assign(model=frame["model"].map(paths.label))
        note = " ".join(filter(None, [note, self.facts_note()]))
        write(frame, stem, self.results, caption, note, digits=digits)
        return display_table(frame, digits)

    def figure(self, figure, stem, data):
        """Write a figure as PNG and PDF and its numbers as CSV under `results`."""
        from qlutils.show.plots import save_figure

        save_figure(figure, stem, self.results, data)

    def record(self, **extra):
        """Write `<results>/run.json`, one entry a notebook: all that is needed to run it again."""
        path = self.results / "run.json"
        entries = read_record(path)
        if counts := self.known_counts():
            extra = {"known_facts": counts, **extra}
        entries[self.notebook] = sealed(
            {
                "notebook": self.notebook,
                "parameters": self.parameters,
                "inputs": self.inputs(),
                "facts": len(self.facts()),
                "model": {"name": self.model, "revision": _revision(self.model), **self._identity},
                "work": self._work,
                "versions": versions(),
                "platform": platform.platform(),
                "command": os.environ.get("QLUTILS_COMMAND", "the notebook alone"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self._started, 2),
                **extra,
            }
        )
        write_json(path, dict(sorted(entries.items())))


def read_record(path):
    """{notebook: entry} of a run.json that `Study.record` wrote; damaged entries are left out with
    a warning."""
    try:
        found = json.loads(Path(path).read_bytes())
        good = {
            name: entry
            for name, entry in found.items()
            if is_sealed(entry) and entry["notebook"] == name
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        found, good = ["all of it"], {}
    if lost := sorted(set(found) - set(good)):
        warnings.warn(
            f"record {path} is damaged: {', '.join(lost)} is left out. Run the notebook again",
            stacklevel=2,
        )
    return good


def model_content(model):
    """A hash that changes with a local model's files, or with the downloaded revision of a Hub
    model."""
    from qlutils.model import pretrained

    if pretrained.is_gguf(model):
        return pretrained.content(model)
    folder = (
        paths.DEMO / "models" / model[5:]
        if model.startswith("demo/")
        else Path(os.path.expanduser(model))
    )
    if os.path.isdir(folder):  # False, where `Path.is_dir` raises, for what cannot be a path
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model folder {model} holds no config.json: want what save_pretrained writes"
            )
        return folder_hash(folder)
    if (
        model.startswith("demo/")
        or len(model) > 96
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII)
    ):
        bundled = sorted(f"demo/{path.name}" for path in (paths.DEMO / "models").glob("*/"))
        raise ValueError(
            f"there is no model {model!r}; want a folder, a Hugging Face id, or a bundled one: "
            f"{', '.join(bundled)}"
        )
    return sha256([model, _revision(model) or "not downloaded"])


def _revision(model):
    """The downloaded commit of a model of the Hugging Face Hub; None for a local model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    file = Path(HF_HUB_CACHE, "models--" + str(model).replace("/", "--"), "refs", "main")
    return file.read_text(encoding="utf-8") if os.path.isfile(file) else None


def check_parameters(cells):
    """{name: value} of a notebook's parameters, from the sources of the cells run so far.

    The notebook's own parameters are the literal assignments of a cell that holds nothing else;
    papermill's injected cell, which begins with "# Parameters", may set those and no others.
    ValueError names an unknown parameter, a value that is no literal, or one of another type than
    its default (None takes any type).
    """
    defaults, values, problem = {}, {}, ""
    for source in cells:
        injected = source.lstrip().startswith("# Parameters")
        cell = literals(source)
        if all(
            re.search(rf"(?m)^{name}\s*[:=]", source) for name in ("output", "seed")
        ):  # the parameters, edited or not
            problem = source if cell is None else ""
        if cell is None:
            if injected:
                raise ValueError(
                    f"a parameter is not a literal value in the injected cell:\n{source}"
                )
        elif injected:
            check_values(cell, defaults)
            values.update(cell)
        else:
            defaults.update(cell)
            values.update(cell)
    if problem:  # else an older cell's values would be taken for it
        raise ValueError(
            f"the parameters cell must hold nothing but lines `name = literal value`; "
            f"got\n{problem}"
        )
    check_values(values, values)
    return values


# of parameters whose other values would give numbers without a meaning; the rest is checked where
# it is used
RANGES = {
    "t": (0.05, 1, "a share of the largest score that results keep, at least 0.05 and below 1"),
    "static_threshold": (0, 1, "a CS2, at least 0 and below 1"),
    "example_line": (0, 1, "a CS2, at least 0 and below 1"),
    "n_locality": (1, 10**6, "a number of queries, at least 1"),
    "ppl_entries": (0, 10**6, "a number of texts, at least 0"),
    "ppl_max_tokens": (2, 10**6, "a number of tokens, at least 2"),
    "seed": (0, 2**63, "at least 0"),
    "known_prompts": (0, 10**6, "a number of prompts, at least 0 (0: all facts)"),
    "more_controls_facts": (0, 10**6, "a number of facts, at least 0"),
    "sweep_facts": (0, 10**6, "a number of facts, at least 0"),
    "control_queries": (1, 10**6, "a number of queries, at least 1"),
}


def check_values(given, defaults):
    """ValueError unless every given parameter is known, of its default's type and within its
    range."""
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(
                f"unknown parameter {name!r}; this notebook knows {', '.join(defaults)}"
            )
        default = defaults[name]
        if not (
            default is None
            or type(value) is type(default)
            or (value is None and name in NULLABLE)
            or (isinstance(default, float) and type(value) is int)
        ):
            raise ValueError(
                f"parameter {name}={value!r}: want a value like its default {default!r}, "
                f"of type {type(default).__name__}"
            )
    for name, (least, limit, what) in RANGES.items():
        value = given.get(name, least)
        if isinstance(value, (int, float)) and not least <= value < limit:
            raise ValueError(f"parameter {name}={value!r}: want {what}")


def literals(source):
    """{name: value} of a cell made of `name = literal` lines alone, else None."""
    try:
        nodes = ast.parse(source).body
        if nodes and all(
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
            for node in nodes
        ):
            return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
    except (SyntaxError, ValueError):
        pass
    return None


def _one_of(what, value, known):
    if value not in known:
        raise ValueError(f"{what} {value!r} is unknown; use one of {', '.join(known)}")
