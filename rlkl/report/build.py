"""The page: what it shows, put together for its template, and the file that is written."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import rlkl
from rlkl import settings
from rlkl.data import files
from rlkl.grid import cost, fair, plan
from rlkl.report import facets, figures, matched, svg
from rlkl.report.answers import answers
from rlkl.report.commands import commands
from rlkl.report.figures import Figure
from rlkl.report.load import Data, load
from rlkl.report.shown import shown
from rlkl.report.words import cell, number, signed, told

COLLAPSE = {
    "policy/eval/entropy": ("Entropy", "nats a token"),
    "policy/eval/distinct_2": ("Distinct bigrams", "share"),
    "policy/eval/self_bleu": ("Self-BLEU", "share"),
    "policy/eval/length": ("Length", "tokens"),
}
HERE = Path(__file__).parent
MOST_PANELS = 12


def report(folders: Sequence[str | Path], output: str | Path, gold: str | None = None) -> Path:
    """Write the page of comparisons and runs to ``output``, which is replaced as a whole.

    Raises:
        ValueError: a folder is neither, nothing in it can be reported, the page cannot be written, or another file is
            in its place.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file, such as {path / 'report.html'}")
    if path.exists() and not (path.is_file() and _is_page(path)):
        raise ValueError(
            f"{path}: is there and is no page; name another output, such as {path.with_name('report.html')}"
        )
    text = page(load(folders, gold), [str(folder) for folder in folders], gold)
    files.write(path.resolve(), text, overwrite=True)  # where a link leads to
    return path


def _is_page(path: Path) -> bool:
    """Whether a file begins as HTML does; an empty one holds nothing that could be lost."""
    with open(path, "rb") as file:
        head = file.read(1024).lstrip()
    return not head or head.lower().startswith((b"<!doctype html", b"<html"))


def page(data: Data, folders: Sequence[str], gold: str | None = None) -> str:
    """The page as one HTML document that asks for nothing else; ``gold`` where it was asked for by name."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "cell": cell,
        "mean": _mean,
        "iqm": _iqm,
        "rough": matched.rough,
        "signed": signed,
        "breakable": _breakable,
        "json": _json,
    }
    environment.tests |= {"told": told, "drawn": lambda arm, data: bool(data.of(arm))}
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html").render(
        **context(data, folders, gold),
        style=Markup(style),  # our own files; all else is escaped
        script=Markup(script),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def context(data: Data, folders: Sequence[str], gold: str | None = None) -> dict[str, Any]:
    """What the template names."""
    by = facets.factor(data.arms)
    styles = facets.looks({arm: runs[0].of for arm, runs in data.plan.arms.items()}, by)
    seeds = sorted({member.seed for member in data.members})
    over = _over(data, styles)
    return {
        "version": rlkl.__version__,
        "name": data.summary["name"],
        "gold": data.gold,
        "data": data,
        "summary": data.summary,
        "styles": styles,
        "seeds": seeds,
        "answers": answers(data),
        "ends": matched.ends(data),
        "apart": matched.apart(data),
        "short": matched.short(data),
        "held": matched.held(data),
        "panels": facets.said(data.arms, by),
        "frontier": _frontier(data, styles),
        "curves": _curves(data, styles),
        "over": over,
        "most_panels": MOST_PANELS,
        "without_panel": matched.without_panel(data, [figure.title for figure in over]),
        "fits": _fits(data),
        "collapse": _collapse(data, styles),
        "profile": figures.profile(data, styles),
        "ended": cost.endings(data.summary),
        "shown": shown(data),
        "differs": plan.diff(data.plan) if len(data.arms) > 1 else {},
        "flags": [fair.told(flag).removeprefix("warning: ") for flag in fair.flags(data.plan)],
        "budgets": cost.caps(data.plan),
        "shared": _shared(data),
        "environments": _environments(data),
        "damaged": [str(member.folder / "env.json") for member in data.members if member.environment is None],
        "commands": commands(data, folders, gold),
    }


def _mean(found: Mapping[str, float] | None, beside: Mapping[str, float] | None = None) -> str:
    return number(found["mean"], (beside["mean"],) if beside else ()) if found else "–"


def _iqm(found: Mapping[str, Any]) -> str:
    inside = found["iqm_interval"]
    ends = (inside["low"], inside["high"]) if inside else ()
    middle, *rest = (number(x, (found["iqm"], *ends)) for x in (found["iqm"], *ends))
    return f"{middle} [{', '.join(rest)}]" if rest else middle


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break behind its marks, but not inside a number."""
    return Markup(re.sub(r"([_,/=]|\.(?!\d))", r"\1<wbr>", str(escape(name))))


def _json(value: Any) -> Markup:
    """JSON inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _frontier(data: Data, styles: dict[str, svg.Style]) -> list[list[Figure]]:
    made = [figures.frontier(data, styles, "gold", figures.called(data))]
    return _rows([*made, figures.frontier(data, styles, "proxy", "proxy (what is trained on)")])


def _rows(made: Sequence[list[Figure]]) -> list[list[Figure]]:
    """Figures of one panel in a row, small multiples in rows of their own."""
    if all(len(one) < 2 for one in made):
        made = [[figure for one in made for figure in one]]
    return [one for one in made if one]


def _curves(data: Data, styles: dict[str, svg.Style]) -> list[list[Figure]]:
    gold = figures.called(data)
    wanted = [
        ("step", "step", "gold", gold, "gold by step"),
        ("step", "step", "kl", "KL, nats a sequence (√ scale)", "KL by step"),
    ]
    wanted.append(("labels", "labels of training", "gold", gold, "gold by labels"))
    wanted.append(("tokens", "training tokens sampled", "gold", gold, "gold by tokens"))
    rows = [run["evaluations"][-1] for run in data.summary["runs"].values() if run.get("evaluations")]
    used = [one for one in wanted if any(row.get(one[0]) for row in rows)]
    made = [
        figures.curve(data, styles, f"curve{k}", (x, xlabel), key, label, f"{title[0].upper()}{title[1:]}")
        for k, (x, xlabel, key, label, title) in enumerate(used)
    ]
    return _rows(made)


def _over(data: Data, styles: dict[str, svg.Style]) -> list[Figure]:
    made = (figures.overoptimisation(data, arm, styles[arm], k) for k, arm in enumerate(data.arms))
    return [one for one in made if one]


def _fits(data: Data) -> list[tuple[str, str, Mapping[str, Any], float | None]]:
    """Arm, law, fit of gold, and its peak where evaluations surround it."""
    found = []
    for arm, row in data.summary["arms"].items():
        kls = [point["kl"] for rows in data.lines(arm).values() for point in rows]
        for law, fit in ((row.get("fits") or {}).get("gold") or {}).items():
            if fit:
                found.append((arm, law, fit, figures.peak(law, fit, kls)))
    return found


def _collapse(data: Data, styles: dict[str, svg.Style]) -> list[list[Figure]]:
    made = []
    for key, (title, unit) in COLLAPSE.items():
        name = key.rpartition("/")[2]
        made.append(figures.curve(data, styles, name, ("step", "step"), key, f"{title}, {unit}", f"{title} by step"))
    return _rows(made)


def _shared(data: Data) -> str:
    """The settings in which all arms agree, as dotted keys."""
    runs = [settings.decisive(runs[0].config) for runs in data.plan.arms.values()]
    same = {key: x for key, x in runs[0].items() if key != "seed" and all(one.get(key, runs) == x for one in runs)}
    return yaml.safe_dump(same, sort_keys=False, allow_unicode=True, width=10**6)


def _environments(data: Data) -> list[tuple[str, dict[str, str]]]:
    """Machines and versions, each with the runs that were made there."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for member in data.members:
        known = {key: x for key, x in (member.environment or {}).items() if key != "command"}
        if known:
            flat = {key: str(x) for key, x in settings.flat(known)}
            found.setdefault(json.dumps(flat), ([], flat))[0].append(member.name)
    total = sum(len(names) for names, _ in found.values())
    return [("all runs" if len(names) == total else ", ".join(names), flat) for names, flat in found.values()]
