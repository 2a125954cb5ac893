"""Best of n: which completions are kept, in which order, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import RECORDS, Tree, varied
from test_joint import JOINT

from rlkl.cli import main
from rlkl.search import search


@pytest.fixture
def config(tiny_config: Tree) -> Path:
    path = Path("search.yaml")
    one = {"type": "function", "path": "test_search:length", "weight": 0}
    path.write_text(yaml.safe_dump({**tiny_config, "rewards": {**tiny_config["rewards"], "length": one}}))
    return path


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_best_of_n_are_the_best_of_all_that_were_drawn(config: Path) -> None:
    every = search(config, prompts=2, samples=12, best=99)
    best = search(config, prompts=2, samples=12, best=2)
    assert [*Counter(row["prompt"] for row in best).values()] == [2, 2]
    for prompt in {row["prompt"] for row in every}:
        ours = [row for row in every if row["prompt"] == prompt]
        assert [row["score"] for row in ours] == sorted((row["score"] for row in ours), reverse=True)
        assert [row["rank"] for row in ours] == list(range(1, len(ours) + 1))
        assert sum(row["drawn"] for row in ours) == 12 and len({row["completion"] for row in ours}) == len(ours)
        assert [row for row in best if row["prompt"] == prompt] == ours[:2]
    for row in every:
        assert row["score"] == pytest.approx(varied([row["prompt"]], [row["completion"]])[0])
        assert row["shares"] == {"varied": pytest.approx(row["score"]), "length": float(len(row["completion"]))}


def test_the_command_prints_a_table_and_writes_the_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", str(config), "--samples", "4", "--best", "1", "-o", "best.jsonl"]
    assert main(words) == 0
    rows = [json.loads(line) for line in Path("best.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == search(config, prompts=3, samples=4, best=1)
    said = capsys.readouterr().out
    assert all(word in said for word in ("prompt", "drawn", "score", "length")) and not Path("runs").exists()
    assert main(words) == 2 and "best.jsonl: exists" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_as_many_prompts_are_searched_as_are_asked_for_and_held_out(config: Path) -> None:
    tree = {**yaml.safe_load(config.read_text()), "evaluate": {"prompts": 1}}
    config.write_text(yaml.safe_dump(tree))
    counts = [len({row["prompt"] for row in search(config, prompts=n, samples=2, best=1)}) for n in (1, 2, 99)]
    assert counts == [1, 2, round(len(RECORDS) * tree["data"]["held_out"])]


def test_what_is_yet_to_be_taught_ranks_nothing(config: Path, tiny_model: Path) -> None:
    taught = {"type": "learned", "path": str(tiny_model), "labeller": "test_search:length", "budget": 8}
    joint = {**JOINT, "scorer": str(tiny_model)}
    for source in (taught, joint):
        with pytest.raises(ValueError, match=r"rewards.model: it learns .* and a search trains nothing"):
            search(config, [f"rewards={yaml.safe_dump({'model': source}, default_flow_style=True, width=9999)}"],
                   prompts=1, samples=2, best=1)  # fmt: skip
