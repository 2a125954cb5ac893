"""The wheel in a clean environment: what it installs is enough to run, in a folder that knows no repository."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Tree, metrics

import rlkl

REWARD = "def letters(prompts, completions):\n    return [sum(map(str.isalpha, text)) / 9 for text in completions]\n"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A program of an environment that holds the wheel, run in a folder. Its dependencies are those of this one."""
    home = tmp_path_factory.mktemp("elsewhere") / "env"
    venv.create(home, symlinks=True)
    python = str(home / "bin" / "python")
    words = ["install", "--quiet", "--no-deps", "--no-index", str(wheel_file)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *words], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    clean = {name: x for name, x in os.environ.items() if not name.startswith("PYTHON")}

    def run(folder: Path, program: str, *words: str) -> str:
        command = [str(home / "bin" / program), *words]
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Tree) -> Path:
    """A folder with prompts, a reward and the configurations of a run and of a comparison."""
    (tmp_path / "my_reward.py").write_text(REWARD, encoding="utf-8")
    rewards = {"letters": {"type": "function", "path": "my_reward:letters"}}
    base = {**tiny_config, "rewards": rewards, "train": {"steps": 1}}
    ppo = {"trainer": {"type": "ppo", "epochs": 1}}
    compare = {"name": "two", "base": "run.yaml", "arms": {"reinforce": {}, "ppo": ppo}, "seeds": [0], "workers": 1}
    for name, config in (("run.yaml", base), ("compare.yaml", compare)):
        (tmp_path / name).write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


def test_the_package_is_the_one_of_the_wheel(run: Run, folder: Path) -> None:
    where = "import rlkl.trainers as t, rlkl.rewards as r, rlkl; print(rlkl.__file__, t.__file__, r.__file__)"
    for path in run(folder, "python", "-c", where).split():
        assert "/elsewhere" in path and "/env/lib/" in path
        assert not Path(path).is_relative_to(ROOT)


def test_the_installed_package_finds_itself_healthy(run: Run, folder: Path) -> None:
    said = run(folder, "rlkl", "doctor")
    assert said.startswith(f"rlkl {rlkl.__version__}, ")
    assert "MISSING" not in said
    assert "FAILED" not in said


def test_the_installed_package_trains(run: Run, folder: Path) -> None:
    run(folder, "rlkl", "train", "run.yaml")
    assert [row["step"] for row in metrics(folder / "runs/tiny")] == [0, 1]
    assert (folder / "runs/tiny/final/model.safetensors").is_file()


def test_the_installed_package_compares(run: Run, folder: Path) -> None:
    said = run(folder, "rlkl", "compare", "compare.yaml")
    for arm in ("reinforce", "ppo"):
        assert arm in said
        assert [row["step"] for row in metrics(folder / f"runs/two/{arm},seed=0")] == [0, 1]
