"""matplotlib's SVG as part of a page: colours are the page's own variables, text is text, and little else is left."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlkl.plots import MARKERS

ARMS = ("#0b62c4", "#b8430a", "#15743a", "#7a35dd", "#b3185f", "#0c6f86", "#7a5000", "#4d5566")
"""Colours of arms; the page has a variable for each, with other values on a dark ground."""
INK, SOFT, LINE = "#101418", "#5b6470", "#c9cfd6"
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", **{colour: f"arm{k}" for k, colour in enumerate(ARMS)}}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere: ``colour`` indexes ARMS, ``dash`` DASHES, ``index`` names its class."""

    index: int
    colour: int
    dash: int

    @property
    def line(self) -> dict[str, Any]:
        """Of a line of it."""
        return {"color": ARMS[self.colour], "linestyle": DASHES[self.dash], "gid": f"arm-{self.index}"}

    @property
    def marker(self) -> str:
        """Of its points."""
        return MARKERS[self.index % len(MARKERS)]


def styles(arms: Mapping[str, str]) -> dict[str, Style]:
    """A colour a family of arms (the arm without its axes), a dash a member; both repeat if they must."""
    families = list(dict.fromkeys(arms.values()))
    if len(families) == 1:
        return {arm: Style(k, k % len(ARMS), k // len(ARMS) % len(DASHES)) for k, arm in enumerate(arms)}
    found = {}
    for k, (arm, family) in enumerate(arms.items()):
        place = [other for other, of in arms.items() if of == family].index(arm)
        turn, colour = divmod(families.index(family), len(ARMS))
        found[arm] = Style(k, colour, (place + 2 * turn) % len(DASHES))
    return found


def axes(width: float = 4.7, height: float = 3.3) -> tuple[Any, Any]:
    """A figure of one panel, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rlkl", "text.parse_math": False})
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
    axis.grid(color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    return figure, axis


def embed(figure: Any, name: str) -> str:
    """The figure as an ``<svg>`` for the page, closed after it; ``name`` keeps its ids apart from those of others."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return clean(buffer.getvalue(), name)


def clean(text: str, name: str) -> str:
    """An SVG file of matplotlib as an element of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', text))
    text = re.sub(r' id="arm-(\d+)"', r' class="arm-\1"', text)
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.I)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.S)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: [^;\"]*?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'(?<= d=")[^"]*', lambda m: re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}", m[0]), text)
    text = re.sub(
        r'(?<==")[^"]*\d\.\d{3}[^"]*', lambda m: re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", m[0]), text
    )
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = re.sub(r'(?<= d=")[ML\d\s.z-]+(?=")', lambda m: m[0].replace("\nL ", " "), text)  # after M comes L
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    (box,) = re.findall(r'viewBox="([^"]+)"', head[0])
    return f'<svg viewBox="{box}" aria-hidden="true" focusable="false">{text[head.end() :].strip()}'
