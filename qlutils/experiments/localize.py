"""From facts to stored scores: every query of a run is attributed, and of its scores those that can
matter are kept, all above 0.05 of its largest.

A KN set is not stored: it depends on the threshold t, and `neurons.sets.kn_sets(queries, t)` makes
it of the scores wherever one is read.
"""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch

from qlutils.attribution.attribute import Attribution, Spec, attribute_encoded
from qlutils.facts import Fact, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.cas import cas_candidates
from qlutils.neurons.sets import STORE_THRESHOLD, fact_table, jaccard, knowledge_neurons

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
ONE_QUERY = "the only usable query of its fact; consistency needs two"


# --- the task -------------------------------------------------------------------------------------


def localise_unit(lm, unit: list[dict], **spec) -> pd.DataFrame:
    """Attribute all queries of a unit of facts; the task behind `localise`. One row a query:

    fact, relation, subject, object, prompt_index, prompt; left_out: why the query cannot be
    tokenised or read (such a row has no numbers), else None; prompt_tokens, answer_tokens;
    probability of the whole answer, and whether it is known (greedy decoding gives it); gap (L,),
    the completeness gap; converged, evaluations and row_budget, see `Attribution`; layer, neuron,
    score: the neurons above 0.05 of the query's largest score. The first row of a fact has cas_*,
    see `cas_candidates`.
    """
    rows, encoded = [], []
    for record in unit:
        fact = Fact(**record)
        for index, prompt in enumerate(fact.prompts):
            row = {
                "fact": fact.id,
                "relation": fact.relation,
                "subject": fact.subject,
                "object": fact.object,
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
    names = [f"{row['fact']}: {row['prompt']}" for row in read]
    if read:
        _add_scores(read, encoded, attribute_encoded(lm, encoded, Spec(**spec), names))
    return pd.DataFrame(rows)


def _passes(lm, fact: dict, config: dict) -> float:
    """A step of a layer runs the layers above it, on average half of them, there and back."""
    spec, baselines = Spec(**config), len(fact["prompts"])
    if spec.method == "sig":
        baselines = sum(map(prompt_tokens, fact["prompts"]))
    steps = CONVERGED_STEPS if spec.rule == "converged" else spec.steps
    return steps * lm.num_layers * baselines


localise_unit.VERSION = 1
localise_unit.passes = _passes


def _add_scores(rows: list[dict], encoded, result: Attribution) -> None:
    """Fill in what was found of the queries that could be read, all three in one order."""
    # (Q, L, N), selected where it is: of a large model half a million scores a query
    scores = result.scores
    converged = [None] * len(rows) if result.converged is None else result.converged.tolist()
    for i, (row, (prompt, answer)) in enumerate(zip(rows, encoded)):
        kept = scores[i] > STORE_THRESHOLD * scores[i].max().clamp_min(0)  # (L, N)
        layer, neuron = (one.int().cpu().numpy() for one in kept.nonzero(as_tuple=True))
        row |= {
            "prompt_tokens": len(prompt),
            "answer_tokens": len(answer),
            "probability": result.probability[i].item(),
            "known": result.known[i].item(),
            "row_budget": result.row_budget,
            "converged": converged[i],
            "evaluations": result.evaluations[i].item(),
            "gap": result.completeness_gap[i].cpu().numpy(),
            "layer": layer,
            "neuron": neuron,
            "score": scores[i][kept].cpu().numpy(),
        }
    facts = pd.Series([row["fact"] for row in rows])
    for _, same in facts.groupby(facts, sort=False):
        first = rows[same.index[0]]
        for name, values in cas_candidates(scores[same.index.tolist()]).items():
            kind = np.int32 if name in ("layer", "neuron") else first["score"].dtype
            first[f"cas_{name}"] = values.astype(kind)


# --- a run ----------------------------------------------------------------------------------------


def localise(study, **spec) -> pd.DataFrame:
    """Localise all facts of a study with its model and method; the `queries` frame, saved for later
    notebooks.

    `spec`: fields of `Spec` other than the method. Queries that had to be left out are not in it;
    they are saved as "left_out" with the reason, and so is a fact's only usable query.
    """
    config = {"method": study.method, **spec}
    facts = list(map(asdict, study.facts()))
    frame = study.run(localise_unit, [facts], config, desc=f"{study.model} {study.method}")
    usable = frame["left_out"].isna()
    alone = usable.groupby(frame["fact"]).transform("sum") < 2
    frame.loc[usable & alone, "left_out"] = ONE_QUERY
    lost = frame[frame["left_out"].notna()].reset_index(drop=True)
    queries = _usable(frame)
    if queries.empty:
        raise ValueError(
            f"no fact of this run has two usable queries for {study.model}; first reason: "
            f"{lost['left_out'].iloc[0]}"
        )
    study.save(queries, "queries", localisation=_settings(**config))
    study.save(lost[["fact", "prompt", "left_out"]], "left_out")
    return queries


def _settings(**config) -> dict:
    """The fields of `Spec` on which scores depend, beside the method."""
    settings = asdict(Spec(**config))
    del settings["method"], settings["row_budget"]
    return settings


def _usable(frame) -> pd.DataFrame:
    return frame[frame["left_out"].isna()].drop(columns="left_out").reset_index(drop=True)


def localise_again(study, facts: list[dict], what: str, **spec) -> pd.DataFrame:
    """The `queries` frame of some facts or wordings, to compare with the run's own; not saved.

    facts: dicts with the fields of `Fact`; what: names the work in the run's record."""
    config = {"method": study.method, **spec}
    desc = f"{study.model} {study.method} {what}"
    return _usable(study.run(localise_unit, [facts], config, desc=desc))


def localise_by_other_rule(
    study,
    queries,
    *,
    facts=12,
    seed=0,
    **spec,
):
    """A seeded sample of a run's facts by another rule of the integral: by "converged", or by the
    paper's where the run itself used that. A `queries` frame with the column `rule`, saved as
    "other_rule" for notebook 02."""
    other = "right" if spec.get("rule") == "converged" else "converged"
    names = queries["fact"].unique()
    chosen = names[np.random.default_rng(seed).permutation(len(names))[:facts]]
    sample = [asdict(fact) for fact in study.facts() if fact.id in chosen]
    spec |= {"rule": other, "steps": Spec.steps}
    frame = localise_again(study, sample, other, **spec).assign(rule=other)
    study.save(frame, "other_rule")
    return frame


def localised(study) -> pd.DataFrame:
    """The `queries` frame of a study: what notebook 01 saved for these inputs. Where that is
    missing it is computed: with the settings of what was saved from other inputs (of other facts,
    say), if anything, else with the defaults, which are the paper's."""
    if study.method in study.methods_done("queries"):
        return study.load("queries")
    saved = study.localisation()
    how = "with the settings of what is saved" if saved else "by the paper's rule"
    told = ", ".join(f"{name}={value!r}" for name, value in _settings(**saved).items())
    print(
        f"Knowledge neurons of {study.model} by {study.method} are not there yet: localising "
        f"{how}: {told}."
    )
    return localise(study, **saved)


# --- what notebook 01 shows -----------------------------------------------------------------------


def localisation_summary(queries, sets: list[set]) -> pd.DataFrame:
    """Size, depth and error of the KN sets of a `queries` frame, in one row.

    mean completeness gap: over layers and queries; largest gap of a layer: of the layers' means
    over queries; both in units of probability."""
    sizes = pd.Series([len(one) for one in sets])
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


def example_facts(queries, t=0.2) -> list[str]:
    """Ids of the two facts that Figures 1, 7 and 10 show: the paper's where the data has them, else
    the known facts of highest and lowest CS2 (known: every query answered; if there are none, all
    facts count)."""
    about = queries.drop_duplicates("fact").set_index(["relation", "subject", "object"])["fact"]
    if all(key in about.index for key in PAPER_EXAMPLES):
        return [about[key] for key in PAPER_EXAMPLES]
    facts = fact_table(queries, t).dropna(subset="cs2")
    several = facts[facts["n_queries"] > 2]  # CS2 of two prompts is CS1
    facts = several if len(several) > 1 else facts
    known = facts[facts["known"] == 1]
    facts = known if len(known) > 1 else facts
    names = facts.sort_values("cs2", kind="stable")["fact"]
    return [names.iloc[-1], names.iloc[0]]


def example_maps(lm, queries, facts: list[str], **spec) -> list[dict]:
    """The dense attribution and activation (L, N) of two neighbour queries of each fact, for the
    heatmaps of Figure 1: of its first and last known prompt (of all prompts if fewer than two are
    known). Dicts with fact, prompt, answer, attribution, activation, probability."""
    maps = []
    for fact in facts:
        group = queries[queries["fact"] == fact]
        chosen = group[group["known"]] if group["known"].sum() > 1 else group
        for place in (0, -1):
            one = {"fact": fact, "prompt": chosen["prompt"].iloc[place]}
            maps.append(one | {"answer": chosen["object"].iloc[place]})
    encoded = [lm.encode(one["prompt"], one["answer"]) for one in maps]
    result = attribute_encoded(lm, encoded, Spec(**spec), [one["prompt"] for one in maps])
    seen = activations(lm, [prompt for prompt, _ in encoded])
    found = zip(maps, result.scores.cpu().numpy(), seen, result.probability.tolist())
    for one, scores, activation, probability in found:
        one |= {"attribution": scores, "activation": activation, "probability": probability}
    return maps


def activations(lm, prompts: list[list[int]]) -> list[np.ndarray]:
    """(L, N) neuron vectors of each tokenised prompt at its last token."""
    found = [None] * len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        ids = torch.tensor([prompts[i] for i in same], device=lm.device)  # (Q, T)
        for i, vectors in zip(same, neuron_vectors(lm, ids).float().cpu().numpy()):
            found[i] = vectors
    return found


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
    agreement = [jaccard(a, b) for a, b in pairs]
    error = (found.scores - exact.scores).abs().flatten(1).amax(1) / top
    gap = found.completeness_gap.amax(1) / top
    settled = found.converged
    return {
        "evaluations": float(found.evaluations.mean()),
        "jaccard": np.mean(agreement),
        "jaccard_p5": np.percentile(agreement, 5),
        "error": float(error.mean()),
        "gap": float(gap.mean()) if method == "ig" else np.nan,
        "converged": np.nan if settled is None else float(settled.float().mean()),
        "n": len(agreement),
    }
