"""Notebook 05: which token attention settles on (Eq. 4)."""

import pandas as pd

from qlutils.change.synapses import column_scores, first_tokens
from qlutils.facts import prompt_tokens


def attend(lm, unit):
    """Where each query of a unit (see `effects.units`) attends: one row a query.

    fact, relation, prompt_index; tokens, their number T; token_id_first and first_share, the first
    token and the share of all attention that it gets; column, token, token_id and share of the most
    attended token (Eq. 4, with columns), and `at`, the characters before it; the same without the
    first tokens (`_rest`, see `synapses.first_tokens`)."""
    rows = []
    encoded = []
    for fact in unit:
        for place, prompt in zip(fact["prompt_index"], fact["prompts"]):
            row = {
                "fact": fact["fact"],
                "relation": fact["relation"],
                "prompt_index": place,
            }
            rows.append(row)
            encoded.append(lm.encode_prompt(prompt))
    found = column_scores(lm, encoded)
    for row, ids, (total, _) in zip(rows, encoded, found):
        share = total.mean((0, 1)) / len(ids)  # (T,) from (L, H, T)
        row["tokens"] = len(ids)
        row["token_id_first"] = ids[0]
        row["first_share"] = share[0]
        starts = {"": 0, "_rest": first_tokens(lm)}
        for name, first in starts.items():
            column = first + int(share[first:].argmax())
            before = lm.tokenizer.decode(ids[:column], skip_special_tokens=True)
            row[f"column{name}"] = column
            row[f"token{name}"] = lm.tokenizer.decode([ids[column]])
            row[f"at{name}"] = len(before)
            row[f"token_id{name}"] = ids[column]
            row[f"share{name}"] = share[column]
    return pd.DataFrame(rows)


def _passes(lm, fact, config):
    return sum(map(prompt_tokens, fact["prompts"]))


attend.VERSION = 1
attend.passes = _passes
