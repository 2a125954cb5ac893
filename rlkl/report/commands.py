"""What makes the runs and the page again."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from rlkl.report.load import Data


class Command(NamedTuple):
    """What it makes, the line, and the file that it needs with what is in it."""

    makes: str
    line: str
    file: str = ""
    text: str = ""


def commands(data: Data, folders: Sequence[str], gold: str | None = None) -> dict[str, list[Command]]:
    """``first``: of every comparison and of the page; ``runs``: of every run that belongs to no comparison."""
    several = len(data.compared) > 1
    made = []
    for name, text in data.compared.items():
        file = f"{name}.yaml" if several else "compare.yaml"
        made.append(Command(f"the comparison {name}", shlex.join(["rlkl", "compare", file]), file, text))
    singles = []
    for member in data.members:
        if member.single:
            file, text = f"{member.name}.yaml", (member.folder / "config.yaml").read_text(encoding="utf-8")
            singles.append(Command(member.name, shlex.join(["rlkl", "train", file]), file, text))
    chosen = ["--gold", gold] if gold else []
    line = shlex.join(["rlkl", "report", *folders, *chosen, "-o", "report.html"])
    return {"first": [*made, Command("this page", line)], "runs": singles}
