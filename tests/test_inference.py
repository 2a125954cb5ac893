"""KL-regularised RL as inference: the optimum, its gap, soft values, collapse, target matching, early stopping."""

import itertools
import math
from collections.abc import Callable
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
    expected_gradient,
    fixed_point,
    numbered,
    relative,
    tabular,
    terminal,
    transformer,
)

from rlkl import exact, losses
from rlkl.config import KLConfig
from rlkl.policy import Policy
from rlkl.tasks.tabular import random_tabular

BETA = 0.5


def scores(problem: Problem, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(problem.atoms), generator=generator, dtype=torch.float64)


def gibbs(problem: Problem, reward_N: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi* from the definition."""
    return (problem.ref + reward_N / beta).log_softmax(0)


# ------------------------------------------------------------------------------- optimum and gap


@pytest.mark.parametrize("make", [tabular, transformer])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_gap_of_any_policy_is_beta_kl_to_the_optimum(make, beta):
    problem, tolerance = make(), TABULAR if make is tabular else TRANSFORMER
    reward = scores(problem)
    log_z = (problem.ref.exp() * (reward / beta).exp()).sum().log()
    with torch.no_grad():
        logp, ref = exact.sequence_logp(problem.policy, problem.atoms)
        star, found = exact.optimum(ref, reward, beta)
        assert_close(found, log_z, tolerance)
        assert_close(star, gibbs(problem, reward, beta), tolerance)
        gap = beta * exact.kl(logp, star)
        assert_close(exact.objective(logp, ref, reward, beta), beta * log_z - gap, tolerance)
        assert_close(problem.objective(reward, beta), beta * log_z - gap, tolerance)
        assert gap > 1e-4
        at_star = exact.objective(star, ref, reward, beta)
        assert_close(at_star, beta * log_z, tolerance)


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_products_of_soft_values_are_the_optimum(beta, dense):
    problem = tabular(3, 3)
    reward = scores(problem)
    reward_NT = terminal(problem.atoms, reward).value_BT
    if dense:  # a token reward besides, the same for every prefix with that token
        reward_NT = reward_NT + torch.tensor([0.3, -1.0, 0.7])[problem.atoms.tokens_BT] * problem.atoms.policy_mask_BT
    ref_NT = problem.token_logp(problem.policy.reference).detach()
    value = exact.soft_values(problem.atoms, ref_NT, reward_NT, beta)
    assert value.shape == (len(problem.atoms), 4)
    token_star = ref_NT + (reward_NT + value[:, 1:] - value[:, :-1]) / beta * problem.atoms.policy_mask_BT
    assert_close((token_star * problem.atoms.policy_mask_BT).sum(-1), gibbs(problem, reward_NT.sum(-1), beta))
    assert_close(value[:, 0], beta * (problem.ref + reward_NT.sum(-1) / beta).logsumexp(0).expand(len(value)))


def test_values_are_expected_rewards_to_go():
    problem = tabular(3, 3)
    reward = scores(problem)
    law = problem.logp.exp().detach()
    found = exact.values(problem.atoms, problem.token_logp().detach(), terminal(problem.atoms, reward).value_BT)
    assert_close(found[:, 0], (law * reward).sum().expand(len(law)))
    for token in (0, 1):  # 2 ends at once
        after = problem.atoms.tokens_BT[:, 0] == token
        mean = (law * reward)[after].sum() / law[after].sum()
        assert_close(found[after, 1], mean.expand(int(after.sum())))


def test_the_librarys_gradient_leads_to_the_optimum():
    problem = tabular(3, 3)
    reward = scores(problem)
    found = fixed_point(problem, terminal(problem.atoms, reward), PLAIN, KLConfig(beta=BETA))
    assert_close(found, gibbs(problem, reward, BETA))


# ------------------------------------------------------------------------------- without KL


def test_without_kl_exact_gradients_collapse_onto_the_best_completion():
    problem = tabular(2, 2, eos=False, at_ref=True)
    reward = torch.tensor([0.0, 1.0, 0.3, 0.8], dtype=torch.float64)
    rewards, best = terminal(problem.atoms, reward), int(reward.argmax())
    for _ in range(400):  # steps of fixed length, because plain gradients vanish as the policy collapses
        step = expected_gradient(problem, rewards, PLAIN, NO_KL).view_as(problem.policy.model.table)
        problem.load(problem.policy.model.table + 0.05 * step / step.norm())
    logp = problem.logp.detach()
    assert float(-(logp.exp() * logp).sum()) < 1e-3
    assert float(exact.kl(logp, problem.ref)) == pytest.approx(-float(problem.ref[best]), abs=5e-3)
    assert float(logp[best].exp()) > 0.999


@pytest.mark.parametrize("make", [tabular, transformer])
def test_the_expected_score_function_is_zero(make):
    problem = make()
    law = problem.logp.detach().exp()
    out = problem.policy(problem.atoms, {"logp"}).get("logp_BT")
    size = problem.gradient(law.sqrt() @ out.sum(-1)).norm()
    assert problem.gradient((law[:, None] * out).sum()).norm() < (TABULAR if make is tabular else TRANSFORMER) * size


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_refitting_on_own_samples_keeps_the_mean_and_loses_gini_diversity(samples):
    """All multisets of N samples; the maximum-likelihood table has the log counts as its logits."""
    problem = tabular(2, 2, eos=True)
    law, refit = problem.logp.detach().exp(), tabular(2, 2, eos=True)
    size = refit.policy.model.table.shape
    mean, gini, total = torch.zeros_like(law), 0.0, 0.0
    with torch.no_grad():
        for chosen in itertools.combinations_with_replacement(range(len(law)), samples):
            counts = torch.bincount(torch.tensor(chosen), minlength=len(law)).double()
            orders = math.factorial(samples) / float((counts + 1).lgamma().exp().prod())
            weight = orders * float(law[list(chosen)].prod())
            seen, mask = torch.zeros(size, dtype=torch.float64), problem.atoms.policy_mask_BT
            rows, tokens = problem.rows()[mask], problem.atoms.tokens_BT[mask]
            seen.index_put_((rows, tokens), counts[:, None].expand_as(mask)[mask], accumulate=True)
            refit.load(seen.clamp(min=1e-200).log())
            fitted = refit.policy(problem.atoms, {"logp"}).get("logp_BT").sum(-1).exp()
            assert_close(fitted, counts / samples)
            mean, gini, total = mean + weight * fitted, gini + weight * float(1 - (fitted**2).sum()), total + weight
    assert total == pytest.approx(1)
    assert_close(mean, law)
    assert gini == pytest.approx((1 - 1 / samples) * float(1 - (law**2).sum()), rel=1e-10, abs=1e-15)


# ------------------------------------------------------------------------------- stochastic environment


def lottery() -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """Token 1: safe (0) or lottery (1). Token 2 is the environment's: with probability .2 a win (1)."""
    models = [random_tabular(2, 3, 0, scale=0.0) for _ in range(2)]
    atoms = exact.enumerate_completions([0], 2, 2)
    atoms = replace(atoms, policy_mask_BT=torch.tensor([[True, False]]).expand(4, 2).clone())
    problem = Problem(Policy(models[0], reference=models[1]), numbered(atoms))
    choice, draw = atoms.tokens_BT.unbind(1)
    logp = torch.stack([torch.full((4,), 0.5), torch.where(draw == 1, 0.2, 0.8)], 1).double().log()
    reward = torch.where(choice == 0, 1.0, 3.0 * (draw == 1)).double()
    return problem, logp, reward


def test_the_soft_backup_takes_the_mean_over_environment_tokens():
    problem, logp, reward = lottery()
    first = problem.atoms.tokens_BT[:, 0] == 1
    reward_NT = torch.stack([torch.zeros(4), reward], 1).double()
    value = exact.soft_values(problem.atoms, logp, reward_NT, BETA)
    choice = ((value[:, 1] - value[:, 0]) / BETA).exp() * 0.5
    assert float(choice[first][0]) == pytest.approx(0.310, abs=5e-4)
    assert float(value[0, 0]) == pytest.approx(0.839, abs=5e-4)

    # The posterior of control as inference is optimistic about what the environment will do.
    everything = replace(problem.atoms, policy_mask_BT=torch.ones(4, 2, dtype=torch.bool))
    claimed = exact.soft_values(everything, logp, reward_NT, BETA)
    hoped = ((claimed[:, 1] - claimed[:, 0]) / BETA).exp() * 0.5
    assert float(hoped[first][0]) == pytest.approx(0.917, abs=5e-4)
    assert float(claimed[0, 0]) == pytest.approx(1.897, abs=5e-4)
    assert float(BETA * (logp.sum(-1) + reward / BETA).logsumexp(0)) == pytest.approx(1.897, abs=5e-4)

    def objective(lot: float) -> float:
        cost = lot * math.log(lot / 0.5) + (1 - lot) * math.log((1 - lot) / 0.5)
        return (1 - lot) * 1 + lot * 0.2 * 3 - BETA * cost

    assert objective(float(choice[first][0])) == pytest.approx(0.839, abs=5e-4)
    assert objective(float(hoped[first][0])) == pytest.approx(0.430, abs=5e-4)


def test_the_policy_gradient_finds_the_right_optimum_of_a_stochastic_environment():
    problem, logp, reward = lottery()
    # The score is paid at the policy's last token; in expectation over the environment it is its mean.
    choose = torch.tensor([[True, False]]).expand(4, 2)
    rewards = replace(terminal(problem.atoms, reward), value_BT=choose * reward[:, None], scored_BT=choose)
    table = problem.policy.model.table
    for _ in range(60):
        own = problem.token_logp().detach()[:, 0]
        step = expected_gradient(problem, rewards, PLAIN, KLConfig(beta=BETA), (own + logp[:, 1]).exp())
        seen = torch.zeros_like(table)
        seen.view(-1).index_add_(0, problem.rows()[:, 0] * 2 + problem.atoms.tokens_BT[:, 0], (own + logp[:, 1]).exp())
        problem.load(table + step.view_as(table) / seen.clamp(min=1e-300) * (seen > 0) / (2 * BETA))
    assert float(problem.token_logp()[-1, 0].exp().detach()) == pytest.approx(0.310, abs=5e-4)


# ------------------------------------------------------------------------------- target matching

TARGET_MATCHING: dict[str, tuple[Callable, Callable]] = {
    # f', and the divergence D_f(pi || pi*) whose gradient it gives
    "reverse": (lambda t: t.log() + 1, lambda p, q: (p * (p / q).log()).sum()),
    "forward": (lambda t: -1 / t, lambda p, q: (q * (q / p).log()).sum()),
    "js": (
        lambda t: math.log(2) - (1 + 1 / t).log(),
        lambda p, q: (p * (2 * p / (p + q)).log()).sum() + (q * (2 * q / (p + q)).log()).sum(),
    ),
    "tv": (lambda t: t.log().sign() / 2, lambda p, q: 0.5 * (p - q).abs().sum()),
}


def matching(problem: Problem, star: torch.Tensor, name: str, sampler: torch.Tensor, baseline: float) -> torch.Tensor:
    """E_q[(pi/q)(f'(pi/pi*) + b) grad log pi] with the library's policy-gradient loss, q = ``sampler``."""
    out = problem.policy(problem.atoms, {"logp"}).get("logp_BT")
    ratio = (out.sum(-1).detach() - star).exp()
    advantage = -(TARGET_MATCHING[name][0](ratio) + baseline) * (out.sum(-1).detach() - sampler).exp()
    weight = sampler.exp()[:, None] * problem.atoms.policy_mask_BT
    return problem.gradient(losses.policy_gradient(out, advantage[:, None].expand_as(out), weight)[0])


@pytest.mark.parametrize("name", TARGET_MATCHING)
@pytest.mark.parametrize("off_policy", [False, True])
def test_target_matching_has_the_gradient_of_its_divergence_and_its_fixed_point_at_the_optimum(name, off_policy):
    problem = tabular(3, 2)
    reward = scores(problem)
    star = gibbs(problem, reward, BETA)
    sampler = problem.ref if off_policy else problem.logp.detach()
    expected = problem.gradient(TARGET_MATCHING[name][1](problem.logp.exp(), star.exp()))
    for baseline in (0.0, 0.7):
        assert_close(matching(problem, star, name, sampler, baseline), expected)
    if name == "reverse":
        assert_close(expected, -problem.gradient(problem.objective(reward, BETA)) / BETA)

    problem.load(problem.policy.reference.table)
    fixed_point(problem, terminal(problem.atoms, reward), PLAIN, KLConfig(beta=BETA))
    assert_close(problem.logp.detach(), star)
    at_star = problem.logp.detach() if name == "tv" else star  # a sign has no tolerance
    sampler = problem.ref if off_policy else problem.logp.detach()
    assert matching(problem, at_star, name, sampler, 0.7).norm() < 1e-10


# ------------------------------------------------------------------------------- early stopping


def flow(problem: Problem, reward: torch.Tensor, time: float, steps: int, natural: bool) -> torch.Tensor:
    """Runge-Kutta along the expected gradient of the reward; the natural one divides by the visits."""
    rewards, table = terminal(problem.atoms, reward), problem.policy.model.table

    def velocity(at: torch.Tensor) -> torch.Tensor:
        problem.load(at)
        step = expected_gradient(problem, rewards, PLAIN, NO_KL).view_as(at)
        seen = problem.visits()
        return torch.where(seen > 0, step / seen.clamp(min=1e-300), 0.0) if natural else step

    h, at = time / steps, table.detach().clone()
    for _ in range(steps):
        a = velocity(at)
        b = velocity(at + h / 2 * a)
        c = velocity(at + h / 2 * b)
        at = at + h / 6 * (a + 2 * b + 2 * c + velocity(at + h * c))
    problem.load(at)
    return problem.logp.detach()


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("time", [0.5, 2.0])
def test_natural_gradient_flow_for_time_t_equals_beta_one_over_t(time, eos):
    problem = tabular(2, 3, eos=eos, at_ref=True)
    reward = scores(problem)
    found = flow(problem, reward, time, 60, natural=True)
    assert_close(found, gibbs(problem, reward, 1 / time), 1e-6)
    assert relative(found, gibbs(problem, reward, 1 / (1.1 * time))) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_plain_gradient_flow_pays_more_kl_for_the_same_reward(seed):
    problem = tabular(2, 3, eos=False, seed=seed, at_ref=True)
    reward = scores(problem, seed)
    found = flow(problem, reward, 6.0, 40, natural=False)
    level, spent = float(found.exp() @ reward), float(exact.kl(found, problem.ref))
    low, high = 1e-3, 1e3
    for _ in range(80):  # the beta of the optimum with that reward
        beta = math.sqrt(low * high)
        low, high = (beta, high) if float(gibbs(problem, reward, beta).exp() @ reward) > level else (low, beta)
    assert float(exact.kl(gibbs(problem, reward, beta), problem.ref)) < 0.95 * spent


# ------------------------------------------------------------------------------- log Z


def test_log_z_by_importance_sampling_is_unbiased_for_z_and_its_sample_size_is_right():
    problem = tabular(2, 2, eos=True)
    reward, law = scores(problem), problem.ref.exp()
    expected = float((law * (reward / BETA).exp()).sum())
    mean = 0.0
    for draws in itertools.product(range(len(law)), repeat=3):
        log_z, size = exact.log_z_by_importance(reward[list(draws)], BETA)
        weights = (reward[list(draws)] / BETA).exp()
        assert float(size) == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()), rel=1e-10)
        mean += float(law[list(draws)].prod()) * math.exp(float(log_z))
    assert mean == pytest.approx(expected, rel=1e-10)


def test_log_z_by_importance_sampling_approaches_enumeration():
    problem = tabular(3, 3)
    reward, law = scores(problem), problem.ref.exp()
    count = 20_000
    draws = torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(0))
    log_z, size = exact.log_z_by_importance(reward[draws], BETA)
    share = float((law @ (reward / BETA).exp()) ** 2 / (law @ (2 * reward / BETA).exp()))
    error = math.sqrt((1 / share - 1) / count)
    assert abs(float(log_z) - float((problem.ref + reward / BETA).logsumexp(0))) < 4 * error
    assert float(size) / count == pytest.approx(share, rel=0.1)
    even, full = exact.log_z_by_importance(torch.full((7,), 2.0), BETA)
    assert float(even) == pytest.approx(2 / BETA)
    assert float(full) == pytest.approx(7)
