"""What the page is made of when nothing has summed it up before, or when several folders come together."""

import html
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl
from reports import BASE, PROXY, TWO, compared, rewrite, steady, write

from rlkl.grid import compare, plan
from rlkl.report import build, facets, figures, svg
from rlkl.report.figures import kept, peak
from rlkl.report.load import load
from rlkl.tracking import read_rows

WHITE = {"on": {"credit": {"whiten_advantages": True}}, "off": {"credit": {"whiten_advantages": False}}}
EXACT = {
    "key": "k",
    "frontier": [{"beta": 9.0, "kl": 0.0, "gold": 0.3}, {"beta": 0.1, "kl": 4.0, "gold": 0.9}],
    "horizons": [{"horizon": 2, "beta": 0.1, "kl": 2.0, "gold": 0.5}],
    "mass": 1.0,
    "prompts": 2,
}


def test_a_page_made_again_states_what_the_comparison_did(tmp_path, capsys):
    folder = compared(
        tmp_path, WHITE, [0, 1, 2], steady, budgets={"tokens": 50000}, tuning={"on": 3, "off": 3}, match_kl=1.0
    )
    path = folder / "on,seed=1/metrics.jsonl"
    rows = list(read_rows(path))
    write_jsonl(path, [*rows[:-1], {**rows[-1], "budget/ended/tokens": 1.0}])
    compare.conclude(plan.make(folder / "compare.yaml"), {})
    summary = json.loads((folder / "summary.json").read_text())
    os.utime(path, (4e9, 4e9))  # written after the summary
    again = load([folder]).summary
    assert json.loads(json.dumps(again)) == summary
    assert again["flags"][0]["key"] == "credit.whiten_advantages"
    assert (again["budgets"], again["tuning"]) == ({"tokens": 50000.0}, {"on": 3, "off": 3})
    assert {name for name, run in again["runs"].items() if run["ended"] == "tokens"} == {"on,seed=1"}


def test_the_exact_frontier_is_read_where_its_gold_is_asked_for(tmp_path):
    rewards = {**BASE["rewards"], "proxy": {**BASE["rewards"]["gold"], "weight": 0}}
    arms = {arm: {**changes, "rewards": rewards} for arm, changes in TWO.items()}
    folder = compared(tmp_path, arms, [0], steady)
    (folder / "exact.json").write_text(json.dumps(EXACT))
    found = load([folder]).summary
    assert found["exact"] == EXACT["frontier"] and found["exact_horizons"] == EXACT["horizons"]
    assert found["area"]["normaliser"] == "exact"
    (folder / "exact.json").write_text("{")
    assert load([folder]).summary["exact"] is None
    (folder / "exact.json").write_text(json.dumps(EXACT))
    other = load([folder], gold="proxy").summary
    assert other["exact"] is None and other["area"]["normaliser"] == "range"


def test_runs_that_an_interrupted_overwrite_left_as_they_were_count_nowhere(tmp_path):
    folder = compared(tmp_path, TWO, [0], steady)
    text = (folder / "compare.yaml").read_text()
    (folder / "compare.yaml").write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.004"))
    data = load([folder])
    assert [member.name for member in data.failed] == ["high,seed=0"]
    assert data.failed[0].error == (
        "finished with optimiser.learning_rate 0.002, now 0.004; compare again with --overwrite to redo the run"
    )
    assert [row["finished"] for row in data.summary["arms"].values()] == [1, 0]


@pytest.mark.parametrize("harm", ["deleted", "unfinished"])
def test_a_run_that_is_gone_since_the_summary_counts_in_no_mean(tmp_path, harm):
    folder = compared(tmp_path, TWO, [0, 1, 2, 3], steady)
    compare.conclude(plan.make(folder / "compare.yaml"), {})
    shutil.rmtree(folder / "high,seed=2" if harm == "deleted" else folder / "high,seed=2/final")
    data = load([folder])
    assert [m.name for m in data.failed] == ["high,seed=2"]
    assert data.summary["arms"]["high"]["gold"]["n"] == 3


@pytest.mark.parametrize("text", ['{"runs": ', "[]", "{}", "3", '{"runs": [], "factors": []}'])
def test_a_damaged_summary_is_made_anew(tmp_path, text):
    folder = compared(tmp_path, TWO, [0], steady)
    (folder / "summary.json").write_text(text)
    assert load([folder]).summary["arms"]["high"]["gold"]["mean"] == pytest.approx(0.69)


@pytest.mark.parametrize("text", ['{"rlk', "[1]"])
def test_a_damaged_environment_is_named_and_left_out(tmp_path, text):
    folder = compared(tmp_path, TWO, [0, 1], steady)
    (folder / "low,seed=1/env.json").write_text(text)
    page = said([folder], tmp_path / "page.html")
    assert f"Damaged, and left out here: {folder / 'low,seed=1/env.json'}." in page
    assert load([folder]).summary["arms"]["low"]["gold"]["n"] == 2
    for run in ("low,seed=0", "high,seed=0", "high,seed=1"):
        (folder / run / "env.json").write_text(text)
    assert "No run has written its environment" not in said([folder], tmp_path / "page.html")


def test_runs_that_never_leave_their_reference_are_drawn(tmp_path):
    """Their exact KL is 0 but for rounding, which may be below it."""
    folder = compared(tmp_path, TWO, [0, 1, 2], steady)
    for run in (*folder.glob("low,*"), folder / "high,seed=0"):
        rewrite(run, lambda row: {**row, "kl/sequence": -1e-9})
    assert "low 0.300 to 0.500 at 0 nats" in build.report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    for run in folder.glob("high,*"):
        rewrite(run, lambda row: {**row, "kl/sequence": -1e-9})
    assert "high 0.300 to 0.700 at 0 nats" in build.report([folder], tmp_path / "page.html").read_text(encoding="utf-8")


def test_several_comparisons_keep_what_they_say_is_compared(tmp_path):
    axes = {"kl.beta": [0.05, 0.2]}
    one = compared(tmp_path / "1", WHITE, [0], steady, name="one", compared=["credit.whiten_advantages"])
    other = compared(
        tmp_path / "2", TWO, [0], steady, name="two", axes=axes, match_kl=2.0, tuning={"low": 2}, columns=["time/step"]
    )
    data = load([one, other])
    config = data.plan.config
    assert data.summary["flags"] == []
    assert (config.axes, config.match_kl, config.columns) == (axes, None, ["time/step"])
    assert data.summary["tuning"] == {"one/on": None, "one/off": None, "two/low": 2, "two/high": None}
    page = build.page(data, [str(one), str(other)])
    assert "nobody has said that they are what is compared" not in page
    assert "one/on not said" in page and "two/low 2" in page


def test_a_run_that_is_named_twice_counts_once_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = compared(tmp_path, TWO, [0, 1], steady)
    run = "page/low,seed=1"
    Path("link").symlink_to(folder / "low,seed=1")
    for folders, ways in (
        (["page", run], f"{run}: named twice, in the comparison page and as a run"),
        (["link", str(folder)], f"{folder}/low,seed=1: named twice, as a run and in the comparison {folder}"),
        (["page/", "page"], "page/low,seed=0: named twice, in the comparison page"),
        ([run, "link"], "link: named twice, as a run"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(ways)}; name it once$"):
            load(folders)
    shutil.copytree(run, "copy")
    with pytest.raises(ValueError, match=r"^copy: the same run as another folder \(arm low, seed 1\); name it once$"):
        load([run, "copy"])
    assert len(load([run, "page/high,seed=1"]).members) == 2


def test_a_single_run_beside_a_comparison_takes_nothing_from_it(tmp_path):
    made = compared(tmp_path, WHITE, [0], steady, name="one", compared=["credit"], match_kl=2.0)
    config = {**BASE, "name": "alone", "optimiser": {"learning_rate": 3e-3}}
    write(tmp_path / "alone", config, lambda kl: 0.3, 0)
    data = load([made, tmp_path / "alone"])
    assert data.arms == ["one/on", "one/off", "alone"]
    assert (data.summary["flags"], data.summary["match_kl"], data.summary["budgets"]) == ([], 2.0, {})


def test_budgets_that_all_have_are_said_of_all(tmp_path):
    made = [
        compared(tmp_path / name, TWO, [0], steady, name=name, budgets={"steps": 20}, axes={"kl.beta": [beta]})
        for name, beta in (("one", 0.1), ("two", 0.2))
    ]
    assert load(made).summary["budgets"] == {"steps": 20}
    text = yaml.safe_load((made[1] / "compare.yaml").read_text())
    text["budgets"]["steps"] = 19
    Path(made[1] / "compare.yaml").write_text(yaml.safe_dump(text))
    assert load(made).summary["budgets"] == {}


def thirty(folder: Path, arms: int, seeds: int, evaluations: int) -> Path:
    """A comparison whose runs have as many evaluations, of gold and a proxy, and samples that fill their room."""
    changes = {f"arm{k}": {"optimiser": {"learning_rate": 1e-3 * (k + 1)}, **PROXY} for k in range(arms)}
    made = compared(folder, changes, range(seeds), steady)
    for run in made.glob("*,seed=*"):
        draw = random.Random(run.name)
        one = next(iter(read_rows(run / "metrics.jsonl")))
        each = list(read_rows(run / "evaluations.jsonl"))[-1]
        rows = [
            {**one, "step": k, "kl/sequence": 4 * k / evaluations + draw.random() / 9, "reward/labels": 64.0 * k}
            for k in range(evaluations)
        ]
        noisy = (
            "reward/eval/gold",
            "reward/eval/proxy",
            "policy/eval/entropy",
            "policy/eval/distinct_2",
            "policy/eval/self_bleu",
            "policy/eval/length",
        )
        rows = [
            row | {name: draw.random() for name in noisy} | {"tokens/generated": 4096.0 * row["step"]} for row in rows
        ]
        write_jsonl(run / "metrics.jsonl", rows)
        write_jsonl(run / "evaluations.jsonl", [{**each, "step": row["step"]} for row in rows])
        samples = list(read_rows(run / "samples.jsonl"))
        for row in samples:
            row["tokens"] = {name: values * 30 for name, values in row["tokens"].items()}
        write_jsonl(
            run / "samples.jsonl", [{**row, "prompt": f"{row['prompt']} {k}"} for row in samples for k in range(15)]
        )
    return made


@pytest.mark.parametrize(("arms", "seeds"), [(10, 3), (30, 1)])
def test_thirty_runs_of_a_thousand_evaluations_stay_below_two_megabytes(tmp_path, arms, seeds):
    folder = thirty(tmp_path, arms, seeds, 1000)
    page = build.report([folder], tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    said = page.read_text(encoding="utf-8")
    assert said.count("against KL</figcaption>") == 2 and "more prompts left out" in said
    assert ("left out here" in said) == (arms == 30)


def test_a_line_keeps_its_ends_and_its_extremes():
    xs, ys = range(1000), [0.0] * 1000
    ys[0], ys[313], ys[700], ys[999] = 5.0, 9.0, -9.0, 4.0
    some, values = kept(xs, ys, 200)
    assert 100 < len(some) <= 200 and list(some) == sorted(some)
    assert {(0, 5.0), (313, 9.0), (700, -9.0), (999, 4.0)} <= set(zip(some.tolist(), values.tolist(), strict=True))
    assert [list(one) for one in kept([1, 2], [3, 4], 200)] == [[1, 2], [3, 4]]


GRID = {
    "bundles": {
        "source": {"score": {}, "more": {"optimiser.weight_decay": 0.1}, "most": {"optimiser.weight_decay": 0.2}}
    },
    "axes": {"kl.beta": [0.05, 0.2]},
}


def test_many_arms_are_drawn_in_panels_of_one_factor_with_bands(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady, **GRID)
    text = build.report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles[:3] == [f"Gold against KL, source {x}" for x in ("score", "more", "most")]
    frontier = text.split('<section id="frontier">')[1].split("</section>")[0]
    assert "a panel for each source, a colour for each arm, a dash for each beta" in frontier
    assert frontier.count("fill-opacity: 0.14") == 12  # a band an arm
    arms = plan.make(folder / "compare.yaml").arms
    looks = facets.looks({arm: runs[0].of for arm, runs in arms.items()}, "source")
    assert [
        (looks[f"{arm},source=most,beta={beta}"].colour, looks[f"{arm},source=most,beta={beta}"].dash)
        for arm in TWO
        for beta in (0.05, 0.2)
    ] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_bands_are_cut_at_what_a_quantity_can_be(tmp_path, monkeypatch):
    folder = compared(tmp_path, TWO, [0, 1, 2], steady)
    for seed, factor in ((0, 0.1), (1, 0.1), (2, 3.0)):
        for arm in TWO:
            rewrite(
                folder / f"{arm},seed={seed}",
                lambda row, factor=factor: (
                    row | {"kl/sequence": factor * row["kl/sequence"], "policy/eval/self_bleu": 0.33 * factor}
                ),
            )
    seen: list[Any] = []
    monkeypatch.setattr(svg, "embed", lambda figure, name: seen.append(figure.axes[0]) or "")
    data = load([folder])
    styles = svg.styles({arm: arm for arm in data.arms})
    bands = {}
    for key in ("kl", "policy/eval/self_bleu", "gold"):
        figures.curve(data, styles, "one", ("step", "step"), key, key, key)
        ends = [part.get_paths()[0].vertices[:, 1] for part in seen[-1].collections]
        bands[key] = [(float(y.min()), float(y.max())) for y in ends]
    assert [low for low, _ in bands["kl"]] == [0.0, 0.0] and all(high > 10 for _, high in bands["kl"])
    assert bands["policy/eval/self_bleu"] == [(0.0, 1.0), (0.0, 1.0)]
    assert [len(each) for each in bands.values()] == [2, 2, 2]
    zero, one, four = seen[0].transData.transform([(0, 0), (0, 1), (0, 4)])[:, 1]
    assert four - zero == pytest.approx(2 * (one - zero))  # of KL, on a root scale
    zero, half, whole = seen[2].transData.transform([(0, 0), (0, 0.5), (0, 1)])[:, 1]
    assert whole - zero == pytest.approx(2 * (half - zero))


def test_panels_are_made_only_where_they_help():
    assert facets.factor([f"a,beta={k}" for k in range(8)]) is None
    assert facets.factor([f"arm{k}" for k in range(12)]) is None
    grid = [f"{arm},source={x},beta={b}" for arm in "abcd" for x in ("s", "m", "l") for b in (1, 2)]
    assert facets.factor(grid) == "arm"
    assert facets.factor([name for name in grid if name[0] in "abc"]) == "source"
    assert facets.panels(["a,x=1", "b,x=2", "c,x=1"], "x") == {"x 1": ["a,x=1", "c,x=1"], "x 2": ["b,x=2"]}


def said(folders: list[Path], output: Path, gold: str | None = None) -> str:
    """The text of a page, white space as one blank."""
    text = build.report(folders, output, gold).read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<wbr>|<(style|script).*?</\1>|<[^>]+>", "", text, flags=re.S)).split())


def test_the_iqm_and_every_kind_of_interval_stand_in_the_table(tmp_path):
    text = said([compared(tmp_path, TWO, [0, 1, 2], steady)], tmp_path / "page.html")
    assert "0.400 [0.375, 0.425] (3 of 3)IQM 0.400 [0.375, 0.425]" in text
    assert (
        "interval3 seeds meanStudent's t95.6 %, at worst 86.7 % IQMStudent's t of the jackknife95.5 %, at worst" in text
    )
    assert (
        "difference of two armsWelch96.6 %, at worst 96.6 % probability of improvementNewcombeat worst 90.3 %" in text
    )
    assert "KL is in nats a sequence: exact at every token, averaged over samples" in text
    assert "difference of a factor's values" not in text
    uneven = compared(
        tmp_path / "grid", TWO, [0, 1, 2], lambda arm, seed, kl: 0.3 + 0.01 * seed * len(arm) * kl, **GRID
    )
    text = said([uneven], tmp_path / "page.html")
    assert "difference of a factor's valuesStudent's t over seeds95.5 %, at worst 95.5 %" in text


def test_an_unreachable_kl_is_named_and_leaves_the_rest(tmp_path):
    text = said([compared(tmp_path, TWO, [0, 1, 2], steady, match_kl=1000.0)], tmp_path / "page.html")
    assert "No run gets to 1000 nats (match_kl); the furthest is at 4 nats." in text
    assert "fewer than 3 seeds" not in text and "they held the true mean in 95.6 %" in text
    assert "up to 1,000 nats, on the √KL axis, level where a run ends before" in text
    text = text.replace("IQM 0.500 [0.475, 0.525]", "")
    assert "tokens low0.3000.400 [0.375, 0.425]" in text and "0.500 [0.475, 0.525]4 [4, 4]" in text


def test_means_over_fewer_runs_than_there_are_say_so_everywhere(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1, 2, 3], steady)
    (folder / "high,seed=3/final/README.md").unlink()
    page = build.report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    table = page.split("where each run first gets to a KL")[1].split("</table>")[0]
    high = table.split("<tr>")[3]
    assert high.count("(3 of 4)") == high.count("<td>") == 7
    area = page.split("Mean height of the frontier")[1].split("</table>")[0]
    assert area.count("(3 of 4)") == 2
    assert "high (3 of 4 runs) 0.300 to" in page


def test_how_far_evaluations_lie_apart_stands_with_each_arm(tmp_path):
    folder = compared(tmp_path, TWO, [0, 1], steady)
    path = folder / "low,seed=0/metrics.jsonl"
    rows = list(read_rows(path))
    write_jsonl(path, [{**rows[0], "kl/sequence": -1e-9}, {**rows[-1], "kl/sequence": 12.7}])
    path.with_name("evaluations.jsonl").unlink()
    table = (
        said([folder], tmp_path / "page.html").split("farthest apart of a run of the arm")[1].split("Between two")[0]
    )
    low, high = table.split("high", 1)
    assert low.count("around: 0–12.7 nats") == 3
    assert [high.count(f"around: {text}") for text in ("0–1 nat", "1–2 nats")] == [1, 1]
    assert "12.7" not in high


def test_tuning_runs_that_nobody_stated_are_said_to_be_not_said(tmp_path):
    text = said([compared(tmp_path, TWO, [0], steady)], tmp_path / "page.html")
    assert "Runs spent on choosing settings: not said." in text


@pytest.mark.parametrize(
    ("law", "found", "shown"),
    [
        ("logarithmic", 3.9e-111, None),
        ("logarithmic", 0.5, None),
        ("logarithmic", 2.0, 2.0),
        ("quadratic", 0.5, 0.5),
        ("quadratic", 5.0, None),
        ("quadratic", None, None),
    ],
)
def test_a_peak_that_no_evaluations_surround_is_none(law, found, shown):
    assert peak(law, {"peak_kl": found}, [0.0, 1.0, 4.0]) == shown


def test_trained_on_gold_and_not_measured_are_told_apart(tmp_path):
    rewards = {
        "gold": {"weight": 0},
        "marks": {"type": "annotations", "labeller": "rlkl.tasks.facts:annotate", "weights": {"right": 1.0}},
    }
    folder = compared(tmp_path, {"golden": {}, "marked": {"rewards": rewards}}, [0], steady)
    text = said([folder], tmp_path / "page.html")
    assert "Trained on gold itself, so that there is no proxy to over-optimise: golden." in text
    assert "a score not kept): marked." in text
    assert "Fits of gold" in text
    alone = said([compared(tmp_path / "b", {"golden": {}}, [0], lambda arm, seed, kl: 0.3)], tmp_path / "one.html")
    assert "no proxy to over-optimise: every run." in alone
    assert "· 1 run " in alone and "· 1 runs" not in alone and " 1 nats" not in alone


def test_every_run_has_its_command_and_files_their_own_names(tmp_path):
    made = [
        compared(tmp_path / name, TWO, [0], steady, name=name, axes={"kl.beta": [beta]})
        for name, beta in (("one", 0.1), ("two", 0.2))
    ]
    singles = []
    for k in range(14):
        config = {**BASE, "name": f"run{k}", "optimiser": {"learning_rate": 1e-3 * (k + 3)}}
        write(tmp_path / f"run{k}", config, lambda kl: 0.3, 0)
        singles.append(tmp_path / f"run{k}")
    text = said([*made, *singles], tmp_path / "page.html", "gold")
    assert "rlkl compare one.yaml" in text and "rlkl compare two.yaml" in text and "compare.yaml" not in text
    assert "14 single runs" in text
    assert [k for k in range(14) if f"rlkl train run{k},seed=0.yaml" not in text] == []
    assert f"{singles[-1]} --gold gold -o report.html" in text


def test_panels_beyond_the_first_twelve_are_folded_not_lost(tmp_path):
    arms = {f"arm{k}": {"optimiser": {"learning_rate": 1e-3 * (k + 1)}, **PROXY} for k in range(13)}
    page = build.report([compared(tmp_path, arms, [0], steady)], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<summary>The other 1 arm</summary>" in page
    assert [k for k in range(13) if f"<figcaption>arm{k}</figcaption>" not in page] == []
