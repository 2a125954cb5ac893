"""Enumerated problems for the oracle tests, and maths coded a second time, away from the library.

A ``Problem`` is a policy with all its completions ("atoms"). ``estimator_loss`` runs an estimator of the
library on batches of atoms, through forward, credit, KL and step loss; ``exact.estimator`` takes its mean.
What it is compared with uses only ``laws``: the models' own logits, normalised here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlkl import credit, exact, kl, update
from rlkl.config import CreditConfig, KLConfig, ReinforceTrainer
from rlkl.policy import Policy
from rlkl.tasks.tabular import random_tabular
from rlkl.trainers import Reinforce
from rlkl.types import Batch, PolicyOutput, Rollout, TokenRewards

TABULAR, TRANSFORMER = 1e-10, 1e-5
PLAIN = CreditConfig(baseline="none")
NO_KL = KLConfig(beta=0.0)


@dataclass(frozen=True)
class Problem:
    """A policy with its reference, and every completion of the prompt ``[0]``."""

    policy: Policy
    atoms: Rollout

    def laws(self, model: torch.nn.Module | None = None) -> Tensor:
        """Next-token log-probs ``[N, T, V]`` at every position, straight from the model's logits."""
        atoms = self.atoms
        ids = torch.cat([atoms.prompt_BP, atoms.tokens_BT], 1)
        first = atoms.prompt_BP.shape[1] - 1
        logits = (self.policy.model if model is None else model)(input_ids=ids, use_cache=False).logits
        return (logits[:, first:-1] / atoms.temperature).log_softmax(-1)

    def token_logp(self, model: torch.nn.Module | None = None) -> Tensor:
        """Log-probs of the policy tokens ``[N, T]``, zero elsewhere."""
        logp_NT = self.laws(model).gather(2, self.atoms.tokens_BT[..., None]).squeeze(2)
        return logp_NT * self.atoms.policy_mask_BT

    @property
    def logp(self) -> Tensor:
        """Sequence log-probs of the policy, differentiable ``[N]``."""
        return self.token_logp().sum(-1)

    @property
    def ref(self) -> Tensor:
        """Sequence log-probs of the reference ``[N]``."""
        return self.token_logp(self.policy.reference).sum(-1).detach()

    def token_kls(self) -> tuple[Tensor, Tensor]:
        """KL(pi||pi0) and KL(pi0||pi) of the next-token laws ``[N, T]``, zero off the policy's tokens."""
        own, ref = self.laws(), self.laws(self.policy.reference).detach()
        mask = self.atoms.policy_mask_BT
        reverse, forward = (own.exp() * (own - ref)).sum(-1), (ref.exp() * (ref - own)).sum(-1)
        return reverse * mask, forward * mask

    def gradient(self, value: Tensor) -> Tensor:
        return exact.flat_gradient(self.policy, value)

    def objective(self, reward_N: Tensor, beta: float) -> Tensor:
        """J, differentiable, from the definition."""
        logp = self.logp
        return (logp.exp() * reward_N).sum() - beta * (logp.exp() * (logp - self.ref)).sum()

    def load(self, table: Tensor) -> None:
        with torch.no_grad():
            self.policy.model.table.copy_(table)

    def rows(self) -> Tensor:
        """The row of the table that holds the law of token t ``[N, T]`` (prefixes in bijective base V)."""
        size, index, rows = self.policy.model.config.vocab_size, self.atoms.prompt_BP[:, 0] + 1, []
        for token in self.atoms.tokens_BT.unbind(1):
            rows.append(index)
            index = index * size + token + 1
        return torch.stack(rows, 1)

    def visits(self) -> Tensor:
        """Probability of visiting a state and taking the action there, in the shape of the table."""
        rows, tokens, mask = self.rows(), self.atoms.tokens_BT, self.atoms.policy_mask_BT
        size = self.policy.model.table.shape[1]
        mass = (self.logp.detach().exp()[:, None] * mask)[mask]
        flat = self.policy.model.table.new_zeros(self.policy.model.table.numel())
        flat.index_add_(0, (rows * size + tokens)[mask], mass)
        return flat.view_as(self.policy.model.table)


def numbered(atoms: Rollout) -> Rollout:
    """Atoms that know their own number, so that rewards can be looked up after any selection."""
    return replace(atoms, columns={"atom": list(range(len(atoms)))})


def tabular(
    vocab: int = 3, length: int = 3, eos: bool = True, seed: int = 0, temperature: float = 1.0, at_ref: bool = False
) -> Problem:
    """A random tabular policy and reference; with ``eos`` the last token of the vocabulary ends."""
    reference = random_tabular(vocab, 1 + length, seed)
    model = random_tabular(vocab, 1 + length, seed if at_ref else seed + 100)
    ends = [vocab - 1] if eos else []
    atoms = exact.enumerate_completions([0], vocab, length, ends, temperature)
    return Problem(Policy(model, reference=reference), numbered(atoms))


def transformer(length: int = 3, temperature: float = 1.0) -> Problem:
    """A one-layer Llama over three tokens, the last of which ends, in float64."""
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, initializer_range=1.0, attn_implementation="eager",
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).double())
    policy = Policy(models[0], reference=models[1])
    assert policy.chunked
    return Problem(policy, numbered(exact.enumerate_completions([0], 3, length, [2], temperature)))


def random_rewards(atoms: Rollout, seed: int = 0, dense: bool = False) -> TokenRewards:
    """Standard-normal causal rewards: of the whole completion at its last token, or of every prefix."""
    tokens, length = atoms.tokens_BT, atoms.length_B
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(tokens.shape[1])
    value = torch.zeros(tokens.shape, dtype=torch.float64)
    for t in range(tokens.shape[1]):
        # One draw a prefix, so that the reward of token t reads tokens up to t only.
        _, prefix = torch.unique(tokens[:, : t + 1], dim=0, return_inverse=True)
        draws = torch.randn(int(prefix.max()) + 1, generator=generator, dtype=torch.float64)
        value[:, t] = draws[prefix]
    scored = atoms.policy_mask_BT & (dense | (steps == length[:, None] - 1))
    return TokenRewards(value * scored, scored)


def terminal(atoms: Rollout, reward_N: Tensor) -> TokenRewards:
    """A score of the completion, paid at its last token."""
    scored = atoms.policy_mask_BT & (torch.arange(atoms.tokens_BT.shape[1]) == atoms.length_B[:, None] - 1)
    return TokenRewards(scored * reward_N[:, None], scored)


def assigned(
    problem: Problem,
    batch: Rollout,
    rewards: TokenRewards,
    cfg: CreditConfig,
    kl_cfg: KLConfig,
    value_NT1: Tensor | None = None,
    ema: float | None = None,
) -> Batch:
    """Credit of a batch of numbered atoms, with given values ``[N, T+1]`` in the place of a learned head."""
    index = torch.tensor(batch.columns["atom"])
    with torch.no_grad():
        out = problem.policy(batch, {"logp", "ref_logp"})
    if value_NT1 is not None:
        end = value_NT1[index].gather(1, batch.length_B[:, None]).squeeze(1)
        out = replace(out, value_BT=value_NT1[index][:, :-1], bootstrap_B=end)
    return credit.assign(batch, rewards.rows(index), out, cfg, kl_cfg, kl_cfg.beta, ema)[0]


def estimator_loss(
    problem: Problem,
    rewards: TokenRewards,
    cfg: CreditConfig = PLAIN,
    kl_cfg: KLConfig = NO_KL,
    value_NT1: Tensor | None = None,
    ema: float | None = None,
) -> Callable[[Rollout], Tensor]:
    """``loss(batch)`` of a REINFORCE step exactly as the loop computes it, for ``exact.estimator``."""
    # A given value stands in for the head, so the trainer must not ask the forward for one.
    trainer = Reinforce(ReinforceTrainer(type="reinforce"), PLAIN)

    def loss(batch: Rollout) -> Tensor:
        kl.check_origin(kl_cfg, batch.origin)
        data = assigned(problem, batch, rewards, cfg, kl_cfg, value_NT1, ema)
        out: PolicyOutput = problem.policy(batch, trainer.need | kl.needs(kl_cfg))
        return update.step_loss(trainer, kl_cfg, kl_cfg.beta, out, data)[0]

    return loss


def expected_gradient(
    problem: Problem,
    rewards: TokenRewards,
    cfg: CreditConfig = PLAIN,
    kl_cfg: KLConfig = NO_KL,
    probability_N: Tensor | None = None,
) -> Tensor:
    """Expected *ascent* direction for batches of one sample and no baseline, in a single pass over all atoms.

    ``probability_N`` is the law of the atoms, where it is not the policy's own.
    """
    assert cfg.baseline == "none" and not cfg.whiten_advantages and cfg.normaliser == "sequence"
    atoms = problem.atoms
    law = problem.logp.detach().exp() if probability_N is None else probability_N
    trainer = Reinforce(ReinforceTrainer(type="reinforce"), PLAIN)
    data = assigned(problem, atoms, rewards, cfg, kl_cfg)
    data = replace(data, weight_BT=atoms.policy_mask_BT * law[:, None])
    out = problem.policy(atoms, trainer.need | kl.needs(kl_cfg))
    return -problem.gradient(update.step_loss(trainer, kl_cfg, kl_cfg.beta, out, data)[0])


def fixed_point(
    problem: Problem, rewards: TokenRewards, cfg: CreditConfig, kl_cfg: KLConfig, steps: int = 70
) -> Tensor:
    """Follow the estimator's expected gradient to where it vanishes; the sequence log-probs there ``[N]``.

    The gradient of a state's logits is divided by the visits of state and action (the natural gradient of a
    table), which moves no fixed point and converges geometrically.
    """
    table = problem.policy.model.table
    for _ in range(steps):
        seen = problem.visits()
        step = expected_gradient(problem, rewards, cfg, kl_cfg).view_as(table) / seen.clamp(min=1e-300)
        problem.load(table + 0.5 / kl_cfg.beta * step * (seen > 0))
    assert expected_gradient(problem, rewards, cfg, kl_cfg).abs().max() < 1e-12
    return problem.logp.detach()


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float(((actual - expected).norm() / expected.norm()).detach())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TABULAR) -> None:
    """Relative error within ``tolerance``; the expected tensor must not be zero."""
    assert expected.norm() > 1e-6, "nothing to compare with"
    error = relative(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g}"
