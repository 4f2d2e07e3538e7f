"""The explorer's page: pieces of HTML (escaped), and `Page`, stock ipywidgets around the functions
of `explorer`."""

from __future__ import annotations

import io
from contextlib import contextmanager
from html import escape

import ipywidgets as w
import numpy as np

from qlutils.explorer import fact as ex
from qlutils.facts import load_facts
from qlutils.model.language_model import BUNDLED
from qlutils.neurons.sets import STORE_THRESHOLD
from qlutils.study import store
from qlutils.checks import METHODS

# Black on white in every theme, because the figures are.
_STYLE = "background:#fff;color:#1a1a1a;padding:6px 10px;border-radius:4px;font-size:13px;line-height:1.45;"
_CELL = "padding:4px 10px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid #e6e6e6;"
_MUTED = "color:#666;"


# --- HTML -----------------------------------------------------------------------------------------


def table_html(head, rows, note: str = "", width="none") -> str:
    """A table of cells that are HTML already; `head` and `note`, at most `width` wide, are plain
    text."""
    top = "".join(
        f'<th style="{_CELL}{_MUTED}font-weight:600">{escape(name)}</th>' for name in head
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    below = (
        f'<div style="{_MUTED}margin-top:4px;max-width:{width}">{escape(note)}</div>'
        if note
        else ""
    )
    return f'<div style="{_STYLE}"><table style="border-collapse:collapse"><tr>{top}</tr>{body}</table>{below}</div>'


def _number(value, form=".3f", bar: str = "") -> str:
    """A number ("–" where it is undefined), and a bar that stays beside it."""
    text = "–" if np.isnan(value) else f"{value:{form}}".replace("-", "−")
    return f'<span style="white-space:nowrap;font-variant-numeric:tabular-nums">{text}{bar and " " + bar}</span>'


def _arrow(before, after) -> str:
    return f'<span style="white-space:nowrap">{before} → <b>{after}</b></span>'


def _token(token: str) -> str:
    shown = token.replace("\n", "⏎").replace(" ", "␣", 1) if token.strip() == "" else token.strip()
    return f'<code style="background:#f1f1f1;color:#1a1a1a;padding:0 3px;border-radius:3px">{escape(shown)}</code>'


def _bar(value: float, color: str, width: int = 90) -> str:
    """A horizontal bar for a share between 0 and 1."""
    box, share = "height:9px;border-radius:2px", min(max(value, 0), 1)
    return (
        f'<span style="display:inline-block;width:{width}px;background:#eee;{box}"><span '
        f'style="display:block;'
        f'width:{share * width:.1f}px;background:{color};{box}"></span></span>'
    )


def tokens_html(tokens, shares) -> str:
    """The tokens of a prompt, tinted by the attention they receive; by its root, as the first token
    may draw most of it and would leave the others white."""
    if shares is None:
        return escape("".join(tokens))
    top = max(shares) or 1.0
    return "".join(
        f'<span title="{share:.1%} of all attention" style="white-space:pre-wrap;padding:1px '
        f"0;border-radius:2px;"
        f'background:rgba(230,159,0,{0.85 * np.sqrt(share / top):.2f})">{escape(token)}</span>'
        for token, share in zip(tokens, shares)
    )


def prompts_html(view: ex.View) -> str:
    """Every prompt: known or not, probability and rank of the answer, runners-up, attention."""
    rows = []
    for place, (row, (tokens, shares)) in enumerate(
        zip(view.predictions.itertuples(), view.attention)
    ):
        known, color = ("✓ known", "#00795a") if row.known else ("✗ not known", "#b34700")
        others = " · ".join(
            f'<span style="white-space:nowrap;font-size:12px">{_token(token)} '
            f'<span style="{_MUTED}">{p:.3f}</span></span>'
            for token, p in row.runners_up[:3]
        )
        rows.append(
            [
                f"q{place}",
                tokens_html(tokens, shares),
                f'<b style="color:{color};white-space:nowrap">{known}</b>',
                _number(row.probability, bar=_bar(row.probability, "#009E73", 50)),
                _number(row.rank, "d"),
                others,
            ]
        )
    read = all(shares is not None for _, shares in view.attention)
    note = (
        f"Answer: {view.fact.object!r}. P: of the whole answer. Rank: of its first token "
        f"{view.predictions['first_token'].iloc[0]!r} among all next tokens. "
        + (
            "Tint: attention received, over all layers and heads (point at a token for its share)."
            if read
            else f"The attention of {view.lm.name} cannot be read, so tokens are not tinted."
        )
    )
    return table_html(["", "prompt", "answered?", "P(answer)", "rank", "runners-up"], rows, note)


def agreement_html(view: ex.View, t: float) -> str:
    """CS1, CS2 and sizes at threshold t."""
    result = ex.agreement(view, t)
    tiles = "".join(
        f'<div style="margin-right:28px"><div style="{_MUTED}">{name}</div><div '
        f'style="font-size:22px;font-weight:600">'
        f'{_number(result[key], form)}</div><div style="{_MUTED}font-size:11px">{what}</div></div>'
        for name, key, form, what in (
            ("CS₁", "cs1", ".2f", "in every prompt's set"),
            ("CS₂", "cs2", ".2f", "in more than one"),
            ("Jaccard", "jaccard", ".2f", "mean over pairs"),
            ("neurons", "union", "d", "in all sets together"),
        )
    )
    note = (
        ""
        if len(result["sizes"]) > 1
        else f'<div style="{_MUTED}">Agreement needs at least two prompts.</div>'
    )
    return f'<div style="{_STYLE}"><div style="display:flex">{tiles}</div>{note}</div>'


def kn_html(view: ex.View, t: float) -> str:
    """The most shared knowledge neurons."""
    table = ex.kn_table(view, t)
    rows = [
        [
            _number(r.layer, "d"),
            _number(r.neuron, "d"),
            f"{r.n}: {r.prompts}",
            _number(r.score, ".2f"),
        ]
        for r in table.head(12).itertuples()
    ]
    return table_html(
        ["layer", "neuron", "a KN of", "score"],
        rows,
        f"The {len(rows)} most shared of {len(table)}; "
        "score: largest share of a prompt's top score.",
    )


def neuron_html(view: ex.View, neuron, t: float, saved=None) -> str:
    """A neuron's page: activation on each prompt, tokens promoted and suppressed, other facts that
    use it."""
    active, used = (
        ex.neuron_activations(view, neuron, t),
        ex.facts_using(saved, neuron, t, but=view.fact.id),
    )
    top = active["activation"].abs().max() or 1.0
    parts = [
        table_html(
            ["prompt", "activation", "attribution / largest", "KN"],
            [
                [
                    escape(r.prompt),
                    _number(
                        r.activation,
                        bar=_bar(
                            abs(r.activation) / top,
                            "#0072B2" if r.activation >= 0 else "#D55E00",
                            60,
                        ),
                    ),
                    _number(r.share, ".2f") if r.share else f"below {STORE_THRESHOLD}",
                    "✓" if r.kn else "",
                ]
                for r in active.itertuples()
            ],
            "Orange bars: negative activations.",
        )
    ]
    parts.append(
        table_html(
            ["promotes", "", "suppresses", ""],
            [
                [
                    _token(r.promotes),
                    _number(r.promotes_score),
                    _token(r.suppresses),
                    _number(r.suppresses_score),
                ]
                for r in ex.neuron_tokens(view.lm, neuron).itertuples()
            ],
            "Dot product of the value vector with each token's unembedding, without the final "
            "normalisation. Where the "
            "activation is negative, the roles are exchanged.",
            "300px",
        )
    )
    rows = [[escape(r.fact), f"{r.n} of {r.of}"] for r in used.head(8).itertuples()]
    parts.append(
        table_html(
            ["other facts that use it", "prompts"] if rows else [],
            rows,
            "Other facts that use it are known once notebook 01 has run for this model and method."
            if saved is None
            else f"{len(used)} of the saved run's other facts have it among their KNs at t = "
            f"{t:.2f}.",
            "300px",
        )
    )
    return (
        f'<div style="{_STYLE}"><b>Layer {neuron[0]}, neuron {neuron[1]}</b><div '
        f'style="display:flex;'
        f'flex-wrap:wrap;gap:14px">{"".join(f"<div>{part}</div>" for part in parts)}</div></div>'
    )


def effects_html(frame, title: str = "") -> str:
    """Before and after of `explorer.change`: grey is before, colour after; controls stand below the
    fact's prompts."""
    rows, updated = [], "new_after" in frame
    for r in frame.to_dict("records"):
        control, role = r["role"].startswith("control"), escape(r["role"])
        rows.append(
            [
                f'<b style="color:#7a4b00;white-space:nowrap">{role}</b>' if control else role,
                f"{escape(r['prompt'])} <b>{escape(r['answer'])}</b>",
                f"{_bar(r['before'], '#aaa')}<br>{_bar(r['after'], '#E69F00' if control else '#0072B2')}",
                _arrow(f"{r['before']:.3f}", f"{r['after']:.3f}"),
                _number(r["change"], "+.1%"),
                _arrow(_token(r["top_before"]), _token(r["top_after"])),
            ]
        )
        if updated:
            rows[-1].append(_arrow(f"{r['new_before']:.3f}", f"{r['new_after']:.3f}"))
    head = ["", "prompt and answer", "", "P(answer)", "change", "likeliest next token"] + [
        "P(new answer)"
    ] * updated
    caption = (
        f'<div style="{_STYLE}font-weight:600;padding-bottom:0">{escape(title)}</div>'
        if title
        else ""
    )
    return caption + table_html(
        head,
        rows,
        "Before → after; grey bars: before. Controls are prompts of other facts, "
        "under the same change.",
    )


def png(figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# --- the page -------------------------------------------------------------------------------------

_SETS = {
    "self": "Self: this prompt's KNs",
    "union": "Union: of the other prompts",
    "intersection": "Intersection: in all others",
    "refine": "Refine: in several others",
    "cas": "CAS: consistency-aware",
    "picked": "hand-picked",
}
_SYNAPSES = {"left alone": 1.0, "off (× 0)": 0.0, "doubled (× 2)": 2.0}
_ACTIONS = {
    "suppress": ("Suppress", "Suppressed (× 0)"),
    "enhance": ("Enhance", "Enhanced (× 2)"),
    "erase": ("Erase", "Erased"),
    "update": ("Update", "Updated"),
    "none": ("Synapses alone", "Neurons left alone"),
}


class Page(w.VBox):
    """The explorer's widgets. Display it, or drive it from code: set a widget's value, click a
    button.

    Only Run computes scores; the slider selects among them. A problem is a line in `status`, never
    a traceback."""

    def __init__(
        self, model="demo/gpt2", method="ig", data="demo", fact=None, output="default", t=0.2
    ):
        super().__init__()
        self.data, self.output, self.view, self.saved, self.controls = data, output, None, None, []
        self.facts, self.views, self.effects, self.action, self.filling = (
            [],
            {},
            None,
            "suppress",
            False,
        )
        self._build(model, method, t)
        with self._in_place("Reading the facts …"):
            self.facts = load_facts(data)
            ids, examples = {one.id: one for one in self.facts}, {}
            for one in self.facts:
                examples.setdefault(one.relation, one.prompts[0].replace(one.subject, "…"))
            if fact is not None and fact not in ids:
                raise ValueError(
                    f"fact {fact!r} is not in {data!r}; a fact's id is relation|subject|object, "
                    f"such as {self.facts[0].id}"
                )
            first = ids[fact] if fact else ids.get("P36|France|Paris", self.facts[0])
            self.relation.options = [
                (f"{name}: {text[:48]}", name) for name, text in examples.items()
            ]
            self.relation.value = first.relation
            self._list_facts()
            self.fact.value = first.id
            self.prompts.value, self.answer.value = "\n".join(first.prompts[:3]), first.object
        if self.fact.value:
            self._run()

    # -- widgets -----------------------------------------------------------------------------------
    def _build(self, model, method, t):
        def make(
            kind, width, name="", label=None, **options
        ):  # width: in pixels, or "1 260": takes what room there is
            grow, _, least = str(width).rpartition(" ")
            layout = (
                w.Layout(width="auto", flex=f"{grow} 1 {least}px")
                if grow
                else w.Layout(width=f"{least}px")
            )
            return kind(
                description=name,
                layout=layout,
                **options,
                **({"style": {"description_width": f"{label}px"}} if label else {}),
            )

        def row(*widgets):  # each with a layout of its own, as some are hidden
            return w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center"))

        self.model = make(
            w.Combobox,
            "1 260",
            "Model",
            60,
            value=model,
            options=list(BUNDLED),
            placeholder="bundled name, Hugging Face id, or folder",
        )
        self.method = make(w.Dropdown, 150, "Method", 60, options=list(METHODS), value=method)
        self.source = w.ToggleButtons(
            options=[("a fact of the data", "data"), ("my own prompts", ex.TYPED)],
            style={"button_width": "140px"},
        )
        self.relation, self.fact = (
            make(w.Dropdown, "1 260", name, 60) for name in ("Relation", "Fact")
        )
        self.prompts = make(w.Textarea, "3 420", "Prompts", 60, placeholder="one a line", rows=4)
        self.answer = make(w.Text, "1 260", "Answer", 60)
        self.run = make(w.Button, 110, "Run", button_style="primary", icon="play")
        self.t = make(
            w.FloatSlider,
            420,
            "threshold t",
            80,
            value=t,
            min=STORE_THRESHOLD,
            max=0.95,
            step=0.05,
            readout_format=".2f",
        )
        picture = w.Layout(max_width="100%", width="900px", height="auto", object_fit="contain")
        self.map, self.overlap = (w.Image(format="png", layout=picture) for _ in range(2))
        (
            self.status,
            self.page_prompts,
            self.page_numbers,
            self.page_table,
            self.page_neuron,
            self.page_effects,
            self.set_size,
        ) = (w.HTML() for _ in range(7))
        self.neuron = make(w.Dropdown, 360, "neuron")
        self.other = make(
            w.Text, 220, "or another", placeholder="layer:neuron", continuous_update=False
        )
        self.pick = make(w.Button, 170, "add to hand-picked", icon="plus")
        self.prompt = make(w.Dropdown, "1 300", "of prompt")
        self.which = make(
            w.Dropdown, 300, "neurons", options=[(text, name) for name, text in _SETS.items()]
        )
        self.picked = make(
            w.Text, 300, "hand-picked", placeholder="3:17, 4:2", continuous_update=False
        )
        self.new = make(w.Text, 240, "new answer", placeholder="for update")
        self.synapses = make(w.Dropdown, 240, "synapses", options=list(_SYNAPSES.items()))
        self.buttons = {
            action: make(
                w.Button, 130, name, button_style="warning" if action in ex.FACTORS else ""
            )
            for action, (name, _) in _ACTIONS.items()
        }
        self.code = w.Textarea(rows=24, layout=w.Layout(width="100%"))

        self.of_data, self.of_user = row(self.relation, self.fact), row(self.prompts, self.answer)
        tabs = {
            "Prompts": [self.page_prompts],
            "Neurons": [self.page_numbers, self.map, self.overlap, self.page_table],
            "One neuron": [row(self.neuron, self.other, self.pick), self.page_neuron],
            "Change it": [
                row(self.which, self.prompt),
                row(self.picked, self.synapses, self.new),
                row(*self.buttons.values(), self.set_size),
                self.page_effects,
            ],
            "Copy as code": [
                w.HTML(
                    "<i>Select all and copy. It does what the page says: threshold, neurons, "
                    "synapses, and the button pressed last.</i>"
                ),
                self.code,
            ],
        }
        self.tabs = w.Tab([w.VBox(parts) for parts in tabs.values()], titles=tuple(tabs))
        self.children = [
            row(self.model, self.method, self.source),
            self.of_data,
            self.of_user,
            row(self.run, self.t, self.status),
            self.tabs,
        ]

        for one, act in ((self.relation, self._list_facts), (self.source, self._show_source)):
            one.observe(lambda _, act=act: act(), "value")
        for act, widgets in (
            (self._refresh, [self.t]),
            (self._show_neuron, [self.neuron, self.other]),
            (self._show_set, [self.which, self.prompt, self.picked, self.synapses, self.new]),
        ):
            for one in widgets:
                one.observe(lambda _, act=act: self._chosen_anew(act), "value")
        for button, act in ((self.run, self._run), (self.pick, self._add)):
            button.on_click(lambda _, act=act: act())
        for action, button in self.buttons.items():
            button.on_click(lambda _, action=action: self._change(action))
        self._show_source()

    # -- what happens ------------------------------------------------------------------------------
    @contextmanager
    def _in_place(self, doing: str = "…"):
        """Say what is being done, and what went wrong, in the status line; buttons rest
        meanwhile."""
        buttons = [self.run, self.pick, *self.buttons.values()]
        self._say(doing, "#666")
        for button in buttons:
            button.disabled = True
        try:
            yield
            if self.view:
                self._say(f"{self.view.fact.id}: scores {self.view.source}", "#00795a")
        except Exception as error:  # whatever it is, a reader gets a sentence
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._say(f"{name}{str(error) or 'no details'}"[:600], "#b00020")
        finally:
            for button in buttons:
                button.disabled = False

    def _say(self, text, color):
        self.status.value = f'<span style="color:{color};font-weight:600">{escape(text)}</span>'

    def _chosen_anew(self, act):
        """A reader has changed something: act, if there is anything to act on."""
        if self.view and not self.filling:
            with self._in_place():
                act()

    def _fill(self, dropdown, options, value):
        """Give a list other options, which is no choice of the reader's."""
        self.filling = True
        try:
            dropdown.options, dropdown.value = options, value
        finally:
            self.filling = False

    def _list_facts(self):
        self.fact.options = [
            (f"{one.subject} → {one.object}", one.id)
            for one in self.facts
            if one.relation == self.relation.value
        ]

    def _show_source(self):
        typed = self.source.value == ex.TYPED
        self.of_data.layout.display, self.of_user.layout.display = (
            ("none", "") if typed else ("", "none")
        )

    def _run(self):
        with self._in_place("Working: model, answers, scores …"):
            if self.source.value == ex.TYPED:
                fact = ex.typed_fact(self.prompts.value, self.answer.value)
            else:
                fact = next(f for f in self.facts if f.id == self.fact.value)
            key = self.model.value.strip(), self.method.value, fact
            if key not in self.views:
                lm = store.cached_model(key[0])
                saved = ex.saved_queries(lm.name, self.method.value, self.data, self.output)
                view = ex.look(lm, fact, self.method.value, saved)
                self.views = {
                    k: v for k, v in self.views.items() if v[0].lm is lm
                }  # one model in memory
                self.views[key] = view, saved, ex.control_facts(lm, self.facts, fact)
            self.view, self.saved, self.controls = self.views[key]
            self._fill(
                self.neuron, [], None
            )  # a new fact's page begins with its most shared neuron
            self.effects, self.page_effects.value = None, ""
            self.page_prompts.value = prompts_html(self.view)
            self._fill(self.prompt, [(f"q{i} {text}", i) for i, text in enumerate(fact.prompts)], 0)
            self._refresh()

    def _refresh(self):
        """Everything that depends on t, from the scores at hand."""
        t, table = self.t.value, ex.kn_table(self.view, self.t.value)
        self.page_numbers.value, self.page_table.value = (
            agreement_html(self.view, t),
            kn_html(self.view, t),
        )
        self.overlap.value = png(ex.overlap_figure(self.view, t))
        pairs = list(zip(table["layer"], table["neuron"]))
        names = [
            f"layer {l}, neuron {n}: KN of {k} prompts" for (l, n), k in zip(pairs, table["n"])
        ]
        self._fill(
            self.neuron,
            list(zip(names, pairs)),
            self.neuron.value if self.neuron.value in pairs else next(iter(pairs), None),
        )
        self._show_neuron()
        self._show_set()

    def _one(self):
        """The neuron of the page's third part: the one typed, else the one of the list, else
        None."""
        typed = self.other.value.strip()
        return min(ex.parse_neurons(self.view.lm, typed)) if typed else self.neuron.value

    def _show_neuron(self):
        neuron = self._one()
        self.map.value = png(ex.kn_map(self.view, self.t.value, neuron))
        self.page_neuron.value = (
            neuron_html(self.view, neuron, self.t.value, self.saved)
            if neuron
            else "No prompt has a knowledge neuron; name one to see its page."
        )

    def _add(self):
        with self._in_place():
            if not self.view or self._one() is None:
                raise ValueError("there is no knowledge neuron to add; name one as layer:neuron")
            layer, index = self._one()
            self.picked.value = ", ".join(
                filter(None, [self.picked.value.strip(" ,"), f"{layer}:{index}"])
            )
            self.which.value = "picked"

    def _neurons(self):
        return ex.choose_neurons(
            self.view, self.t.value, self.which.value, self.prompt.value, self.picked.value
        )

    def _show_set(self):
        """The size of the chosen set, and the script that does what is chosen."""
        empty = self.which.value == "picked" and not self.picked.value.strip()
        self.set_size.value = "&nbsp; " + (
            "type neurons, or add them from “One neuron”"
            if empty
            else f"{len(self._neurons())} neurons at t = {self.t.value:.2f}"
        )
        self.code.value = ex.as_code(
            self.view,
            self.t.value,
            "self" if empty else self.which.value,
            self.action,
            self.controls,
            picked=self.picked.value,
            new=self.new.value,
            synapses=self.synapses.value,
            prompt=self.prompt.value,
        )

    def _change(self, action):
        if not self.view:
            return
        with self._in_place("Working: before and after …"):
            place, synapses, title = self.prompt.value, self.synapses.value, _ACTIONS[action][1]
            neurons = set() if action == "none" else self._neurons()
            self.effects = ex.change(
                self.view,
                neurons,
                action,
                self.controls,
                new=self.new.value,
                synapses=synapses,
                prompt=place,
            )
            if action != "none":
                title += (
                    f": {len(neurons)} neurons ({_SETS[self.which.value].split(':')[0]}, q{place}, "
                    f"t = {self.t.value:.2f})"
                    + ("" if neurons else ": an empty set changes nothing")
                )
            if synapses != 1:
                title += f"; synapses of q{place} × {synapses:g}"
            elif action == "none":
                title += ", and so are synapses: choose above what happens to them"
            self.page_effects.value = effects_html(self.effects, title)
            self.action = action
            self._show_set()
