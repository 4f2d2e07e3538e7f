"""Controls 2 and 6: some queries of a run localised again, by other rules of the integral, in other
wordings, and in another precision of the model."""

import re

import numpy as np
import pandas as pd

from qlutils.experiments.controls import GROUP, agreement, subject_in
from qlutils.experiments.localize import localise_again
from qlutils.neurons.sets import jaccard, kn_sets

RULES = ("right", "midpoint", "gauss")
STEPS = 20
DTYPES = ("float32", "bfloat16")
ARTICLE = r"\b(?:the|a|an) "


def sample_queries(queries, n, seed):
    """At most `n` queries, one a fact, known ones first; the same for every method. `prompts`: a
    list of its prompt."""
    order = np.random.default_rng(seed).permutation(len(queries))
    shuffled = queries.iloc[order].sort_values("known", ascending=False, kind="stable")
    rows = shuffled.drop_duplicates("fact").head(n).sort_values(["fact", "prompt_index"])
    return rows.assign(prompts=[[prompt] for prompt in rows["prompt"]])


def variants(prompt, subject):
    """At most two wordings as close to the prompt as can be: an article dropped, or one added
    before the subject. The last word, at which attribution is read, stays."""
    place = subject_in(subject).search(prompt)
    start, end = place.span() if place else (0, 0)
    found = [
        prompt[: article.start()] + prompt[article.end() :]
        for article in re.finditer(ARTICLE, prompt)
        if not start <= article.start() < end
    ]
    before = prompt[:start]
    has_one = re.search(f"{ARTICLE}$", before, re.I) or re.match(ARTICLE, subject, re.I)
    if place and not has_one:
        found.append(before + ("the " if before else "The ") + prompt[start:])
    last = prompt.split()[-1:]
    return [one for one in dict.fromkeys(found) if one.split()[-1:] == last][:2]


def noise(
    study,
    queries,
    *,
    t,
    n,
    seed,
    **spec,
):
    """How far KN sets that should be one differ: the `agreement` of 3 sets, a row a sampled query
    and kind.

    "quadrature": the query by three rules of the integral; "variants": the query and two
    near-identical wordings; "neighbours": the same facts' queries, to compare. Sampled are queries
    of which two such wordings can be made; where there are none, others, without that kind."""
    wordings = pd.Series(
        map(variants, queries["prompt"], queries["subject"]),
        queries.index,
    )
    near = queries[wordings.map(len) == GROUP - 1]
    rows = sample_queries(near if len(near) else queries, n, seed)
    by_rule = []
    for rule in RULES:
        again = spec | {"rule": rule, "steps": STEPS}
        other = again != spec  # than the run's own
        found = localise_again(study, rows, f"noise {rule}", **again) if other else rows
        by_rule.append(found)
    kinds = {"quadrature": pd.concat(by_rule)}
    if len(near):
        worded = localise_again(study, rows.assign(prompts=wordings), "noise wording", **spec)
        kinds["variants"] = pd.concat([rows, worded])
    kinds["neighbours"] = queries[queries["fact"].isin(rows["fact"])]
    every = pd.concat(kinds, names=["kind"])
    names = ["fact", "relation", "kind"]
    found = []
    for keys, group in every.groupby(names, sort=False):
        found.append(dict(zip(names, keys)) | agreement(kn_sets(group, t)))
    return pd.DataFrame(found)


def precision(
    study,
    queries,
    *,
    t,
    n,
    seed,
    **spec,
):
    """Jaccard of the KN sets of sampled queries in two precisions of the model, a row a query; and
    by how much P(answer) differs; in the run's own they are known."""
    rows = sample_queries(queries, n, seed)
    keys = ["fact", "relation", "prompt"]
    found = []
    for dtype in DTYPES:
        frame = rows
        if f"torch.{dtype}" != str(study.lm().dtype):
            other = study.beside(study.model, dtype=dtype)
            frame = localise_again(other, rows, dtype, **spec)
        found.append(frame.assign(kn=kn_sets(frame, t))[[*keys, "kn", "probability"]])
    both = found[0].merge(found[1], on=keys, suffixes=("", "_other"))
    both["pair"] = " and ".join(DTYPES)
    both["jaccard"] = [jaccard(*sets, empty=np.nan) for sets in zip(both["kn"], both["kn_other"])]
    both["change"] = (both["probability_other"] - both["probability"]).abs()
    return both[[*keys, "pair", "jaccard", "change"]]
