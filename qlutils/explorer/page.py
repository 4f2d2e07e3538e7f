"""The explorer's page: pieces of HTML, and `Page`, stock ipywidgets around the functions of
`explorer.fact`."""

import os
from contextlib import contextmanager
from functools import partial
from html import escape

import ipywidgets as w

from qlutils.checks import METHODS
from qlutils.explorer import fact as ex
from qlutils.facts import load_facts
from qlutils.model.loading import BUNDLED
from qlutils.neurons.sets import STORE_THRESHOLD
from qlutils.show.page import table_html, template
from qlutils.show.plots import rendered
from qlutils.show.tables import display_table
from qlutils.study import store

_PIECES = template("explorer/pieces.html").module


# --- HTML -----------------------------------------------------------------------------------------


def prompts_html(view):
    """Every prompt: known or not, probability and rank of the answer, runners-up, attention."""
    return _PIECES.prompts(view)


def kn_html(view, t):
    """The most shared knowledge neurons."""
    table = ex.kn_table(view, t)
    top = display_table(table.head(12)).rename(columns={"n": "a KN of"})
    return _PIECES.kns(table_html(top), len(top), len(table))


def neuron_html(view, neuron, t, saved):
    """A neuron's page: activation on each prompt, tokens promoted and suppressed, other facts that
    use it."""
    return _PIECES.neuron(
        neuron,
        ex.neuron_activations(view, neuron, t),
        ex.neuron_tokens(view.lm, neuron),
        None if saved is None else ex.facts_using(saved, neuron, t, but=view.fact.id),
        t,
        STORE_THRESHOLD,
    )


def effects_html(frame, title):
    """Before and after of `explorer.fact.change`: grey is before, colour after; controls stand
    below the fact's prompts."""
    return _PIECES.effects(frame.to_dict("records"), title)


def png(figure):
    """The figure as PNG bytes."""
    return rendered(figure, format="png", dpi=130).getvalue()


# --- the page -------------------------------------------------------------------------------------

_SETS = {
    "Self: this prompt's KNs": "self",
    "Union: of the other prompts": "union",
    "Intersection: in all others": "intersection",
    "Refine: in several others": "refine",
    "CAS: consistency-aware": "cas",
    "hand-picked": "picked",
}
_SYNAPSES = {
    "left alone": 1.0,
    "off (× 0)": 0.0,
    "doubled (× 2)": 2.0,
}
_BUTTONS = {
    "suppress": "Suppress",
    "enhance": "Enhance",
    "erase": "Erase",
    "update": "Update",
    "none": "Synapses alone",
}


def _row(*widgets):
    """Side by side with equal shares of the width, below one another where there is no room."""
    for widget in widgets:
        widget.layout.flex = "1 1 170px"
        widget.layout.width = "auto"
    return w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _text(description, placeholder):
    """A line that counts once it is complete."""
    return w.Text(description=description, placeholder=placeholder, continuous_update=False)


def _picture():
    return w.Image(
        format="png",
        layout=dict(max_width="100%", width="900px", height="auto", object_fit="contain"),
    )


class Page(w.VBox):
    """The explorer's widgets. Display it, or drive it from code: set a widget's value, click a
    button.

    fact: id of the first fact, such as "P36|France|Paris" (that one, or the data's first, by
    default). output: the run whose saved scores are used before any are computed.

    Only Run computes scores; the slider selects among them. A problem is a line in `status`, never
    a traceback."""

    view = None  # this and the next two are set by Run
    saved = None
    controls = ()
    effects = None  # the last change
    action = "suppress"

    def __init__(
        self, model="demo/gpt2", method="ig", data="demo", fact=None, output="default", t=0.2
    ):
        super().__init__()
        self.data = data
        self.output = output
        self.facts = []
        self.views = {}  # what Run found, for each fact seen with the model in memory
        self._make_question(model, method, t)
        self._make_answers()
        self._make_changes()
        self._arrange()
        self._listen()
        with self._in_place("Reading the facts …"):
            self._list_relations(fact)
        if self.fact.value:
            self._run()

    # -- widgets -----------------------------------------------------------------------------------
    def _make_question(self, model, method, t):
        self.model = w.Combobox(
            description="Model",
            value=model,
            options=list(BUNDLED),
            placeholder="bundled name, Hugging Face id, or folder",
        )
        self.method = w.Dropdown(description="Method", options=METHODS, value=method)
        self.source = w.ToggleButtons(
            options={"a fact of the data": "data", "my own prompts": ex.TYPED}
        )
        self.relation = w.Dropdown(description="Relation")
        self.fact = w.Dropdown(description="Fact")
        self.prompts = w.Textarea(description="Prompts", placeholder="one a line", rows=4)
        self.answer = w.Text(description="Answer")
        self.run = w.Button(description="Run", button_style="primary", icon="play")
        self.t = w.FloatSlider(
            description="threshold t",
            value=t,
            min=STORE_THRESHOLD,
            max=0.95,
            step=0.05,
        )

    def _make_answers(self):
        for name in "status page_prompts page_numbers page_table page_neuron".split():
            setattr(self, name, w.HTML())
        self.map = _picture()
        self.overlap = _picture()
        self.neuron = w.Dropdown(description="neuron")
        self.other = _text("or another", "layer:neuron")
        self.pick = w.Button(description="add to hand-picked", icon="plus")

    def _make_changes(self):
        self.which = w.Dropdown(description="neurons", options=_SETS)
        self.prompt = w.Dropdown(description="prompt")
        self.picked = _text("hand-picked", "3:17, 4:2")
        self.synapses = w.Dropdown(description="synapses", options=_SYNAPSES)
        self.new = _text("new answer", "for update")
        self.buttons = {
            action: w.Button(
                description=name,
                button_style="warning" if action in ex.FACTORS else "",
            )
            for action, name in _BUTTONS.items()
        }
        self.set_size = w.HTML()
        self.page_effects = w.HTML()
        self.code = w.Textarea(rows=24, layout=w.Layout(width="100%"))

    def _arrange(self):
        self.of_data = _row(self.relation, self.fact)
        self.of_user = _row(self.prompts, self.answer)
        copy = "<i>Select all and copy. It does what the page says and the button pressed last.</i>"
        tabs = {
            "Prompts": [self.page_prompts],
            "Neurons": [self.page_numbers, self.map, self.overlap, self.page_table],
            "One neuron": [_row(self.neuron, self.other, self.pick), self.page_neuron],
            "Change it": [
                _row(self.which, self.prompt),
                _row(self.picked, self.synapses, self.new),
                _row(*self.buttons.values(), self.set_size),
                self.page_effects,
            ],
            "Copy as code": [w.HTML(copy), self.code],
        }
        self.children = [
            _row(self.model, self.method, self.source),
            self.of_data,
            self.of_user,
            _row(self.run, self.t, self.status),
            w.Tab(list(map(w.VBox, tabs.values())), titles=tuple(tabs)),
        ]
        self._show_source()

    def _listen(self):
        self.relation.observe(self._list_facts, "value")
        self.source.observe(self._show_source, "value")
        choices = {
            self._refresh: [self.t],
            self._show_neuron: [self.neuron, self.other],
            self._show_set: [self.which, self.prompt, self.picked, self.synapses, self.new],
        }
        for act, widgets in choices.items():
            for widget in widgets:
                widget.observe(partial(self._chosen_anew, act), "value")
        self.run.on_click(self._run)
        self.pick.on_click(self._add)
        for action, button in self.buttons.items():
            button.on_click(partial(self._change, action))

    # -- what happens ------------------------------------------------------------------------------
    @contextmanager
    def _in_place(self, doing="…"):
        """Say what is being done, and what went wrong, in the status line; buttons rest
        meanwhile."""
        buttons = [self.run, self.pick, *self.buttons.values()]
        self._say(doing, "#666")
        for button in buttons:
            button.disabled = True
        try:
            yield
            if view := self.view:  # which is not what the menus say before Run
                told = f"{view.fact.id}, {view.lm.name}, {view.method}: scores {view.source}"
                self._say(told, "#00795a")
        except Exception as error:  # whatever it is, a reader gets a sentence
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._say(f"{name}{str(error) or 'no details'}"[:600], "#b00020")
        finally:
            for button in buttons:
                button.disabled = False

    def _say(self, text, color):
        self.status.value = f'<span style="color:{color};font-weight:600">{escape(text)}</span>'

    def _chosen_anew(self, act, _):
        """A widget changed: act, if there is anything to act on and it is the reader's choice, not
        part of what is being done."""
        if self.view and not self.run.disabled:
            with self._in_place():
                act()

    def _list_relations(self, fact):
        """Read the facts and choose one: `fact`, an id, or what a newcomer sees first."""
        self.facts = load_facts(self.data)
        first = ex.find_fact(self.facts, fact)
        examples = {}
        for one in self.facts:
            text = one.prompts[0].replace(one.subject, "…")
            examples.setdefault(one.relation, f"{one.relation}: {text[:48]}")
        self.relation.options = [(text, name) for name, text in examples.items()]
        self.relation.value = first.relation
        self._list_facts()
        self.fact.value = first.id
        self.prompts.value = "\n".join(first.prompts[:3])
        self.answer.value = first.object

    def _list_facts(self, *_):
        same = [one for one in self.facts if one.relation == self.relation.value]
        self.fact.options = [(f"{one.subject} → {one.object}", one.id) for one in same]

    def _show_source(self, *_):
        typed = self.source.value == ex.TYPED
        self.of_data.layout.display = "none" if typed else ""
        self.of_user.layout.display = "" if typed else "none"

    def _run(self, *_):
        with self._in_place("Working: model, answers, scores …"):
            if self.source.value == ex.TYPED:
                fact = ex.typed_fact(self.prompts.value, self.answer.value)
            else:
                fact = ex.find_fact(self.facts, self.fact.value)
            self.view, self.saved, self.controls = self._looked_at(fact)
            self.neuron.options = []  # a new fact's page begins with its most shared neuron
            self.effects = None
            self.page_effects.value = ""
            self.page_prompts.value = prompts_html(self.view)
            self.prompt.options = [(f"q{i} {text}", i) for i, text in enumerate(fact.prompts)]
            self.prompt.value = 0
            self._refresh()

    def _looked_at(self, fact):
        """(view, saved queries, controls) of a fact, computed once while its model is in memory."""
        lm = store.cached_model(self.model.value.strip())
        key = lm, self.method.value, fact
        if key not in self.views:
            run = lm.name, self.method.value, self.data, self.output
            spec = ex.saved_spec(*run)  # so what is computed now is by the run's own rule
            saved = ex.saved_queries(*run, **spec)
            view = ex.look(lm, fact, self.method.value, saved, **spec)
            found = view, saved, ex.control_facts(lm, self.facts, fact)
            self.views = {old: one for old, one in self.views.items() if old[0] is lm}
            self.views[key] = found
        return self.views[key]

    def _refresh(self):
        """Everything that depends on t, from the scores at hand."""
        t = self.t.value
        self.page_numbers.value = _PIECES.agreement(ex.agreement(self.view, t))
        self.page_table.value = kn_html(self.view, t)
        self.overlap.value = png(ex.overlap_figure(self.view, t))
        chosen = self.neuron.value
        names = {
            f"layer {row.layer}, neuron {row.neuron}: KN of {row.n} prompts": (
                row.layer,
                row.neuron,
            )
            for row in ex.kn_table(self.view, t).itertuples()
        }
        if chosen not in names.values():
            chosen = next(iter(names.values()), None)
        self.neuron.options = list(names.items())
        self.neuron.value = chosen
        self._show_neuron()
        self._show_set()

    def _one(self):
        """The neuron of the page's third part: the one typed, else the one of the list, else
        None."""
        typed = self.other.value.strip()
        return min(ex.parse_neurons(self.view.lm, typed)) if typed else self.neuron.value

    def _show_neuron(self):
        neuron = self._one()
        t = self.t.value
        self.map.value = png(ex.kn_map(self.view, t, neuron))
        self.page_neuron.value = "No prompt has a knowledge neuron; name one to see its page."
        if neuron:
            self.page_neuron.value = neuron_html(self.view, neuron, t, self.saved)

    def _add(self, *_):
        with self._in_place():
            neuron = self.view and self._one()
            if not neuron:
                raise ValueError("there is no knowledge neuron to add; name one as layer:neuron")
            added = f"{self.picked.value.strip(' ,')}, {neuron[0]}:{neuron[1]}"
            self.picked.value = added.strip(" ,")
            self.which.value = "picked"
            self._show_set()

    def _neurons(self):
        return ex.choose_neurons(
            self.view, self.t.value, self.which.value, self.prompt.value, self.picked.value
        )

    def _options_of_change(self):
        return {name: getattr(self, name).value for name in ("new", "synapses", "prompt")}

    def _show_set(self):
        """The size of the chosen set, and the script that does what is chosen."""
        self.set_size.value = self.code.value = ""  # not another fact's, whatever fails below
        which = self.which.value
        picked = self.picked.value
        t = self.t.value
        if which == "picked" and not picked.strip():
            which = "self"  # in the script
            size = "type neurons, or add them from “One neuron”"
        else:
            size = f"{len(self._neurons())} neurons at t = {t:.2f}"
        self.set_size.value = f"&nbsp; {size}"
        options = dict(picked=picked, **self._options_of_change())
        self.code.value = ex.as_code(self.view, t, which, self.action, self.controls, **options)

    def _change(self, action, _):
        if not self.view:
            return
        with self._in_place("Working: before and after …"):
            neurons = set() if action == "none" else self._neurons()
            options = self._options_of_change()
            self.effects = ex.change(self.view, neurons, action, self.controls, **options)
            which = self.which.label.split(":")[0]
            title = _PIECES.done(action, len(neurons), which, self.t.value, **options)
            self.page_effects.value = effects_html(self.effects, title)
            self.action = action
            self._show_set()


def explore(model="demo/gpt2", method="ig", data="demo", fact=None, output="default", t=0.2):
    """The explorer as a widget, for JupyterLab and VS Code; see `Page`. Without a front end, as
    under papermill, nothing is built and a line says so."""
    if has_front_end():
        return Page(model, method, data, fact, output, t)
    print(
        "The explorer is a widget: run this notebook in JupyterLab or VS Code. A fixed example is "
        "below."
    )


def has_front_end():
    """Whether this kernel was started by something that shows widgets: a Jupyter server, VS Code,
    or Colab; not by the study's driver, wherever that was started."""
    served = any(name.startswith(("JPY_SESSION_NAME", "VSCODE_", "COLAB_")) for name in os.environ)
    return served and "QLUTILS_PROGRESS" not in os.environ
