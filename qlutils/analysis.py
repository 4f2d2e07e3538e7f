"""From the `queries` frames of a run to the paper's tables of consistency: Tables 1, 4 and 5, Figures 3, 8 and 9."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .neurons import classify, fact_table, otsu_threshold
from .stats import bootstrap_mean, welch
from .tables import paper_value

METHOD_NAMES = {"ig": "Dai et al.", "sig": "Enguehard", "amig": "Chen et al."}


def classified_facts(queries: pd.DataFrame, t: float = 0.2, static: float = 0.1) -> pd.DataFrame:
    """`neurons.fact_table` with a class a threshold: `class_static` and `class_otsu`, and the thresholds themselves.

    "I" above the threshold, "II" at or below it, None where CS2 is undefined (no query of the fact has a KN) and for
    facts of exactly two prompts (`two_prompts`), whose CS2 is CS1: they are counted and shown apart."""
    facts = fact_table(queries, t)
    facts["two_prompts"] = facts["n_queries"] == 2
    usable = facts["cs2"].where(~facts["two_prompts"])
    facts["threshold_static"], facts["threshold_otsu"] = static, otsu_threshold(usable)
    for name in ("static", "otsu"):
        facts[f"class_{name}"] = classify(usable, facts[f"threshold_{name}"].iloc[0])
    return facts


def with_classes(queries: pd.DataFrame, t: float = 0.2, static: float = 0.1) -> pd.DataFrame:
    """`queries` with its fact's cs2, class_static and class_otsu beside every query."""
    facts = classified_facts(queries, t, static)
    return queries.merge(facts[["fact", "cs2", "class_static", "class_otsu"]], on="fact", how="left")


def table_1(facts: dict[str, pd.DataFrame], model: str, seed: int = 0) -> pd.DataFrame:
    """Table 1 of one model: a row a method and threshold, from `classified_facts` of each method.

    R is a class's share of the classified facts, S its mean CS2 with a 95 % interval (bootstrap over facts within
    relation); t, df, p and Cohen's d are Welch's, between the classes' CS2. The paper's value stands in columns
    ending in `_paper`, for the paper's models."""
    rows = []
    for threshold in ("static", "otsu"):
        both = common_class_two(facts, threshold)
        for method, frame in facts.items():
            classes = frame[f"class_{threshold}"]
            row = {"threshold": threshold, "method": method, "at": frame[f"threshold_{threshold}"].iloc[0],
                   "n": int(classes.notna().sum())}
            for name in ("I", "II"):
                part = frame[classes == name]
                estimate = bootstrap_mean(part, "cs2", seed=seed)
                row[f"R_{name}"] = len(part) / row["n"] if row["n"] else np.nan
                row[f"R_{name}_paper"] = paper_value(1, model, f"ratio_{name}", threshold=threshold, method=method)
                row |= {f"n_{name}": len(part), f"S_{name}": estimate.mean, f"S_{name}_low": estimate.mean_low,
                        f"S_{name}_high": estimate.mean_high,
                        f"S_{name}_paper": paper_value(1, model, f"cs_{name}", threshold=threshold, method=method)}
            test = welch(frame["cs2"][classes == "I"], frame["cs2"][classes == "II"])
            row |= {"t": test.t, "t_paper": paper_value(1, model, "t", threshold=threshold, method=method),
                    "df": test.df, "p": test.p, "d": test.d, "cap_II": both,
                    "cap_II_paper": paper_value(1, model, "cap_II", threshold=threshold, method=method)}
            rows.append(row)
    return _without_empty_paper_columns(pd.DataFrame(rows))


def common_class_two(facts: dict[str, pd.DataFrame], threshold: str) -> float:
    """cap:II, the share of facts that every one of the three methods puts into K_II; NaN while a method is missing."""
    if set(facts) != set(METHOD_NAMES):
        return np.nan
    classes = pd.concat([frame.set_index("fact")[f"class_{threshold}"] for frame in facts.values()], axis=1)
    classes = classes.dropna()
    return float((classes == "II").all(axis=1).mean()) if len(classes) else np.nan


def table_4(facts: dict[str, pd.DataFrame], model: str) -> pd.DataFrame:
    """Table 4: the thresholds on CS2 behind Table 1, with the paper's."""
    return pd.DataFrame([
        {"threshold": threshold, "method": method, "value": frame[f"threshold_{threshold}"].iloc[0],
         "value_paper": paper_value(4, model, "threshold_value", threshold=threshold, method=method)}
        for threshold in ("static", "otsu") for method, frame in facts.items()
    ]).pipe(_without_empty_paper_columns)


def _without_empty_paper_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of the paper's values are dropped where the paper has none; ours stay, undefined or not."""
    return frame.drop(columns=[c for c in frame if c.endswith("_paper") and frame[c].isna().all()])


def table_5(queries: pd.DataFrame) -> pd.DataFrame:
    """Table 5: one example query and answer a relation, the first of the data in use."""
    return queries.groupby("relation", sort=False).first().reset_index()[["relation", "prompt", "object"]].rename(
        columns={"prompt": "example query", "object": "answer"})


def consistency_summary(facts: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """What CS2 alone does not show, a row a method: CS1, CS2, mean pairwise Jaccard, CS2 at three prompts, set sizes,
    mean layer, each a mean over facts with its 95 % interval; and how many facts have no defined CS2."""
    columns = ("cs1", "cs2", "jaccard", "cs2_3", "mean_size", "union_size", "mean_layer")
    rows = []
    for method, frame in facts.items():
        row = {"method": method, "n": int(frame["cs2"].notna().sum()), "n_undefined": int(frame["cs2"].isna().sum()),
               "n_two_prompts": int(frame["two_prompts"].sum())}
        for column in columns:
            row |= {k: v for k, v in bootstrap_mean(frame, column, seed=seed).row("mean", column).items() if k != "n"}
        rows.append(row)
    return pd.DataFrame(rows)


def threshold_sensitivity(queries: pd.DataFrame, t_values=(0.1, 0.2, 0.3, 0.4, 0.5),
                          static_values=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5)) -> pd.DataFrame:
    """Mean CS2 and the share of K_II over the KN threshold t and the static class threshold, a row a pair."""
    rows = []
    for t in t_values:
        cs2 = fact_table(queries, t)["cs2"].dropna()
        rows += [{"t": t, "static": static, "cs2": cs2.mean(), "R_II": (cs2 <= static).mean() if len(cs2) else np.nan,
                  "n": len(cs2)} for static in static_values]
    return pd.DataFrame(rows)
