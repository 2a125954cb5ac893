"""PPO: golden numbers, the policy gradient at ratio 1, minibatches, and what is refused."""

from dataclasses import replace

import oracle
import pytest
import torch
from conftest import Tree, metrics
from torch import Tensor

import rlkl
from rlkl import exact, launch, loop, losses, settings, update
from rlkl.config import CreditConfig, KLConfig, PPOTrainer, dump
from rlkl.lane import Lane, build
from rlkl.trainers import PPO


def row(*x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_the_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5, .5, 1.5, .5 with advantages +1, +1, -1, -1: the clip at .2 binds on the first and the last."""
    ratio, adv = row(1.5, 0.5, 1.5, 0.5), row(1, 1, -1, -1)
    logp = ratio.log().requires_grad_()
    loss, found = losses.ppo_clip(logp, torch.zeros_like(adv), adv, torch.ones_like(adv), clip=0.2)
    assert float(loss.detach()) == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist()[0] == pytest.approx([0.0, -0.5, 1.5, 0.0])
    values = {name: float(total / count) for name, (total, count) in found.items() if not name.endswith(("min", "max"))}
    assert values["policy/clip_fraction"] == 0.5
    assert values["policy/approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))
    assert float(found["policy/ratio_min"][0]) == 0.5 and float(found["policy/ratio_max"][0]) == 1.5


def test_the_clipped_value_loss_by_hand() -> None:
    """V=1, G=0, V_old=.5, clip .2: the clipped value .7 has the smaller error, so the larger, 1, counts."""
    one, zero = row(1.0), row(0.0)
    loss, _ = losses.value(one, zero, one.bool(), torch.tensor(1.0), behaviour_value_BT=row(0.5), clip=0.2)
    assert float(loss) == pytest.approx(0.5)
    loss, _ = losses.value(zero, one, one.bool(), torch.tensor(1.0), behaviour_value_BT=row(0.5), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * 1.0)
    loss, _ = losses.value(row(0.9), one, one.bool(), torch.tensor(1.0), behaviour_value_BT=row(0.5), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * 0.3**2)


def test_at_ratio_one_its_expected_gradient_is_the_exact_one() -> None:
    problem = oracle.tabular(at_ref=False)
    rewards, penalty = oracle.random_rewards(problem.atoms), KLConfig(beta=0.4)
    trainer = PPO(PPOTrainer(type="ppo"), oracle.PLAIN)
    law = problem.logp.detach().exp()
    data = oracle.assigned(problem, problem.atoms, rewards, oracle.PLAIN, penalty)
    data = replace(data, weight_BT=problem.atoms.policy_mask_BT * law[:, None])
    loss, found = update.step_loss(trainer, penalty, 0.4, problem.policy(problem.atoms, trainer.need), data)
    truth = problem.gradient(problem.objective(rewards.value_BT.sum(-1), 0.4))
    oracle.assert_close(-exact.flat_gradient(problem.policy, loss), truth)
    assert float(found["policy/clip_fraction"][0]) == 0 == float(found["policy/approx_kl"][0])


def test_the_clip_does_not_bound_kl() -> None:
    """One state, four actions, exact expectations: the clip binds time and again, and KL still goes to -log pi0(y*)."""
    start = torch.tensor([2.0, 1.0, 0.0, -2.0], dtype=torch.float64)
    ref, logits, adv = start.log_softmax(-1), start.clone().requires_grad_(), row(0.0, 0.0, 0.0, 1.0)
    bound: list[bool] = []
    while float((gap := logits.detach().log_softmax(-1) - ref).exp() @ (ref.exp() * gap)) < -0.98 * float(ref[3]):
        old = logits.log_softmax(-1).detach()[None]
        for _ in range(10):
            logp, weight = logits.log_softmax(-1)[None], old.exp()
            loss, found = losses.ppo_clip(logp, old, adv - (weight * adv).sum(), weight, clip=0.2)
            (gradient,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                logits -= gradient
        bound.append(float(found["policy/clip_fraction"][0]) > 0)
        assert len(bound) < 1000
    assert sum(bound) >= 4, "the clip hardly acted, so this shows nothing"


def lane_of(config: Tree, *overrides: str) -> Lane:
    parsed = settings.load(config, overrides)
    lane = build(parsed)
    lane.place(launch.accelerator(parsed))
    return lane


def test_minibatches_deal_out_every_completion_once_and_differently_each_epoch(tiny_config: Tree) -> None:
    lane = lane_of(tiny_config, "trainer.type=ppo", "trainer.minibatches=3", "rollout.prompts=4")
    rollout = loop.collect(lane, 1)
    dealt = [[rows.tolist() for rows, _ in lane.minibatches(rollout, 1, epoch)] for epoch in (0, 1)]
    for epoch in dealt:
        assert sorted(i for rows in epoch for i in rows) == list(range(len(rollout)))
    assert dealt[0] != dealt[1]
    assert {share for _, share in lane.minibatches(rollout, 1, 0)} == {3.0}


def test_a_process_without_a_row_takes_part_with_weight_zero(tiny_config: Tree) -> None:
    lane = lane_of(tiny_config, "trainer.type=ppo", "trainer.minibatches=4")
    rollout = loop.collect(lane, 1).rows(torch.tensor([0]))  # as if another process held the other completions
    shares = [share for _, share in lane.minibatches(rollout, 1, 0)]
    assert sorted(shares) == [0.0, 0.0, 0.0, 4.0]


def test_epochs_stop_once_the_policy_moved_past_target_kl(tiny_config: Tree) -> None:
    keys = ["trainer.type=ppo", "trainer.epochs=5", "optimiser.learning_rate=0.05"]
    free = metrics(rlkl.train(tiny_config, [*keys, "name=free"]))
    held = metrics(rlkl.train(tiny_config, [*keys, "name=held", "trainer.target_kl=1e-9"]))
    assert [row["policy/epochs"] for row in free[1:]] == [5, 5]
    assert [row["policy/epochs"] for row in held[1:]] == [2, 2]  # the first pass has ratio 1
    assert free[1]["policy/ratio_max"] > 1 > free[1]["policy/ratio_min"]


def test_one_update_a_step_is_reinforce(tiny_config: Tree) -> None:
    plain = metrics(rlkl.train(tiny_config, ["name=plain"]))
    once = metrics(rlkl.train(tiny_config, ["name=once", "trainer.type=ppo", "trainer.epochs=1"]))
    for ours, theirs in zip(plain, once, strict=True):
        shared = {name: x for name, x in theirs.items() if name in ours and name != "loss/policy"}
        assert {name: ours[name] for name in shared} == pytest.approx(shared, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.value_clip=0.1"],
            r"trainer\.value_clip=0\.1 with credit\.baseline=leave_one_out: no value is learned",
        ),
        (["kl.placement=loss", "kl.estimator=k3"], r"kl\.estimator=k3 with 4 updates a step.*k3_ratio"),
        (["trainer.minibatches=9"], r"trainer\.minibatches=9: a step has 4 completions"),
    ],
)
def test_what_means_nothing_is_refused(overrides: list[str], message: str, tiny_config: Tree) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(tiny_config, ["trainer.type=ppo", *overrides])


def test_a_resolved_configuration_can_be_read_again(tiny_config: Tree) -> None:
    config = settings.load(tiny_config, ["trainer.type=ppo"])
    assert settings.load(dump(config)) == config


def test_explained_variance_is_reported_with_a_value(tiny_config: Tree) -> None:
    rows = metrics(rlkl.train(tiny_config, ["trainer.type=ppo", "credit.baseline=value", "credit.advantage=gae"]))
    assert rows[1]["credit/explained_variance"] == pytest.approx(0, abs=1e-5)  # the head starts at 0
    assert rows[2]["credit/explained_variance"] != 0


def test_credit_decides_what_the_forward_must_return() -> None:
    config = PPOTrainer(type="ppo", entropy_coef=0.1)
    assert PPO(config, CreditConfig(baseline="value")).need == {"logp", "entropy", "value"}
    assert PPO(PPOTrainer(type="ppo"), oracle.PLAIN).need == {"logp"}
