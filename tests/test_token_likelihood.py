"""Each likelihood loss reaches the fixed point that its algebra promises, and diverges where it says so.

One state, five tokens, a table of logits: the whole data law is summed, so the gradient is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkl import credit, exact, kl
from rlkl.config import CreditConfig, KLConfig, TokenLikelihoodTrainer
from rlkl.policy import Policy
from rlkl.tasks.tabular import random_tabular
from rlkl.trainers import TokenLikelihood
from rlkl.types import Batch, PolicyOutput, TokenRewards
from rlkl.update import step_loss

V = 5
BAD = 2
REVERSE = KLConfig(beta=0.7, placement="loss", estimator="exact")
FORWARD = KLConfig(beta=0.7, placement="loss", estimator="exact_forward")
NONE = KLConfig(beta=0.0)


@dataclass
class State:
    """One state with its data law ``m`` and annotations ``w``."""

    m: Tensor
    w: Tensor
    seed: int = 3

    def __post_init__(self) -> None:
        self.policy = Policy(random_tabular(V, 2, self.seed))
        self.atoms = exact.enumerate_completions([0], V, 1)
        self.q = self.law()
        self.offset = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def law(self) -> Tensor:
        with torch.no_grad():
            return self.policy(self.atoms, {"logp"}).get("logp_BT")[:, 0].exp()

    def batch(self, behaviour: Tensor) -> Batch:
        """The whole data law as one batch: the weights hold the probabilities."""
        marked = torch.ones(V, 1, dtype=torch.bool)
        return Batch(
            adv_BT=torch.zeros(V, 1, dtype=torch.float64),
            return_BT=torch.zeros(V, 1, dtype=torch.float64),
            mask_BT=marked,
            weight_BT=self.m[:, None],
            tokens=torch.tensor(1.0),
            group_B=torch.zeros(V, dtype=torch.long),
            behaviour_logp_BT=behaviour[:, None],
            annotation_BT=self.w[:, None],
        )

    def loss(self, trainer: TokenLikelihood, penalty: KLConfig, behaviour: Tensor) -> Tensor:
        """The exact loss of the data law."""
        out = self.policy(self.atoms, (trainer.need - {"value"}) | kl.needs(penalty) | {"ref_logp"})
        if "value" in trainer.need:
            out = replace(out, value_BT=self.offset.expand(V, 1))
        return step_loss(trainer, penalty, penalty.beta, out, self.batch(behaviour.log()))[0]

    def minimise(self, trainer: TokenLikelihood, penalty: KLConfig) -> Tensor:
        """The law at the minimum of the exact loss."""
        optimiser = torch.optim.LBFGS(
            [self.policy.model.table, self.offset],
            max_iter=500,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(trainer, penalty, self.q)
            loss.backward()
            return loss

        optimiser.step(closure)
        return self.law()

    def descend(
        self, trainer: TokenLikelihood, penalty: KLConfig, steps: int, rate: float, on_policy: bool = False
    ) -> Tensor:
        """Gradient descent on the exact loss, from the reference; ``on_policy`` the data law is the policy's own."""
        optimiser = torch.optim.SGD([self.policy.model.table, self.offset], lr=rate)
        for _ in range(steps):
            behaviour = self.law() if on_policy else self.q
            self.m = behaviour if on_policy else self.m
            optimiser.zero_grad()
            self.loss(trainer, penalty, behaviour).backward()
            optimiser.step()
        return self.law()


def trainer(loss: str, beta: float = 0.7, **keys: Any) -> TokenLikelihood:
    return TokenLikelihood(TokenLikelihoodTrainer(type="token_likelihood", loss=loss, **keys), beta)  # type: ignore[arg-type]


def only_bad(share: float, w: float = -1.0) -> State:
    """A share of the annotated data is the bad token; the rest of the weight is unmarked and carries no loss."""
    m = torch.zeros(V, dtype=torch.float64)
    w_V = torch.zeros(V, dtype=torch.float64)
    m[BAD], w_V[BAD] = share, w
    m[0] = 1 - share  # annotated 0: KL alone
    return State(m, w_V)


def logit(p: Tensor) -> Tensor:
    return p.log() - (-p).log1p()


def gibbs(state: State, beta: float) -> Tensor:
    return (state.q.log() + state.w / beta).softmax(0)


GRADED = torch.tensor([0.5, -1.0, 0.3, -0.2, 0.8], dtype=torch.float64)
SPREAD = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)


def test_unlikelihood_with_reverse_kl_reaches_its_fixed_point() -> None:
    state, m = only_bad(0.4), 0.4
    p = state.minimise(trainer("unlikelihood"), REVERSE)[BAD]
    assert float(logit(p)) == pytest.approx(float(logit(state.q[BAD]) - m / (REVERSE.beta * (1 - p))), abs=1e-5)
    assert float(p) < float(state.q[BAD])


def test_npo_with_reverse_kl_reaches_its_fixed_point() -> None:
    state, m = only_bad(0.4), 0.4
    p, q = state.minimise(trainer("npo"), REVERSE)[BAD], state.q[BAD]
    assert float(logit(p)) == pytest.approx(float(logit(q) - 2 * m / (REVERSE.beta * (p + q))), abs=1e-5)


def test_signed_with_forward_kl_reaches_its_fixed_point_when_bounded() -> None:
    """The condition beta*pi0 > |w| holds for every bad token."""
    m = torch.ones(V, dtype=torch.float64)
    state = State(m / V, torch.tensor([0.2, -0.02, 0.1, -0.03, 0.0], dtype=torch.float64) * V)
    w = state.w / V  # per state: annotation times its share of the data
    assert bool((FORWARD.beta * state.q > -w).all())
    p = state.minimise(trainer("signed"), FORWARD)
    assert torch.allclose(p, (w + FORWARD.beta * state.q) / (w.sum() + FORWARD.beta), atol=1e-6)


@pytest.mark.parametrize("penalty", [NONE, REVERSE], ids=["without KL", "with reverse KL"])
def test_signed_diverges_where_nothing_bounds_it(penalty: KLConfig) -> None:
    few, many = (only_bad(0.9, w=-4.0).descend(trainer("signed"), penalty, steps, 1.0)[BAD] for steps in (30, 600))
    assert float(many) < 0.1 * float(few) < 0.1 * float(only_bad(0.9).q[BAD])


def test_signed_diverges_under_forward_kl_beyond_its_condition() -> None:
    state = only_bad(0.9, w=-4.0)
    assert float(FORWARD.beta * state.q[BAD]) < 0.9 * 4
    assert float(state.descend(trainer("signed"), FORWARD, 600, 1.0)[BAD]) < 1e-9


def test_signed_is_metastable_under_reverse_kl_above_its_threshold() -> None:
    """Above beta_c = m / max_{p<q} p (logit q - logit p) a start at q stays near it; below, it runs away."""
    state = only_bad(0.4)
    grid = torch.linspace(1e-4, 1 - 1e-4, 20000, dtype=torch.float64) * state.q[BAD]
    critical = 0.4 / float((grid * (logit(state.q[BAD]) - logit(grid))).max())
    stays = only_bad(0.4).descend(trainer("signed"), KLConfig(**_exact(1.2 * critical)), 800, 0.5)[BAD]
    leaves = only_bad(0.4).descend(trainer("signed"), KLConfig(**_exact(0.8 * critical)), 800, 0.5)[BAD]
    assert float(stays) > 0.2 * float(state.q[BAD])
    assert float(leaves) < 1e-3 * float(state.q[BAD])


def _exact(beta: float) -> dict[str, Any]:
    return {"beta": beta, "placement": "loss", "estimator": "exact"}


@pytest.mark.parametrize("loss", ["binary", "regression"])
def test_losses_that_hold_beta_reach_gibbs_with_an_offset_of_the_state(loss: str) -> None:
    state = State(SPREAD, GRADED)
    p = state.minimise(trainer(loss), NONE)
    assert torch.allclose(p, gibbs(state, 0.7), atol=1e-5)
    log_z = (state.q * (state.w / 0.7).exp()).sum().log()
    assert float(state.offset.detach()) == pytest.approx(0.7 * float(log_z), abs=1e-4)


def test_regression_with_one_annotated_token_is_absorbed_by_an_offset_and_kept_without() -> None:
    m, w = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    m[BAD], w[BAD] = 1.0, -1.0
    absorbed = State(m, w)
    p = absorbed.minimise(trainer("regression", offset="state"), NONE)[BAD]
    kept = State(m, w)
    moved = kept.minimise(trainer("regression", offset="none"), NONE)[BAD]
    assert float(moved) == pytest.approx(float(kept.q[BAD]) * float(torch.tensor(-1 / 0.7).exp()), rel=1e-5)
    assert float(p) > 1.5 * float(moved)


def test_rwr_reaches_gibbs_on_samples_of_the_reference() -> None:
    state = State(SPREAD, GRADED)
    state.m = state.q.clone()
    assert torch.allclose(state.minimise(trainer("rwr"), NONE), gibbs(state, 0.7), atol=1e-5)


def test_rwr_reaches_gibbs_on_its_own_samples_by_their_importance() -> None:
    state = State(SPREAD, GRADED)
    assert torch.allclose(state.descend(trainer("rwr"), NONE, 1500, 0.5, on_policy=True), gibbs(state, 0.7), atol=1e-5)


@pytest.mark.parametrize("loss", ["signed", "unlikelihood", "npo"])
def test_every_token_marked_good_is_maximum_likelihood(loss: str) -> None:
    state = State(SPREAD, torch.ones(V, dtype=torch.float64))
    assert torch.allclose(state.minimise(trainer(loss), NONE), SPREAD, atol=1e-6)


def test_losses_by_hand() -> None:
    from rlkl import likelihood

    def row(*x: float) -> Tensor:
        return torch.tensor([x], dtype=torch.float64)

    p, q, w, weight = row(0.5, 0.25, 0.9), row(0.25, 0.5, 0.5), row(2.0, -1.0, 7.0), row(0.5, 0.5, 0.0)
    logp, ref = p.log(), q.log()
    two, four = float(torch.tensor(2.0).log()), float(torch.tensor(4 / 3).log())
    cases: dict[str, tuple[Callable[[], Any], float]] = {
        "signed": (lambda: likelihood.signed(logp, w, weight), 0.5 * (2 * two - 2 * two)),
        "unlikelihood": (lambda: likelihood.unlikelihood(logp, w, weight), 0.5 * (2 * two + four)),
        "npo": (lambda: likelihood.npo(logp, ref, w, weight, 1.0), 0.5 * (2 * two + 2 * float(row(1.5).log()))),
        "regression": (
            lambda: likelihood.regression(logp, ref, row(0.0, 0.0, 0.0), w, weight, 1.0),
            0.25 * ((2 - two) ** 2 + (-1 + two) ** 2),
        ),
        "rwr": (
            lambda: likelihood.rwr(logp, ref, ref, w, weight, 1.0),
            0.5 * (float(row(2.0).exp()) * two + float(row(-1.0).exp()) * 2 * two),
        ),
        "contrastive": (
            lambda: likelihood.contrastive(logp, row(0.1, 0.75, 0.1).log(), w, weight),
            0.5 * (2 * two + float(row(4 / 3).log())),
        ),
    }
    for name, (compute, expected) in cases.items():
        assert float(compute()[0]) == pytest.approx(expected), name


def test_a_certain_bad_token_stays_finite() -> None:
    from rlkl import likelihood

    logp = torch.zeros(1, 1, requires_grad=True)
    loss, _ = likelihood.unlikelihood(logp, -torch.ones(1, 1), torch.ones(1, 1))
    loss.backward()
    assert bool(loss.isfinite()) and bool(logp.grad is not None and logp.grad.isfinite().all())


@pytest.mark.parametrize("lead", [4.0, 10.0, 16.0, 17.0])
def test_a_certain_bad_token_is_pressed_as_hard_as_any(lead: float) -> None:
    """d/dz of -log(1-p) is p for the token and shares p among the others, also where p rounds to 1 in float32."""
    from rlkl import likelihood

    logits = torch.tensor([lead, 0.0, 0.0], requires_grad=True)
    loss, _ = likelihood.unlikelihood(logits.log_softmax(-1)[:1, None], -torch.ones(1, 1), torch.ones(1, 1))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1:].tolist() == pytest.approx([-0.5, -0.5], rel=0.3)


def test_windowed_annotations_and_where_the_kl_acts() -> None:
    """w is the sum over the window; tokens train where it holds an annotated one; the KL covers every policy token."""
    atoms = exact.enumerate_completions([0], 2, 3).rows(torch.tensor([0]))
    given = torch.tensor([[0.0, -2.0, 1.0]], dtype=torch.float64)
    marked = torch.tensor([[False, True, True]])
    annotated = replace(atoms, annotation_BT=given, annotated_BT=marked)
    ignored = TokenRewards(torch.full((1, 3), 9.0), torch.ones(1, 3, dtype=torch.bool))
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    out = PolicyOutput(logp_BT=zeros, ref_logp_BT=zeros - 1)
    for horizon, w, trains in ((1, [0, -2, 1], [0, 1, 1]), (2, [-2, -1, 1], [1, 1, 1]), (None, [-1, -1, 1], [1, 1, 1])):
        batch = credit.likelihood(annotated, ignored, out, CreditConfig(horizon=horizon))
        assert batch.get("annotation_BT").tolist() == [w]
        assert batch.weight_BT.tolist() == [[x / sum(trains) for x in trains]]
        assert batch.get("kl_weight_BT").tolist() == [[1 / sum(trains)] * 3]
        assert torch.equal(batch.behaviour_logp_BT, zeros)
    from_data = credit.likelihood(replace(annotated, origin="data"), ignored, out, CreditConfig(horizon=1))
    assert torch.equal(from_data.behaviour_logp_BT, zeros - 1)
    rewarded = credit.likelihood(atoms, ignored, out, CreditConfig(horizon=1))
    assert rewarded.get("annotation_BT").tolist() == [[9.0, 9.0, 9.0]]
