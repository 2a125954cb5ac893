"""What a run says: lines, bar, samples, and the nats that beta calls for, against closed forms."""

import io
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import Tree

import rlkl
from rlkl import settings, summary, terminal
from rlkl.screen import Screen

METRICS = {"reward/train/total": 0.5, "kl/penalty": 0.25, "kl/beta": 0.1, "time/step": 1.0}


def law_kl(reward: torch.Tensor, share: torch.Tensor, beta: float) -> float:
    """KL(pi*||pi0) of pi* ~ pi0 exp(r/beta) for a reward with a known law under pi0."""
    log_tilted = (share.log() + reward / beta).log_softmax(0)
    return float((log_tilted.exp() * (log_tilted - share.log())).sum())


def test_optimum_kl_finds_the_exact_one_from_many_samples():
    reward, share = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]).double(), torch.tensor([0.2, 0.3, 0.3, 0.2]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = reward[torch.multinomial(share, 64 * 4096, replacement=True, generator=generator)].view(64, 4096)
    for beta in (1.0, 0.3, 0.1, 0.02):
        nats, effective = terminal.optimum_kl(drawn, beta)
        assert nats == pytest.approx(law_kl(reward, share, beta), rel=0.01)
        assert 1 < effective <= 4096


def test_optimum_kl_is_var_over_two_beta_squared_at_first_order_from_two_samples_on():
    """Unbiased, as the second moment of every pair is taken: all pairs of a law, each with its probability."""
    reward, beta = torch.tensor([0.0, 1.0, 3.0]).double(), 1e3
    pairs = torch.cartesian_prod(reward, reward)
    nats, effective = terminal.optimum_kl(pairs, beta)
    assert nats == pytest.approx(float(reward.var(unbiased=False)) / (2 * beta**2), rel=1e-2)
    assert effective == pytest.approx(2, abs=1e-4)


def test_optimum_kl_ends_at_the_log_share_of_the_best():
    """As beta goes to 0 the optimum is pi0 on the best answers: -log of their share (and one effective sample)."""
    nats, effective = terminal.optimum_kl(torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double(), 1e-3)
    assert nats == pytest.approx(math.log(4) * 4 / 3)
    assert effective == pytest.approx(1)


def guidance(reward: list[list[float]], *overrides: str, whiten: bool = False) -> list[str]:
    """Guidance for rewards of base samples, a row a prompt."""
    rows = torch.tensor(reward)
    before = SimpleNamespace(
        rewards=SimpleNamespace(value_BT=torch.stack([rows.flatten(), torch.zeros(rows.numel())], -1)),
        rollout=SimpleNamespace(group_B=torch.arange(len(rows)).repeat_interleave(rows.shape[1])),
    )
    config = settings.load(
        {
            "name": "x",
            "model": {"type": "facts"},
            "data": {"type": "facts"},
            "rewards": {"gold": {"type": "function", "path": "a:b"}},
            "trainer": {"type": "reinforce"},
        },
        [*overrides, f"credit.whiten_rewards={str(whiten).lower()}"],
    )
    return list(terminal.guidance(config, before))  # type: ignore[arg-type]


def test_guidance_names_the_nats_to_aim_for():
    reward = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    said = " ".join(guidance(reward, "kl.beta=0.5"))
    nats, _ = terminal.optimum_kl(torch.tensor(reward).double(), 0.5)
    assert "at most 1/beta = 2 nats" in said
    assert f"aim for about {nats:.2g} nats a sequence at the optimum" in said


def test_guidance_gives_a_ceiling_where_few_samples_carry_the_weight():
    reward = [[0.0, 0.2, 0.3, 1.0]] * 3
    said = " ".join(guidance(reward, "kl.beta=0.01"))
    assert f"and up to {(1 - 0.375) / 0.01:.2g}" in said


def test_guidance_scales_with_whitened_rewards():
    """Rewards ten times as large call for other nats, unless they are divided by their spread first."""
    small, large = [[0.0, 0.1, 0.0, 0.1], [0.1, 0.0, 0.1, 0.1]], [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    aims = [re.findall(r"aim for about (\S+)", " ".join(guidance(r, "kl.beta=1"))) for r in (small, large)]
    assert aims[0] != aims[1]
    aims = [re.findall(r"aim for about (\S+)", " ".join(guidance(r, "kl.beta=1", whiten=True))) for r in (small, large)]
    assert aims[0] == aims[1]


def test_guidance_says_so_where_it_cannot_know():
    assert "do not differ in reward" in guidance([[1.0, 1.0], [0.0, 0.0]])[0]
    assert "do not differ in reward" in guidance([[1.0], [0.0]])[0]
    assert "none; credit.horizon=2" in guidance([[0.0, 1.0]], "credit.horizon=2")[0]
    assert "beta 0" in guidance([[0.0, 1.0]], "kl.beta=0")[0]
    assert guidance([[0.0, 1.0]], "kl.target=3")[0].endswith("aim for kl.target = 3 nats a sequence")


def test_samples_are_cut_to_a_line():
    rows = [{"prompt": "a\nb", "completion": "c" * 200}, {"prompt": "p", "completion": "q"}]
    lines = list(terminal.samples(rows, width=40))
    assert lines[0] == "  a b | " + "c" * 33 + "…"
    assert lines[1] == "  p | q"


def test_arithmetic_counts_per_process(tiny_config):
    config = settings.load(tiny_config, ["rollout.prompts=5", "train.micro_batch=4", "train.steps=7"])
    alone, shared = ("\n".join(summary.arithmetic(config, ranks)) for ranks in (1, 2))
    assert "5 prompts x 2 samples = 10 completions, at most 60 tokens" in alone
    assert "3 x at most 4 completions\n" in alone
    assert "2 x at most 4 completions on each of 2 processes" in shared
    assert "7 steps, 70 completions, at most 420 tokens" in alone


def test_without_a_tty_there_is_a_line_an_interval(capsys):
    with Screen(total=7) as screen:
        for step in range(1, 8):
            screen.step(step, METRICS, every=3)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["3/7", "6/7", "7/7"]


def test_only_the_main_process_speaks(capsys):
    with Screen(main=False, total=1) as screen:
        screen.say("hello")
        screen.step(1, METRICS, every=1)
    assert capsys.readouterr().out == ""


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_tty_a_bar_moves_below_the_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setenv("TERM", "xterm")
    with Screen(total=4) as screen:
        assert screen.progress is not None
        screen.say("[not markup] " + "x" * 300)
        for step in range(1, 5):
            screen.step(step, METRICS, every=1)
        assert screen.progress.tasks[0].completed == 4
        shown = screen.progress.tasks[0].fields["shown"]
    assert shown == "reward 0.500  KL 0.25"
    written = sys.stdout.getvalue()
    assert "[not markup] " + "x" * 300 in written
    assert "4/4" in written
    assert "step 4/4" not in written


def test_a_run_says_its_arithmetic_its_guidance_and_two_samples_an_evaluation(tiny_config, capsys):
    rlkl.train({**tiny_config, "evaluate": {"every": 1, "prompts": 2, "samples_per_prompt": 2}})
    lines = capsys.readouterr().out.splitlines()
    assert any("2 prompts x 2 samples = 4 completions" in line for line in lines)
    assert any("aim for about" in line for line in lines)
    at = [i for i, line in enumerate(lines) if line.startswith("eval @")]
    assert len(at) == 3
    assert all(lines[i + k].startswith("  Line ") for i in at for k in (1, 2))


def test_no_samples_where_none_are_asked_for(tiny_config, capsys):
    folder = rlkl.train({**tiny_config, "log": {"with": [], "samples": 0}})
    assert not (folder / "samples.jsonl").exists()
    assert "  Line " not in capsys.readouterr().out


def chunks(handle: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(handle, 65536)
        except OSError:  # Linux says so when the other end is closed
            return
        if not data:
            return
        yield data


def test_a_real_terminal_shows_the_bar_and_the_lines(tiny_config: Tree):
    Path("config.yaml").write_text(yaml.safe_dump(tiny_config))
    here, there = pty.openpty()
    paths = os.pathsep.join(str(p) for p in (Path(rlkl.__file__).parents[1], Path(__file__).parent))
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "rlkl", "train", "config.yaml"]
    process = subprocess.Popen(command, stdout=there, stderr=there, env=environment)
    os.close(there)
    text = b"".join(chunks(here)).decode()
    assert process.wait() == 0, text
    assert "2/2" in text
    assert "eval @ 2" in text
    assert "step 2/2" not in text
