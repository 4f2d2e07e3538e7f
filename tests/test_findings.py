"""Every measured number of README.md and figures/FINDINGS.md is that of the committed tables."""

import csv
import json
import re
from itertools import product

import pytest
from tiny import readme_table

from qlutils import paths
from qlutils.checks import METHODS
from qlutils.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
FINDINGS = "figures/FINDINGS.md"
DETAILS = (ROOT / FINDINGS).read_text("utf-8")
PRINTED = json.loads((ROOT / "qlutils/show/paper_values.json").read_text("utf-8"))["tables"]
# folders below figures/
KNOWN, KNOWN_SIG, BUNDLED = "known-pararel", "known-sig-pararel", "known-bundled"
ANY, ANY_AMIG, VARIED = "paper-pararel", "paper-amig-pararel", "notebooks"
EVERY, MANY = "every-known-pararel", "many-pararel"
SITE, SIZES = "paper-site-pararel", "sizes-pararel"
SMALL, LARGE = "pretrained/smollm2-135m", "pretrained/gemma-3-270m"
LARGEST = "pretrained/qwen2.5-coder-1.5b"  # of which few facts were localised
MODELS = {"SmolLM2-135M": SMALL, "Gemma 3 270M": LARGE, "Qwen2.5-Coder 1.5B": LARGEST}
COLUMNS = {
    "SmolLM2-135M": (KNOWN, SMALL),
    "Gemma 3 270M": (KNOWN, LARGE),
    "SmolLM2, bundled facts": (VARIED, SMALL),
    "Gemma 3, bundled facts": (BUNDLED, LARGE),
}
RUNS = {  # facts: the folder of each method
    "Known": dict(ig=KNOWN, sig=KNOWN_SIG, amig=KNOWN),
    "Any": dict(ig=ANY, sig=ANY, amig=ANY_AMIG),
    "Bundled": dict(ig=BUNDLED, sig=BUNDLED, amig=BUNDLED),
    "Every": dict(ig=EVERY, sig=EVERY, amig=EVERY),
    "Many": dict(ig=MANY, sig=MANY, amig=MANY),
    "Sizes": dict(ig=SIZES, sig=SIZES, amig=SIZES),
}
ALL = {"threshold": "all", "class": "all"}
GROUPS = (
    "the fact's own queries",
    "one pattern, different objects",
    "different patterns and objects, different relations",
)
RELATION = "different patterns and objects, one relation"
PAPER = {
    "GPT-2": "gpt2",
    "LLaMA-2-7B": "meta-llama/Llama-2-7b-hf",
    "LLaMA-3-8B": "meta-llama/Meta-Llama-3-8B",
}


# --- reading the committed tables -----------------------------------------------------------------
def rows(folder, name, **where):
    """Rows of a committed CSV below figures/ in which columns have these texts."""
    file = paths.FIGURES / folder / f"{name}.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return [row for row in csv.DictReader(opened) if where.items() <= row.items()]


def row(folder, name, **where):
    [found] = rows(folder, name, **where)
    return found


def of(folder, model):
    return f"{folder}/{model.replace('/', '--')}"


def erased(own, method, neurons="local", op="erasure"):
    """What an edit did: a row of Table 3 where notebook 07 was run, else of Table 2; {} if neither
    has it."""
    for table in ("table3", "table2"):
        if found := rows(own, f"{method}/{table}", **ALL, op=op, neurons=neurons):
            return found[0]
    return {}


def percent(*values):
    """Shares as "96 / 94 / 37 %", each "–" where it was not measured."""
    return " / ".join(f"{100 * float(one):.0f}" if one else "–" for one in values) + " %"


def both(*values):
    """Of SmolLM2 and Gemma: "94 and 99 %"."""
    return percent(*values).replace(" / ", " and ")


def numbers(*values, digits=2):
    return " / ".join(f"{float(one):.{digits}f}" for one in values)


def interval(row, name, digits=2):
    value, low, high = (numbers(row[name + end], digits=digits) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def share(row, name):
    """With its interval, in percent: "22 % [7, 44]"."""
    low, high = (f"{100 * float(row[name + end]):.0f}" for end in ("_low", "_high"))
    return f"{percent(row[name])} [{low}, {high}]"


def of_all_facts(rows, name):
    """The mean of a column over classes that together hold all facts."""
    counted = [(int(row["n"]), float(row[name])) for row in rows if row["n"] not in ("", "0")]
    return sum(n * value for n, value in counted) / sum(n for n, _ in counted)


def control(number, name, folder, model, kinds, method="ig"):
    """The CS2 of kinds of groups."""
    where = dict(model=model, method=method)
    found = [rows(folder, f"control{number}_{name}", **where, kind=kind) for kind in kinds]
    return [one[0]["cs2"] for one in found if one]


def told(pattern, folder=KNOWN, models=(SMALL, LARGE)):
    """What the first sentence of "In short" that fits says in the pattern's group, by model."""
    found = []
    for model in models:
        said = (one["sentence"] for one in rows(folder, "in_short", model=model))
        found.append(next(fits[1] for one in said if (fits := re.search(pattern, one))))
    return found


# --- tables ---------------------------------------------------------------------------------------
def agreement(cs2, share_ii):
    return f"{float(cs2):.2f}; {percent(share_ii)}"


def consistency(folder, model, method):
    """CS2 and the share of K_II; None where the method was not run."""
    own = of(folder, model)
    found = rows(own, "all/consistency", method=method)
    if not found:
        return None
    static = row(own, "all/table1", threshold="static", method=method)
    return agreement(found[0]["cs2"], static["R_II"])


def paper_agreement(threshold, method="ig"):
    """CS2 of all facts, the mean of the classes', and the share of K_II, of the paper's models."""
    for model in PAPER.values():
        key = f"{model}|{threshold}|{method}"
        share_i, cs2_i, share_ii, cs2_ii, *_ = PRINTED["1"]["rows"][key]
        yield share_i * cs2_i + share_ii * cs2_ii, share_ii


def first_table():
    """Of `amig`, any fact is of more facts there than were edited."""
    by_method = [[agreement(*one) for one in paper_agreement("static", name)] for name in METHODS]
    names = [f"{name}, the paper" for name in PAPER]
    yield from zip(names, *by_method)
    facts = {
        "any fact": "Any",
        "64 facts": "Sizes",
        "11,424 facts": "Many",
        "facts it knows": "Known",
        "bundled facts it knows": "Bundled",
    }
    for (name, run), (label, model) in product(facts.items(), MODELS.items()):
        folders = RUNS[run] | (dict(amig=ANY) if run == "Any" else {})
        cells = [consistency(folders[method], model, method) or "–" for method in METHODS]
        if set(cells) != {"–"}:
            yield f"{label}, {name}", *cells


def by_method():
    for (facts, folders), (label, model) in product(RUNS.items(), MODELS.items()):
        for method, folder in folders.items():
            cs2 = consistency(folder, model, method)
            if cs2:
                here = (folder, model, method)
                edited = VARIED if here == (BUNDLED, SMALL, "ig") else folder  # the same facts
                changed = changed_by_method(of(edited, model), method)
                n = row(of(folder, model), "all/consistency", method=method)["n"]
                yield f"{facts}, {label}", f"`{method}`", n, cs2, *changed


def changed_by_method(own, method):
    edit, random = erased(own, method), erased(own, method, "local (random)")
    n = f" (n = {edit['n_gen']})" if edit else ""
    yield percent(edit.get("gen")) + n if edit else "–"
    yield f"{percent(edit['loc'])} ({percent(random['loc'])})" if edit else "–"
    where = dict(threshold="static", set="self", direction="suppress")
    alone = rows(own, f"{method}/fig4", **where, **{"class": "I"})
    yield percent(alone[0]["trimmed"]) if alone else "–"
    synapses = {one["quantity"]: one["mean"] for one in rows(own, f"{method}/synapses")}
    alike = [synapses[name] for name in ("jaccard", "jaccard_rest") if synapses]
    yield f"{percent(synapses['share in column 0'])}; {numbers(*alike)}" if synapses else "–"


def found_neurons(folder, model):
    """The rows on KNs of a column of the table."""
    own = of(folder, model)
    localised = row(own, "ig/localisation")
    consistency = row(own, "all/consistency", method="ig")
    classes = {
        name: row(own, "all/table1", threshold=name, method="ig") for name in ("static", "otsu")
    }
    answered = int(localised["n_known"]) / int(localised["n_queries"])
    yield f"{consistency['n']}, {int(localised['n_queries']):,} ({percent(answered)})"
    yield interval(consistency, "cs2")
    yield numbers(*control(1, "null", folder, model, GROUPS))
    yield numbers(*control(2, "noise", folder, model, ("variants", "neighbours"))) or "–"
    yield share(classes["static"], "R_II")
    noise = row(own, "all/otsu_null", method="ig")
    yield f"{percent(classes['otsu']['R_II'])} ({percent(noise['R_II'])})"


def changed_answers(folder, model):
    """What edits, attention and the rule of the integral do, the other rows."""
    own = of(folder, model)
    for neurons in ("local", "global", "cas", "local (random)"):
        done = erased(own, "ig", neurons)
        size = float(done["neurons_edited"])
        yield f"{percent(done['rel'], done['gen'], done['loc'])} ({size:.0f})"
    lost, said = (row(own, "ig/table2_loc", op=op, neurons="local") for op in ("erase", "update"))
    yield percent(lost["loc_same"], lost["loc_other"])
    updated = erased(own, "ig", op="update")
    yield percent(updated["rel"], updated["gen"], said["loc_new"])
    broken = row(own, "ig/table2", **ALL, op="update", neurons="local")["broken"]
    yield percent(broken) if broken else "–"
    most = rows(own, "ig/fig5_values", threshold="otsu")
    yield percent(*(of_all_facts(most, name) for name in ("predominance", "predominance_rest")))
    names = ("share in column 0", "jaccard", "jaccard_rest")
    first, every, rest = (row(own, "ig/synapses", quantity=name)["mean"] for name in names)
    yield f"{percent(first)}; {numbers(every, rest)}"
    paper, converged = (rows(own, "all/by_rule", rule=rule)[0] for rule in ("right", "converged"))
    yield f"{numbers(paper['jaccard'])}; {numbers(paper['cs2'], converged['cs2'])}"


def marks(folder, model):
    """A claim's mark by `ig` and, where it was run and differs, by `amig`."""
    for one in rows(folder, "scoreboard", model=model, method="ig"):
        others = rows(folder, "scoreboard", model=model, claim=one["claim"])
        if folder == VARIED:  # by `ig` alone; the other methods were run of the same facts
            others += rows(BUNDLED, "scoreboard", model=model, claim=one["claim"], method="amig")
        ran = {other["method"]: other["mark"] for other in others if other["mark"] != "not run"}
        by_amig = ran.get("amig", one["mark"])
        yield one["mark"] + f" (`amig`: {by_amig})" * (by_amig != one["mark"])


def cells(heading, path=FINDINGS):
    return [(*one.values(),) for one in readme_table(heading, path)]


def test_the_first_table_is_the_papers_and_the_committed_ones():
    assert cells("## What it finds on real models", "README.md") == [*first_table()]


def test_the_table_by_method_is_the_committed_ones():
    assert cells("## By method and facts") == [*by_method()]


def test_the_table_of_numbers_is_the_committed_one():
    table = readme_table("## In numbers", FINDINGS)
    for name, where in COLUMNS.items():
        assert [one[name] for one in table] == [*found_neurons(*where), *changed_answers(*where)]


def printed(op, neurons, columns=3):
    """Rel, Gen and Loc of the paper's GPT-2, by class."""
    values = PRINTED["3"]["rows"]
    edits = {name: values[f"gpt2|{op}|{neurons}|{name}"][:columns] for name in ("I", "II")}
    return "; ".join(f"{name}: {percent(*some)}" for name, some in edits.items())


def test_what_the_paper_found_is_what_it_prints():
    cs2, static = zip(*paper_agreement("static"))
    wanted = {
        1: ", ".join(numbers(one) for one in cs2),
        4: ", ".join(percent(one) for one in static),
        5: ", ".join(percent(one) for _, one in paper_agreement("otsu")),
        6: printed("erasure", "local"),
        7: printed("erasure", "global"),
        8: printed("erasure", "cas"),
        11: printed("update", "local", 2),
    }
    table = readme_table("## In numbers", FINDINGS)
    assert {place: table[place]["the paper"] for place in wanted} == wanted


def test_the_marks_of_the_claims_are_the_committed_ones():
    table = readme_table("## Which of the paper's claims hold", FINDINGS)
    for name, where in COLUMNS.items():
        assert [one[name] for one in table] == [*marks(*where)]


# --- sentences ------------------------------------------------------------------------------------
OWN = [of(KNOWN, SMALL), of(KNOWN, LARGE)]


def on_consistency():
    """README's points 1 to 5."""
    found = [row(own, "all/consistency", method="ig") for own in OWN]
    queries = [f"{int(row(own, 'ig/localisation')['n_queries']):,}" for own in OWN]
    asked = [f"({one['n']} facts, {n} queries)" for one, n in zip(found, queries)]
    yield "SmolLM2 {} first, then Gemma {}".format(*asked)
    yield "CS2 is {} and {}, in the".format(*(interval(one, "cs2") for one in found))
    cs2, static = zip(*paper_agreement("static"))
    yield f"in the paper {min(cs2):.2f} to {max(cs2):.2f}"  # of three models, by `ig`
    classes = [row(own, "all/table1", threshold="static", method="ig") for own in OWN]
    of_paper = f"({100 * min(static):.0f} to {100 * max(static):.0f} %)"
    yield "K_II are {} and {} of the facts {}".format(
        *(share(one, "R_II") for one in classes), of_paper
    )
    choices = "".join(told(r"(The static share .*)"))
    yield f"never more than {max(map(float, re.findall(r'([0-9.]+) % .', choices)))} % if KNs"

    static = r"^([\d.]+ % \[.*?\]) by the static class threshold"
    n = [row(of(EVERY, model), "all/consistency", method="ig")["n"] for model in (SMALL, LARGE)]
    every = "Of all {} and {:,} that they know it is {} and {}"
    yield every.format(n[0], int(n[1]), *told(static, EVERY))
    yield from on_relations()
    yield from on_all_known()

    (small, n_small), (large, n_large) = (capitals(BUNDLED, model) for model in (SMALL, LARGE))
    varied = f"In capitals CS2 is {small} and {large} by the bundled facts' words"
    yield f"{varied} (n = {n_small}, {n_large})"
    (first, n_first), (second, n_second) = (capitals(KNOWN, model) for model in (SMALL, LARGE))
    yield f"{first} and {second} by ParaRel's (n = {n_first}, {n_second})"
    yield f"of capitals alone CS2 is {small} for ParaRel's {first}, in Gemma {large} for {second}"
    apart = [capitals(KNOWN, model, inside=False) for model in (SMALL, LARGE)]
    yield "still for {} (n = {}) and {} (n = {})".format(*apart[0], *apart[1])
    bundled = [of(BUNDLED, model) for model in (SMALL, LARGE)]
    n = [row(own, "all/consistency", method="ig")["n"] for own in bundled]
    second = [row(own, "all/table1", threshold="static", method="ig") for own in bundled]
    second = [share(one, "R_II") for one in second]
    yield f"Of SmolLM2's {n[0]} bundled facts {second[0]} are K_II, of Gemma's {n[1]} {second[1]}"
    yield f"*Bundled facts*: {n[0]} and {n[1]} of this"

    better = r"against three others .*: (.*) more"
    gain = told(better)
    facts = told(better.replace("(.*)", ".*") + r" \(n = (\d+) and")
    yield "{} and {} higher than that of three".format(*gain)
    yield "of the same facts (n = {}, {})".format(*facts)

    otsu = [row(own, "all/table1", threshold="otsu", method="ig")["R_II"] for own in OWN]
    noise = [row(own, "all/otsu_null", method="ig")["R_II"] for own in OWN]
    yield "makes {} and {} of the facts K_II, and of normal noise {} and {}".format(
        *map(percent, [*otsu, *noise])
    )
    yield "CS2 of the other half by {} and {}; within".format(*told(r"by Otsu's (.*?) more"))
    assert all("cannot" in one for one in told(r"by Otsu's .* within relations (.*)"))

    one, wording, unrelated, relation = shared_by_kind(KNOWN)
    yield f"CS2 of three queries is {one} where one fact is"
    yield f"asked in three wordings, {wording} where three facts are asked in one"
    yield f"{relation} with only the relation in common, {unrelated} with nothing"
    one, wording, _, relation = shared_by_kind(BUNDLED)
    yield f"fact: {one} of one fact, {wording} of one wording, {relation} of the relation"


def on_relations():
    """Which relations K_II is of."""
    own = of(MANY, SMALL)
    facts = int(row(own, "all/consistency", method="ig")["n"])
    [most] = told(r"By the static threshold (\d+ % of these \d+) are", MANY, [SMALL])
    second = share(row(own, "all/table1", threshold="static", method="ig"), "R_II")
    yield f"Of {facts:,} facts, answered or not, SmolLM2 has {second}, and {most} are"
    for halves in rows(MANY, "control5_split_half"):
        n = int(halves["n_I"]) + int(halves["n_II"])
        yield f"Of {n:,} of SmolLM2's facts, answered or not, classes from half"
    static, otsu = "by the static threshold ", "by Otsu's "
    across = [told(f"{one}(.*?) more", MANY, [SMALL])[0] for one in (static, otsu)]
    yield "{} and, by Otsu's threshold, {}; within".format(*across)
    within = "[^;]* within relations (.*?) more"
    within = [told(one + within, MANY, [SMALL])[0] for one in (static, otsu)]
    yield "within relations by {} and {}. In the other runs, by".format(*within)
    table = rows(own, "all/cs2_by_relation")
    yield f"are instruments, continents and religions, 3 of {len(table)} relations"
    counted = {one["meaning"]: int(one["n"]) * float(one["R_II"]) for one in table}
    three = sorted(counted, key=counted.get)[:-4:-1]
    assert three == ["instrument", "continent", "religion"]
    shares = [percent(one["R_II"]) for one in table if one["meaning"] in three]
    yield "{} of the instruments, {} of the continents, {} of the religions".format(*shares)
    rest = [one for one in table if one["meaning"] not in three]
    n = sum(int(one["n"]) for one in rest)
    others = sum(map(counted.get, (one["meaning"] for one in rest))) / n
    yield f"{100 * others:.1f} % of the {n:,} facts of the others"
    yield f"from {numbers(table[0]['cs2'])} ({table[0]['meaning']}) to"
    yield f"to {numbers(table[-1]['cs2'])} ({table[-1]['meaning']})"


def on_all_known():
    """The details' item on all facts that the models know."""
    own = [of(EVERY, model) for model in (SMALL, LARGE)]
    found = [row(one, "all/consistency", method="ig") for one in own]
    cs2 = " and ".join(interval(one, "cs2") for one in found)
    yield "Of {} and {:,} CS2 is {}; of".format(*(int(one["n"]) for one in found), cs2)
    one, wording, unrelated, _ = shared_by_kind(EVERY)
    yield f"of three queries {one} where one fact is asked, {wording} in one wording, {unrelated}"
    better = r"against three others .*: (.*) more"
    gain = " and ".join(told(better, EVERY))
    facts = told(better.replace("(.*)", ".*") + r" \(n = (\d+) and", EVERY)
    yield f"share {gain} more than three others (n = {', '.join(facts)})"
    half = " and ".join(told(r"by Otsu's (.*?) more", EVERY))
    yield f"differ by {half} in the other half"
    assert all("cannot" in one for one in told(r"by Otsu's .* within relations (.*)", EVERY))
    three = []
    for one in own:
        n = sorted(int(one["n"]) for one in rows(one, "all/cs2_by_relation", method="ig"))
        three.append(percent(sum(n[-3:]) / sum(n)))
    yield "{} of SmolLM2's and {} of Gemma's are of three relations".format(*three)


def capitals(folder, model, inside=True):
    """CS2 of the capitals and how many they are; without those that their subject names, too."""
    found = []
    for one in rows(folder, "fig3_all", model=model, relation="P36"):
        _, subject, answer = one["fact"].split("|")
        if inside or answer.casefold() not in subject.casefold():
            found.append(float(one["cs2"]))
    return numbers(sum(found) / len(found)), len(found)


def shared_by_kind(folder):
    """CS2 of three queries of one kind, of both models."""
    kinds = (*GROUPS, RELATION)
    found = [control(1, "null", folder, model, kinds) for model in (SMALL, LARGE)]
    return [" and ".join(map(numbers, two)) for two in zip(*found)]


def on_changes():
    """README's points 6 to 10."""
    local, random, every, cas = (
        [erased(own, "ig", neurons) for own in OWN]
        for neurons in ("local", "local (random)", "global", "cas")
    )
    updated = [erased(own, "ig", op="update") for own in OWN]

    def two(edits, name):
        return both(*(one[name] for one in edits))

    yield f"{two(local, 'gen')} of the other wordings fail; in the paper's GPT-2"
    first, second = printed("erasure", "local").split("; ")
    first, second = (one.split(" / ")[1] for one in (first, second))
    yield f"GPT-2 {first} % for K_I, {second} % for K_II"
    kept = [float(one) for one in re.findall(r"/ (\d+) %", printed("erasure", "local"))]
    yield f"in GPT-2 {min(kept):.0f} to {max(kept):.0f} %"
    related = [row(own, "ig/table2_loc", op="erase", neurons="local") for own in OWN]
    yield f"Half of them are of the relation: of these {two(related, 'loc_same')} stay"
    yield f"Of other facts' answers {two(local, 'loc')} stay; after"
    yield f"random neurons' erasure {two(random, 'loc')}"
    said = [row(own, "ig/table2_loc", op="update", neurons="local") for own in OWN]
    broken = [row(own, "ig/table2", **ALL, op="update", neurons="local") for own in OWN]
    yield f"by {two(updated, 'rel')} of the edited wordings, {two(updated, 'gen')} of the others"
    yield f"{two(said, 'loc_new')} of unrelated queries; {two(broken, 'broken')} of texts break"

    off = []
    for pattern in (
        r"by -(\d+) % \[[^]]*\] when a query's own",
        r"not its own -(\d+) %",
        r"what they share -(\d+) %",
    ):
        off.append("{} and {} %".format(*told(pattern)))
    yield f"falls by {off[0]} without its own, by {off[1]} without the other wordings'"
    yield f"by {off[2]} without another fact's"
    sizes = {}
    for own, name in product(OWN, ("union_others", "self")):
        where = dict(threshold="static", queries="all", set=name, direction="average")
        size = row(own, "ig/fig4_controls", **where, **{"class": "I"})["size"]
        sizes.setdefault(name, []).append(numbers(size, digits=0))
    others, alone = (" and ".join(sizes[name]) for name in ("union_others", "self"))
    yield f"its own ({others} neurons for its {alone})"
    changes = [-float(one) for one in told(r"random ones (-?[\d.]+) %")]
    yield "by {:g} and {:g} % without random ones".format(*changes)

    synapses = [{one["quantity"]: one["mean"] for one in rows(o, "ig/synapses")} for o in OWN]
    first = both(*(one["share in column 0"] for one in synapses))
    yield f"{first} are columns of the first token"
    alike = " and ".join(numbers(one["jaccard"]) for one in synapses)
    yield f"(Jaccard index {alike})"
    none = percent(synapses[1]["no synapse_rest"])
    yield f"Without that token ({none} of Gemma's queries then have none)"
    yield "move the answer more: by {} and {}".format(*told(r"first token.* suppressed (.*?) more"))
    doubled = told(r"Own against irrelevant without the first token.* enhanced (.*)")
    assert "less" in doubled[0] and "cannot be told" in doubled[1]

    size = " and ".join(f"{float(one['neurons_edited']):.0f}" for one in cas)
    yield f"Erasing the {size} neurons of the consistency-aware score leaves {two(cas, 'loc')}"
    spared = f"one wording's KNs leave {two(local, 'loc')}, all wordings' {two(every, 'loc')}"
    yield f"{spared}; {two(cas, 'gen')} of the other wordings fail"
    gains = {}
    for own, metric in product(OWN, ("loc", "gen")):
        gap = row(own, "ig/cas_by_size", op="erase", facts="all facts", metric=metric)
        gains.setdefault(metric, []).append(interval(gap, "difference", digits=3))
    other, wordings = (" and ".join(gains[metric]) for metric in ("loc", "gen"))
    yield f"CAS gains {other} in other facts, {wordings} in other wordings"


def on_details():
    """README's frame, and the last section of the details."""
    known = []
    for own in OWN:
        facts = rows(own, "ig/known_facts")
        few, looked = (sum(int(one[name]) for one in facts) for name in ("known", "scanned"))
        known.append(f"{few} of {looked:,}")
    twelve = told(r"in (\d+ %) of the facts the answer")
    yield "out of {} and {}, it does in {} and {}".format(*known, *twelve)
    every = [known_facts(model) for model in (SMALL, LARGE)]
    (few, looked), (more, all_looked) = every
    assert looked == all_looked
    yield f"known to them, {few} and {more:,} of {looked:,};"
    yield f"SmolLM2 knows {few} of {looked:,} facts looked at, Gemma {more:,}; of"
    inside = told(r"in (\d+ %) of the facts the answer", EVERY)
    yield "the subject holds the answer in {} and {} of these".format(*inside)
    yield "the answer stands in the subject in {} and {}, as".format(*inside)
    small, large = (row(of(ANY, model), "ig/localisation") for model in (SMALL, LARGE))
    yield f"({small['n_known']} and {large['n_known']} of {int(large['n_queries']):,})"
    kinds = ("neighbours", "variants")
    same = [control(2, "noise", KNOWN, model, kinds) for model in (SMALL, LARGE)]
    same = [" and ".join(map(numbers, one)) for one in same]
    yield f"({same[0]} by `ig`, 12 facts), in Gemma less ({same[1]})"
    varied = " and ".join(map(numbers, control(2, "noise", VARIED, SMALL, kinds)))
    yield f"and SmolLM2's bundled ones far less ({varied})"
    one, _, unrelated = map(numbers, control(1, "null", KNOWN, SMALL, GROUPS, "amig"))
    kept = percent(erased(OWN[0], "amig")["loc"])
    shared = f"three unrelated queries share {unrelated}, three of one fact {one}"
    yield f"{shared}: there the erasure of one wording's KNs leaves {kept}"
    [within] = told(r"by Otsu's .*, within relations (.*?) more", ANY, [SMALL])
    yield f"fact of SmolLM2, by `ig` ({within})"
    yield from on_controls()
    yield from on_site()
    yield from on_sizes()
    yield "lowers P(answer), too, by {} in SmolLM2 and {} in".format(
        *told(r"Enhanced, .*? by -(\d+ %)")
    )
    gaps = list(gaps_by_size())
    limits = [(float(gap["difference_low"]), float(gap["difference_high"])) for gap in gaps]
    clear = [gap for gap, (low, high) in zip(gaps, limits) if not low <= 0 <= high]
    losses, gains = [], []
    for gap in clear:
        value = float(gap["difference"])
        (gains if value > 0 else losses).append(abs(value))
    yield f"{len(gains)} gains of {min(gains):.2f} to {max(gains):.2f}"
    yield f"and {len(losses)} losses of {min(losses):.2f} to {max(losses):.2f}"
    yield f"Of {len(gaps)} such gaps of all runs {len(clear)} can be told"
    moved = []
    for folder in (KNOWN, ANY):
        rules = [rows(of(folder, one), "all/by_rule", method="ig") for one in (SMALL, LARGE)]
        moved.append(max(abs(float(one["cs2"]) - float(other["cs2"])) for one, other in rules))
    yield "CS2 moves by at most {:.2f} (12 known facts) and {:.2f} (10 of *any*)".format(*moved)
    by_amig = []
    for own in OWN:
        rules = {one["rule"]: one for one in rows(own, "all/by_rule", method="amig")}
        sizes = (numbers(rules[name]["mean_size"], digits=0) for name in ("right", "converged"))
        by_amig += [numbers(rules["right"]["jaccard"]), " in place of ".join(sizes)]
    yield "a Jaccard index of {} with the converged ones in SmolLM2 ({} neurons)".format(*by_amig)
    yield "of {} in Gemma ({}; 12 known facts each)".format(*by_amig[2:])
    assert rules["right"]["n"] == "12"
    yield "relations resampled, CS2 is {} and {}".format(*told(r"relations resampled .*: (.*?) \("))
    where = dict(model="demo/gpt2", method="ig", threshold="static")
    alike = row("sample", "table1_all", **where)
    assert float(alike["R_I"]) == 1  # so that K_I's mean is that of all facts
    where = dict(model="demo/gpt2", **ALL, op="erasure", neurons="local")
    fail = percent(row("sample", "table2_all", **where)["gen"])
    cs2 = numbers(alike["S_I"])
    yield f"(`demo/gpt2`: CS2 {cs2}), but erasing one wording's neurons makes only {fail}"
    by_ig = [[mark.split(" (")[0] for mark in marks(KNOWN, model)] for model in (SMALL, LARGE)]
    for mark, words in (("holds", "hold in both models"), ("does not hold", "in neither")):
        same = [str(n) for n, two in enumerate(zip(*by_ig), 1) if two == (mark, mark)]
        yield f"{', '.join(same)} {words}"


def on_site():
    """What changes where neurons are read as pre-activations, of the same facts."""
    facts = {one["fact"]: one["cs2"] for one in rows(of(SITE, SMALL), "all/fig3") if one["cs2"]}
    here = [one for one in rows(of(ANY, SMALL), "all/fig3", model=SMALL) if one["fact"] in facts]
    sides = [list(map(float, one)) for one in (facts.values(), (one["cs2"] for one in here))]
    assert len(sides[0]) == len(sides[1])
    cs2 = [numbers(sum(side) / len(side)) for side in sides]
    second = [percent(sum(value <= 0.1 for value in side) / len(side)) for side in sides]
    there = interval(row(of(SITE, SMALL), "all/consistency", method="ig"), "cs2")
    assert there.startswith(cs2[0])
    yield f"pre-activations, of {len(sides[0])} facts CS2 is {there} and K_II {second[0]}"
    yield f"in place of {cs2[1]} and {second[1]}"


def on_sizes():
    """The same facts in models of three sizes."""
    own = [of(SIZES, model) for model in MODELS.values()]
    found = [row(one, "all/consistency", method="ig") for one in own]
    second = [row(one, "all/table1", threshold="static", method="ig") for one in own]
    [n] = {one["n"] for one in found}
    cs2 = ", ".join(interval(one, "cs2") for one in found)
    yield f"Of the same {n} facts, answered or not, CS2 is {cs2} and K_II"
    yield "and K_II {}, {} and {} in SmolLM2".format(*(share(one, "R_II") for one in second))
    larger = [numbers(one) for one, _ in paper_agreement("static")]
    yield "the paper's CS2 falls with the size, from {} over {} to {}".format(*larger)
    kinds = (GROUPS[0], GROUPS[2])
    shared = (control(1, "null", SIZES, model, kinds) for model in MODELS.values())
    one, unrelated = (", ".join(map(numbers, three)) for three in zip(*shared))
    yield f"Three queries share {one} where they ask for one fact, {unrelated} where nothing is"
    localised = [row(one, "ig/localisation") for one in own]
    [queries] = {one["n_queries"] for one in localised}
    answered = "{}, {} and {}".format(*(one["n_known"] for one in localised))
    yield f"answer {answered} of the {queries} queries"
    where = dict(claim="3", part="lower CS")
    lower = [row(SIZES, "claims", model=model, **where)["verdict"] for model in (LARGE, LARGEST)]
    assert lower == ["the opposite holds", "cannot be told"]
    yield "From the first to the second it rises, from there no change can be told"


def on_controls():
    """What Otsu's threshold makes of noise, and edits of neurons that are no KNs of the fact."""
    places = []  # -1, 0, 1: below, within and above what noise gives
    for path in paths.FIGURES.glob("*/pretrained--*/all/otsu_null.csv"):
        own = path.parent.relative_to(paths.FIGURES)
        for noise in rows(own, "otsu_null"):
            otsu = row(own, "table1", threshold="otsu", method=noise["method"])["R_II"]
            low, high = (float(noise[f"R_II_{end}"]) for end in ("low", "high"))
            places.append((float(otsu) > high) - (float(otsu) < low))
    again = row(of(VARIED, SMALL), "all/otsu_null", method="ig")
    assert again == row(of(BUNDLED, SMALL), "all/otsu_null", method="ig")  # the same run
    places.remove(1)
    yield f"In {places.count(0)} of {len(places)} runs of a model and method Otsu's"
    yield f"in {places.count(-1)} it lies below, in {places.count(1)} above"
    kept, sizes = {}, {}
    for own, name in product(OWN, ("", " (random)", " (matched)", " (same_relation)")):
        edit = row(own, "ig/edit_controls", op="erasure", neurons=f"local{name}")
        assert edit["n"] == "18"
        kept.setdefault(name, []).append(edit["loc"])
        sizes.setdefault(name, []).append(float(edit["neurons_edited"]))
    kns, random, active, other = (both(*shares) for shares in kept.values())
    yield f"Of 18 facts a model, the erasure of one wording's KNs leaves {kns} of other"
    yield f"of as many random neurons {random}, of as many that are as active {active}, and"
    few = [f"{n:.0f} for {of:.0f}" for n, of in zip(sizes[" (same_relation)"], sizes[""])]
    yield f"the fact's own ({' and '.join(few)}), {other}"


def known_facts(model):
    """Of all of ParaRel: how many facts the model knows, and of how many it was asked."""
    note = (paths.FIGURES / EVERY / "in_short.md").read_text("utf-8")
    kept, _, looked = re.search(rf"{model} (\d+) kept, (\d+) known of (\d+)", note).groups()
    return int(kept), int(looked)


def gaps_by_size():
    """What CAS gains over as many neurons, in the other wordings and in other facts: a row a run of
    a real model, method and operation, where there are facts enough for an interval."""
    for path in paths.FIGURES.glob("*/pretrained--*/*/cas_by_size.csv"):
        with path.open(encoding="utf-8") as file:
            for gap in csv.DictReader(file):
                if gap["facts"] == "all facts" and gap["metric"] in ("gen", "loc"):
                    if gap["difference_low"]:
                        yield gap


@pytest.mark.parametrize("about", [on_consistency, on_changes, on_details])
def test_every_measured_number_is_the_committed_one(about):
    text = " ".join(f"{README} {DETAILS}".split())
    found = list(about())
    assert len(found) > 10 and [one for one in found if one not in text] == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_the_rules_is_the_measured_table(method):
    cells = [f"`{method}`"]
    for rule in ("`right` 20 (the paper)", "`converged`"):
        for model in list(MODELS)[:2]:
            heading = f"## {model}, `{method}`"
            table = readme_table(heading, "tests/benchmarks/results/rules.md")
            two = {one["queries"]: one for one in table if one["rule"] == rule}

            def pair(name, two=two):
                return f"{two['answered'][name]} / {two['other'][name]}"

            evaluations = f" by {pair('evaluations')}" * (rule == "`converged`")
            cells.append(pair("mean Jaccard index") + evaluations)
    assert f"| {' | '.join(cells)} |" in README.splitlines()
