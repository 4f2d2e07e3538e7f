"""Which rule finds the converged knowledge neurons: `python tests/benchmarks/bench_rules.py
[options]`.

For each model and method: the KN sets (t = 0.2) of queries that the model answers and of queries
that it does not, by each rule against Clenshaw-Curtis with 257 nodes (after alpha = u**3); the
gradients a layer and baseline that it took; its time over that of the paper's rule, measured in
turn. ParaRel's queries with `--data pararel` (or a folder), else the bundled facts.
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch

from qlutils import knowledge_neurons, load_facts, load_model
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change.rows import score_queries
from qlutils.checks import METHODS

REFERENCE = 257  # nodes of "clenshaw" that stand for the exact integral
RULES = (
    Spec(rule="right", steps=20),
    Spec(rule="midpoint", steps=20),
    Spec(rule="gauss", steps=16),
    Spec(rule="converged", tolerance=0.05),
)


def sample(lm, facts, count, seed=0):
    """`count` queries that the model answers and as many others, tokenised; drawn with a seed."""
    pairs = [(prompt, fact.object) for fact in facts for prompt in fact.prompts]
    order = np.random.default_rng(seed).permutation(len(pairs))
    answered, other = [], []
    for start in range(0, len(order), 128):
        some = []
        for place in order[start : start + 128]:
            try:
                some.append(lm.encode(*pairs[place]))
            except ValueError:  # not a continuation of its prompt
                continue
        for query, known in zip(some, score_queries(lm, some).exact):
            (answered if known else other).append(query)
        if min(len(answered), len(other)) >= count:
            break
    return answered[:count], other[:count]


def measure(lm, queries, spec):
    """KN sets, scores, and what one call took."""
    start = time.perf_counter()
    found = attribute_encoded(lm, queries, spec, ["query"] * len(queries))
    return found, knowledge_neurons(found.scores), time.perf_counter() - start


def rows(lm, name, method, kind, queries):
    """One row a rule."""
    exact, wanted, _ = measure(lm, queries, Spec(method, REFERENCE, "clenshaw"))
    largest = exact.scores.flatten(1).amax(1)
    gap = float((exact.completeness_gap.amax(1) / largest).median()) if method == "ig" else np.nan
    table, base = [], None
    for rule in RULES:
        spec = Spec(method, rule.steps, rule.rule, tolerance=rule.tolerance)
        found, sets, seconds = measure(lm, queries, spec)
        base = base or seconds
        same = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(sets, wanted)]
        settled = np.nan if found.converged is None else float(found.converged.float().mean())
        table.append(
            {
                "model": name,
                "method": method,
                "queries": kind,
                "n": len(queries),
                "rule": rule.rule if settled == settled else f"{rule.rule} {rule.steps}",
                "evaluations": float(found.evaluations.mean()),
                "Jaccard": np.mean(same),
                "5th percentile": np.percentile(same, 5),
                "converged": settled,
                "time / paper's rule": seconds / base,
                "gap of the reference": gap,
            }
        )
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo/gpt2", "demo/llama2", "demo/llama3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--queries", type=int, default=40, help="of either kind; a quarter for sig")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    facts = load_facts(args.data, facts_per_relation=20)
    print(f"{args.device}, threads {torch.get_num_threads()}, float32")
    for name in args.models:
        lm = load_model(name, device=args.device)
        for method in args.methods:
            count = max(1, args.queries // 4) if method == "sig" else args.queries
            for kind, queries in zip(("answered", "other"), sample(lm, facts, count)):
                if queries:
                    table = pd.DataFrame(rows(lm, name, method, kind, queries))
                    print(table.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
