"""The documents say what is there: keys, links, files and the configurations that they name."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from rlkl import reference, settings
from rlkl.config import dump
from rlkl.grid import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("rlkl", "trainers", "rewards", "configs", "docs", "benchmarks")


def test_the_page_of_keys_is_current():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference.page() + "\n", "run: python -m rlkl.reference > docs/config.md"


def test_every_key_has_a_meaning():
    bare = [line for line in reference.page().splitlines() if re.match(r"\| `[\w.<>]+` \|", line)]
    assert len(bare) > 60
    assert [line for line in bare if line.endswith("|  |")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_the_tree_in_the_readme_is_the_tree():
    """Every source, configuration and document stands there once, and nothing else."""
    tree = re.search(r"^```tree\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert tree is not None
    named, folder = [], Path()
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = Path(*folder.parts[:depth])
        if name.endswith("/"):
            folder = folder / name.rstrip("/")
        else:
            named.append(str(folder / name))
        assert len(line.split()) > 1 or name.endswith("/"), f"{name}: says nothing"
    there = [
        p for top in FOLDERS for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix not in (".pyc", ".typed")
    ]
    linked = [ROOT / "rlkl" / "trainers", ROOT / "rlkl" / "rewards"]
    kept = {str(p.relative_to(ROOT)) for p in there if not any(p.is_relative_to(link) for link in linked)}
    assert sorted(named) == sorted(kept)


def test_the_snippets_of_comparisons_are_one_whole_with_or_without_what_is_left_out(tmp_path):
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    tree = yaml.safe_load("".join(re.findall(r"```yaml\n(.*?)```", page, re.S)[:2]))
    tree |= {"base": str(ROOT / "configs" / tree["base"]), "folder": str(tmp_path)}
    assert len(plan.make(tree).arms) == 5
    assert len(plan.make({key: x for key, x in tree.items() if key != "exclude"}).arms) == 8


RUNS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name != "fix.yaml"]  # a comparison


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_configurations_are_valid(path):
    needed = ["data.path=yours.jsonl"] if "data.path" in path.read_text(encoding="utf-8") else []
    config = settings.load(path, needed)
    assert settings.load(dump(config)) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_files(path):
    assert load_config_from_file(str(path)).num_processes >= 1
