"""summary.json as a whole, whether the comparison has just ended or its page is made again."""

from collections.abc import Mapping
from typing import Any

from rlkl.grid import cost, fair, statements
from rlkl.grid.plan import Plan
from rlkl.grid.results import Result


def stated(
    made: Plan, found: Mapping[str, Result], ended: Mapping[str, str | None], exact: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the runs came to, with the exact frontier where there is one, flags, budgets and tuning.

    Args:
        made: the comparison.
        found: run -> what it came to.
        ended: run -> the cap that ended it, None where none did.
        exact: what exact.json holds: ``frontier`` and ``horizons``.
    """
    summary = statements.summary(made, found, exact["frontier"] if exact else None)
    summary |= {"exact_horizons": exact["horizons"]} if exact else {}
    summary |= {"flags": fair.flags(made), "budgets": cost.caps(made), "tuning": cost.tuning(made)}
    for name, run in summary["runs"].items():
        run["ended"] = ended[name] if run["error"] is None else None
    return summary
