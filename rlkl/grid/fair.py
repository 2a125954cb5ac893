"""What makes a comparison unfair without anybody having meant it: keys in which arms differ beside what is compared.

Torch-free.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from rlkl import settings
from rlkl.config import Config
from rlkl.grid.plan import Plan

Flag = dict[str, Any]
"""A key, its values by arm (of the arms that read it), as summary.json holds it."""


def in_force(config: Config) -> dict[str, Any]:
    """Whitening and clipping of rewards, normaliser, gamma, lambda, and the penalty's place, estimator and window.

    Only where they are read.
    """
    credit, kl, kind = config.credit, config.kl, config.trainer.type
    values: dict[str, Any] = {}
    for name, source in config.rewards.items():
        if source.weight:
            values |= {f"rewards.{name}.{key}": getattr(source, key) for key in ("whiten", "clip")}
    if kind in ("reinforce", "ppo"):
        names = ("whiten_rewards", "whiten_advantages", "normaliser")
        values |= {f"credit.{name}": getattr(credit, name) for name in names}
        if credit.advantage == "gae":
            values["credit.lambda"] = credit.lambda_
    if kind != "dpo":
        values["credit.gamma"] = credit.gamma
    if kl.beta > 0 and not config.holds_beta:
        values |= {"kl.placement": kl.placement, "kl.estimator": kl.estimator}
        if kl.placement == "reward":
            values["kl.window"] = kl.resolved_window(credit.horizon)
    return values


def flags(plan: Plan) -> list[Flag]:
    """The keys in which arms differ and that are no axis, in no bundle and not under ``compared``.

    Arms that were tuned with more runs than others are flagged too, where that was said.
    """
    first = {arm: runs[0].config for arm, runs in plan.arms.items()}
    values = {arm: in_force(config) for arm, config in first.items()}
    meant = list(_meant(plan))
    found: list[Flag] = []
    for key in dict.fromkeys(key for one in values.values() for key in one):
        by_arm = {arm: one[key] for arm, one in values.items() if key in one}
        follows = key == "kl.window" and len({config.kl.window for config in first.values()}) == 1
        if len({settings.show(x) for x in by_arm.values()}) > 1 and not _covered(key, meant):
            if follows and _covered("credit.horizon", meant):
                continue  # the window's default follows from the horizon, which is what is compared
            found.append({"key": key, "values": by_arm})
    tuning = plan.config.tuning
    if len(set(tuning.values())) > 1 and not _covered("tuning", meant):
        found.append({"key": "tuning", "values": dict(tuning)})
    return found


def told(flag: Flag) -> str:
    """A flag on one line, arms of a value together."""
    groups: dict[str, list[str]] = {}
    for arm, value in flag["values"].items():
        groups.setdefault(settings.show(value), []).append(arm)
    parts = [
        f"{value} in {len(arms)} arms" if len(arms) > 3 else f"{value} ({', '.join(arms)})"
        for value, arms in groups.items()
    ]
    return (
        f"warning: arms differ in {flag['key']}: {', '.join(parts)}; if that is what you compare, list it under "
        "compared, else make it equal"
    )


def check(plan: Plan) -> None:
    """Refuse an entry of ``compared`` that is no key of a run.

    Raises:
        ValueError: it names the entry.
    """
    known = {key for runs in plan.arms.values() for key in settings.decisive(runs[0].config)} | {"tuning"}
    for key in plan.config.compared:
        if not any(_covered(one, [key]) for one in known):
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"compared: {key}: no such key" + (f", did you mean {close[0]}?" if close else ""))


def _meant(plan: Plan) -> Iterator[str]:
    config = plan.config
    yield from config.compared
    yield from config.axes
    for values in config.bundles.values():
        yield from (key for changes in values.values() for key in _keys(changes))


def _keys(changes: Mapping[str, Any]) -> Iterator[str]:
    return (key for key, _ in settings.flat(changes))


def _covered(key: str, meant: list[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in meant)
