"""One fact's edits, made in the weights, to be read in notebooks 03 and 07."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qlutils.change.editing import edit_weights
from qlutils.change.rows import score_queries
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.kn_modification import tokenised_facts

TOKENS = 12  # of a text


@dataclass
class WorkedExample:
    """What the edits of one fact change.

    answers, a row an edit and query: op, neurons, n_neurons; prompt; asked: "q_i", "rephrasing" or
    "unrelated"; object, that an operation is about (of the fact's own queries); p_before, p_after,
    its probability (of unrelated queries the unedited answer's); answer_before, answer_after, the
    greedy answers; changed.
    texts: what the model writes after q_i."""

    answers: pd.DataFrame
    texts: pd.DataFrame


def worked_example(lm, plan, **options):
    """Erase and update one planned fact by each of its sets, in the weights, and ask its own and
    its locality queries before and after. options: those of `edit_weights`."""
    [fact] = tokenised_facts(lm, [plan], ("erase", "update"))
    objects = dict(old=fact.answer("erase"), new=fact.answer("update"))
    own = pd.DataFrame(dict(prompt=plan["prompts"], asked="rephrasing"))
    own.loc[plan["query"], "asked"] = "q_i"
    others = [query["prompt"] for query in plan["locality"]]
    unrelated = pd.DataFrame(dict(prompt=others, asked="unrelated"))
    answers, texts = [], []
    for op, targets in fact.targets.items():
        goal = plan["object" if op == "erase" else "new_object"]
        asked = pd.concat([own.assign(object=goal), unrelated], ignore_index=True)
        before, text = _replies(lm, fact, targets)
        if not texts:
            texts.append(dict(op="none", neurons="", text=text))
        for edit in plan["edits"]:
            with edit_weights(lm, edit["set"], op, **objects, **options):
                after, text = _replies(lm, fact, targets)
            keys = dict(op=PAPER_OP[op], neurons=edit["neurons"])
            part = asked.assign(**keys, n_neurons=len(edit["set"]))
            part = part.join(before.add_suffix("_before")).join(after.add_suffix("_after"))
            answers.append(part)
            texts.append(keys | {"text": text})
    answers = pd.concat(answers, ignore_index=True)
    answers["changed"] = answers["answer_before"] != answers["answer_after"]
    return WorkedExample(answers, pd.DataFrame(texts))


def _replies(lm, fact, targets):
    """Of a fact's `targets` and locality queries the probability p of the answer and as many greedy
    tokens, as text; and TOKENS tokens after q_i."""
    queries = targets + fact.locality
    scores = score_queries(lm, queries)
    begun = [_begun(*one) for one in zip(scores.greedy, queries)]
    place = fact.plan["query"]
    prompts = [prompt for prompt, _ in queries + [targets[place]]]
    lengths = [len(answer) for _, answer in queries] + [TOKENS]
    said = []
    for ids in greedy_answers(lm, prompts, lengths, begun + [begun[place]]):
        said.append(lm.tokenizer.decode(ids, skip_special_tokens=True).strip())
    p = np.exp(scores.log_probability)
    return pd.DataFrame(dict(p=p, answer=said[:-1])), said[-1]


def _begun(greedy, query):
    """Of the greedy tokens after each part of an answer those that greedy decoding gives: up to the
    first that is not the answer's."""
    _, answer = query
    for count, (token, own) in enumerate(zip(greedy, answer), 1):
        if token != own:
            return greedy[:count]
    return greedy


def example_table(example):
    """A row a prompt of the fact and operation: the answer, and P of the operation's object."""
    own = example.answers[example.answers["asked"] != "unrelated"].copy()
    own["prompt"] += np.where(
        own["asked"] == "q_i",
        "  ← q_i",
        "",
    )
    for when in ("before", "after"):
        own[when] = [
            f"{answer}; P({goal}) = {p:.2f}"
            for answer, goal, p in zip(
                own[f"answer_{when}"],
                own["object"],
                own[f"p_{when}"],
            )
        ]
    wide = own.pivot(
        index=["op", "object", "prompt", "before"],
        columns="neurons",
        values="after",
    )
    wide = wide[list(dict.fromkeys(own["neurons"]))]
    return wide.reset_index("before").rename_axis(columns=None)
