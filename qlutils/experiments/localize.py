"""From facts to stored scores: every query of a run is attributed, and of its scores those that can
matter are kept, all above 0.05 of its largest.

A KN set is not stored: it depends on the threshold t, and `neurons.sets.kn_sets(queries, t)` makes
it of the scores wherever one is read.
"""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change.rows import in_batches
from qlutils.facts import Fact, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.cas import cas_candidates
from qlutils.neurons.sets import (
    STORE_THRESHOLD,
    fact_table,
    jaccard,
    knowledge_neurons,
)

# What `compare_rules` compares; the last one stands for the exact integral.
COMPARED = (
    ("right", "steps", 20),
    ("endpoints", "steps", 20),
    ("gauss", "steps", 8),
    ("converged", "tolerance", 0.05),
    ("converged", "tolerance", 0.005),
)
CONVERGED_STEPS = 9  # about what the rule "converged" takes a layer, between models
# The facts of the paper's Figure 1.
PAPER_EXAMPLES = [
    ("P39", "Suleiman I", "Shah"),
    ("P39", "Christoph Ahlhaus", "mayor"),
]


# --- the task -------------------------------------------------------------------------------------


def localise_unit(lm, unit, **spec):
    """Attribute all queries of a unit of facts; the task behind `localise`. One row a query:

    fact, relation, subject, object, prompt_index, prompt; left_out: why the query cannot be
    tokenised or read (such a row has no numbers), else None; prompt_tokens, answer_tokens;
    probability of the whole answer, and whether it is known (greedy decoding gives it); gap (L,),
    the completeness gap; converged, evaluations and row_budget, see `Attribution`; layer, neuron,
    score: the neurons above 0.05 of the query's largest score. The first row of a fact has cas_*,
    see `cas_candidates`.
    """
    rows = []
    encoded = []
    for record in unit:
        fact = Fact(**record)
        about = {"fact": fact.id} | record
        for index, prompt in enumerate(about.pop("prompts")):
            row = about | {
                "prompt_index": index,
                "prompt": prompt,
                "left_out": None,
                "known": False,
            }
            rows.append(row)
            try:
                encoded.append(lm.encode(prompt, fact.object))
            except ValueError as error:
                row["left_out"] = str(error)
    read = [row for row in rows if row["left_out"] is None]
    if read:
        names = [f"{row['fact']}: {row['prompt']}" for row in read]
        result = attribute_encoded(lm, encoded, Spec(**spec), names)
        _add_numbers(read, encoded, result)
        _add_cas(read, result.scores)
    return pd.DataFrame(rows)


def _passes(lm, fact, config):
    """A step of a layer runs the layers above it, on average half of them, there and back."""
    spec = Spec(**config)
    baselines = len(fact["prompts"])
    if spec.method == "sig":
        baselines = sum(map(prompt_tokens, fact["prompts"]))
    steps = CONVERGED_STEPS if spec.rule == "converged" else spec.steps
    return steps * lm.num_layers * baselines


localise_unit.VERSION = 2
localise_unit.passes = _passes


def _add_numbers(rows, encoded, result):
    """Fill in what the `Attribution` of the queries that could be read says, all in one order."""
    numbers = {
        "prompt_tokens": [len(prompt) for prompt, _ in encoded],
        "answer_tokens": [len(answer) for _, answer in encoded],
        "probability": result.probability.tolist(),
        "known": result.known.tolist(),
        "row_budget": result.row_budget,
        "converged": None if result.converged is None else result.converged.tolist(),
        "evaluations": result.evaluations.tolist(),
        "gap": list(result.completeness_gap.cpu().numpy()),
    }
    numbers = pd.DataFrame(numbers).to_dict("records")
    for row, own, scores in zip(rows, numbers, result.scores):
        kept = scores > STORE_THRESHOLD * scores.max().clamp_min(0)  # (L, N)
        layer, neuron = kept.nonzero(as_tuple=True)
        row |= own
        row |= {
            "layer": layer.int().cpu().numpy(),
            "neuron": neuron.int().cpu().numpy(),
            # selected where it is: of a large model all are half a million
            "score": scores[kept].cpu().numpy(),
        }


def _add_cas(rows, scores):
    """Give the first row of each fact its `cas_candidates`, of all its `scores` (Q, L, N)."""
    facts = pd.DataFrame(rows).groupby("fact")
    for places in facts.indices.values():
        first = rows[places[0]]
        for name, values in cas_candidates(scores[places]).items():
            like = first.get(name, first["score"])  # as precise as what is kept of a query
            first[f"cas_{name}"] = values.astype(like.dtype)


# --- a run ----------------------------------------------------------------------------------------


def localise(study, **spec):
    """Localise all facts of a study with its model and method; the `queries` frame, saved for later
    notebooks.

    `spec`: fields of `Spec` other than the method. Queries that had to be left out are not in it;
    they are saved as "left_out" with the reason, and so is a fact's only usable query.
    """
    config = {"method": study.method, **spec}
    frame = study.run(
        localise_unit,
        [list(map(asdict, study.facts()))],
        config,
        desc=f"{study.model} {study.method}",
    )
    usable = frame["left_out"].isna()
    alone = usable & (usable.groupby(frame["fact"]).transform("sum") < 2)
    frame.loc[alone, "left_out"] = "the only usable query of its fact; consistency needs two"
    lost = frame.loc[frame["left_out"].notna(), ["fact", "prompt", "left_out"]]
    queries = _usable(frame)
    if queries.empty:
        raise ValueError(
            f"no fact of this run has two usable queries for {study.model}; first reason: "
            f"{lost['left_out'].iloc[0]}"
        )
    settings = asdict(Spec(**config))  # those on which scores depend, beside the method
    del settings["method"], settings["row_budget"]
    study.save(queries, "queries", localisation=settings)
    study.save(lost.reset_index(drop=True), "left_out")
    return queries


def _usable(frame):
    usable = frame[frame["left_out"].isna()]
    return usable.drop(columns="left_out").reset_index(drop=True)


def localise_again(study, facts, what, **spec):
    """The `queries` frame of some facts or wordings, to compare with the run's own; not saved.

    facts: a frame with the fields of `Fact`; what: names the work in the run's record."""
    config = {"method": study.method, **spec}
    facts = facts[["relation", "subject", "object", "prompts"]].to_dict("records")
    desc = f"{study.model} {study.method} {what}"
    return _usable(study.run(localise_unit, [facts], config, desc=desc))


def localise_by_other_rule(study, queries, n_facts=12, *, seed=0, **spec):
    """A seeded sample of `n_facts` of a run's facts by another rule of the integral: by
    "converged", or by the paper's where the run itself used that. A `queries` frame with the column
    `rule`, saved as "other_rule" for notebook 02."""
    other = "right" if spec.get("rule") == "converged" else "converged"
    chosen = np.random.default_rng(seed).permutation(queries["fact"].unique())[:n_facts]
    sample = pd.DataFrame([fact for fact in study.facts() if fact.id in chosen])
    spec |= {"rule": other, "steps": Spec.steps}
    frame = localise_again(study, sample, other, **spec).assign(rule=other)
    study.save(frame, "other_rule")
    return frame


def localised(study):
    """The `queries` frame of a study: what notebook 01 saved for these inputs. Where that is
    missing it is computed: with the settings of what was saved from other inputs (of other facts,
    say), if anything, else with the defaults, which are the paper's."""
    if study.method in study.methods_done("queries"):
        return study.load("queries")
    saved = study.localisation()
    how = "with the settings of what is saved" if saved else "by the paper's rule"
    spec = Spec(study.method, **saved)
    print(f"Knowledge neurons of {study.model} are not there yet: localising {how}: {spec}.")
    return localise(study, **saved)


# --- what notebook 01 shows -----------------------------------------------------------------------


def localisation_summary(queries, sets):
    """Size, depth and error of the KN sets of a `queries` frame, in one row.

    mean completeness gap: over layers and queries; largest gap of a layer: of the layers' means
    over queries; both in units of probability."""
    sizes = pd.Series(map(len, sets))
    layers = pd.Series([layer for one in sets for layer, _ in one], dtype=float)
    gaps = np.stack(queries["gap"])  # (Q, L)
    row = {
        "n_queries": len(queries),
        "n_known": queries["known"].sum(),
        "n_empty": (sizes == 0).sum(),
        "median KNs": sizes.median(),
        "mean KN layer": layers.mean(),
        "share in layer 0": (layers == 0).mean(),
        "mean completeness gap": gaps.mean(),
        "largest gap of a layer": gaps.mean(0).max(),
        "mean P": queries["probability"].mean(),
    }
    return pd.DataFrame([row])


def example_facts(queries, t=0.2):
    """Ids of the two facts that Figures 1, 7 and 10 show: the paper's where the data has them, else
    the known facts of highest and lowest CS2 (known: every query answered; if there are none, all
    facts count)."""
    facts = fact_table(queries, t)
    about = facts.set_index(["relation", "subject", "object"])["fact"]
    if set(PAPER_EXAMPLES) <= set(about.index):
        return about[PAPER_EXAMPLES].tolist()
    facts = facts.dropna(subset="cs2")
    for wanted in ("n_queries > 2", "known == 1"):  # CS2 of two prompts is CS1
        fewer = facts.query(wanted)
        facts = fewer if len(fewer) > 1 else facts
    names = facts.sort_values("cs2", kind="stable")["fact"]
    return [names.iloc[-1], names.iloc[0]]


def example_maps(lm, queries, facts, **spec):
    """The dense attribution and activation (L, N) of two neighbour queries of each fact, for the
    heatmaps of Figure 1: of its first and last known prompt (of all prompts if fewer than two are
    known). Dicts with fact, prompt, answer, attribution, activation, probability."""
    chosen = []
    for fact in facts:
        group = queries[queries["fact"] == fact]
        known = group[group["known"]]
        group = known if len(known) > 1 else group
        chosen.append(group.iloc[[0, -1]])
    maps = pd.concat(chosen)[["fact", "prompt", "object"]]
    maps = maps.rename(columns={"object": "answer"})
    found = dense_maps(lm, maps["prompt"].tolist(), maps["answer"].tolist(), **spec)
    return [one | dense for one, dense in zip(maps.to_dict("records"), found)]


def dense_maps(lm, prompts, answers, **spec):
    """A dict a query: attribution and activation of every neuron (L, N), and probability."""
    encoded = list(map(lm.encode, prompts, answers))
    result = attribute_encoded(lm, encoded, Spec(**spec), prompts)
    return pd.DataFrame(
        {
            "attribution": list(result.scores.cpu().numpy()),
            "activation": activations(lm, [prompt for prompt, _ in encoded]),
            "probability": result.probability.tolist(),
        }
    ).to_dict("records")


def activations(lm, prompts):
    """(L, N) neuron vectors of each tokenised prompt at its last token."""

    def compute(some):
        ids = torch.tensor(some, device=lm.device)  # (Q, T)
        return neuron_vectors(lm, ids).float().cpu().numpy()

    return in_batches(lm, map(tuple, prompts), lambda prompt: (len(prompt),), compute)


def compare_rules(lm, queries, spec, *, t, sample, seed):
    """The rules `COMPARED` against the exact integral, on a seeded sample of a run's queries.

    A row a rule, the last being the exact one's own: gradient evaluations a layer (and baseline);
    mean and 5th percentile over queries of the Jaccard index of the KN sets at `t`; mean over
    queries of the largest error of a score and of a layer's largest completeness gap, both over the
    query's largest score (the latter NaN where scores are normalised); share of the queries that
    the rule calls converged (NaN where it cannot tell), n."""
    shuffled = np.random.default_rng(seed).permutation(len(queries))
    chosen = queries.iloc[np.sort(shuffled[:sample])]
    prompts = chosen["prompt"].tolist()
    encoded = list(map(lm.encode, prompts, chosen["object"]))
    results = [
        attribute_encoded(lm, encoded, replace(spec, rule=rule, **{setting: value}), prompts)
        for rule, setting, value in COMPARED
    ]
    numbers = pd.DataFrame(_against(found, results[-1].scores, t) for found in results)
    table = pd.DataFrame(COMPARED, columns=["rule", "setting", "steps or tolerance"])
    table = table.drop(columns="setting").join(numbers)
    return table if spec.method == "ig" else table.assign(gap=np.nan)


def _against(found, exact, t):
    """What the scores `exact` (Q, L, N) say of an `Attribution`."""
    ours = knowledge_neurons(found.scores, t)
    agreement = list(map(jaccard, ours, knowledge_neurons(exact, t)))
    top = exact.abs().amax((1, 2))  # (Q,)
    top = top.clamp_min(1e-30)
    error = (found.scores - exact).abs().amax((1, 2)) / top
    gap = found.completeness_gap.amax(1) / top
    settled = found.converged
    return {
        "evaluations": found.evaluations.mean().item(),
        "jaccard": np.mean(agreement),
        "jaccard_p5": np.percentile(agreement, 5),
        "error": error.mean().item(),
        "gap": gap.mean().item(),
        "converged": np.nan if settled is None else settled.float().mean().item(),
        "n": len(agreement),
    }
