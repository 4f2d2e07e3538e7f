"""One fact under the microscope: what the model answers, which neurons it uses, and what happens
when they change.

Plain functions that return tables and figures, and a script that repeats what they show;
`explorer_page` makes HTML and widgets of them and computes nothing itself. Prompts are called q0,
q1, ...
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from qlutils.attribution.attribute import Spec
from qlutils.change.editing import edit_weights
from qlutils.change.rows import score_queries
from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.change.synapses import column_scores, find_synapses, scale_synapses
from qlutils.experiments.localize import localise_unit
from qlutils.facts import Fact
from qlutils.files import as_frame, read_table
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.passes import computing, neuron_vectors
from qlutils.neurons.sets import cas_neurons, consistency, kn_sets, neighbour_sets
from qlutils.show import plots
from qlutils.study.identity import code_versions, model_content
from qlutils.study.notebook import Study

FACTORS = {"suppress": 0.0, "enhance": 2.0}  # section 3.1
ACTIONS = (
    *FACTORS,
    "erase",
    "update",
    "none",
)  # "none" leaves the neurons alone, to see the synapses' effect
SETS = ("self", "union", "intersection", "refine", "cas", "picked")
TYPED = "typed"  # the relation of facts that were typed in


# --- a fact and its view --------------------------------------------------------------------------


@dataclass
class View:
    """A fact as one model sees it by one method. `frame`: a row a prompt, as in a run's `queries`;
    `predictions` as of the function; `attention`: (tokens, shares) a prompt, shares None where the
    attention cannot be read; `activations` (Q, L, N) at the last prompt token; `source`: where the
    scores come from."""

    lm: object
    fact: Fact
    method: str
    frame: pd.DataFrame
    predictions: pd.DataFrame
    attention: list
    activations: np.ndarray
    source: str
    spec: dict

    def sets(self, t: float) -> list[set]:
        """The KN set of each prompt at threshold `t` (0.05 to 1)."""
        return kn_sets(self.frame, t)

    def shares(self) -> list[dict]:
        """For each prompt {(layer, neuron): its score as a share of the prompt's largest}, of the
        neurons kept."""
        return [
            dict(
                zip(zip(row.layer, row.neuron), np.asarray(row.score) / max(row.score, default=1.0))
            )
            for row in self.frame.itertuples()
        ]


def typed_fact(prompts: str, answer: str) -> Fact:
    """A fact from typed text, one prompt a line. ValueError: no prompt, or no answer."""
    lines = list(dict.fromkeys(line.strip() for line in prompts.splitlines() if line.strip()))
    if not lines:
        raise ValueError(
            "type at least one prompt, one a line: the text that leads up to the answer"
        )
    if not answer.strip():
        raise ValueError("type the answer that should follow the prompts")
    return Fact(TYPED, "your prompts", answer.strip(), tuple(lines))


def saved_queries(
    model: str, method: str, data="demo", output="default", **spec
) -> pd.DataFrame | None:
    """What notebook 01 saved in run `output` for this very model, method and `attribution.Spec`, or
    None."""
    path = (
        Study("explore_fact", model=model, method=method, data=data, output=output).results
        / "queries.parquet"
    )
    table, made = read_table(path) if path.exists() else (None, None)
    if table is None or made["inputs"]["content"] != model_content(model):
        return None
    if made["inputs"].get("code") != code_versions():
        return None
    wanted = asdict(Spec(method=method, **spec)).items()
    same = made["inputs"]["dtype"] is None and dict(wanted) | made["localisation"] == dict(wanted)
    return as_frame([table]) if same else None


def look(lm, fact: Fact, method="ig", saved: pd.DataFrame | None = None, **spec) -> View:
    """The view of a fact: its scores from `saved` where it has the fact with these prompts, else
    computed now.

    ValueError, with its prompt, for a query that cannot be read."""
    frame, source = None, "read from a saved run"
    if saved is not None:
        frame = saved[saved["fact"] == fact.id].reset_index(drop=True)
    if frame is None or tuple(frame["prompt"]) != fact.prompts:
        frame, source = localise_unit(lm, [asdict(fact)], method=method, **spec), "computed now"
        if frame["left_out"].notna().any():
            raise ValueError(frame["left_out"].dropna().iloc[0])
    ids = [lm.encode_prompt(prompt) for prompt in fact.prompts]
    activations = torch.cat(
        [neuron_vectors(lm, torch.tensor([one], device=lm.device)) for one in ids]
    )
    return View(
        lm,
        fact,
        method,
        frame,
        predictions(lm, fact.prompts, fact.object),
        [attention_received(lm, prompt) for prompt in fact.prompts],
        activations.float().cpu().numpy(),
        source,
        spec,
    )


@torch.no_grad()
def next_token(lm, prompt: str) -> torch.Tensor:
    """(V,) probabilities of the token after `prompt`."""
    ids = torch.tensor([lm.encode_prompt(prompt)], device=lm.device)
    with computing(lm):
        logits = lm.model(input_ids=ids, use_cache=False).logits
    return torch.softmax(logits[0, -1].to(lm.score_dtype), -1).cpu()


def predictions(lm, prompts, answer: str, top: int = 4) -> pd.DataFrame:
    """A row a prompt: `probability` of the whole answer; `known`, whether greedy decoding gives it;
    the answer's `first_token` and its `rank` (1: the likeliest next token); `runners_up`, the `top`
    likeliest others as (token, probability)."""
    encoded = [lm.encode(prompt, answer) for prompt in prompts]
    scores, rows = score_queries(lm, encoded), []
    for row, (prompt, (_, target)) in enumerate(zip(prompts, encoded)):
        p = next_token(lm, prompt)
        best = [i for i in p.topk(min(top + 1, len(p))).indices.tolist() if i != target[0]][:top]
        rows.append(
            dict(
                prompt=prompt,
                known=bool(scores.exact[row]),
                probability=float(np.exp(scores.log_probability[row])),
                first_token=lm.tokenizer.decode([target[0]]),
                rank=int((p > p[target[0]]).sum()) + 1,
                runners_up=[(lm.tokenizer.decode([i]), float(p[i])) for i in best],
            )
        )
    return pd.DataFrame(rows)


def attention_received(lm, prompt: str) -> tuple[list[str], np.ndarray | None]:
    """The tokens of a prompt and each one's share of all attention, over layers, heads and
    attending tokens (sum 1); None instead of the shares where this model's attention cannot be
    read."""
    ids = lm.encode_prompt(prompt)
    tokens = [lm.tokenizer.decode([i]) for i in ids]
    try:
        [(total, _)] = column_scores(lm, [ids])
    except UnsupportedModel:
        return tokens, None
    return tokens, total.mean((0, 1)) / len(ids)


# --- neurons: tables ------------------------------------------------------------------------------


def kn_table(view: View, t: float) -> pd.DataFrame:
    """The neurons that are KNs of a prompt, most shared first: layer, neuron, n (prompts), prompts,
    and `score`, the largest share of a prompt's largest score."""
    sets, shares, rows = view.sets(t), view.shares(), []
    for neuron in set().union(*sets):
        where = [i for i, one in enumerate(sets) if neuron in one]
        rows.append(
            (
                *neuron,
                len(where),
                " ".join(f"q{i}" for i in where),
                max(shares[i][neuron] for i in where),
            )
        )
    frame = pd.DataFrame(rows, columns=["layer", "neuron", "n", "prompts", "score"]).astype(
        dict(layer=int, neuron=int, n=int, score=float)
    )
    return frame.sort_values(
        ["n", "score", "layer", "neuron"], ascending=[False, False, True, True], ignore_index=True
    )


def agreement(view: View, t: float) -> dict:
    """CS1, CS2, mean Jaccard (NaN with one prompt), size of the union and the number of KNs of each
    prompt."""
    sets = view.sets(t)
    result = consistency(sets) if len(sets) > 1 else None
    return dict(
        {name: getattr(result, name, np.nan) for name in ("cs1", "cs2", "jaccard")},
        union=len(set().union(*sets)),
        sizes=[len(one) for one in sets],
    )


def choose_neurons(view: View, t: float, which: str, prompt: int = 0, picked: str = "") -> set:
    """The neurons to change, by name: "self", "union", "intersection", "refine" (Eq. 3, of prompt
    `prompt`), "cas" (Eq. 7), or "picked", read from text such as "3:17, 4:2"."""
    sets = view.sets(t)
    if which == "picked":
        return parse_neurons(view.lm, picked)
    if which == "cas":
        return cas_neurons(view.frame.iloc[0])
    if which == "self":
        return sets[prompt]
    if which not in SETS:
        raise ValueError(f"set {which!r} is unknown; use one of {', '.join(SETS)}")
    if len(sets) < 2:
        raise ValueError(
            f"{which} is made of a fact's other prompts, and there is only one prompt; add another"
        )
    return neighbour_sets(sets, prompt)[which]


def parse_neurons(lm, text: str) -> set:
    """{(layer, neuron)} of text such as "3:17, 4:2"; ValueError for anything else or a neuron
    outside the model."""
    pairs = [part.split(":") for part in text.replace(",", " ").split()]
    if not pairs or not all(len(pair) == 2 and all(n.isdecimal() for n in pair) for pair in pairs):
        raise ValueError(
            f"neurons are written layer:neuron, such as 3:17, 4:2, counted from 0; got {text!r}"
        )
    return set(lm.check_neurons([(int(layer), int(index)) for layer, index in pairs]))


@torch.no_grad()
def neuron_tokens(lm, neuron, top: int = 8) -> pd.DataFrame:
    """What a neuron writes towards the output: `top` tokens its value vector promotes and
    suppresses most.

    The score is the plain dot product of the value vector with each token's unembedding vector,
    without the final normalisation, so only its order and sign mean something; a neuron whose
    activation is negative does the reverse."""
    [(layer, index)] = lm.check_neurons([neuron])
    value, weight = lm.value_vectors(layer)[index], lm.arch.head.weight
    if (
        weight.shape[1] != value.shape[0]
    ):  # a projection stands between the last layer and the unembedding
        raise ValueError(
            f"{lm.name} projects its residual stream before the unembedding: value vectors have "
            f"no tokens"
        )
    score = (weight.to(lm.score_dtype) @ value.to(lm.score_dtype)).cpu()
    shown = {}
    for name, sign in (("promotes", 1), ("suppresses", -1)):
        best = (sign * score).topk(top)
        shown[name] = [lm.tokenizer.decode([i]) for i in best.indices.tolist()]
        shown[f"{name}_score"] = sign * best.values.numpy()
    return pd.DataFrame(shown)


def neuron_activations(view: View, neuron, t: float) -> pd.DataFrame:
    """A row a prompt: a neuron's activation at the last token, its score as a share of the prompt's
    largest (0 where it is below what is kept), and whether it is a KN."""
    [(layer, index)] = view.lm.check_neurons([neuron])
    return pd.DataFrame(
        [
            dict(
                prompt=f"q{i} {prompt}",
                activation=float(view.activations[i, layer, index]),
                share=float(shares.get((layer, index), 0.0)),
                kn=(layer, index) in one,
            )
            for i, (prompt, shares, one) in enumerate(
                zip(view.fact.prompts, view.shares(), view.sets(t))
            )
        ]
    )


def facts_using(saved: pd.DataFrame | None, neuron, t: float, but: str = "") -> pd.DataFrame:
    """Facts of a saved run with the neuron among their KNs, by the number of prompts that have it;
    not fact `but`."""
    if saved is None:
        return pd.DataFrame(columns=["fact", "n", "of"])
    uses = saved[["fact"]].assign(n=[tuple(neuron) in one for one in kn_sets(saved, t)])
    table = uses.groupby("fact", sort=False)["n"].agg(n="sum", of="size").reset_index()
    table = table[(table["n"] > 0) & (table["fact"] != but)]
    return table.sort_values(["n", "fact"], ascending=[False, True], ignore_index=True)


# --- neurons: figures -----------------------------------------------------------------------------


def kn_map(view: View, t: float, neuron=None) -> Figure:
    """Layer by neuron: a dot for each KN, larger for a larger share of the top score, coloured by
    how many prompts have it; `neuron` is ringed."""
    table, q, layers = kn_table(view, t).iloc[::-1], len(view.fact.prompts), view.lm.num_layers
    fig = Figure(figsize=(plots.WIDE, 0.7 + 0.19 * min(layers, 16)))
    ax = fig.subplots()
    dots = ax.scatter(
        table["neuron"],
        table["layer"],
        s=6 + 50 * table["score"],
        c=table["n"],
        cmap="viridis_r",
        vmin=0.5,
        vmax=q + 0.5,
        linewidths=0.3,
        edgecolors="white",
        clip_on=False,
        zorder=3,
    )
    if neuron is not None:
        ax.scatter(
            [neuron[1]],
            [neuron[0]],
            s=110,
            facecolors="none",
            edgecolors="#D55E00",
            linewidths=1.4,
            zorder=4,
        )
    ax.set(
        xlim=(-0.01 * view.lm.num_neurons, 1.01 * view.lm.num_neurons),
        ylim=(-0.5, layers - 0.5),
        xlabel="neuron",
        ylabel="layer",
    )
    ax.grid(axis="y", linewidth=0.3, color="0.85")
    ax.set_title(f"{len(table)} knowledge neurons of {q} prompts, t = {t:.2f}", loc="left")
    bar = fig.colorbar(dots, ax=ax, label="prompts that share it", pad=0.01)
    for axis in (ax.yaxis, bar.ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return fig


def overlap_figure(view: View, t: float, most: int = 14) -> Figure:
    """How many neurons exactly these prompts share: a bar for each combination, largest first (an
    UpSet plot)."""
    sets = view.sets(t)
    counts = Counter(
        frozenset(i for i, one in enumerate(sets) if neuron in one) for neuron in set().union(*sets)
    )
    shown = sorted(counts.items(), key=lambda item: (-item[1], -len(item[0]), sorted(item[0])))[
        :most
    ]
    colors = [
        "#D55E00" if len(who) == len(sets) > 1 else "#0072B2" if len(who) > 1 else "0.65"
        for who, _ in shown
    ]
    fig = Figure(figsize=(plots.WIDE, 1.5 + 0.14 * len(sets)))
    bars, dots = fig.subplots(2, 1, sharex=True, height_ratios=[7, 1.2 * len(sets)])
    bars.bar_label(
        bars.bar(range(len(shown)), [n for _, n in shown], color=colors, width=0.7),
        fontsize=6,
        padding=1,
    )
    bars.margins(y=0.2)
    bars.yaxis.get_major_locator().set_params(integer=True)
    bars.set(ylabel="neurons", xlim=(-0.6, max(len(shown), 1) - 0.4))
    hidden = len(counts) - len(shown)
    bars.set_title(
        "grey: in one prompt only; blue: shared; orange: in every prompt"
        + (f" ({hidden} more combinations not shown)" if hidden else ""),
        loc="left",
    )
    for x, (who, _) in enumerate(shown):
        dots.plot([x] * len(sets), range(len(sets)), "o", color="0.88", markersize=3.5)
        dots.plot([x] * len(who), sorted(who), "o-", color=colors[x], markersize=4, linewidth=1.2)
    dots.set_yticks(range(len(sets)), [f"q{i}: {len(one)} KNs" for i, one in enumerate(sets)])
    dots.set(ylim=(len(sets) - 0.5, -0.5), xticks=[])
    dots.tick_params(axis="y", length=0)
    dots.spines[["left", "bottom"]].set_visible(False)
    return fig


# --- changes --------------------------------------------------------------------------------------


def control_facts(lm, facts, fact: Fact) -> list[tuple[str, Fact]]:
    """Facts to watch beside `fact`: one of the same relation, where there is one, and one of
    another, of other subject and object. Of a seeded sample, the first whose first prompt the model
    answers, else the first readable."""
    found, rng = [], np.random.default_rng(0)
    for name, same in (("same relation", True), ("other relation", False)):
        pool = [
            f
            for f in facts
            if (f.relation == fact.relation) == same
            and f.subject != fact.subject
            and f.object.casefold() != fact.object.casefold()
        ]
        readable = []
        for other in (pool[i] for i in rng.permutation(len(pool))[:12]):
            with suppress(ValueError):
                readable.append((other, lm.encode(other.prompts[0], other.object)))
        known = score_queries(lm, [encoded for _, encoded in readable]).exact if readable else []
        best = [other for (other, _), right in zip(readable, known) if right] or [
            other for other, _ in readable
        ]
        found += [(name, other) for other in best[:1]]
    return found


def change(
    view: View,
    neurons,
    action: str,
    controls=(),
    *,
    new: str = "",
    synapses: float = 1.0,
    prompt: int = 0,
) -> pd.DataFrame:
    """What a change does to every prompt of the fact and to the first prompt of each control fact.

    action: one of ACTIONS; "update" writes `new` in place of the answer. synapses: the attention
    columns that are knowledge synapses of prompt `prompt` are multiplied by it (1: left alone). The
    model is as before afterwards.
    Columns: role, prompt, answer, `before`, `after` (probability of the answer), `change`
    (relative; NaN where before is 0), `top_before`, `top_after` (likeliest next token) and, for an
    update, `new_before`, `new_after`."""
    lm, fact = view.lm, view.fact
    if action not in ACTIONS:
        raise ValueError(f"action {action!r} is unknown; use one of {', '.join(ACTIONS)}")
    if action == "update" and not new.strip():
        raise ValueError("an update needs a new answer; type the one the model should give instead")
    rows = [(f"q{i}", text, fact.object) for i, text in enumerate(fact.prompts)]
    rows += [(f"control: {name}", other.prompts[0], other.object) for name, other in controls]
    prompts, answers = [text for _, text, _ in rows], [answer for *_, answer in rows]

    def measure():
        got = {"": answer_probability(lm, prompts, answers).numpy().astype(float)}
        if action == "update":
            got["new_"] = (
                answer_probability(lm, prompts, [new] * len(prompts)).numpy().astype(float)
            )
        got["top_"] = [
            lm.tokenizer.decode([int(next_token(lm, text).argmax())]) for text in prompts
        ]
        return got

    before = measure()
    with ExitStack() as stack:
        if synapses != 1:
            stack.enter_context(
                scale_synapses(lm, find_synapses(lm, fact.prompts[prompt]), synapses)
            )
        if action in FACTORS:
            stack.enter_context(scale_neurons(lm, neurons, FACTORS[action]))
        elif action != "none":
            written = {"old": fact.object, "new": new} if action == "update" else {}
            asked = fact.prompts[prompt]
            words = {name: lm.encode(asked, text)[1] for name, text in written.items()}
            stack.enter_context(edit_weights(lm, neurons, action, **words))
        after = measure()
    frame = pd.DataFrame(rows, columns=["role", "prompt", "answer"])
    for name in before:
        frame[f"{name}before"], frame[f"{name}after"] = before[name], after[name]
    frame["change"] = (frame["after"] - frame["before"]) / frame["before"].where(
        frame["before"] > 0
    )
    return frame


def as_code(
    view: View,
    t: float,
    which="self",
    action="suppress",
    controls=(),
    *,
    picked="",
    new="",
    synapses=1.0,
    prompt=0,
) -> str:
    """A script over the package's public names that computes what the explorer shows: `sets`,
    `neurons`, `before` and `after`, the probabilities of `change`, in its order."""
    fact, extra = view.fact, "".join(f", {name}={value!r}" for name, value in view.spec.items())
    shown = [(text, fact.object) for text in fact.prompts] + [
        (other.prompts[0], other.object) for _, other in controls
    ]
    neurons = {
        "self": f"sets[{prompt}]",
        "cas": "cas_neurons(cas_candidates(scores))",
        "picked": repr(parse_neurons(view.lm, picked)) if which == "picked" else "",
    }.get(which, f"neighbour_sets(sets, {prompt})[{which!r}]")
    contexts = [f"scale_synapses(lm, find_synapses(lm, prompts[{prompt}]), {synapses!r})"] * (
        synapses != 1
    )
    words = ", ".join(
        f"{name}=lm.encode(prompts[{prompt}], {text})[1]"
        for name, text in (("old", "answer"), ("new", repr(new.strip())))
    )
    contexts += {
        "erase": ["edit_weights(lm, neurons, 'erase')"],
        "none": [],
        "update": [f"edit_weights(lm, neurons, 'update', {words})"],
    }.get(action, [f"scale_neurons(lm, neurons, {FACTORS.get(action)!r})"])
    measured = {"": "answer_probability(lm, *zip(*queries))"}
    if action == "update":
        measured["_new"] = (
            f"answer_probability(lm, list(zip(*queries))[0], [{new.strip()!r}] * len(queries))"
        )
    measure = lambda when, margin: "".join(  # noqa: E731
        f"{margin}{when}{name} = {call}\n" for name, call in measured.items()
    )
    change = (f"with {', '.join(contexts)}:\n" if contexts else "") + measure(
        "after", "    " if contexts else ""
    )
    used = ["attribute", "answer_probability", "knowledge_neurons", "load_model"] + [
        name
        for name in ("edit_weights", "find_synapses", "scale_neurons", "scale_synapses")
        if name in change
    ]
    inner = [
        name for name in ("cas_candidates", "cas_neurons", "neighbour_sets") if name in neurons
    ] + ["consistency"]
    lines = "".join(f"    {pair!r},\n" for pair in shown)
    return f"""from qlutils import {", ".join(sorted(used))}
from qlutils.neurons.sets import {", ".join(sorted(inner))}

lm = load_model({view.lm.name!r})
queries = [  # the fact's prompts, then one prompt of each control fact
{lines}]
prompts, answer = [prompt for prompt, _ in queries[:{len(fact.prompts)}]], {fact.object!r}
scores = attribute(lm, prompts, [answer] * len(prompts), method={view.method!r}{extra}).scores
sets = knowledge_neurons(scores, t={t!r})
if len(sets) > 1:
    print(consistency(sets))
neurons = {neurons}

{measure("before", "")}{change}for (prompt, expected), p, q in zip(queries, before.tolist(), after.tolist()):
    print(f"{{p:.3f}} -> {{q:.3f}}  {{prompt}} {{expected}}")
"""


def explore(model="demo/gpt2", method="ig", data="demo", fact=None, output="default", t=0.2):
    """The explorer as a widget, for JupyterLab and VS Code; see `explorer_page.Page`.

    fact: id of the first fact, such as "P36|France|Paris" (that one, or the data's first, by
    default). output: the run whose saved scores are used before any are computed. Without a front
    end, as under papermill, nothing is built and a line says so."""
    if not has_front_end():
        print(
            "The explorer is a widget: run this notebook in JupyterLab or VS Code. A fixed "
            "example is below."
        )
        return None
    from qlutils.explorer.page import Page

    return Page(model, method, data, fact, output, t)


def has_front_end() -> bool:
    """Whether this kernel was started by something that shows widgets: a Jupyter server, VS Code,
    or Colab."""
    known = "JPY_SESSION_NAME" in os.environ or any(
        name.startswith(("VSCODE_", "COLAB_")) for name in os.environ
    )
    return (
        known and "QLUTILS_PROGRESS" not in os.environ
    )  # the study's driver, wherever it was started
