"""What a horizon does: the fixed points of the library's own expected gradient, against the predictions."""

import pytest
import torch
from oracle import (
    TABULAR,
    Problem,
    assert_close,
    assigned,
    estimator_loss,
    expected_gradient,
    fixed_point,
    relative,
    tabular,
    terminal,
)

from rlkl import exact
from rlkl.config import CreditConfig, KLConfig
from rlkl.types import TokenRewards

BETA = 0.5


def horizon(h: int | None, gamma: float = 1.0) -> CreditConfig:
    return CreditConfig(baseline="none", horizon=h, gamma=gamma)


def window(name: str | None) -> KLConfig:
    return KLConfig(beta=BETA, window=name)


def scores(problem: Problem, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(problem.atoms), generator=generator, dtype=torch.float64)


def groups(problem: Problem, t: int) -> torch.Tensor:
    """Number of the prefix of t tokens that an atom has ``[N]``."""
    if t == 0:
        return torch.zeros(len(problem.atoms), dtype=torch.long)
    length = problem.atoms.length_B[:, None]
    seen = torch.where(torch.arange(t) < length, problem.atoms.tokens_BT[:, :t], -1)
    return torch.unique(seen, dim=0, return_inverse=True)[1]


def total(problem: Problem, t: int, mass_N: torch.Tensor) -> torch.Tensor:
    """Sum of ``mass_N`` over the atoms that share an atom's prefix of t tokens ``[N]``."""
    group = groups(problem, t)
    return mass_N.new_zeros(int(group.max()) + 1).index_add(0, group, mass_N)[group]


def conditionals(problem: Problem, law_N: torch.Tensor) -> torch.Tensor:
    """log p(token t | prefix) of a law over completions ``[N, T]``, by summing atoms."""
    width = problem.atoms.tokens_BT.shape[1]
    return torch.stack([(total(problem, t + 1, law_N) / total(problem, t, law_N)).log() for t in range(width)], 1)


def soft(problem: Problem, t: int, reward_N: torch.Tensor) -> torch.Tensor:
    """V*_t = beta log E_pi0[exp(r/beta) | prefix of t tokens] by summing atoms ``[N]``."""
    law = problem.ref.exp()
    return BETA * (total(problem, t, law * (reward_N / BETA).exp()) / total(problem, t, law)).log()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("h", "name"), [(1, None), (1, "own"), (1, "anchored"), (2, None), (3, None), (None, None)])
def test_anchored_horizon_keeps_the_first_tokens_and_is_optimal_on_the_last(h, name, seed):
    problem = tabular(2, 3, eos=False, seed=seed)
    reward, width = scores(problem, seed), 3
    found = fixed_point(problem, terminal(problem.atoms, reward), horizon(h), window(name))

    star = (problem.ref + reward / BETA).softmax(0)
    kept = width - (h or width)
    tokens = torch.where(
        torch.arange(width) < kept,
        problem.token_logp(problem.policy.reference).detach(),
        conditionals(problem, star),
    )
    assert_close(found, tokens.sum(-1))
    predicted = (problem.ref.exp() * soft(problem, kept, reward)).sum()
    assert_close(problem.objective(reward, BETA).detach(), predicted)
    last = {1: (problem.ref + reward / BETA).exp(), 2: None, 3: star, None: star}[h]
    if last is not None:
        assert_close(conditionals(problem, found.exp())[:, -1], conditionals(problem, last)[:, -1])


def test_j_grows_with_the_anchored_horizon():
    problem = tabular(2, 4, eos=False)
    reward = scores(problem)
    values = [(problem.ref.exp() * soft(problem, 4 - h, reward)).sum() for h in range(5)]
    assert values == sorted(values)
    assert float(values[0]) == pytest.approx(float((problem.ref.exp() * reward).sum()))
    reached = []
    for h in range(1, 5):
        fixed_point(problem, terminal(problem.atoms, reward), horizon(h), window(None))
        reached.append(problem.objective(reward, BETA).detach())
    assert_close(torch.stack(reached), torch.stack(values[1:]))


@pytest.mark.parametrize("h", [1, 2])
def test_no_fixed_point_of_a_short_horizon_is_optimal(h):
    problem = tabular(2, 3, eos=False)
    reward = scores(problem)
    _, log_z = exact.optimum(problem.ref, reward, BETA)
    fixed_point(problem, terminal(problem.atoms, reward), horizon(h), window(None))
    assert float(problem.objective(reward, BETA).detach()) < BETA * float(log_z) - 1e-3


@pytest.mark.parametrize("h", [3, None])
@pytest.mark.parametrize("seed", range(3))
def test_full_reward_with_own_kl_never_reaches_the_optimum(seed, h):
    problem = tabular(2, 3, eos=False, seed=seed)
    reward = scores(problem, seed)
    rewards = terminal(problem.atoms, reward)
    star, log_z = exact.optimum(problem.ref, reward, BETA)
    found = fixed_point(problem, rewards, horizon(h), window("own"))
    assert float(exact.kl(found, star)) > 1e-3
    assert float(problem.objective(reward, BETA).detach()) < BETA * float(log_z) - 5e-4

    fixed_point(problem, rewards, horizon(None), window("full"))
    assert_close(problem.logp.detach(), star)
    assert expected_gradient(problem, rewards, horizon(h), window("full")).norm() < 1e-12
    assert expected_gradient(problem, rewards, horizon(h), window("own")).norm() > 1e-3


@pytest.mark.parametrize("estimator", ["exact_local", "k2", "k3_ratio", "k1_ratio"])
def test_a_local_kl_loss_is_the_own_window(estimator):
    problem = tabular(2, 3, eos=False)
    rewards = terminal(problem.atoms, scores(problem))
    own = expected_gradient(problem, rewards, horizon(None), window("own"))
    local = KLConfig(beta=BETA, placement="loss", estimator=estimator)
    assert_close(expected_gradient(problem, rewards, horizon(None), local), own)


def test_full_kl_window_with_horizon_one_dodges_prefixes_with_later_kl():
    """Two tokens: the first law is not pi0 but pi0 exp(-KL of the optimal last token), renormalised."""
    problem = tabular(3, 2, eos=False)
    reward = scores(problem)
    found = fixed_point(problem, terminal(problem.atoms, reward), horizon(1), window("full"))
    reference = problem.token_logp(problem.policy.reference).detach()
    last = conditionals(problem, (problem.ref + reward / BETA).softmax(0))[:, 1]
    assert_close(conditionals(problem, found.exp())[:, 1], last)
    later_kl = total(problem, 1, last.exp() * (last - reference[:, 1]))
    first = reference[:, 0] - later_kl
    first = first - (first.exp() * last.exp()).sum().log()
    assert_close(conditionals(problem, found.exp())[:, 0], first)
    assert relative(first, reference[:, 0]) > 0.05


def test_gamma_zero_gives_a_terminal_reward_to_the_final_token_only():
    problem = tabular(2, 3, eos=False)
    rewards = terminal(problem.atoms, scores(problem))
    gradient = expected_gradient(problem, rewards, horizon(None, gamma=0.0)).view_as(problem.visits())
    early, final = problem.rows()[:, :2].unique(), problem.rows()[:, 2].unique()
    assert gradient[early].abs().max() < 1e-15
    assert gradient[final].abs().max(-1).values.min() > 1e-4
    full = expected_gradient(problem, rewards, horizon(None)).view_as(problem.visits())
    assert_close(gradient[final], full[final])


def eos_logit(problem: Problem, model: torch.nn.Module) -> torch.Tensor:
    """logit of ending, at every position of every atom."""
    end = problem.laws(model)[..., -1].detach()
    return end - torch.log1p(-end.exp())


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_horizon_one_shifts_the_eos_logit_by_r_over_beta_at_every_step(constant):
    problem = tabular(3, 3, eos=True)
    reward = scores(problem) + constant
    fixed_point(problem, terminal(problem.atoms, reward), horizon(1), window(None))
    shift = eos_logit(problem, problem.policy.model) - eos_logit(problem, problem.policy.reference)
    ended = problem.atoms.tokens_BT == 2
    before_limit = ended & (torch.arange(3) < 2) & problem.atoms.policy_mask_BT
    assert int(before_limit.sum()) == 3
    assert_close(shift[before_limit], (reward[:, None] / BETA).expand(-1, 3)[before_limit])


def test_with_eos_a_constant_added_to_the_reward_moves_the_optimum_of_a_short_horizon_only():
    laws = {}
    for h in (1, 2, None):
        for constant in (0.0, 1.0):
            problem = tabular(3, 3, eos=True)
            rewards = terminal(problem.atoms, scores(problem) + constant)
            laws[h, constant] = fixed_point(problem, rewards, horizon(h), window(None)).exp()
    assert_close(laws[None, 0.0], laws[None, 1.0])
    assert relative(laws[1, 1.0], laws[1, 0.0]) > 0.2
    assert relative(laws[2, 1.0], laws[2, 0.0]) > 0.05


def test_with_eos_horizon_one_can_end_below_the_reference():
    problem = tabular(3, 3, eos=True)
    reward = problem.atoms.length_B.double()  # every end is good, a late one better
    start = (problem.ref.exp() * reward).sum()
    rewards = terminal(problem.atoms, reward)
    fixed_point(problem, rewards, horizon(1), window(None))
    assert float(problem.objective(reward, BETA).detach()) < float(start) - 0.1
    fixed_point(problem, terminal(problem.atoms, reward - start), horizon(1), window(None))
    assert float(problem.objective(reward, BETA).detach()) > float(start)
    fixed_point(problem, rewards, horizon(None), window(None))
    assert float(problem.objective(reward, BETA).detach()) > float(start)


def test_centring_subtracts_the_expected_score():
    problem = tabular(3, 2, eos=True)
    reward = scores(problem) + 1.0
    cfg = CreditConfig(baseline="none", horizon=1, centre_rewards=True)
    loss = estimator_loss(problem, terminal(problem.atoms, reward), cfg, window(None))
    found = -exact.estimator(problem.policy, problem.atoms, loss, 2).gradient
    mean = (problem.logp.exp() * reward).sum().detach()
    rewards = terminal(problem.atoms, reward - mean)
    assert_close(found, expected_gradient(problem, rewards, horizon(1), window(None)))


@pytest.mark.parametrize("spread", ["first", "uniform"])
def test_a_sequence_score_that_is_spread_backwards_gives_a_wrong_gradient(spread):
    problem = tabular(2, 3, eos=False)
    reward = scores(problem)
    share = torch.tensor([1.0, 0.0, 0.0]) if spread == "first" else torch.full((3,), 1 / 3)
    scored = problem.atoms.policy_mask_BT
    wrong = TokenRewards(reward[:, None] * share.double(), scored)
    truth = problem.gradient(problem.objective(reward, 0.0))
    assert_close(expected_gradient(problem, terminal(problem.atoms, reward), horizon(None)), truth, TABULAR)
    assert relative(expected_gradient(problem, wrong, horizon(None)), truth) > 0.3


def test_anchored_window_follows_the_scored_positions_even_where_the_score_is_zero():
    problem = tabular(2, 3, eos=False)
    zero = torch.zeros(len(problem.atoms), dtype=torch.float64)
    rewards = terminal(problem.atoms, zero)
    nowhere = TokenRewards(rewards.value_BT, torch.zeros_like(rewards.scored_BT))
    u = (problem.token_logp() - problem.token_logp(problem.policy.reference)).detach()
    for paid, windows in ((rewards, (1, 2, 1)), (nowhere, (1, 1, 1))):
        batch = assigned(problem, problem.atoms, paid, horizon(2), window(None))
        expected = torch.stack([u[:, t : t + k].sum(-1) for t, k in enumerate(windows)], 1)
        assert_close(batch.adv_BT, -BETA * expected)
