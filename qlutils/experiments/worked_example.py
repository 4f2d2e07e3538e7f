"""One fact's edits, made in the weights, to be read in notebooks 03 and 07."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qlutils.change.editing import edit_weights
from qlutils.change.rows import score_queries
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.kn_modification import asked_of, objects_of

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
    asked, _ = asked_of(lm, [plan])
    asked["asked"] = asked["kind"].replace("neighbour", "rephrasing")
    answers = []
    texts = []
    for op, rows in asked[asked["kind"] != "text"].groupby("op", sort=False):
        objects = objects_of(lm, plan, op)
        before, text = _replies(lm, rows)
        if not texts:
            texts.append({"op": "none", "neurons": "", "text": text})
        for edit in plan["edits"]:
            with edit_weights(lm, edit["set"], op, **objects, **options):
                after, text = _replies(lm, rows)
            keys = {
                "op": PAPER_OP[op],
                "neurons": edit["neurons"],
            }
            texts.append(keys | {"text": text})
            part = rows[["prompt", "asked"]].assign(
                **keys,
                n_neurons=len(edit["set"]),
                object=rows["object"].mask(rows["kind"] == "unrelated"),
            )
            part = part.join(before.add_suffix("_before"))
            answers.append(part.join(after.add_suffix("_after")))
    answers = pd.concat(answers, ignore_index=True)
    answers["changed"] = answers["answer_before"] != answers["answer_after"]
    return WorkedExample(answers, pd.DataFrame(texts))


def _replies(lm, rows):
    """Of the queries in `rows` the probability p of the answer and as many greedy tokens, as text;
    and TOKENS tokens after q_i."""
    queries = rows["query"]
    scores = score_queries(lm, queries.tolist())
    [begin] = queries[rows["kind"] == "q_i"].str[0]
    prompts = [*queries.str[0], begin]
    lengths = [*queries.str[1].str.len(), TOKENS]
    said = [
        lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in greedy_answers(lm, prompts, lengths)
    ]
    replies = {
        "p": np.exp(scores.log_probability),
        "answer": said[:-1],
    }
    return pd.DataFrame(replies, rows.index), said[-1]


def example_table(example):
    """A row a prompt of the fact and operation: the answer, and P of the operation's object."""
    own = example.answers[example.answers["asked"] != "unrelated"].copy()
    own["prompt"] += np.where(own["asked"] == "q_i", "  ← q_i", "")
    for when in ("before", "after"):
        cells = zip(own[f"answer_{when}"], own["object"], own[f"p_{when}"])
        own[when] = [f"{answer}; P({goal}) = {p:.2f}" for answer, goal, p in cells]
    wide = own.pivot(
        index=["op", "object", "prompt", "before"],
        columns="neurons",
        values="after",
    )
    wide = wide[own["neurons"].unique()]
    return wide.reset_index("before").rename_axis(columns=None)
