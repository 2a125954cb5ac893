"""The page of a comparison: its answers, its figures, and that what runs wrote cannot act in it."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import BASE, HOSTILE, compared, write

from rlkl.cli import main
from rlkl.report import svg
from rlkl.report.answers import answers
from rlkl.report.build import report
from rlkl.report.load import load
from rlkl.report.shown import shown
from rlkl.report.words import listed, number, versus

TWO = {"low": {}, "high": {"optimiser": {"learning_rate": 0.002}}}
VOID = {"wbr", "meta", "br", "img", "input", "link", "hr", "path", "use", "line", "rect"}


def steady(arm: str, seed: int, kl: float) -> float:
    """``high`` is .2 above ``low`` at 4 nats, .1 at 1 nat; seeds differ by a hundredth."""
    return 0.3 + (0.2 if arm.startswith("high") else 0.1) * kl**0.5 + 0.01 * (seed - 1)


def alike(arm: str, seed: int, kl: float) -> float:
    """Arms that differ by less than their seeds."""
    return 0.3 + 0.1 * kl**0.5 + 0.05 * (seed - 1) + (0.001 if arm.startswith("high") else 0.0)


class Reader(HTMLParser):
    """Tags with their attributes, in order, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.said += data


def asked(folder: Path) -> dict[str, str]:
    """Questions and answers of one comparison."""
    return {one.question: " ".join([one.answer, *one.points]) for one in answers(load([folder]))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared(tmp_path_factory.mktemp("runs"), TWO, [0, 1, 2], steady)


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return report([folder], folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_html_that_asks_for_nothing(page):
    reader = Reader(page)
    assert reader.open == []
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    links = {
        value for _, a in reader.tags for key, value in a.items() if key in ("src", "href", "xlink:href", "action")
    }
    assert {link for link in links if link and not link.startswith("#")} == set()
    assert "url(http" not in page and "@import" not in page


def test_headings_descend_one_level_at_a_time(page):
    levels = [int(tag[1]) for tag, _ in Reader(page).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_every_figure_has_words_with_numbers_in_them(page):
    images = [a for _, a in Reader(page).tags if a.get("role") == "img"]
    assert len(images) >= 8
    assert all(re.search(r"\d", str(a["aria-label"])) for a in images)
    assert any("high 0.300 to 0.700 at 4 nats" in str(a["aria-label"]) for a in images)


def test_ids_are_unique_and_links_inside_the_page_lead_somewhere(page):
    tags = Reader(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {
        str(v)[1:] for _, a in tags for k, v in a.items() if k in ("href", "xlink:href") and str(v).startswith("#")
    }
    assert links <= set(ids)


def test_what_a_model_wrote_cannot_act(page):
    reader = Reader(page)
    assert HOSTILE in reader.said
    assert HOSTILE not in page
    assert [tag for tag, _ in reader.tags if tag == "img"] == []
    assert len([tag for tag, _ in reader.tags if tag == "script"]) == 2  # its numbers, and its own script
    assert [key for _, a in reader.tags for key in a if key.startswith("on")] == []


def test_numbers_of_tokens_travel_as_json_that_cannot_end_its_element(tmp_path):
    folder = compared(tmp_path, TWO, [0], steady)
    for path in folder.glob("*/samples.jsonl"):
        path.write_text(path.read_text().replace('"reward/gold": [', '"reward/</script><!--": ['))
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    held = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in held
    data = json.loads(held)
    assert set(data["numbers"][0]) == {"kl", "logp", "ref_logp", "reward/</script><!--", "advantage"}
    assert data["scale"]["reward/</script><!--"] == 1.0


def test_the_best_arm_is_named_with_interval_and_probability(folder):
    found = asked(folder)
    said = found["Which arm gets the most gold at 1 nat?"]
    assert said.startswith("high, with 0.500 [0.475, 0.525]: shown to be above low")
    assert "+0.100 [" in said and "probability of improvement 1 [" in said
    assert found["Which arm gets the most gold at 5 nats?"].startswith("No run gets there; the furthest is one of ")


def test_no_difference_is_said_in_words(tmp_path):
    found = asked(compared(tmp_path, TWO, [0, 1, 2], alike))
    assert found["Which arm gets the most gold at 1 nat?"].startswith("No difference can be told: high has the highest")


def test_fewer_than_three_seeds_have_no_interval_and_say_so(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1], steady)
    said = asked(folder)["Which arm gets the most gold at 1 nat?"]
    assert said.startswith(
        "high has the highest mean, 0.495 (0.490–0.500). With 2 seeds in an arm there is no interval"
    )
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There are fewer than 3 seeds" in page and "held the true mean" not in page


def test_the_penalty_is_weighed_within_arms_that_differ_in_beta_alone(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], alike, axes={"kl.beta": [0.05, 0.2]})
    said = asked(folder)["What does the KL penalty buy?"]
    assert "low,beta=0.05 → low,beta=0.2 (β from 0.05 to 0.2): KL at the end goes from 4 " in said
    assert "high,beta=0.05 → high,beta=0.2" in said
    assert "low,beta=0.05 → high" not in said
    assert "At equal KL, gold: no difference can be told in 2." in said


def test_a_question_is_corrected_for_its_own_pairs_and_no_others(tmp_path):
    """Four arms make six pairs a place, two of which differ in beta alone."""
    shift = {"low,beta=0.05": 0.0, "low,beta=0.2": 0.1, "high,beta=0.05": 0.0, "high,beta=0.2": 0.1}

    def law(arm: str, seed: int, kl: float) -> float:
        return 0.3 + shift[arm] * kl**0.5 + 0.02 * (seed - 1)

    data = load([compared(tmp_path, TWO, [0, 1, 2], law, axes={"kl.beta": [0.05, 0.2]})])
    (said,) = [one for one in answers(data) if one.question == "What does the KL penalty buy?"]
    at = next(place for place in data.summary["matched"]["kl"] if place["at"] == 2)
    (pair,) = [p for p in at["pairs"] if (p["a"], p["b"]) == ("low,beta=0.05", "low,beta=0.2")]
    assert f"p\u00a0=\u00a0{number(2 * pair['p'])} after Holm" in said.points[0]


def test_factors_are_told_apart_the_rest_being_equal(tmp_path):
    def law(arm: str, seed: int, kl: float) -> float:
        worth = 0.2 * arm.startswith("high") + 0.001 * seed * arm.startswith("high")
        return 0.3 + worth * kl**0.5 + 0.05 * seed + (0.04 + 0.001 * seed**2) * arm.endswith("0.2")

    folder = compared(tmp_path, TWO, [0, 1, 2], law, axes={"kl.beta": [0.05, 0.2]})
    found = {one.question: one for one in answers(load([folder]))}
    arms = found["Which arm gets the most gold, the rest being equal?"]
    assert arms.answer == "3 of 3 differences are shown."
    assert arms.points[0] == "at 1 nat high is above low by 0.201"
    assert arms.details[0].startswith("at 1 nat, high against low: +0.201 [+0.1")
    assert "in 2 of 2 combinations" in arms.details[0]
    betas = found["Which beta gets the most gold, the rest being equal?"]
    assert betas.points[-1] == "at the end beta 0.2 is above beta 0.05 by 0.042"
    assert not any(
        "the rest being equal" in question for question in asked(compared(tmp_path / "b", TWO, [0, 1, 2], law))
    )


def test_where_one_arm_overtakes_another_is_found_between_two_budgets(tmp_path):
    def crossing(arm: str, seed: int, kl: float) -> float:
        budget = float(arm.split("queries=")[1])
        better = (budget > 250) == arm.startswith("high")
        return 0.3 + (0.2 if better else 0.1) * kl**0.5 + 0.002 * (seed - 1)

    folder = compared(tmp_path, TWO, [0, 1, 2], crossing, axes={"train.budget.queries": [100, 200, 300, 400]})
    said = asked(folder)["At what label budget does one of low and high overtake the other?"]
    assert said.startswith("high overtakes low between 200 and 300 labels: at 100 labels low leads; at 200 labels low")


def test_gold_that_falls_under_a_rising_proxy_is_reported(tmp_path):
    def hacked(arm: str, seed: int, kl: float) -> float:
        return 0.5 + 0.2 * kl - (0.08 if arm.startswith("high") else 0.0) * kl**2 + 0.001 * seed

    proxy = {"type": "function", "path": "rlkl.tasks.facts:gold"}
    arms = {arm: {**changes, "rewards": {"gold": {"weight": 0}, "proxy": proxy}} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0, 1, 2], hacked)
    said = asked(folder)["Is gold lost while the proxy still rises?"]
    assert said.startswith("high: in 3 of 3 runs, by 0.600 on average after the best evaluation, at 1 nat")
    assert "low" not in said
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "quadratic fit of gold peaks at 0.540 nats" in page.replace("\n", " ")


def test_runs_that_crashed_diverged_or_never_ended_are_named_and_count_nowhere(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2, 3, 4, 5], steady)
    (folder / "high,seed=3/final/README.md").unlink()
    (folder / "high,seed=3/error.txt").write_text("Traceback\n  a line\nRunError: the <b>reward</b> raised\n")
    (folder / "high,seed=4/final/README.md").unlink()
    rows = (folder / "high,seed=5/metrics.jsonl").read_text().splitlines()
    row = {**json.loads(rows[-1]), "reward/eval/gold": None}
    (folder / "high,seed=5/metrics.jsonl").write_text("\n".join([*rows[:-1], json.dumps(row)]) + "\n")
    data = load([folder])
    assert {m.name: m.error for m in data.failed} == {
        "high,seed=3": "RunError: the <b>reward</b> raised",
        "high,seed=4": "not finished: step 20 of 20",
        "high,seed=5": "diverged: reward/eval/gold is not finite at step 20",
    }
    assert data.summary["arms"]["high"]["gold"]["n"] == 3
    text = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "RunError: the &lt;b&gt;reward&lt;/b&gt; raised" in text


def test_runs_of_their_own_become_arms_by_their_names(tmp_path):
    for name, seed, rate in (("a,seed=0", 0, 1e-3), ("a,seed=1", 1, 1e-3), ("b", 0, 2e-3)):
        config = {**BASE, "name": name, "seed": seed, "optimiser": {"learning_rate": rate}}
        write(tmp_path / name, config, lambda kl: 0.3 + 0.1 * kl, seed)
    data = load([tmp_path / "a,seed=0", tmp_path / "a,seed=1", tmp_path / "b"])
    assert {arm: [m.seed for m in data.of(arm)] for arm in data.arms} == {"a": [0, 1], "b": [0]}
    assert data.summary["arms"]["a"]["gold"]["mean"] == pytest.approx(0.7)


def test_comparisons_beside_each_other_keep_their_arms_apart(tmp_path):
    one = compared(tmp_path / "one", TWO, [0], steady, name="one")
    other = compared(tmp_path / "two", TWO, [0], alike, name="two")
    data = load([one, other])
    assert data.arms == ["one/low", "one/high", "two/low", "two/high"]
    assert data.summary["arms"]["one/high"]["gold"]["mean"] == pytest.approx(0.69)
    report([one, other], tmp_path / "page.html")


def test_a_folder_that_was_moved_is_read_where_it_is(tmp_path):
    folder = compared(tmp_path / "old", TWO, [0], steady)
    moved = folder.rename(tmp_path / "new")
    assert [m.error for m in load([moved]).members] == [None, None]


def test_samples_stand_side_by_side_once_before_training_and_once_an_arm(folder):
    found = shown(load([folder]))
    seed, prompt, cells = found.prompts[0]
    assert (seed, prompt) == (0, f"Prompt 0 of seed 0 {HOSTILE}")
    assert [cell.who for cell in cells] == ["before training", "low", "high"]
    assert found.seeds == [0, 1, 2]
    assert list(found.measures) == ["kl", "advantage", "reward/gold"]


def test_thirty_runs_with_long_samples_stay_below_two_megabytes(tmp_path):
    arms = {f"arm{k}": {"optimiser": {"learning_rate": 1e-3 * (k + 1)}} for k in range(10)}
    folder = compared(tmp_path, arms, [0, 1, 2], steady)
    for path in folder.glob("*/samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:  # completions of 840 tokens, 30 prompts
            row["tokens"] = {name: values * 30 for name, values in row["tokens"].items()}
        lines = [json.dumps({**row, "prompt": f"{row['prompt']} {k}"}) for row in rows for k in range(15)]
        path.write_text("\n".join(lines) + "\n")
    page = report([folder], tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    assert re.search(r"\d+ more prompts left out", page.read_text(encoding="utf-8"))


def test_settings_environment_and_commands_stand_on_the_page(folder, page):
    said = " ".join(Reader(page).said.split())
    assert re.search(r"optimiser.learning_rate *0.0001 *0.002", said)
    assert "rlkl compare compare.yaml" in said and "rlkl report" in said
    assert re.search("torch *1", said)
    held = re.search(r"<summary>compare.yaml</summary><pre[^>]*>(.*?)</pre>", page, re.S)
    assert held is not None
    assert yaml.safe_load(held[1].replace("&#39;", "'").replace("&#34;", '"'))["arms"] == TWO


def test_the_command_writes_the_page_and_refuses_what_is_no_run(folder, tmp_path, capsys):
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for wrong, said in (
        ([str(tmp_path)], "neither a run (config.yaml) nor a comparison"),
        ([str(folder), "--gold", "golt"], "has no reward called golt"),
        ([str(folder), "-o", str(tmp_path)], "is a folder; name a file"),
        ([str(folder), "-o", str(tmp_path / "no" / "page.html")], "cannot be written"),
        ([str(folder), str(folder)], "the same run as another folder"),
    ):
        assert main(["report", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_figure_is_valid_xml_whose_colours_are_the_page_s():
    figure, axis = svg.axes()
    axis.plot([0, 1], [0, 1], **svg.styles({"a": "a"})["a"].line)
    axis.set_xlabel("$100 < 200 & 0.06125")
    text = svg.embed(figure, "one")
    root = ElementTree.fromstring(text.replace("xlink:href", "href"))
    assert root.tag == "svg"
    assert "$100 &lt; 200 &amp; 0.06125" in text
    assert "var(--arm0)" in text and 'class="arm-0"' in text and svg.ARMS[0] not in text
    assert "var(--ink)" in text and "font-family" not in text


def test_arms_of_a_family_share_a_colour():
    found = svg.styles({"a,beta=1": "a", "a,beta=2": "a", "b,beta=1": "b"})
    looks: list[Any] = [(style.colour, style.dash) for style in found.values()]
    assert looks == [(0, 0), (0, 1), (1, 0)]
    assert [style.colour for style in svg.styles({"x=1": "x", "x=2": "x"}).values()] == [0, 1]


def test_a_comparison_of_two_arms_reads_both_ways():
    pair = {
        "a": "one",
        "b": "two",
        "n": [3, 4],
        "difference": 0.2,
        "interval": [0.1, 0.4],
        "p": 0.01,
        "p_holm": 0.02,
        "improvement": 0.9,
        "improvement_interval": [0.6, 0.95],
        "prompts": {"n": 8, "difference": 0.2, "interval": [0.1, 0.3]},
    }
    turned = versus([pair], "two", "one")
    assert turned is not None
    assert turned["interval"] == [-0.4, -0.1]
    assert turned["improvement"] == pytest.approx(0.1)
    assert turned["improvement_interval"] == pytest.approx([0.05, 0.4])
    assert turned["prompts"]["interval"] == [-0.3, -0.1]
    assert versus([pair], "one", "two") == pair
    assert versus([pair], "one", "three") is None


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (None, "–"),
        (0, "0"),
        (1.0, "1"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (123.4, "123.4"),
        (2560.0, "2,560"),
        (1e-5, "1.0e-05"),
    ],
)
def test_numbers_read_well(x, said):
    assert number(x) == said


def test_many_names_are_counted():
    assert listed(["a"]) == "a"
    assert listed(list("abcd")) == "a, b, c and d"
    assert listed(list("abcdef")) == "a, b, c and 3 more"
