"""Fewer evaluations for the same integral: `python tests/benchmarks/bench_rules.py [queries]`.

For every bundled model and method: the KN sets (t = 0.2) of some queries by each rule against those of 100 Gauss-Legendre
nodes, and the rule's time against the paper's rule (20 steps, right ends), measured in turn. The same for the time of one
query at GPT-2-small's shape.
"""

import sys
import time

import numpy as np
import torch
from bench_attribution import SHAPES, NoTokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from qlutils import knowledge_neurons, load_facts, load_model
from qlutils.attribution import METHODS, Spec, attribute_encoded
from qlutils.models import BUNDLED, LanguageModel

RULES = (("right", 20), ("midpoint", 20), ("gauss", 20), ("gauss", 8), ("gauss", 6), ("auto", 6))


def clock(lm, queries, spec, repeats):
    names, best = ["query"] * len(queries), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        scores = attribute_encoded(lm, queries, spec, names).scores
        best = min(best, time.perf_counter() - start)
    return scores, best


def main(count=60):
    facts = load_facts("demo", facts_per_relation=2)
    pairs = [(prompt, fact.object) for fact in facts for prompt in fact.prompts]
    print(f"threads {torch.get_num_threads()}; Jaccard index with the converged set, mean and 5th percentile; time of the "
          "paper's rule over the rule's")
    for name in BUNDLED:
        lm = load_model(name, device="cpu")
        for method in METHODS:
            some = np.random.default_rng(0).permutation(len(pairs))[:int(count) // (4 if method == "sig" else 1)]
            queries = [lm.encode(*pairs[i]) for i in some]
            exact = knowledge_neurons(clock(lm, queries, Spec(method, 100, "gauss"), 1)[0])
            base, line = None, []
            for rule, steps in RULES:
                scores, seconds = clock(lm, queries, Spec(method, steps, rule), 2)
                base = base or seconds
                same = [len(a & b) / len(a | b) for a, b in zip(knowledge_neurons(scores), exact) if a | b]
                line.append(f"{rule} {steps}: {np.mean(same):.3f} {np.percentile(same, 5):.2f} {base / seconds:.2f}x")
            print(f"{name:11} {method:4} n = {len(queries):2}  " + "   ".join(line), flush=True)
    torch.manual_seed(0)
    lm = LanguageModel(AutoModelForCausalLM.from_config(GPT2Config(**SHAPES["gpt2"])), NoTokenizer(), "gpt2-shape")
    query = torch.randint(0, 50257, (12,)).tolist(), [5]
    seconds = {rule: clock(lm, [query], Spec("ig", steps, rule), 4)[1] for rule, steps in RULES[::5]}
    print(f"one query at GPT-2-small's shape, random weights: right 20 {seconds['right']:.3f} s, auto 6 "
          f"{seconds['auto']:.3f} s, {seconds['right'] / seconds['auto']:.2f}x")


if __name__ == "__main__":
    main(*sys.argv[1:])
