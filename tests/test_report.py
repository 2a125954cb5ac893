"""The page of a comparison: its answers, its figures, and that what runs wrote cannot act in it."""

import itertools
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import BASE, HOSTILE, TWO, alike, compared, rewrite, steady, write

from rlkl.cli import main
from rlkl.report import build, svg
from rlkl.report.build import report
from rlkl.report.load import load
from rlkl.report.shown import shown

VOID = {"wbr", "meta", "br", "img", "input", "link", "hr", "path", "use", "line", "rect"}


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


def test_an_arm_that_has_collapsed_leaves_the_others_their_colours(tmp_path):
    folder = compared(tmp_path, {**TWO, "wild": {"optimiser": {"learning_rate": 0.1}}}, [0], steady)

    def wild(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "tokens": {**row["tokens"], "kl": [20.0 * x for x in row["tokens"]["kl"]]}}

    rewrite(folder / "wild,seed=0", wild, "samples")
    found = shown(load([folder]))
    assert max(x for one in found.numbers for x in one["kl"]) > 10
    assert 0.5 < found.scale["kl"] <= 1
    assert found.scale["advantage"] == 0.5


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
        ([str(folder), "--gold", "golt"], "--gold golt: no run has a reward of that name; there are gold\n"),
        ([str(folder), "-o", str(tmp_path)], "is a folder; name a file"),
        ([str(folder), "-o", str(tmp_path / "no" / "page.html")], "there is no folder"),
        ([str(folder), str(folder)], "named twice, in the comparison"),
    ):
        assert main(["report", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_names_break_behind_their_marks_and_not_inside_a_number():
    assert build._breakable("token_a,beta=0.001,<x>") == "token_<wbr>a,<wbr>beta=<wbr>0.001,<wbr>&lt;x&gt;"
    assert build._breakable("train.budget/x") == "train.<wbr>budget/<wbr>x"


def test_a_file_that_is_no_page_is_never_replaced(folder, tmp_path, capsys):
    there = tmp_path / "summary.json"
    there.write_text('{"name": "page"}')
    assert main(["report", str(folder), "-o", str(there)]) == 2
    said = capsys.readouterr().err
    assert said.strip().endswith(
        f"summary.json: is there and is no page; name another output, such as {tmp_path / 'report.html'}"
    )
    assert said.count("\n") == 1 and there.read_text() == '{"name": "page"}'
    old = tmp_path / "old.html"
    for text in ("\n<!DOCTYPE HTML><p>an older page", ""):
        old.write_text(text)
        assert main(["report", str(folder), "-o", str(old)]) == 0
        assert old.read_text(encoding="utf-8").startswith("<!doctype html>")
    os.mkfifo(pipe := tmp_path / "pipe")
    assert main(["report", str(folder), "-o", str(pipe)]) == 2
    assert pipe.is_fifo() and "is there and is no page" in capsys.readouterr().err
    (link := tmp_path / "link.html").symlink_to(old)
    old.write_text("")
    assert main(["report", str(folder), "-o", str(link)]) == 0
    assert link.is_symlink() and old.read_text(encoding="utf-8").startswith("<!doctype html>")


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
