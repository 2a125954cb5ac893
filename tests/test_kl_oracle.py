"""The KL table by enumeration: which gradient and which value every estimator has, in every place."""

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
    terminal,
    transformer,
)
from pydantic import ValidationError

from rlkl import credit, exact, kl, losses
from rlkl.config import GRADIENT, REFUSED, CreditConfig, KLConfig
from rlkl.types import PolicyOutput, TokenRewards

PROBLEMS = {
    "fixed length": (lambda: tabular(2, 3, eos=False), TABULAR),
    "eos": (lambda: tabular(3, 3, eos=True), TABULAR),
    "temperature": (lambda: tabular(3, 2, eos=True, temperature=0.6), TABULAR),
    "transformer": (lambda: transformer(2, temperature=1.5), TRANSFORMER),
}
TABLE = [
    ("reward", "k1", None, "exact"),
    ("reward", "k1", "full", "exact"),
    ("reward", "k1", "same", "exact"),
    ("reward", "k1", "own", "local"),
    ("loss", "exact", None, "exact"),
    ("loss", "k2_sequence", None, "exact"),
    ("loss", "exact_local", None, "local"),
    ("loss", "k2", None, "local"),
    ("loss", "k1_ratio", None, "local"),
    ("loss", "k3_ratio", None, "local"),
    ("loss", "k3", None, "forward"),
    ("loss", "exact_forward", None, "forward"),
]


@pytest.fixture(params=PROBLEMS)
def problem(request) -> tuple[Problem, float]:
    make, tolerance = PROBLEMS[request.param]
    return make(), tolerance


def gradients(problem: Problem) -> dict[str, torch.Tensor]:
    """The three gradients that an estimator can have, from the definitions."""
    reverse, forward = problem.token_kls()
    logp = problem.logp
    law = logp.exp()
    return {
        "exact": problem.gradient((law * (logp - problem.ref)).sum()),
        "local": problem.gradient((law.detach()[:, None] * reverse).sum()),
        "forward": problem.gradient((law.detach()[:, None] * forward).sum()),
    }


def nothing(problem: Problem) -> TokenRewards:
    return terminal(problem.atoms, torch.zeros(len(problem.atoms), dtype=torch.float64))


def sampled(problem: Problem, penalty, placement: str) -> torch.Tensor:
    """Expected descent direction of an estimator that the configuration refuses.

    ``penalty(out)`` gives ``[B, T]``; in the reward it is paid as a cost with full reward-to-go.
    """
    need = {"logp", "ref_logp", "kl"}

    def loss(batch):
        out = problem.policy(batch, need)
        weight = batch.policy_mask_BT.double() / len(batch)
        if placement == "loss":
            return (weight * penalty(out)).sum()
        paid = credit.discounted(-penalty(out).detach(), 1.0)
        return losses.policy_gradient(out.get("logp_BT"), paid, weight)[0]

    return exact.estimator(problem.policy, problem.atoms, loss).gradient


def k1(out: PolicyOutput) -> torch.Tensor:
    return kl.log_ratio(out.get("logp_BT"), out.get("ref_logp_BT"))


def k2(out: PolicyOutput) -> torch.Tensor:
    return kl.k2(out.get("logp_BT"), out.get("ref_logp_BT"))


def k3(out: PolicyOutput) -> torch.Tensor:
    return kl.k3(out.get("logp_BT"), out.get("ref_logp_BT"))


def test_the_table_covers_everything_that_is_offered():
    assert {(place, name) for place, name, _, _ in TABLE} == set(GRADIENT)


def test_the_three_gradients_differ(problem):
    found = gradients(problem[0])
    for one, two in [("exact", "local"), ("exact", "forward"), ("local", "forward")]:
        assert relative(found[one], found[two]) > 0.05


@pytest.mark.parametrize(("placement", "estimator", "window", "target"), TABLE)
def test_expected_gradient_is_the_one_promised(problem, placement, estimator, window, target):
    problem, tolerance = problem
    beta = 0.7
    cfg = KLConfig(beta=beta, placement=placement, estimator=estimator, window=window)
    loss = estimator_loss(problem, nothing(problem), PLAIN, cfg)
    found = exact.estimator(problem.policy, problem.atoms, loss).gradient
    assert_close(found, beta * gradients(problem)[target], tolerance)


@pytest.mark.parametrize("row", [r for r in TABLE if r[3] == "exact"])
def test_reward_and_exact_kl_together_give_the_gradient_of_j(problem, row):
    problem, tolerance = problem
    rewards = random_rewards(problem.atoms, dense=True)
    cfg = KLConfig(beta=0.4, placement=row[0], estimator=row[1], window=row[2])
    loss = estimator_loss(problem, rewards, PLAIN, cfg)
    found = -exact.estimator(problem.policy, problem.atoms, loss).gradient
    truth = problem.gradient(problem.objective(rewards.value_BT.sum(-1), cfg.beta))
    assert_close(found, truth, tolerance)


def test_one_pass_over_all_atoms_equals_the_mean_over_batches():
    problem = tabular()
    rewards = random_rewards(problem.atoms, dense=True)
    cfg, kl_cfg = CreditConfig(baseline="none", horizon=2, gamma=0.7), KLConfig(beta=0.4)
    mean = exact.estimator(problem.policy, problem.atoms, estimator_loss(problem, rewards, cfg, kl_cfg))
    assert_close(expected_gradient(problem, rewards, cfg, kl_cfg), -mean.gradient)


@pytest.mark.parametrize(("placement", "estimator"), REFUSED)
def test_refused_with_its_reason(placement, estimator):
    with pytest.raises(ValidationError) as error:
        KLConfig(placement=placement, estimator=estimator)
    assert REFUSED[placement, estimator] in str(error.value)


@pytest.mark.parametrize("estimator", ["k2_sequence", "k1_ratio", "k3_ratio", "exact_forward"])
def test_no_other_estimator_is_paid_as_a_reward(estimator):
    with pytest.raises(ValidationError, match="only k1 can be paid as a reward"):
        KLConfig(placement="reward", estimator=estimator)


def test_k1_in_loss_has_zero_gradient(problem):
    problem, tolerance = problem
    assert sampled(problem, k1, "loss").norm() < tolerance * gradients(problem)["exact"].norm()


def test_exact_kl_in_reward_misses_exactly_the_own_token(problem):
    problem, tolerance = problem
    found, truth = sampled(problem, lambda out: out.get("kl_BT"), "reward"), gradients(problem)
    assert_close(found, truth["exact"] - truth["local"], tolerance)
    assert relative(found, truth["exact"]) > 0.3


def test_k3_in_reward_is_reverse_minus_forward_in_one_step():
    problem = tabular(3, 1, eos=False)
    truth = gradients(problem)
    found = sampled(problem, k3, "reward")
    assert_close(found, truth["exact"] - truth["forward"])
    assert relative(found, truth["exact"]) > 0.3


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_in_reward_are_biased(problem, estimator):
    found, truth = sampled(problem[0], estimator, "reward"), gradients(problem[0])
    assert min(relative(found, t) for t in truth.values()) > 0.2
    assert max(cosine(found, t) for t in truth.values()) < 0.99


SAMPLED = {"k1", "k2", "k3", "k2_sequence", "k1_ratio", "k3_ratio", "exact"}


@pytest.mark.parametrize("origin", ["data", "reference"])
def test_sampled_estimators_are_refused_off_policy_and_others_are_not(origin):
    refused = set()
    for estimator in (*SAMPLED, "exact_local", "exact_forward"):
        cfg = KLConfig(placement="reward" if estimator == "k1" else "loss", estimator=estimator)
        kl.check_origin(cfg, "policy")
        try:
            kl.check_origin(cfg, origin)
        except ValueError as error:
            assert "did not draw" in str(error)
            refused.add(estimator)
    assert refused == SAMPLED


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_sampled_estimators_estimate_nothing_on_annotated_completions(estimator):
    """Mean error over all completions that a person might have written, against the KL at their states."""
    errors = []
    with torch.no_grad():
        for seed in range(6):
            problem = tabular(seed=seed)
            out, truth = problem.policy(problem.atoms, {"logp", "ref_logp", "kl"}), problem.token_kls()[0].sum(-1)
            assert_close(out.get("kl_BT").sum(-1), truth)
            errors.append((estimator(out).sum(-1) / truth - 1).abs())
    assert torch.cat(errors).mean() > 1.0


@torch.no_grad()
def test_on_data_of_the_reference_k1_is_minus_the_forward_kl():
    problem = tabular()
    law, out = problem.ref.exp(), problem.policy(problem.atoms, {"logp", "ref_logp"})
    forward = (law * (problem.ref - problem.logp)).sum()
    assert_close((law * k1(out).sum(-1)).sum(), -forward)
    # k3 is forward KL there only in its log part; E[rho] - 1 comes on top.
    assert float((law * k3(out).sum(-1)).sum()) != pytest.approx(float(forward), rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_summed_exact_kl_is_unbiased_for_the_sequence_kl_with_less_variance_than_k1(seed):
    problem = tabular(3, 4, seed=seed)
    out = problem.policy(problem.atoms, {"logp", "ref_logp", "kl"})
    law, truth = problem.logp.exp(), (problem.logp.exp() * (problem.logp - problem.ref)).sum()
    assert_close(exact.kl(problem.logp, problem.ref), truth)
    u = k1(out).sum(-1)
    variance = {}
    for name, value in {"k1": u, "k3": torch.expm1(-u) + u, "exact": out.get("kl_BT").sum(-1)}.items():
        assert_close((law * value).sum(), truth)
        variance[name] = float((law * (value - truth) ** 2).sum())
    assert variance["exact"] < 0.5 * variance["k1"]


@torch.no_grad()
@pytest.mark.parametrize(("scale", "worse"), [(2.0, True), (0.1, False)])
def test_sequence_k3_is_worse_than_k1_unless_policy_and_reference_are_close(scale, worse):
    """Its weight exp(-u) explodes with the spread of the sequence log-ratio; for tiny u it is the better one."""
    for seed in range(5):
        problem = tabular(3, 5, eos=False, seed=seed)
        problem.load(problem.policy.reference.table + scale * problem.policy.model.table)
        law, u = problem.logp.exp(), problem.logp - problem.ref
        truth = (law * u).sum()
        variance = {n: (law * (v - truth) ** 2).sum() for n, v in (("k1", u), ("k3", torch.expm1(-u) + u))}
        assert bool(variance["k3"] > variance["k1"]) == worse


@pytest.mark.parametrize("seed", range(3))
def test_rao_blackwellised_gradient_has_less_variance_than_k1_in_reward(seed):
    problem = tabular(seed=seed)
    trace = {}
    for placement, name in [("reward", "k1"), ("loss", "exact"), ("loss", "k2_sequence")]:
        loss = estimator_loss(problem, nothing(problem), PLAIN, KLConfig(placement=placement, estimator=name))
        trace[name] = exact.estimator(problem.policy, problem.atoms, loss).trace_variance
    assert trace["exact"] < 0.5 * trace["k1"]
    assert trace["k2_sequence"] > 0.5 * trace["k1"]


def test_penalty_in_loss_reports_the_sequence_kl():
    problem = tabular()
    batch = problem.atoms.rows(torch.tensor([0, 4, 4, 9]))
    for name, column in [("exact", 0), ("exact_local", 0), ("exact_forward", 1)]:
        cfg = KLConfig(placement="loss", estimator=name)
        data = assigned(problem, batch, nothing(problem), PLAIN, cfg)
        value, metrics = kl.penalty(cfg, problem.policy(batch, kl.needs(cfg)), data)
        expected = float(problem.token_kls()[column].detach().sum(-1)[[0, 4, 4, 9]].mean())
        total, count = metrics["loss/kl"]
        assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
        assert float(total / count) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("row", TABLE)
def test_environment_tokens_take_no_part_in_any_estimator(row):
    """The middle token is written by a fixed environment, with a law of its own."""
    problem = tabular(3, 3, eos=False)
    mask = problem.atoms.policy_mask_BT.clone()
    mask[:, 1] = False
    problem = replace(problem, atoms=replace(problem.atoms, policy_mask_BT=mask))
    world = tabular(3, 3, eos=False, seed=50).token_logp()[:, 1].detach()
    logp, ref = problem.logp, problem.ref
    law = (logp + world).exp()
    reverse, forward = problem.token_kls()
    value = {"exact": law * (logp - ref), "local": law.detach() * reverse.sum(-1)}
    value["forward"] = law.detach() * forward.sum(-1)
    placement, estimator, window, target = row
    cfg = KLConfig(beta=0.7, placement=placement, estimator=estimator, window=window)
    found = expected_gradient(problem, nothing(problem), PLAIN, cfg, law.detach())
    assert_close(-found, 0.7 * problem.gradient(value[target].sum()))


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_temperature_divides_policy_and_reference_logits(tau):
    problem = tabular(temperature=tau)
    out = problem.policy(problem.atoms, {"logp", "ref_logp", "kl", "kl_forward", "entropy"})
    cold = tabular()
    for model in (cold.policy.model, cold.policy.reference):
        with torch.no_grad():
            model.table.div_(tau)
    expected = cold.policy(cold.atoms, {"logp", "ref_logp", "kl", "kl_forward", "entropy"})
    for name in ("logp_BT", "ref_logp_BT", "kl_BT", "kl_forward_BT", "entropy_BT"):
        assert_close(out.get(name), expected.get(name))
    assert relative(out.get("kl_BT"), tabular().policy(cold.atoms, {"kl"}).get("kl_BT")) > 0.1


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(6.0, 0.2), (6.3, 0.201), (6.6, 0.202), (7.2, 0.204), (60.0, 0.204), (5.4, 0.198), (0.0, 0.196)],
)
def test_adaptive_beta(measured, expected):
    """beta 0.2, target 6 nats: relative error clipped at 20 %, a tenth of which moves beta."""
    assert kl.adapt(0.2, measured, 6.0) == pytest.approx(expected, rel=1e-12)


def test_adaptive_beta_reads_the_mean_sum_of_log_ratios_over_policy_tokens():
    problem = tabular()
    batch = problem.atoms.rows(torch.tensor([2, 5]))
    mask = batch.policy_mask_BT.clone()
    mask[0, 0] = False
    u = torch.tensor([[9.0, 2.0, 3.0], [1.0, 5.0, 7.0]])
    out = PolicyOutput(logp_BT=u - 1, ref_logp_BT=torch.full_like(u, -1.0))
    full = replace(batch, policy_mask_BT=torch.tensor([[False, True, True], [True, True, False]]))
    assert kl.measured(full, out) == pytest.approx((5 + 6) / 2)


@pytest.mark.parametrize("estimator", ["k1_ratio", "k3_ratio"])
def test_ratio_estimators_correct_for_a_policy_that_moved_since_sampling(estimator):
    """One token, drawn from an older policy: the ratio restores the reverse KL of the current one."""
    problem, old = tabular(3, 1, eos=False), tabular(3, 1, eos=False, seed=4).logp.detach()
    cfg = KLConfig(placement="loss", estimator=estimator)
    data = assigned(problem, problem.atoms, nothing(problem), PLAIN, cfg)
    data = replace(data, behaviour_logp_BT=old[:, None], weight_BT=old.exp()[:, None])
    found = kl.penalty(cfg, problem.policy(problem.atoms, kl.needs(cfg)), data)[0]
    assert_close(problem.gradient(found), gradients(problem)["exact"])


def test_without_beta_there_is_no_kl_term():
    problem = tabular()
    rewards = random_rewards(problem.atoms)
    truth = problem.gradient(problem.objective(rewards.value_BT.sum(-1), 0.0))
    for cfg in (NO_KL, KLConfig(beta=0.0, placement="loss", estimator="exact")):
        assert_close(expected_gradient(problem, rewards, PLAIN, cfg), truth)
