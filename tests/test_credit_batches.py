"""What must not change a gradient (padding, micro-batches, environment tokens), and what rescales it."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    NO_KL,
    PLAIN,
    Problem,
    assert_close,
    assigned,
    estimator_loss,
    random_rewards,
    relative,
    tabular,
)
from pydantic import ValidationError

from rlkl import credit, exact, kl, update
from rlkl.config import GRADIENT, CreditConfig, KLConfig, ReinforceTrainer
from rlkl.trainers import Reinforce
from rlkl.types import Rollout, TokenRewards

KL = KLConfig(beta=0.4)
PICKED = torch.tensor([0, 3, 3, 8, 14, 6])
NORMALISERS = ["sequence", "token_mean", "sequence_mean"]


def advantages(problem: Problem, rewards: TokenRewards, kl_cfg: KLConfig = KL, **cfg) -> torch.Tensor:
    cfg = CreditConfig(**{"baseline": "none", **cfg})
    return assigned(problem, problem.atoms.rows(PICKED), rewards, cfg, kl_cfg).adv_BT


def scaled(rewards: TokenRewards, factor: float) -> TokenRewards:
    return replace(rewards, value_BT=factor * rewards.value_BT)


# ------------------------------------------------------------------------------- whitening and centring


def test_whitened_rewards_have_unit_spread_before_kl_enters():
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    picked = rewards.rows(PICKED)
    spread = picked.value_BT[picked.scored_BT].std(correction=0)
    found = advantages(problem, rewards, whiten_rewards=True)
    assert_close(found, advantages(problem, scaled(rewards, float(1 / spread))), 1e-7)
    assert_close(found, advantages(problem, scaled(rewards, 100.0), whiten_rewards=True), 1e-7)
    assert relative(found, advantages(problem, scaled(rewards, 3.0))) > 0.05


def test_whitened_advantages_rescale_beta():
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    found = advantages(problem, rewards, whiten_advantages=True)
    raw, mask = advantages(problem, rewards), problem.atoms.rows(PICKED).policy_mask_BT
    assert_close(found[mask], (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0), 1e-7)
    assert not found[~mask].any()
    tenfold = advantages(problem, scaled(rewards, 10.0), whiten_advantages=True)
    assert_close(tenfold, advantages(problem, rewards, KLConfig(beta=0.04), whiten_advantages=True), 1e-7)
    assert relative(tenfold, found) > 0.05


def test_centring_takes_the_mean_score_of_the_other_samples():
    problem = tabular()
    rewards = random_rewards(problem.atoms)
    score = rewards.rows(PICKED).value_BT.sum(-1)
    others = (score.sum() - score) / 5
    mask = problem.atoms.rows(PICKED).policy_mask_BT
    found = advantages(problem, rewards, NO_KL, centre_rewards=True)
    assert_close(found, (score - others)[:, None] * mask)


# ------------------------------------------------------------------------------- environment tokens


def with_environment(rollout: Rollout, at: int) -> Rollout:
    """A token of an environment put before completion token ``at`` of every row that gets there."""
    batch, width = rollout.tokens_BT.shape
    longer = (rollout.length_B >= at).long()
    tokens, mask = torch.zeros(batch, width + 1, dtype=torch.long), torch.zeros(batch, width + 1, dtype=torch.bool)
    keep = torch.tensor([t for t in range(width + 1) if t != at])
    tokens[:, keep], mask[:, keep] = rollout.tokens_BT, rollout.policy_mask_BT
    return replace(rollout, tokens_BT=tokens, policy_mask_BT=mask, length_B=rollout.length_B + longer)


def widened(x_BT: torch.Tensor, at: int, fill: float) -> torch.Tensor:
    return torch.cat([x_BT[:, :at], torch.full_like(x_BT[:, :1], fill), x_BT[:, at:]], 1)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "cfg",
    [
        {"baseline": "none"},
        {"baseline": "none", "horizon": 1},
        {"baseline": "leave_one_out", "horizon": 2, "gamma": 0.5},
        {"baseline": "leave_one_out", "gamma": 0.5},
        {"baseline": "value", "advantage": "gae", "gamma": 0.5, "lambda": 0.5},
        {"baseline": "value", "bootstrap_truncated": True, "gamma": 0.5},
        {"baseline": "batch_mean", "whiten_rewards": True, "whiten_advantages": True},
    ],
)
def test_horizons_and_gae_step_over_environment_tokens(cfg, at):
    problem = tabular()
    rollout, rewards = problem.atoms.rows(PICKED), random_rewards(problem.atoms, dense=True).rows(PICKED)
    out = problem.policy(rollout, {"logp", "ref_logp"})
    value = random_rewards(problem.atoms, 5, dense=True).value_BT[PICKED]
    out = replace(out, value_BT=value, bootstrap_B=value.sum(-1))
    # Whatever log-probs and values stand at the environment's token, they must not matter.
    wide_out = replace(
        out,
        logp_BT=widened(out.get("logp_BT"), at, -7.0),
        ref_logp_BT=widened(out.get("ref_logp_BT"), at, -1.0),
        value_BT=widened(value, at, 50.0),
    )
    wide_rewards = TokenRewards(widened(rewards.value_BT, at, 0.0), widened(rewards.scored_BT, at, False))
    cfg = CreditConfig(**cfg)
    plain, _ = credit.assign(rollout, rewards, out, cfg, KL, KL.beta)
    wide, _ = credit.assign(with_environment(rollout, at), wide_rewards, wide_out, cfg, KL, KL.beta)
    keep = [t for t in range(4) if t != at]
    for name in ("adv_BT", "return_BT", "weight_BT"):
        assert_close(getattr(wide, name)[:, keep], getattr(plain, name))
        assert not getattr(wide, name)[:, at].any()


# ------------------------------------------------------------------------------- batches


def pieces(problem: Problem, rewards: TokenRewards, cfg: CreditConfig, kl_cfg: KLConfig, sizes) -> torch.Tensor:
    """Accumulated gradient over micro-batches, as the loop does it."""
    batch, trainer = problem.atoms.rows(PICKED), Reinforce(ReinforceTrainer(type="reinforce"), PLAIN)
    data = assigned(problem, batch, rewards, cfg, kl_cfg)
    gradient = torch.zeros(1)
    for rows in torch.arange(len(batch)).split(sizes):
        out = problem.policy(batch.rows(rows), trainer.need | kl.needs(kl_cfg))
        gradient = gradient + problem.gradient(update.step_loss(trainer, kl_cfg, 0.4, out, data.rows(rows))[0])
    return gradient


@pytest.mark.parametrize(("placement", "estimator"), GRADIENT)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_micro_batches_add_up_to_the_batch(placement, estimator, normaliser):
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    cfg = CreditConfig(normaliser=normaliser)
    kl_cfg = KLConfig(beta=0.4, placement=placement, estimator=estimator)
    whole = estimator_loss(problem, rewards, cfg, kl_cfg)(problem.atoms.rows(PICKED))
    for sizes in ([6], [1] * 6, [1, 3, 2]):
        assert_close(pieces(problem, rewards, cfg, kl_cfg, sizes), problem.gradient(whole))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize(("placement", "estimator"), GRADIENT)
def test_padding_changes_nothing(placement, estimator, normaliser):
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    cfg = CreditConfig(normaliser=normaliser, whiten_rewards=True)
    kl_cfg = KLConfig(beta=0.4, placement=placement, estimator=estimator)
    expected = problem.gradient(estimator_loss(problem, rewards, cfg, kl_cfg)(problem.atoms.rows(PICKED)))

    def wider(x_BT: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([x_BT, torch.full_like(x_BT[:, :1], fill).expand(-1, 2)], 1)

    atoms = replace(
        problem.atoms,
        prompt_BP=wider(problem.atoms.prompt_BP, 2),
        tokens_BT=wider(problem.atoms.tokens_BT, 2),
        policy_mask_BT=wider(problem.atoms.policy_mask_BT, False),
    )
    rewards = TokenRewards(wider(rewards.value_BT, 0), wider(rewards.scored_BT, False))
    found = estimator_loss(replace(problem, atoms=atoms), rewards, cfg, kl_cfg)(atoms.rows(PICKED))
    assert_close(problem.gradient(found), expected)


def test_groups_are_compared_within_and_rows_may_come_in_any_order():
    problem = tabular()
    rewards, cfg = random_rewards(problem.atoms, dense=True), CreditConfig(baseline="leave_one_out")
    batch = replace(problem.atoms.rows(PICKED), group_B=torch.tensor([5, 5, 2, 2, 2, 5]))
    whole = assigned(problem, batch, rewards, cfg, KL).adv_BT
    for group in (2, 5):
        rows = (batch.group_B == group).nonzero().squeeze(1)
        assert_close(whole[rows], assigned(problem, batch.rows(rows), rewards, cfg, KL).adv_BT)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert_close(assigned(problem, batch.rows(order), rewards, cfg, KL).adv_BT, whole[order])


def test_two_prompts_average_their_gradients():
    """Every pair of two-sample groups, one a prompt: the sequence normaliser weighs prompts alike."""
    problem = tabular(2, 2, eos=True)
    first, second = random_rewards(problem.atoms), random_rewards(problem.atoms, 3)
    count, law = len(problem.atoms), problem.logp.exp().detach()
    rewards = TokenRewards(torch.cat([first.value_BT, second.value_BT]), torch.cat([first.scored_BT, second.scored_BT]))
    loss, mean = estimator_loss(problem, rewards, CreditConfig(baseline="leave_one_out"), KL), 0
    for chosen in torch.cartesian_prod(*[torch.arange(count)] * 4):
        batch = replace(problem.atoms.rows(chosen), group_B=torch.tensor([0, 0, 1, 1]))
        batch.columns["atom"] = [int(i) + (n > 1) * count for n, i in enumerate(chosen)]
        mean = mean + float(law[chosen].prod()) * problem.gradient(loss(batch))
    values = [problem.objective(r.value_BT.sum(-1), KL.beta) for r in (first, second)]
    assert_close(-mean, problem.gradient(sum(values) / 2))


# ------------------------------------------------------------------------------- refusals


def test_a_reward_on_a_token_of_the_environment_is_refused():
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    mask = problem.atoms.policy_mask_BT & (torch.arange(3) != 1)
    moved = replace(problem, atoms=replace(problem.atoms, policy_mask_BT=mask))
    for wrong in (rewards, replace(rewards, scored_BT=mask), replace(rewards, value_BT=0 * rewards.value_BT)):
        with pytest.raises(ValueError, match="did not write"):
            assigned(moved, moved.atoms, wrong, PLAIN, KL)


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch_mean", "group_norm"])
def test_a_single_sample_has_nothing_to_be_compared_with(baseline):
    problem = tabular()
    with pytest.raises(ValueError, match="1 sample"):
        assigned(
            problem, problem.atoms.rows(PICKED[:1]), random_rewards(problem.atoms), CreditConfig(baseline=baseline), KL
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"horizon": 2, "advantage": "gae", "baseline": "value"}, "silently ignore the horizon"),
        ({"horizon": 2, "advantage": "gae", "baseline": "value", "lambda": 1.0}, "without bootstrap"),
        ({"horizon": 2, "bootstrap_truncated": True}, "without bootstrap"),
        ({"advantage": "gae", "baseline": "leave_one_out"}, "learned value"),
        ({"horizon": 0}, "greater than or equal to 1"),
    ],
)
def test_refused_credit(wrong, message):
    with pytest.raises(ValidationError, match=message):
        CreditConfig(**wrong)


def test_the_mean_of_the_estimator_counts_every_ordered_batch_once():
    """``exact.estimator`` itself, against a loop over ordered pairs."""
    problem = tabular(2, 2, eos=True)
    loss = estimator_loss(problem, random_rewards(problem.atoms), CreditConfig(), KL)
    law, mean, square = problem.logp.exp().detach(), 0, 0.0
    for pair in torch.cartesian_prod(*[torch.arange(len(problem.atoms))] * 2):
        gradient = problem.gradient(loss(problem.atoms.rows(pair)))
        mean = mean + law[pair].prod() * gradient
        square += float(law[pair].prod() * (gradient @ gradient))
    found = exact.estimator(problem.policy, problem.atoms, loss, 2)
    assert_close(found.gradient, mean)
    assert found.trace_variance == pytest.approx(square - float(mean @ mean), rel=1e-10)
