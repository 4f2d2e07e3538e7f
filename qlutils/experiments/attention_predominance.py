"""Notebook 05: which token attention settles on (Eq. 4)."""

import pandas as pd

from qlutils.change.synapses import column_scores, first_tokens
from qlutils.experiments.effects import each_query
from qlutils.facts import prompt_tokens


def attend(lm, unit):
    """Where each query of a unit (see `effects.units`) attends: one row a query.

    fact, relation, prompt_index; tokens, their number T; token_id_first and first_share, the first
    token and the share of all attention that it gets; column, token, token_id and share of the most
    attended token (Eq. 4, with columns), and `at`, the characters before it; the same without the
    first tokens (`_rest`, see `synapses.first_tokens`)."""
    rows = [about for _, _, about in each_query(unit)]
    encoded = [lm.encode_prompt(fact["prompts"][i]) for fact, i, _ in each_query(unit)]
    decode = lm.tokenizer.decode
    starts = {"": 0, "_rest": first_tokens(lm)}
    for row, ids, (total, _) in zip(rows, encoded, column_scores(lm, encoded)):
        share = total.mean((0, 1)) / len(ids)  # (T,) from (L, H, T)
        row |= {
            "tokens": len(ids),
            "token_id_first": ids[0],
            "first_share": share[0],
        }
        for name, first in starts.items():
            column = first + int(share[first:].argmax())
            row |= {
                f"column{name}": column,
                f"token{name}": decode([ids[column]]),
                f"at{name}": len(decode(ids[:column], skip_special_tokens=True)),
                f"token_id{name}": ids[column],
                f"share{name}": share[column],
            }
    return pd.DataFrame(rows)


def _passes(lm, fact, config):
    return sum(map(prompt_tokens, fact["prompts"]))


attend.VERSION = 1
attend.passes = _passes
