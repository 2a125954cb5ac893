"""docs/guide.md as a new user follows it: its files are written and its commands run, in order, in an empty folder."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkl import cli

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Language, file name (or nothing) and content of the fenced blocks, in order."""
    for info, content in re.findall(r"^```(.+?)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        language, _, name = info.partition(" ")
        yield language, name, content


@pytest.fixture
def elsewhere(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with a model in it, and no trace of the modules that are imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(tiny_model, "my-model")
    yield tmp_path
    sys.modules.pop("my_reward", None)


def test_the_guide_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "notebook"}
    for language, name, content in blocks(GUIDE.read_text(encoding="utf-8")):
        if name:
            Path(name).write_text(content, encoding="utf-8")
        elif language == "python":
            exec(compile(content, GUIDE.name, "exec"), names)
        else:
            assert language == "bash", f"a block of {language} that nothing runs"
            for line in content.splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "rlkl", line
                assert cli.main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    printed = capsys.readouterr().out
    for said in ("KL guidance", "GiB", "kl/sequence", "prompt: Why is the moon white?"):
        assert said in printed
    assert {run.name for run in Path("runs").iterdir()} >= {
        "mine",
        "nudge",
        "two-nats",
        "lora",
        "longer",
        "python",
        "versus",
    }


def test_its_links_and_its_keys_exist() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert all((GUIDE.parent / target).is_file() for target in re.findall(r"\]\(([^)#\s]+)", text))
