"""From facts to stored knowledge neurons: attribution of every query of a run, kept sparse, in
units of work."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch

from qlutils.attribution.attribute import Attribution, Spec, attribute_encoded
from qlutils.facts import Fact, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.sets import (
    STORE_THRESHOLD,
    cas_candidates,
    fact_table,
    knowledge_neurons,
)

# What `compare_rules` compares, and the tolerance that stands for the exact integral.
COMPARED = (
    dict(rule="right", steps=20),
    dict(rule="endpoints", steps=20),
    dict(rule="gauss", steps=8),
    dict(rule="converged", tolerance=0.05),
)
EXACT = dict(rule="converged", tolerance=0.005)
CONVERGED_STEPS = 9  # about what the rule "converged" takes a layer, between models
# The facts of the paper's Figure 1.
PAPER_EXAMPLES = (("P39", "Suleiman I", "Shah"), ("P39", "Christoph Ahlhaus", "mayor"))


def localise_unit(lm, unit: list[dict], **spec) -> pd.DataFrame:
    """Attribute all queries of a unit of facts; the task behind `localise`. One row a query:

    fact, relation, subject, object, prompt_index, prompt; probability of the whole answer and
    whether it is known (greedy decoding gives it); prompt_tokens, answer_tokens; converged (None
    for a rule that cannot tell) and evaluations (see `attribution.Attribution`); gap (L,), the
    completeness gap; layer, neuron, score: the neurons above 0.05 of the query's largest score. The
    first row of a fact carries cas_*, mean and deviation over the fact's queries of every neuron
    that an offered CAS setting can select. A query that cannot be tokenised or read has its reason
    in `left_out` and no numbers.
    """
    spec, rows, encoded, names = Spec(**spec), [], [], []
    for record in unit:
        fact = Fact(**record)
        for index, prompt in enumerate(fact.prompts):
            row = dict(
                fact=fact.id,
                relation=fact.relation,
                subject=fact.subject,
                object=fact.object,
                prompt_index=index,
                prompt=prompt,
                left_out=None,
                prompt_tokens=0,
                answer_tokens=0,
            )
            try:
                query = lm.encode(prompt, fact.object)
                row |= dict(prompt_tokens=len(query[0]), answer_tokens=len(query[1]))
                encoded.append(query)
                names.append(f"{fact.id}: {prompt}")
            except ValueError as error:
                row["left_out"] = str(error)
            rows.append(row)
    frame = pd.DataFrame(rows)
    if encoded:
        _add_scores(frame, attribute_encoded(lm, encoded, spec, names))
    return frame


def _passes(lm, fact: dict, config: dict) -> float:
    """A step of a layer runs the layers above it, on average half of them, there and back."""
    spec, baselines = Spec(**config), len(fact["prompts"])
    if spec.method == "sig":
        baselines = sum(map(prompt_tokens, fact["prompts"]))
    steps = CONVERGED_STEPS if spec.rule == "converged" else spec.steps
    return steps * lm.num_layers * baselines


localise_unit.VERSION = 1
localise_unit.passes = _passes


def _add_scores(frame: pd.DataFrame, result: Attribution) -> None:
    """Fill in what was found of the queries that are not left out; `result` has them in the frame's
    order."""
    scores, read = result.scores, np.flatnonzero(frame["left_out"].isna())
    cells: dict[str, list] = {
        name: [None] * len(frame)
        for name in (
            "gap",
            "layer",
            "neuron",
            "score",
            "cas_layer",
            "cas_neuron",
            "cas_mean",
            "cas_std",
            "cas_mean_max",
            "cas_std_max",
        )
    }
    top = scores.amax((1, 2), keepdim=True)
    found = ((scores > STORE_THRESHOLD * top) & (top > 0)).nonzero(as_tuple=True)
    query, layer, neuron, score = (one.cpu().numpy() for one in (*found, scores[found]))
    ends = np.cumsum(np.bincount(query, minlength=len(read)))[:-1]
    for name, values in (
        ("layer", layer.astype(np.int32)),
        ("neuron", neuron.astype(np.int32)),
        ("score", score),
        ("gap", result.completeness_gap.cpu().numpy()),
    ):
        for row, one in zip(read, values if name == "gap" else np.split(values, ends)):
            cells[name][row] = one
    for _, rows in pd.Series(read).groupby(frame["fact"].to_numpy()[read], sort=False):
        for name, values in cas_candidates(scores[rows.index.tolist()]).items():
            kind = np.int32 if name in ("layer", "neuron") else score.dtype
            cells[f"cas_{name}"][rows.iloc[0]] = values.astype(kind)
    frame["probability"], frame["known"] = np.nan, False
    frame.loc[read, "probability"] = result.probability.cpu().numpy()
    frame.loc[read, "known"] = result.known.cpu().numpy()
    frame["row_budget"] = result.row_budget
    frame["converged"], frame["evaluations"] = None, np.nan
    frame.loc[read, "evaluations"] = result.evaluations.numpy()
    if result.converged is not None:
        frame.loc[read, "converged"] = result.converged.cpu().numpy()
    for name, values in cells.items():
        frame[name] = pd.Series(values, dtype=object, index=frame.index)


def localise(study, **spec) -> pd.DataFrame:
    """Localise all facts of a study with its model and method; the `queries` frame, saved for later
    notebooks.

    `spec`: fields of `attribution.Spec` other than the method. Queries that had to be left out are
    not in it; they are saved as "left_out" with the reason, and so is a fact that keeps fewer than
    two queries.
    """
    config = {"method": study.method, **spec}
    facts, name = [asdict(fact) for fact in study.facts()], f"{study.model} {study.method}"
    frame = study.run(localise_unit, [facts], config, desc=name)
    single = frame["left_out"].isna() & (
        frame[frame["left_out"].isna()]
        .groupby("fact")["fact"]
        .transform("size")
        .reindex(frame.index)
        < 2
    )
    frame.loc[single, "left_out"] = "the only usable query of its fact; consistency needs two"
    lost = frame[frame["left_out"].notna()]
    queries = frame[frame["left_out"].isna()].drop(columns="left_out").reset_index(drop=True)
    if queries.empty:
        raise ValueError(
            f"no fact of this run has two usable queries for {study.model}; first reason: "
            f"{lost['left_out'].iloc[0]}"
        )
    choices = {
        name: value
        for name, value in asdict(Spec(**config)).items()
        if name not in ("method", "row_budget")
    }
    study.save(queries, "queries", localisation=choices)
    study.save(lost[["fact", "prompt", "left_out"]].reset_index(drop=True), "left_out")
    return queries


def localise_by_other_rule(
    study, queries: pd.DataFrame, *, facts: int = 12, seed: int = 0, **spec
) -> pd.DataFrame:
    """Some facts of a run again, by another rule of the integral: "converged", or the paper's where
    the run itself used that. A seeded sample of `facts` facts with all their prompts; the frame of
    `localise`, with the column `rule`, saved as "other_rule" for notebook 02."""
    other = "right" if spec.get("rule") == "converged" else "converged"
    chosen = queries["fact"].drop_duplicates()
    chosen = chosen.iloc[np.sort(np.random.default_rng(seed).permutation(len(chosen))[:facts])]
    some = [fact for fact in study.facts() if fact.id in set(chosen)]
    config = {"method": study.method, **spec, "rule": other, "steps": Spec.steps}
    frame = study.run(
        localise_unit,
        [[asdict(fact)] for fact in some],
        config,
        desc=f"{study.model} {study.method} {other}",
    )
    frame = frame[frame["left_out"].isna()].drop(columns="left_out").reset_index(drop=True)
    study.save(frame.assign(rule=other), "other_rule")
    return frame.assign(rule=other)


def localised(study) -> pd.DataFrame:
    """The `queries` frame of a study: what notebook 01 saved for these inputs, computed with
    defaults if it is missing."""
    if study.method in study.methods_done("queries"):
        return study.load("queries")
    print(
        f"Knowledge neurons of {study.model} by {study.method} are not there yet: localising with "
        f"default settings."
    )
    return localise(study)


def example_facts(queries: pd.DataFrame, t: float = 0.2) -> list[str]:
    """Ids of the two facts that Figures 1, 7 and 10 show: the paper's where the data has them, else
    the known facts of highest and lowest CS2 (known: every query answered; if there are none, all
    facts count)."""
    present = {
        (r, s, o): fact
        for fact, r, s, o in queries[["fact", "relation", "subject", "object"]]
        .drop_duplicates()
        .itertuples(index=False)
    }
    if all(key in present for key in PAPER_EXAMPLES):
        return [present[key] for key in PAPER_EXAMPLES]
    facts = fact_table(queries, t).dropna(subset="cs2")
    facts = (
        facts[facts["n_queries"] > 2] if (facts["n_queries"] > 2).sum() > 1 else facts
    )  # CS2 of two prompts is CS1
    known = facts[facts["known"] == 1]
    facts = (known if len(known) > 1 else facts).sort_values("cs2", kind="stable")
    return [facts["fact"].iloc[-1], facts["fact"].iloc[0]]


def example_maps(lm, queries: pd.DataFrame, facts: list[str], **spec) -> list[dict]:
    """For two neighbour queries of each fact: dense attribution and activation (L, N), for the
    heatmaps of Figure 1.

    The two are the first and the last of the fact's known prompts (of all its prompts if fewer than
    two are known). Each
    dict: fact, prompt, answer, attribution, activation."""
    maps = []
    for fact in facts:
        group = queries[queries["fact"] == fact]
        chosen = group[group["known"]] if group["known"].sum() > 1 else group
        for _, row in chosen.iloc[[0, -1]].iterrows():
            encoded = lm.encode(row["prompt"], row["object"])
            scores = attribute_encoded(lm, [encoded], Spec(**spec), [row["prompt"]]).scores[0]
            activation = (
                neuron_vectors(lm, torch.tensor([encoded[0]], device=lm.device))[0].float().cpu()
            )
            maps.append(
                dict(
                    fact=fact,
                    prompt=row["prompt"],
                    answer=row["object"],
                    attribution=scores.cpu().numpy(),
                    activation=activation.numpy(),
                )
            )
    return maps


def compare_rules(lm, queries: pd.DataFrame, spec, *, t=0.2, sample=20, seed=0) -> pd.DataFrame:
    """The rules `COMPARED` against the exact integral, on a seeded sample of a run's queries.

    A row a rule, the last being the exact one's own: gradient evaluations a layer (and baseline);
    mean and 5th percentile over queries of the Jaccard index of the KN sets at `t`; mean over
    queries of the largest error of a score and of a layer's largest completeness gap, both over the
    query's largest score (the latter NaN where scores are normalised); share of the queries that
    the rule calls converged (NaN where it cannot tell), n."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(queries))[:sample])
    rows = queries.iloc[chosen]
    encoded = [lm.encode(prompt, answer) for prompt, answer in zip(rows["prompt"], rows["object"])]
    names = rows["prompt"].tolist()

    def scored(rule):
        return attribute_encoded(lm, encoded, replace(spec, **rule), names)

    exact = scored(EXACT)
    table = [
        {
            "rule": rule["rule"],
            "steps or tolerance": rule.get("steps") or rule["tolerance"],
            **_against(scored(rule) if rule is not EXACT else exact, exact, t, spec.method),
        }
        for rule in (*COMPARED, EXACT)
    ]
    return pd.DataFrame(table)


def _against(found: Attribution, exact: Attribution, t: float, method: str) -> dict:
    top = exact.scores.abs().flatten(1).amax(1).clamp_min(1e-30)
    pairs = zip(knowledge_neurons(found.scores, t), knowledge_neurons(exact.scores, t))
    jaccard = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    error = (found.scores - exact.scores).abs().flatten(1).amax(1) / top
    gap = found.completeness_gap.amax(1) / top
    settled = found.converged
    return {
        "evaluations": float(found.evaluations.mean()),
        "jaccard": np.mean(jaccard),
        "jaccard_p5": np.percentile(jaccard, 5),
        "error": float(error.mean()),
        "gap": float(gap.mean()) if method == "ig" else np.nan,
        "converged": np.nan if settled is None else float(settled.float().mean()),
        "n": len(jaccard),
    }
