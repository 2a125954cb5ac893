"""Credit assignment: golden numbers, and which estimators are unbiased, by enumeration."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    NO_KL,
    PLAIN,
    TABULAR,
    TRANSFORMER,
    Problem,
    assert_close,
    assigned,
    cosine,
    estimator_loss,
    expected_gradient,
    random_rewards,
    relative,
    tabular,
    transformer,
)

from rlkl import credit, exact
from rlkl.config import CreditConfig, KLConfig, ReinforceTrainer
from rlkl.trainers import Reinforce
from rlkl.types import End, PolicyOutput, Rollout, TokenRewards

KL = KLConfig(beta=0.4)
T3 = torch.tensor([[True, True, True]])


def d(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mean_ascent(problem: Problem, rewards: TokenRewards, cfg: CreditConfig, samples: int, **more) -> torch.Tensor:
    loss = estimator_loss(problem, rewards, cfg, more.pop("kl_cfg", KL), **more)
    return -exact.estimator(problem.policy, problem.atoms, loss, samples).gradient


def truth(problem: Problem, rewards: TokenRewards, beta: float = KL.beta) -> torch.Tensor:
    return problem.gradient(problem.objective(rewards.value_BT.sum(-1), beta))


def wrong_values(problem: Problem, seed: int = 9) -> torch.Tensor:
    """A V that knows nothing but is a function of the state ``[N, T+1]``."""
    dense = random_rewards(problem.atoms, seed, dense=True).value_BT
    start = torch.full((len(dense), 1), 0.7, dtype=torch.float64)
    return torch.cat([start, dense], 1)


# ------------------------------------------------------------------------------------------ golden numbers


@pytest.mark.parametrize(
    ("gamma", "window", "expected"),
    [
        (1.0, None, (10, 9, 7, 4)),
        (1.0, 1, (1, 2, 3, 4)),
        (1.0, 2, (3, 5, 7, 4)),
        (1.0, 4, (10, 9, 7, 4)),
        (1.0, 9, (10, 9, 7, 4)),
        (0.5, None, (3.25, 4.5, 5, 4)),
        (0.5, 2, (2, 3.5, 5, 4)),
        (0.5, 3, (2.75, 4.5, 5, 4)),
        (0.0, None, (1, 2, 3, 4)),
        (0.0, 2, (1, 2, 3, 4)),
    ],
)
def test_windowed_discounted_sums(gamma, window, expected):
    torch.testing.assert_close(credit.discounted(d((1, 2, 3, 4)), gamma, window), d(expected))


@pytest.mark.parametrize(
    ("name", "horizon", "expected"),
    [
        ("own", 2, (1, 2, 3, 4)),
        ("full", 2, (3.25, 4.5, 5, 4)),
        ("same", 2, (2, 3.5, 5, 4)),
        ("same", None, (3.25, 4.5, 5, 4)),
        ("anchored", 1, (1, 2, 3, 4)),
        ("anchored", 2, (1, 3.5, 5, 4)),  # scored at the third token: windows of tokens 2 and 3 hold it
        ("anchored", 3, (2.75, 4.5, 5, 4)),
    ],
)
def test_kl_windows(name, horizon, expected):
    scored = torch.tensor([[False, False, True, False]])
    torch.testing.assert_close(credit.kl_returns(d((1, 2, 3, 4)), scored, 0.5, horizon, name), d(expected))


@pytest.mark.parametrize(
    ("gamma", "lambda_", "last", "expected"),
    [
        # deltas without discount: 1+1-0.5, 0-1-1, 2+last+1
        (1.0, 0.0, 0.0, (1.5, -2.0, 3.0)),
        (1.0, 1.0, 0.0, (2.5, 1.0, 3.0)),
        (1.0, 0.5, 4.0, (1.5 - 1.0 + 1.75, -2.0 + 3.5, 7.0)),
        # deltas: 1+0.5-0.5, -0.5-1, 2+2+1; decay 0.25
        (0.5, 0.5, 4.0, (1.0 - 0.375 + 0.3125, -1.5 + 1.25, 5.0)),
    ],
)
def test_gae(gamma, lambda_, last, expected):
    found = credit.gae(d((1, 0, 2)), d((0.5, 1, -1)), d(last), T3, gamma, lambda_)
    torch.testing.assert_close(found, d(expected))


def test_baselines_by_hand():
    x, group = d((1, 0), (2, 4), (6, 8), (10, 0), (20, 2)), torch.tensor([7, 7, 7, 3, 3])
    others = d((4, 6), (3.5, 4), (1.5, 2), (20, 2), (10, 0))
    torch.testing.assert_close(credit.others_mean(x, group), others)
    torch.testing.assert_close(credit.batch_mean_without_self(x), (x.sum(0) - x) / 4)
    std = d((7**0.5, 4), (7**0.5, 4), (7**0.5, 4), (50**0.5, 2**0.5), (50**0.5, 2**0.5))
    centred = d((-2, -4), (-1, 0), (3, 4), (-5, -1), (5, 1))
    torch.testing.assert_close(credit.group_norm(x, group, eps=0.0), centred / std)


def by_hand(u=((0, 0, 0), (0, 0, 0)), ends=(End.EOS, End.LIMIT), mask=None) -> tuple[Rollout, PolicyOutput]:
    """Two samples of one prompt, lengths 2 and 3, with given log-ratios."""
    length = torch.tensor([2, 3])
    mask = torch.arange(3) < length[:, None] if mask is None else mask
    rollout = Rollout(
        prompt_BP=torch.zeros(2, 1, dtype=torch.long),
        prompt_length_B=torch.ones(2, dtype=torch.long),
        tokens_BT=torch.zeros(2, 3, dtype=torch.long),
        length_B=length,
        policy_mask_BT=mask,
        end_B=torch.tensor(ends),
        group_B=torch.zeros(2, dtype=torch.long),
        sample_id_B=torch.arange(2),
    )
    logp = d(*u) - 1
    return rollout, PolicyOutput(logp_BT=logp, ref_logp_BT=torch.full_like(logp, -1.0))


SCORES = TokenRewards(d((0, 3, 0), (0, 0, 5)), torch.tensor([[False, True, False], [False, False, True]]))
DENSE = TokenRewards(d((1, 3, 0), (2, 4, 5)), torch.tensor([[True, True, False], [True, True, True]]))
U = ((1, -1, 0), (2, 0, 1))


@pytest.mark.parametrize(
    ("rewards", "cfg", "expected"),
    [
        (SCORES, {"baseline": "none"}, ((3, 3.5, 0), (3.5, 4.5, 4.5))),
        (SCORES, {"baseline": "leave_one_out"}, ((-0.5, -1, 0), (0.5, 1, 1))),  # 3.5 is held after the end
        (DENSE, {"baseline": "none"}, ((4, 3.5, 0), (9.5, 8.5, 4.5))),
        (DENSE, {"baseline": "batch_mean"}, ((-5.5, -5, 0), (5.5, 5, 4.5))),  # nothing is left after the end
        (DENSE, {"baseline": "none", "horizon": 1}, ((0.5, 3.5, 0), (1, 4, 4.5))),
        (DENSE, {"baseline": "none", "horizon": 2, "gamma": 0.5}, ((2.25, 3.5, 0), (3, 6.25, 4.5))),
        (DENSE, {"baseline": "ema"}, ((2, 1.5, 0), (7.5, 6.5, 2.5))),  # the EMA so far is 2
        (SCORES, {"baseline": "none", "centre_rewards": True}, ((-2, -1.5, 0), (0.5, 1.5, 1.5))),
        (SCORES, {"baseline": "none", "whiten_rewards": True}, ((3, 3.5, 0), (3.5, 4.5, 4.5))),  # their std is 1
    ],
)
def test_assign_by_hand(rewards, cfg, expected):
    rollout, out = by_hand(U)
    batch, _ = credit.assign(rollout, rewards, out, CreditConfig(**cfg), KLConfig(beta=0.5), 0.5, ema=2.0)
    torch.testing.assert_close(batch.adv_BT, d(*expected), rtol=1e-7, atol=1e-7)


def test_ema_starts_at_the_first_mean_and_excludes_the_current_batch():
    rollout, out = by_hand()
    cfg = CreditConfig(baseline="ema", ema_decay=0.75)
    first, ema = credit.assign(rollout, SCORES, out, cfg, NO_KL, 0.0)
    torch.testing.assert_close(first.adv_BT, d((3, 3, 0), (5, 5, 5)))
    assert ema == pytest.approx(21 / 5)
    second, ema = credit.assign(rollout, SCORES, out, cfg, NO_KL, 0.0, ema=1.0)
    torch.testing.assert_close(second.adv_BT, d((2, 2, 0), (4, 4, 4)))
    assert ema == pytest.approx(0.75 + 0.25 * 21 / 5)


@pytest.mark.parametrize("end", [End.EOS, End.STOP, End.LIMIT])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("advantage", ["returns", "gae"])
def test_only_truncated_episodes_bootstrap_and_only_when_asked(end, asked, advantage):
    rollout, out = by_hand(ends=(end, End.EOS))
    out = replace(out, value_BT=d((0.5, 1, 0), (0, 0, 0)), bootstrap_B=torch.tensor([8.0, 9.0]))
    exact = {"lambda": 1.0} if advantage == "gae" else {}
    cfg = CreditConfig(baseline="value", advantage=advantage, gamma=0.5, bootstrap_truncated=asked, **exact)
    adv = credit.assign(rollout, SCORES, out, cfg, NO_KL, 0.0)[0].adv_BT
    paid = 3 + (4 if asked and end == End.LIMIT else 0)
    torch.testing.assert_close(adv, d((paid / 2 - 0.5, paid - 1, 0), (1.25, 2.5, 5)))


# --------------------------------------------------------------------------------------------------- bias

UNBIASED = ["none", "batch_mean", "leave_one_out", "ema", "value"]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("baseline", UNBIASED)
def test_unbiased_baselines(baseline, dense):
    problem = tabular(3, 2)
    rewards = random_rewards(problem.atoms, dense=dense)
    more = {"ema": {"ema": 1.7}, "value": {"value_NT1": wrong_values(problem)}}.get(baseline, {})
    found = mean_ascent(problem, rewards, CreditConfig(baseline=baseline), 2, **more)
    assert_close(found, truth(problem, rewards), TABULAR)


def test_unbiased_baselines_on_a_transformer():
    problem = transformer(2)
    rewards = random_rewards(problem.atoms, dense=True)
    for baseline in ("leave_one_out", "batch_mean"):
        found = mean_ascent(problem, rewards, CreditConfig(baseline=baseline), 2)
        assert_close(found, truth(problem, rewards), TRANSFORMER)


def test_baselines_are_unbiased_where_what_is_scored_depends_on_the_sample():
    """Some completions earn a bonus at their second token; no other completion is scored there."""
    problem = tabular(3, 3)
    rewards = random_rewards(problem.atoms)
    bonus = (problem.atoms.tokens_BT == 1) & torch.tensor([False, True, False])
    rewards = TokenRewards(rewards.value_BT + bonus.double(), rewards.scored_BT | bonus)
    for baseline in ("leave_one_out", "batch_mean"):
        found = mean_ascent(problem, rewards, CreditConfig(baseline=baseline), 2)
        assert_close(found, truth(problem, rewards))


@pytest.mark.parametrize(("h", "gamma"), [(1, 1.0), (2, 1.0), (None, 0.7)])
@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
def test_a_baseline_does_not_change_the_mean_of_a_windowed_estimator(h, gamma, baseline):
    problem = tabular(3, 2)
    rewards = random_rewards(problem.atoms, dense=True)
    cfg = CreditConfig(baseline=baseline, horizon=h, gamma=gamma)
    plain = expected_gradient(problem, rewards, cfg.model_copy(update={"baseline": "none"}), KL)
    assert_close(mean_ascent(problem, rewards, cfg, 2, ema=0.9), plain)


@pytest.mark.parametrize("samples", [2, 3])
def test_self_inclusive_mean_scales_the_gradient_by_exactly_g_minus_one_over_g(samples):
    problem = tabular(3, 2, eos=False)
    rewards = random_rewards(problem.atoms, dense=True)

    def loss(batch: Rollout) -> torch.Tensor:
        data = assigned(problem, batch, rewards, PLAIN, KL)
        data = replace(data, adv_BT=data.return_BT - data.return_BT.mean(0))
        return Reinforce(ReinforceTrainer(type="reinforce"), PLAIN).loss(problem.policy(batch, {"logp"}), data)[0]

    found = -exact.estimator(problem.policy, problem.atoms, loss, samples).gradient
    assert_close(found, (samples - 1) / samples * truth(problem, rewards))


def test_group_norm_of_two_is_biased_it_follows_the_sign_of_the_difference():
    problem = tabular(3, 2)
    rewards = random_rewards(problem.atoms)
    found = mean_ascent(problem, rewards, CreditConfig(baseline="group_norm"), 2, kl_cfg=NO_KL)
    score, law = rewards.value_BT.sum(-1), problem.logp.exp().detach()
    sign = (score[:, None] - score).sign()
    by_signs = (law[:, None] * law * sign * problem.logp[:, None]).sum() / 2**0.5
    assert_close(found, problem.gradient(by_signs), 1e-4)  # the epsilon in the division
    assert 0.5 < cosine(found, truth(problem, rewards, 0.0)) < 0.999


@pytest.mark.parametrize("samples", [2, 3])
def test_leave_one_out_trace_variance(samples):
    problem = tabular(3, 2)
    rewards = random_rewards(problem.atoms)
    loss = estimator_loss(problem, rewards, CreditConfig(baseline="leave_one_out"))
    found = exact.estimator(problem.policy, problem.atoms, loss, samples).trace_variance

    score, law = rewards.value_BT.sum(-1), problem.logp.exp().detach()
    s = torch.stack([problem.gradient(row) for row in problem.logp])
    g, mu = (law * score) @ s, law @ score

    def variance(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return p @ (x**2).sum(-1) - ((p @ x) ** 2).sum()

    zeta1 = variance(law, (score - mu)[:, None] * s + g) / 4
    pairs = 0.5 * (score[:, None, None] - score[None, :, None]) * (s[:, None] - s[None])
    zeta2 = variance((law[:, None] * law).flatten(), pairs.flatten(0, 1))
    expected = 2 / (samples * (samples - 1)) * (2 * (samples - 2) * zeta1 + zeta2)
    assert found == pytest.approx(float(expected), rel=1e-10)


def gae_config(lambda_: float, bootstrap: bool = False) -> CreditConfig:
    return CreditConfig(advantage="gae", baseline="value", bootstrap_truncated=bootstrap, **{"lambda": lambda_})


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_the_exact_value_is_unbiased_for_every_lambda(lambda_):
    problem = tabular(3, 3)
    rewards = random_rewards(problem.atoms, dense=True)
    own, ref = problem.token_logp().detach(), problem.token_logp(problem.policy.reference).detach()
    value = exact.values(problem.atoms, own, rewards.value_BT - KL.beta * (own - ref))
    found = mean_ascent(problem, rewards, gae_config(lambda_), 1, value_NT1=value)
    assert_close(found, truth(problem, rewards))


@pytest.mark.parametrize(
    ("lambda_", "bootstrap", "unbiased"),
    [(1.0, False, True), (0.95, False, False), (0.0, False, False), (1.0, True, False)],
)
def test_gae_with_a_wrong_value_is_unbiased_only_at_lambda_one_without_bootstrap(lambda_, bootstrap, unbiased):
    problem = tabular(3, 3)
    rewards = random_rewards(problem.atoms, dense=True)
    found = mean_ascent(problem, rewards, gae_config(lambda_, bootstrap), 1, value_NT1=wrong_values(problem))
    error = relative(found, truth(problem, rewards))
    assert error < TABULAR if unbiased else error > 0.02


def test_lambda_is_not_a_horizon():
    problem = tabular(2, 3, eos=False)
    rewards = random_rewards(problem.atoms)
    value = wrong_values(problem)
    gae = mean_ascent(problem, rewards, gae_config(0.0), 1, value_NT1=value, kl_cfg=NO_KL)
    window = expected_gradient(problem, rewards, CreditConfig(baseline="none", horizon=1))
    assert relative(gae, window) > 0.3
    assert mean_ascent(problem, rewards, gae_config(0.0), 1, value_NT1=0 * value).norm() > 1e-3


@pytest.mark.parametrize(("normaliser", "biased"), [("sequence", 0), ("token_mean", 1), ("sequence_mean", 1)])
def test_normalisers(normaliser, biased):
    problem = tabular(3, 3, seed=1)
    rewards = random_rewards(problem.atoms, seed=1)
    cfg = CreditConfig(baseline="leave_one_out", normaliser=normaliser)
    found, right = mean_ascent(problem, rewards, cfg, 2), truth(problem, rewards)
    if biased:
        assert 0.9 < cosine(found, right) < 0.999
    else:
        assert_close(found, right)
