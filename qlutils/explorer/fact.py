"""One fact under the microscope: what the model answers, which neurons it uses, and what happens
when they change.

Plain functions that return tables and figures, and a script that repeats what they show;
`explorer.page` makes HTML and widgets of them and computes nothing itself. Prompts are called q0,
q1, ...
"""

import re
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from jinja2 import Template
from matplotlib.figure import Figure

from qlutils.attribution.attribute import Spec
from qlutils.change.editing import edit_weights
from qlutils.change.rows import score_queries
from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.change.synapses import column_scores, find_synapses, scale_synapses
from qlutils.checks import one_of
from qlutils.experiments.localize import activations, localise_unit
from qlutils.facts import Fact, check_filled
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.passes import computing
from qlutils.neurons.cas import cas_neurons
from qlutils.neurons.sets import check_kept, consistency, kn_sets, neighbour_sets
from qlutils.paths import packaged
from qlutils.show.plots import WIDE
from qlutils.study.identity import code_versions, differing, model_content
from qlutils.study.notebook import Study
from qlutils.study.results import saved_frame

FACTORS = {"suppress": 0.0, "enhance": 2.0}  # section 3.1
ACTIONS = (*FACTORS, "erase", "update", "none")  # "none": to see what synapses do by themselves
TYPED = "typed"  # the relation of facts that were typed in


# --- a fact and its view --------------------------------------------------------------------------


@dataclass
class View:
    """A fact as one model sees it by one method. `frame`: a row a prompt, as in a run's `queries`;
    `predictions` as of the function; `attention`: (tokens, shares) a prompt, shares None where the
    attention cannot be read; `activations` (Q, L, N) at the last prompt token; `source`: where the
    scores come from; `spec`: further options of `attribute`."""

    lm: object
    fact: Fact
    method: str
    frame: pd.DataFrame
    predictions: pd.DataFrame
    attention: list
    activations: np.ndarray
    source: str
    spec: dict

    def sets(self, t):
        """The KN set of each prompt at threshold `t` (0.05 to 1)."""
        return kn_sets(self.frame, t)

    def kns(self, t):
        """A row a prompt and neuron whose score is kept: prompt (0, 1, ...), layer, neuron, score,
        `share` of the prompt's largest, and `kn`, whether it is a KN at threshold `t`."""
        lists = ["layer", "neuron", "score"]
        rows = self.frame[lists].rename_axis("prompt").explode(lists).dropna().reset_index()
        rows = rows.astype({"layer": int, "neuron": int, "score": float})
        largest = rows.groupby("prompt")["score"].transform("max")
        check_kept(t)
        return rows.assign(share=rows["score"] / largest, kn=rows["score"] > t * largest)


def find_fact(facts, fact=None):
    """The fact of this id; without one, what a newcomer sees first. ValueError for another id."""
    ids = {one.id: one for one in facts}
    if fact is None:
        return ids.get("P36|France|Paris", facts[0])
    if fact not in ids:
        raise ValueError(
            f"fact {fact!r} is not in the data; a fact's id is relation|subject|object, such as "
            f"{facts[0].id}"
        )
    return ids[fact]


def typed_fact(prompts, answer):
    """A fact from typed text, one prompt a line. ValueError: no prompt, or no answer."""
    lines = map(str.strip, prompts.splitlines())
    answer = answer.strip()
    distinct = tuple(dict.fromkeys(filter(None, lines)))
    if not distinct:
        raise ValueError("type at least one prompt, one a line: what leads up to the answer")
    for prompt in distinct:
        check_filled(prompt)
    if not answer:
        raise ValueError("type the answer that should follow the prompts")
    return Fact(TYPED, "your prompts", answer, distinct)


def _study(model, method, data, output):
    return Study(
        "explore_fact",
        model=model,
        method=method,
        data=data,
        output=output,
    )


def saved_spec(model, method, data="demo", output="default"):
    """The fields of `qlutils.Spec` with which notebook 01 localised what it saved in run `output`;
    {} where nothing is saved."""
    return _study(model, method, data, output).localisation()


def saved_queries(model, method, data="demo", output="default", **spec):
    """What notebook 01 saved in run `output` for this very model, method and `qlutils.Spec`, or
    None. `spec`: what is saved may be by another rule than the default, see `saved_spec`."""
    study = _study(model, method, data, output)
    if differing(study.localisation(), asdict(Spec(method, **spec))):
        return None
    ours = {
        "content": model_content(model),
        "code": code_versions(),
        "dtype": None,
    }
    return saved_frame(study.results / "queries.parquet", ours)


def look(lm, fact, method="ig", saved=None, **spec):
    """The view of a fact: its scores from `saved` where it has the fact with these prompts, else
    computed now.

    ValueError, with its prompt, for a query that cannot be read."""
    source = "read from a saved run"
    frame = pd.DataFrame(columns=["fact", "prompt"]) if saved is None else saved
    frame = frame[frame["fact"] == fact.id].reset_index(drop=True)
    if tuple(frame["prompt"]) != fact.prompts:
        source = "computed now"
        frame = localise_unit(lm, [asdict(fact)], method=method, **spec)
        for reason in frame["left_out"].dropna():
            raise ValueError(reason)
    tokens = [lm.encode_prompt(prompt) for prompt in fact.prompts]
    return View(
        lm,
        fact,
        method,
        frame,
        predictions(lm, fact.prompts, fact.object),
        [attention_received(lm, prompt) for prompt in fact.prompts],
        np.stack(activations(lm, tokens)),
        source,
        spec,
    )


def _words(lm, tokens):
    """The text of each token."""
    return [lm.tokenizer.decode([int(token)]) for token in tokens]


@torch.no_grad()
def next_token(lm, prompt):
    """(V,) probabilities of the token after `prompt`."""
    ids = torch.tensor([lm.encode_prompt(prompt)], device=lm.device)
    with computing(lm):
        last = lm.logits(ids)[0, -1]
    return torch.softmax(last.to(lm.score_dtype), -1).cpu()


def predictions(lm, prompts, answer):
    """A row a prompt: `probability` of the whole answer; `known`, whether greedy decoding gives it;
    the answer's `first_token` and its `rank` (1: the likeliest next token); `runners_up`, the four
    likeliest others as (token, probability)."""
    encoded = [lm.encode(prompt, answer) for prompt in prompts]
    scores = score_queries(lm, encoded)
    rows = []
    for prompt, (_, target) in zip(prompts, encoded):
        first = target[0]
        p = next_token(lm, prompt)
        rank = int((p > p[first]).sum()) + 1
        p[first] = -1  # the answer is no runner-up
        best = p.topk(4)
        word, *words = _words(lm, [first, *best.indices])
        rows.append((word, rank, list(zip(words, best.values.tolist()))))
    table = pd.DataFrame(rows, columns=["first_token", "rank", "runners_up"])
    return table.assign(known=scores.exact, probability=np.exp(scores.log_probability))


def attention_received(lm, prompt):
    """The tokens of a prompt and each one's share of all attention, over layers, heads and
    attending tokens (sum 1); None instead of the shares where this model's attention cannot be
    read."""
    ids = lm.encode_prompt(prompt)
    tokens = _words(lm, ids)
    try:
        [(total, _)] = column_scores(lm, [ids])  # (L, H, T)
    except UnsupportedModel:
        return tokens, None
    return tokens, total.mean((0, 1)) / len(ids)


# --- neurons: tables ------------------------------------------------------------------------------


def kn_table(view, t):
    """The neurons that are KNs of a prompt, most shared first: layer, neuron, n (prompts), prompts,
    and `score`, the largest share of a prompt's largest score."""
    rows = view.kns(t).query("kn")
    rows["prompt"] = "q" + rows["prompt"].astype(str)
    table = rows.groupby(["layer", "neuron"], as_index=False).agg(
        n=("prompt", "size"),
        prompts=("prompt", " ".join),
        score=("share", "max"),
    )
    most_shared = ["n", "score"]  # of neurons in order
    return table.sort_values(most_shared, ascending=False, kind="stable", ignore_index=True)


def agreement(view, t):
    """CS1, CS2, mean Jaccard (NaN with one prompt), size of the union and the number of KNs of each
    prompt."""
    sets = view.sets(t)
    found = dict.fromkeys(("cs1", "cs2", "jaccard"), np.nan)
    if len(sets) > 1:
        found = asdict(consistency(sets))
    return found | {"union": len(set().union(*sets)), "sizes": list(map(len, sets))}


def choose_neurons(view, t, which, prompt=0, picked=""):
    """The neurons to change, by name: "self", "union", "intersection", "refine" (Eq. 3, of prompt
    `prompt`), "cas" (Eq. 7), or "picked", read from text such as "3:17, 4:2"."""
    if which == "picked":
        return parse_neurons(view.lm, picked)
    if which == "cas":
        return cas_neurons(view.frame.iloc[0])
    sets = view.sets(t)
    return sets[prompt] if which == "self" else neighbour_sets(sets, prompt)[which]


def parse_neurons(lm, text):
    """{(layer, neuron)} of text such as "3:17, 4:2"; ValueError for anything else or a neuron
    outside the model."""
    parts = text.replace(",", " ").split()
    if not parts or not all(re.fullmatch(r"\d+:\d+", part) for part in parts):
        raise ValueError(f"neurons are written layer:neuron, such as 3:17, 4:2; got {text!r}")
    return set(lm.check_neurons([tuple(map(int, part.split(":"))) for part in parts]))


@torch.no_grad()
def neuron_tokens(lm, neuron):
    """What a neuron writes towards the output: the eight tokens its value vector promotes
    and suppresses most.

    The score is the plain dot product of the value vector with each token's unembedding vector,
    without the final normalisation, so only its order and sign mean something; a neuron whose
    activation is negative does the reverse."""
    [(layer, index)] = lm.check_neurons([neuron])
    value = lm.value_vectors(layer)[index]
    weight = lm.arch.head.weight  # (d,), (V, d)
    if weight.shape[1] != len(value):
        raise ValueError(
            f"{lm.name} projects its residual stream before the unembedding: value vectors have "
            f"no tokens"
        )
    score = (weight.to(lm.score_dtype) @ value.to(lm.score_dtype)).cpu()  # (V,)
    shown = {}
    for name in ("promotes", "suppresses"):
        best = score.topk(8, largest=name == "promotes")
        shown[name] = _words(lm, best.indices)
        shown[f"{name}_score"] = best.values.numpy()
    return pd.DataFrame(shown)


def neuron_activations(view, neuron, t):
    """A row a prompt: a neuron's activation at the last token, its score as a share of the prompt's
    largest (0 where it is below what is kept), and whether it is a KN."""
    [(layer, index)] = view.lm.check_neurons([neuron])
    rows = view.kns(t).query("layer == @layer and neuron == @index").set_index("prompt")
    prompts = [f"q{i} {text}" for i, text in enumerate(view.fact.prompts)]
    table = rows[["share", "kn"]].astype(float).reindex(range(len(prompts)), fill_value=0)
    active = view.activations[:, layer, index].astype(float)
    return table.astype({"kn": bool}).assign(prompt=prompts, activation=active)


def facts_using(saved, neuron, t, but=""):
    """Facts of a saved run with the neuron among their KNs, by the number of prompts that have it;
    not fact `but`."""
    kn = [tuple(neuron) in one for one in kn_sets(saved, t)]
    table = saved.assign(kn=kn).groupby("fact", as_index=False)
    table = table.agg(n=("kn", "sum"), of=("kn", "size")).query("n > 0 and fact != @but")
    return table.sort_values("n", ascending=False, kind="stable", ignore_index=True)


# --- neurons: figures -----------------------------------------------------------------------------


def kn_map(view, t, neuron=None):
    """Layer by neuron: a dot for each KN, larger for a larger share of the top score, coloured by
    how many prompts have it; `neuron` is ringed."""
    table = kn_table(view, t).iloc[::-1]
    prompts = len(view.fact.prompts)
    layers = view.lm.num_layers
    neurons = view.lm.num_neurons
    fig = Figure(figsize=(WIDE, 0.7 + 0.19 * min(layers, 16)))
    ax = fig.subplots()
    dots = ax.scatter(
        table["neuron"],
        table["layer"],
        s=6 + 50 * table["score"],
        c=table["n"],
        cmap="viridis_r",
        vmin=0.5,
        vmax=prompts + 0.5,
        clip_on=False,
    )
    if neuron is not None:
        layer, index = neuron
        ax.plot(index, layer, "o", markersize=10, fillstyle="none", color="#D55E00")
    ax.set(
        xlabel="neuron",
        xlim=(-0.01 * neurons, 1.01 * neurons),
        ylabel="layer",
        ylim=(-0.5, layers - 0.5),
    )
    ax.set_title(f"{len(table)} knowledge neurons of {prompts} prompts, t = {t:.2f}", loc="left")
    bar = fig.colorbar(dots, label="prompts that share it", pad=0.01)
    for one in (ax, bar.ax):
        one.yaxis.get_major_locator().set_params(integer=True)
    return fig


def overlap_figure(view, t, most=14):
    """How many neurons exactly these prompts share: a bar for each combination, largest first (an
    UpSet plot)."""
    sizes = agreement(view, t)["sizes"]
    counts = kn_table(view, t)["prompts"].value_counts()
    fig = Figure(figsize=(WIDE, 1.5 + 0.14 * len(sizes)))
    bars, dots = fig.subplots(2, 1, sharex=True, height_ratios=[7, 1.2 * len(sizes)])
    colors = {len(sizes): "#D55E00", 1: "0.65"}  # by how many prompts share them
    shown = counts.head(most)
    dots.plot(*np.indices((len(shown), len(sizes))), "o", color="0.88", markersize=3.5)
    for x, (names, count) in enumerate(shown.items()):
        prompts = [int(name[1:]) for name in names.split()]
        color = colors.get(len(prompts), "#0072B2")
        bars.bar_label(bars.bar(x, count, color=color, width=0.7), fontsize=6.5, padding=1)
        dots.plot(
            [x] * len(prompts),
            prompts,
            "o-",
            color=color,
            markersize=4,
            linewidth=1.2,
        )
    hidden = len(counts) - len(shown)
    more = f" ({hidden} more combinations not shown)" if hidden else ""
    bars.set_title(f"grey: in one prompt only; blue: shared; orange: in all{more}", loc="left")
    bars.margins(y=0.2)
    bars.yaxis.get_major_locator().set_params(integer=True)
    bars.set(ylabel="neurons", xlim=(-0.6, max(1, len(shown)) - 0.4))
    dots.set_yticks(range(len(sizes)), [f"q{i}: {size} KNs" for i, size in enumerate(sizes)])
    dots.set(ylim=(len(sizes) - 0.5, -0.5), xticks=[])
    dots.tick_params(axis="y", length=0)
    dots.spines[["left", "bottom"]].set_visible(False)
    return fig


# --- changes --------------------------------------------------------------------------------------


def control_facts(lm, facts, fact):
    """Facts to watch beside `fact`: one of the same relation, where there is one, and one of
    another, of other subject and object. Of a seeded sample, the first whose first prompt the model
    answers, else the first readable."""
    found = []
    rng = np.random.default_rng(0)
    others = [
        one
        for one in facts
        if one.subject != fact.subject and one.object.casefold() != fact.object.casefold()
    ]
    for name, same in {"same relation": True, "other relation": False}.items():
        pool = [one for one in others if (one.relation == fact.relation) == same]
        readable = []
        encoded = []
        for i in rng.permutation(len(pool))[:12]:
            with suppress(ValueError):
                encoded.append(lm.encode(pool[i].prompts[0], pool[i].object))
                readable.append(pool[i])
        if readable:
            known = score_queries(lm, encoded).exact
            found.append((name, readable[known.argmax()]))  # the first, where none is known
    return found


def change(
    view,
    neurons,
    action,
    controls=(),
    *,
    new="",
    synapses=1.0,
    prompt=0,
):
    """What a change does to every prompt of the fact and to the first prompt of each control fact;
    the model is as before afterwards.

    action: one of ACTIONS; "update" writes `new` in place of the answer. synapses: the attention
    columns that are knowledge synapses of prompt `prompt` are multiplied by it (1: left alone).
    Columns: role, prompt, answer, `before`, `after` (probability of the answer), `change`
    (relative; NaN where before is 0), `top_before`, `top_after` (likeliest next token) and, for an
    update, `new_before`, `new_after`."""
    one_of("action", action, ACTIONS)
    if action == "update" and not new.strip():
        raise ValueError("an update needs a new answer; type the one the model should give instead")
    lm = view.lm
    frame = _watched(view.fact, controls)

    def measure(when):
        prompts = frame["prompt"]
        frame[when] = answer_probability(lm, prompts, frame["answer"]).double().numpy()
        if action == "update":
            news = answer_probability(lm, prompts, [new] * len(prompts))
            frame[f"new_{when}"] = news.double().numpy()
        top = [next_token(lm, prompt).argmax() for prompt in prompts]
        frame[f"top_{when}"] = _words(lm, top)

    measure("before")
    with ExitStack() as changed:
        for one in _changes(view, neurons, action, new, synapses, prompt):
            changed.enter_context(one)
        measure("after")
    before = frame["before"].where(frame["before"] > 0)
    return frame.assign(change=(frame["after"] - before) / before)


def losses(effects, prompt=0):
    """The relative loss of the answer's probability in a table of `change`: mean, least, most (a
    gain is a negative loss), and n, the prompts for which it is defined: of prompt `prompt`, the
    fact's other prompts, the controls."""
    role = effects["role"]
    of = role.mask(role != f"q{prompt}", "other wordings")
    of = of.mask(role.str.startswith("control"), "controls").rename("of")
    loss = -effects["change"]
    groups = loss.groupby(of, sort=False)
    return groups.agg(loss="mean", least="min", most="max", n="count").reset_index()


def _watched(fact, controls):
    """The prompts that a change is measured on: role, prompt and answer of each."""
    rows = [(f"q{i}", text, fact.object) for i, text in enumerate(fact.prompts)]
    rows += [(f"control: {name}", other.prompts[0], other.object) for name, other in controls]
    return pd.DataFrame(rows, columns=["role", "prompt", "answer"])


def _changes(view, neurons, action, new, synapses, prompt):
    """The changes of synapses and of neurons, to be entered."""
    lm = view.lm
    asked = view.fact.prompts[prompt]
    if synapses != 1:
        yield scale_synapses(lm, find_synapses(lm, asked), synapses)
    if action in FACTORS:
        yield scale_neurons(lm, neurons, FACTORS[action])
    elif action == "erase":
        yield edit_weights(lm, neurons, action)
    elif action == "update":
        answers = [lm.encode(asked, text)[1] for text in (view.fact.object, new)]
        yield edit_weights(lm, neurons, action, old=answers[0], new=answers[1])


# trim_blocks: a line that only holds a tag leaves no empty line
_SCRIPT = Template(packaged("explorer/script.jinja"), trim_blocks=True)


def as_code(
    view,
    t,
    which="self",
    action="suppress",
    controls=(),
    *,
    picked="",
    new="",
    synapses=1.0,
    prompt=0,
):
    """A script over the package's public names that computes what the explorer shows: `sets`,
    `neurons`, `before` and `after`, the probabilities of `change`, in its order."""
    watched = _watched(view.fact, controls)
    return _SCRIPT.render(
        view=view,
        queries=list(zip(watched["prompt"], watched["answer"])),
        t=t,
        which=which,
        picked=parse_neurons(view.lm, picked) if which == "picked" else set(),
        action=action,
        factors=FACTORS,
        new=new.strip(),
        synapses=synapses,
        prompt=prompt,
        repr=repr,
    )
