"""The explorer's page: pieces of HTML (escaped), and `Page`, stock ipywidgets around the functions of `explorer`."""

from __future__ import annotations

import io
from contextlib import contextmanager
from html import escape

import ipywidgets as w
import numpy as np
import pandas as pd

from . import explorer as ex
from . import store
from .data import load_facts
from .models import BUNDLED
from .neurons import STORE_THRESHOLD
from .study import METHODS

# Black on white in every theme, because the figures are.
_STYLE = "background:#fff;color:#1a1a1a;padding:6px 10px;border-radius:4px;font-size:13px;line-height:1.45;"
_CELL = "padding:4px 10px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid #e6e6e6;"
_NUMBER = _CELL + "font-variant-numeric:tabular-nums;white-space:nowrap;"
_MUTED = "color:#666;"


# --- HTML ------------------------------------------------------------------------------------------------

def table_html(head, rows, note: str = "", width="none") -> str:
    """A table of cells that are HTML already; `head` and `note`, at most `width` wide, are plain text."""
    top = "".join(f'<th style="{_CELL}{_MUTED}font-weight:600">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f'<td style="{_NUMBER if _is_number(cell) else _CELL}">{cell}</td>' for cell in row)
                   + "</tr>" for row in rows)
    below = f'<div style="{_MUTED}margin-top:4px;max-width:{width}">{escape(note)}</div>' if note else ""
    return f'<div style="{_STYLE}"><table style="border-collapse:collapse"><tr>{top}</tr>{body}</table>{below}</div>'


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:2] in ("+1", "−1")


def frame_html(frame: pd.DataFrame, note: str = "", digits: int = 3) -> str:
    """A DataFrame as a table, everything in it escaped."""
    def cell(value):
        if isinstance(value, (float, np.floating)):
            return "–" if np.isnan(value) else f"{value:.{digits}f}".replace("-", "−")
        return escape(str(value))

    return table_html(frame.columns, [[cell(v) for v in row] for row in frame.itertuples(index=False)], note)


def tokens_html(tokens, shares) -> str:
    """The tokens of a prompt, tinted by the attention they receive; by its root, as the first token may draw most of it
    and would leave the others white."""
    if shares is None:
        return escape("".join(tokens))
    top = max(shares) or 1.0
    return "".join(
        f'<span title="{share:.1%} of all attention" style="white-space:pre-wrap;padding:1px 0;border-radius:2px;'
        f'background:rgba(230,159,0,{0.85 * np.sqrt(share / top):.2f})">{escape(token)}</span>'
        for token, share in zip(tokens, shares))


def bar_html(value: float, color: str, width: int = 90) -> str:
    """A horizontal bar for a share between 0 and 1."""
    return (f'<span style="display:inline-block;width:{width}px;background:#eee;height:9px;border-radius:2px">'
            f'<span style="display:block;width:{width * min(max(value, 0.0), 1.0):.1f}px;background:{color};height:9px;'
            'border-radius:2px"></span></span>')


def prompts_html(view: ex.View) -> str:
    """Every prompt: known or not, probability and rank of the answer, runners-up, attention."""
    rows = []
    for place, (row, (tokens, shares)) in enumerate(zip(view.predictions.itertuples(), view.attention)):
        known, color = ("✓ known", "#00795a") if row.known else ("✗ not known", "#b34700")
        known = f'<b style="color:{color};white-space:nowrap">{known}</b>'
        others = " · ".join(f'<span style="white-space:nowrap;font-size:12px">{_token(token)} '
                           f'<span style="{_MUTED}">{p:.3f}</span></span>' for token, p in row.runners_up[:3])
        rows.append([f"q{place}", tokens_html(tokens, shares), known,
                     f"{row.probability:.3f} {bar_html(row.probability, '#009E73', 50)}", str(row.rank), others])
    read = all(shares is not None for _, shares in view.attention)
    note = (f"Answer: {view.fact.object!r}. P: of the whole answer. Rank: of its first token "
            f"{view.predictions['first_token'].iloc[0]!r} among all next tokens. "
            + ("Tint: attention received, over all layers and heads (point at a token for its share)." if read else
               f"The attention of {view.lm.name} cannot be read, so tokens are not tinted."))
    return table_html(["", "prompt", "answered?", "P(answer)", "rank", "runners-up"], rows, note)


def _token(token: str) -> str:
    shown = token.replace("\n", "⏎").replace(" ", "␣", 1) if token.strip() == "" else token.strip()
    return f'<code style="background:#f1f1f1;color:#1a1a1a;padding:0 3px;border-radius:3px">{escape(shown)}</code>'


def agreement_html(view: ex.View, t: float) -> str:
    """CS1, CS2 and sizes at threshold t."""
    result = ex.agreement(view, t)
    number = lambda x: "–" if np.isnan(x) else f"{x:.2f}"  # noqa: E731
    parts = [("CS₁", number(result["cs1"]), "in every prompt's set"),
             ("CS₂", number(result["cs2"]), "in more than one"),
             ("Jaccard", number(result["jaccard"]), "mean over pairs"),
             ("neurons", str(result["union"]), "in all sets together")]
    tiles = "".join(f'<div style="margin-right:28px"><div style="{_MUTED}">{name}</div><div style="font-size:22px;'
                    f'font-weight:600">{value}</div><div style="{_MUTED}font-size:11px">{what}</div></div>'
                    for name, value, what in parts)
    note = "" if len(result["sizes"]) > 1 else f'<div style="{_MUTED}">Agreement needs at least two prompts.</div>'
    return f'<div style="{_STYLE}"><div style="display:flex">{tiles}</div>{note}</div>'


def neuron_html(view: ex.View, neuron, t: float, saved=None) -> str:
    """A neuron's page: activation on each prompt, tokens promoted and suppressed, other facts that use it."""
    active, out = ex.neuron_activations(view, neuron, t), []
    top = active["activation"].abs().max() or 1.0
    rows = [[escape(r.prompt), f"{r.activation:.3f}".replace("-", "−")
             + " " + bar_html(abs(r.activation) / top, "#0072B2" if r.activation >= 0 else "#D55E00", 60),
             f"{r.share:.2f}" if r.share else "below 0.05", "✓" if r.kn else ""] for r in active.itertuples()]
    out.append(table_html(["prompt", "activation", "attribution / largest", "KN"], rows,
                          "Orange bars: negative activations."))
    words = ex.neuron_tokens(view.lm, neuron)
    out.append(table_html(["promotes", "", "suppresses", ""], [
        [_token(r.promotes), f"{r.promotes_score:.3f}", _token(r.suppresses),
         f"{r.suppresses_score:.3f}".replace("-", "−")] for r in words.itertuples()],
        "Dot product of the value vector with each token's unembedding, without the final normalisation. Where the "
        "activation is negative, the roles are exchanged.", "300px"))
    used = ex.facts_using(saved, neuron, t, but=view.fact.id)
    rows = [[escape(r.fact), f"{r.n} of {r.of}"] for r in used.head(8).itertuples()]
    note = ("Other facts that use it are known once notebook 01 has run for this model and method." if saved is None else
            f"{len(used)} of the saved run's other facts have it among their KNs at t = {t:.2f}.")
    out.append(table_html(["other facts that use it", "prompts"] if rows else [], rows, note, "300px"))
    body = "".join(f"<div>{part}</div>" for part in out)
    return (f'<div style="{_STYLE}"><b>Layer {neuron[0]}, neuron {neuron[1]}</b>'
            f'<div style="display:flex;flex-wrap:wrap;gap:14px">{body}</div></div>')


def effects_html(frame: pd.DataFrame, title: str = "") -> str:
    """Before and after of `explorer.change`: grey is before, colour after; controls stand below a line."""
    rows, updated = [], "new_after" in frame
    for r in frame.to_dict("records"):
        control = r["role"].startswith("control")
        name = f'<b style="color:#7a4b00;white-space:nowrap">{escape(r["role"])}</b>' if control else escape(r["role"])
        color = "#E69F00" if control else "#0072B2"
        bars = f'{bar_html(r["before"], "#aaa")}<br>{bar_html(r["after"], color)}'
        relative = "–" if pd.isna(r["change"]) else f'{r["change"]:+.1%}'.replace("-", "−")
        row = [name, f'{escape(r["prompt"])} <b>{escape(r["answer"])}</b>', bars,
               f'<span style="white-space:nowrap">{r["before"]:.3f} → <b>{r["after"]:.3f}</b></span>', relative,
               f'<span style="white-space:nowrap">{_token(r["top_before"])} → {_token(r["top_after"])}</span>']
        if updated:
            row.append(f'<span style="white-space:nowrap">{r["new_before"]:.3f} → <b>{r["new_after"]:.3f}</b></span>')
        rows.append(row)
    head = ["", "prompt and answer", "", "P(answer)", "change", "likeliest next token"] + ["P(new answer)"] * updated
    caption = f'<div style="{_STYLE}font-weight:600;padding-bottom:0">{escape(title)}</div>' if title else ""
    return caption + table_html(head, rows, "Before → after; grey bars: before. Controls are prompts of other facts, "
                                                                    "under the same change.")


def png(figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


# --- the page --------------------------------------------------------------------------------------------

_SET_NAMES = {"self": "Self: this prompt's KNs", "union": "Union: of the other prompts",
              "intersection": "Intersection: in all others", "refine": "Refine: in several others",
              "cas": "CAS: consistency-aware", "picked": "hand-picked"}
_SYNAPSES = {"left alone": 1.0, "off (× 0)": 0.0, "doubled (× 2)": 2.0}
_BUTTONS = {"suppress": "Suppress", "enhance": "Enhance", "erase": "Erase", "update": "Update",
            "none": "Synapses alone"}
_DONE = {"suppress": "Suppressed (× 0)", "enhance": "Enhanced (× 2)", "erase": "Erased", "update": "Updated"}


class Page:
    """The explorer's widgets. Display it (`box`), or drive it from code: set a widget's value, click a button.

    Only Run computes scores; the slider selects among them. A problem is a line in `status`, never a traceback."""

    def __init__(self, model="demo/gpt2", method="ig", data="demo", fact=None, output="default", t=0.2):
        self.data, self.output, self.view, self.saved, self.controls = data, output, None, None, []
        self.facts, self.views, self.effects, self.filling = [], {}, None, False
        self._build(model, method, t)
        with self._in_place("Reading the facts …"):
            self.facts = load_facts(data)
            examples = {}
            for one in self.facts:
                examples.setdefault(one.relation, one.prompts[0].replace(one.subject, "…"))
            self.relation.options = [(f"{name}: {text[:48]}", name) for name, text in examples.items()]
            ids = {one.id: one for one in self.facts}
            if fact is not None and fact not in ids:
                raise ValueError(f"fact {fact!r} is not in {data!r}; a fact's id is relation|subject|object, "
                                 f"such as {self.facts[0].id}")
            first = ids[fact] if fact else ids.get("P36|France|Paris", self.facts[0])
            self.relation.value = first.relation
            self._list_facts()
            self.fact.value = first.id
            self.prompts.value, self.answer.value = "\n".join(first.prompts[:3]), first.object
        if self.fact.value:
            self._run()

    # -- widgets ------------------------------------------------------------------------------------------
    def _build(self, model, method, t):
        wide, style = w.Layout(width="auto", flex="1 1 260px"), {"description_width": "60px"}
        self.model = w.Combobox(value=model, options=list(BUNDLED), description="Model", layout=wide, style=style,
                                placeholder="bundled name, Hugging Face id, or folder")
        self.method = w.Dropdown(options=list(METHODS), value=method, description="Method", style=style,
                                 layout=w.Layout(width="150px"))
        self.source = w.ToggleButtons(options=[("a fact of the data", "data"), ("my own prompts", ex.TYPED)],
                                      style={"button_width": "140px"})
        self.relation = w.Dropdown(description="Relation", layout=wide, style=style)
        self.fact = w.Dropdown(description="Fact", layout=wide, style=style)
        self.prompts = w.Textarea(description="Prompts", placeholder="one a line", rows=4, style=style,
                                  layout=w.Layout(width="auto", flex="3 1 420px"))
        self.answer = w.Text(description="Answer", layout=wide, style=style)
        self.run = w.Button(description="Run", button_style="primary", icon="play", layout=w.Layout(width="110px"))
        self.status = w.HTML()
        self.t = w.FloatSlider(value=t, min=STORE_THRESHOLD, max=0.95, step=0.05, description="threshold t",
                               readout_format=".2f", style={"description_width": "80px"},
                               layout=w.Layout(width="420px"))
        self.page_prompts, self.page_numbers, self.page_table, self.page_neuron = (w.HTML() for _ in range(4))
        self.page_effects, self.set_size = w.HTML(), w.HTML()
        picture = w.Layout(max_width="100%", width="900px", height="auto", object_fit="contain")
        self.map, self.overlap = (w.Image(format="png", layout=picture) for _ in range(2))
        self.neuron = w.Dropdown(description="neuron", layout=w.Layout(width="360px"))
        self.other = w.Text(description="or another", placeholder="layer:neuron", continuous_update=False,
                            layout=w.Layout(width="220px"))
        self.pick = w.Button(description="add to hand-picked", icon="plus", layout=w.Layout(width="170px"))
        self.prompt = w.Dropdown(description="of prompt", layout=w.Layout(width="auto", flex="1 1 300px"))
        self.which = w.Dropdown(options=[(text, name) for name, text in _SET_NAMES.items()], description="neurons",
                                layout=w.Layout(width="300px"))
        self.picked = w.Text(description="hand-picked", placeholder="3:17, 4:2", continuous_update=False,
                             layout=w.Layout(width="300px"))
        self.new = w.Text(description="new answer", placeholder="for update", layout=w.Layout(width="240px"))
        self.synapses = w.Dropdown(options=list(_SYNAPSES.items()), description="synapses",
                                   layout=w.Layout(width="240px"))
        self.buttons = {action: w.Button(description=name, layout=w.Layout(width="130px"),
                                         button_style="warning" if action in ("suppress", "enhance") else "")
                        for action, name in _BUTTONS.items()}
        self.code = w.Textarea(rows=24, layout=w.Layout(width="100%"))
        self._arrange()
        self._wire()

    def _arrange(self):
        def row(*widgets):  # each with a layout of its own, as some are hidden
            return w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center"))

        self.of_data, self.of_user = row(self.relation, self.fact), row(self.prompts, self.answer)
        hint = w.HTML("<i>Select all and copy. The script computes what was last shown under “Change it”.</i>")
        self.tabs = w.Tab([
            w.VBox([self.page_prompts]), w.VBox([self.page_numbers, self.map, self.overlap, self.page_table]),
            w.VBox([row(self.neuron, self.other, self.pick), self.page_neuron]),
            w.VBox([row(self.which, self.prompt), row(self.picked, self.synapses, self.new),
                    row(*self.buttons.values(), self.set_size), self.page_effects]),
            w.VBox([hint, self.code])])
        self.tabs.titles = ("Prompts", "Neurons", "One neuron", "Change it", "Copy as code")
        self.box = w.VBox([row(self.model, self.method, self.source), self.of_data, self.of_user,
                           row(self.run, self.t, self.status), self.tabs])

    def _wire(self):
        self.relation.observe(lambda _: self._list_facts(), "value")
        self.source.observe(lambda _: self._show_source(), "value")
        self.run.on_click(lambda _: self._run())
        self.t.observe(lambda _: self._at_threshold(), "value")
        self.neuron.observe(lambda _: self._neuron(), "value")
        self.other.observe(lambda _: self._neuron(), "value")
        self.pick.on_click(lambda _: self._add())
        for widget in (self.which, self.prompt, self.picked):
            widget.observe(lambda _: self._size(), "value")
        for action, button in self.buttons.items():
            button.on_click(lambda _, action=action: self._change(action))
        self._show_source()

    def _repr_mimebundle_(self, **options):
        bundle = self.box._repr_mimebundle_(**options)
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**bundle, "text/plain": "The explorer is a widget: run this cell in JupyterLab or VS Code."}

    # -- what happens -------------------------------------------------------------------------------------
    @contextmanager
    def _in_place(self, doing: str):
        """Say what is being done, and what went wrong, in the status line; buttons rest meanwhile."""
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

    def _list_facts(self):
        self.fact.options = [(f"{one.subject} → {one.object}", one.id) for one in self.facts
                             if one.relation == self.relation.value]

    def _show_source(self):
        typed = self.source.value == ex.TYPED
        self.of_data.layout.display, self.of_user.layout.display = ("none", "") if typed else ("", "none")

    def _run(self):
        with self._in_place("Working: model, answers, scores …"):
            if self.source.value == ex.TYPED:
                fact = ex.typed_fact(self.prompts.value, self.answer.value)
            else:
                fact = next(f for f in self.facts if f.id == self.fact.value)
            key = self.model.value, self.method.value, fact
            if key not in self.views:
                lm = store.cached_model(self.model.value.strip(), None, None)  # as Study.lm does
                saved = ex.saved_queries(lm.name, self.method.value, self.data, self.output)
                view = ex.look(lm, fact, self.method.value, saved)
                self.views = {k: v for k, v in self.views.items() if v[0].lm is lm}  # one model in memory
                self.views[key] = view, saved, ex.control_facts(lm, self.facts, fact)
            self.view, self.saved, self.controls = self.views[key]
            self.effects, self.page_effects.value = None, ""
            self.page_prompts.value = prompts_html(self.view)
            self.filling = True
            self.prompt.options = [(f"q{i} {text}", i) for i, text in enumerate(fact.prompts)]
            self.prompt.value = 0
            self.filling = False
            self._refresh()

    def _at_threshold(self):
        if self.view:
            with self._in_place("…"):
                self._refresh()

    def _refresh(self):
        """Everything that depends on t, from the scores at hand."""
        t, table = self.t.value, ex.kn_table(self.view, self.t.value)
        self.page_numbers.value = agreement_html(self.view, t)
        self.overlap.value = png(ex.overlap_figure(self.view, t))
        self.page_table.value = frame_html(table.head(12), f"The {min(12, len(table))} most shared of {len(table)}; "
                                           "score: largest share of a prompt's top score.", 2)
        old, pairs = self.neuron.value, list(zip(table["layer"], table["neuron"]))
        self.filling = True  # the list changes, not the reader's choice
        self.neuron.options = [(f"layer {l}, neuron {n}: KN of {k} prompts", (l, n))
                               for (l, n), k in zip(pairs, table["n"])]
        self.neuron.value = old if old in pairs else (pairs[0] if pairs else None)
        self.filling = False
        self._show_neuron()
        self._show_size()
        self._write_code()

    def _neuron(self):
        if self.view and not self.filling:
            with self._in_place("…"):
                self._show_neuron()

    def _chosen(self):
        if not self.other.value.strip():
            return self.neuron.value
        return min(ex.parse_neurons(self.view.lm, self.other.value))

    def _show_neuron(self):
        neuron = self._chosen()
        self.map.value = png(ex.kn_map(self.view, self.t.value, neuron))
        self.page_neuron.value = (neuron_html(self.view, neuron, self.t.value, self.saved) if neuron else
                                  "No prompt has a knowledge neuron; name one to see its page.")

    def _add(self):
        with self._in_place("…"):
            if self._chosen() is None:
                raise ValueError("there is no knowledge neuron to add; name one as layer:neuron")
            layer, index = self._chosen()
            self.picked.value = ", ".join(filter(None, [self.picked.value.strip(" ,"), f"{layer}:{index}"]))
            self.which.value = "picked"

    def _size(self):
        if self.view and not self.filling:
            with self._in_place("…"):
                self._show_size()

    def _neurons(self):
        return ex.choose_neurons(self.view, self.t.value, self.which.value, self.prompt.value, self.picked.value)

    def _show_size(self):
        if self.which.value == "picked" and not self.picked.value.strip():
            self.set_size.value = "&nbsp; type neurons, or add them from “One neuron”"
        else:
            self.set_size.value = f"&nbsp; {len(self._neurons())} neurons at t = {self.t.value:.2f}"

    def _change(self, action):
        if not self.view:
            return
        with self._in_place("Working: before and after …"):
            neurons, synapses = set() if action == "none" else self._neurons(), self.synapses.value
            self.effects = ex.change(self.view, neurons, action, self.controls, new=self.new.value, synapses=synapses,
                                     prompt=self.prompt.value)
            title = "Neurons left alone" if action == "none" else (
                f"{_DONE[action]}: {len(neurons)} neurons ({_SET_NAMES[self.which.value].split(':')[0]}, "
                f"q{self.prompt.value}, t = {self.t.value:.2f})") + (
                "" if neurons or action == "none" else ": an empty set changes nothing")
            if synapses != 1:
                title += f"; synapses of q{self.prompt.value} × {synapses:g}"
            self.page_effects.value = effects_html(self.effects, title)
            self._write_code(action)

    def _write_code(self, action="suppress"):
        which = self.which.value if action != "none" else "self"
        if which == "picked" and not self.picked.value.strip():
            which = "self"
        self.code.value = ex.as_code(self.view, self.t.value, which, action, self.controls, picked=self.picked.value,
                                     new=self.new.value, synapses=self.synapses.value, prompt=self.prompt.value or 0)
