"""What a run says on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlkl import models, summary
from rlkl.config import Config
from rlkl.evaluate import Evaluation
from rlkl.lane import Lane
from rlkl.launch import mismatch
from rlkl.tracking import read_rows


def notices(lane: Lane, accelerator: Accelerator) -> Iterator[str]:
    """What a user should know before the first step."""
    config, model = lane.config, lane.policy.model
    held = f"{len(lane.held_out.ids)} held out"
    if lane.stored is not None:
        held = f"{len(lane.stored.held) // config.samples} held out, evaluated on {len(lane.held_out.ids)} prompts"
    yield (
        f"{config.name}: {config.trainer.type}, {len(lane.train_prompts.ids)} "
        f"{'prompts' if lane.stored is None else 'records'} ({held}), on {next(model.parameters()).device}"
    )
    yield from summary.arithmetic(config, accelerator.num_processes)
    yield lane.train_prompts.lengths()
    yield from () if lane.stored is None else lane.stored.notes
    yield f"KL: beta {config.kl.beta:g}, {summary.penalty(config)}"
    yield from summary.hazards(config, 0.0 if lane.stored is None else lane.stored.lightest)
    if warning := mismatch(accelerator):
        yield warning
    if config.model.dtype == "bfloat16" and config.model.lora is None:
        yield "note: bfloat16 weights lose updates below 1/256 of a weight; prefer lora, or mixed_precision"
    if ignored := models.ignored_sampling(model):
        yield f"ignored from the generation config, for log-probs to mean what they say: {', '.join(ignored)}"
    if not lane.eos_ids and not config.rollout.stop:
        yield f"the model names no EOS: every completion runs to max_new_tokens={config.rollout.max_new_tokens}"
    returns = config.credit.horizon is not None and config.trainer.type != "token_likelihood"
    if returns and (lane.eos_ids or config.rollout.stop) and not config.credit.centre_rewards:
        yield (
            f"warning: credit.horizon={config.credit.horizon} with an EOS action: a constant added to the reward "
            "changes the optimum, and J can fall below the base model's; set credit.centre_rewards=true"
        )
    if config.rollout.replay is not None:
        yield (
            f"samples replayed from {config.rollout.replay}: after the first update they are off-policy, drawn by the "
            "recording run's policy and not by this one; there kl/penalty and k1 in the reward weigh log-ratios of its "
            "samples and estimate no KL of this policy (kl.placement=loss with kl.estimator=exact_local is a KL on any "
            "samples; kl/sequence is measured on fresh ones)"
        )


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """An evaluation on one line: rewards and what annotations moved, with standard errors, and canonical KL; nats."""
    rewards = [k for k in metrics if k.startswith("reward/eval/") and f"{k}_stderr" in metrics]
    parts = [f"{k.removeprefix('reward/eval/')} {metrics[k]:.3f} ± {metrics[f'{k}_stderr']:.3f}" for k in rewards]
    if "preference/eval/accuracy" in metrics:
        shown = [f"{metrics[f'preference/eval/accuracy{end}']:.3f}" for end in ("", "_stderr")]
        parts.append(f"accuracy {' ± '.join(shown)}")
    labels = [k.split("/", 2)[2] for k in metrics if k.startswith("annotated/change/") and f"{k}_stderr" in metrics]
    for label in ("marked", "unmarked") if "marked" in labels else labels:
        key = f"annotated/change/{label}"
        parts.append(f"Δlog p {label} {metrics[key]:+.3f} ± {metrics[f'{key}_stderr']:.3f}")
    kl = f"KL {metrics['kl/sequence']:.3f} ± {metrics['kl/sequence_stderr']:.3f} nats/sequence"
    return f"eval @ {step}: " + "  ".join([*parts, kl, f"length {metrics['policy/eval/length']:.1f}"])


def samples(rows: Sequence[Mapping[str, Any]], width: int = 100) -> Iterator[str]:
    """Completions of an evaluation, a line each, cut to ``width`` characters."""
    for row in rows:
        prompt, completion = (" ".join(str(row[key]).split()) for key in ("prompt", "completion"))
        text = f"{prompt} | {completion}"
        yield f"  {text if len(text) <= width else text[: width - 1] + '…'}"


def guidance(config: Config, before: Evaluation) -> Iterator[str]:
    """How many nats a run with this beta should end at, from the rewards of the base model's samples.

    The optimum meant is that of the whole episode's reward. To be called by all processes.
    """
    beta = config.kl.beta
    if config.trainer.type == "token_likelihood" or config.holds_beta:
        return  # beta is per annotated token, or weighs preferences: no reward pays for it
    if config.kl.target is not None:
        yield f"KL guidance: beta adapts; aim for kl.target = {config.kl.target:g} nats a sequence"
        return
    if beta == 0:
        yield "KL guidance: beta 0: nothing holds KL back; watch kl/sequence, and stop where held-out reward turns"
        return
    if config.credit.horizon is not None:
        yield f"KL guidance: none; credit.horizon={config.credit.horizon} has an optimum of its own"
        return
    local_B, group_B = before.rewards.value_BT.sum(-1).double().cpu(), before.rollout.group_B.cpu()
    reward_PN = torch.tensor(gather_object([local_B[group_B == g].tolist() for g in set(group_B.tolist())])).double()
    if config.credit.whiten_rewards:
        reward_PN = reward_PN / (reward_PN.std() + 1e-8)
    said = f"KL guidance: a unit of reward is worth at most 1/beta = {1 / beta:.3g} nats a sequence"
    count = reward_PN.shape[1]
    spread = float(reward_PN.var(-1).mean()) ** 0.5 if count > 1 else 0.0
    if spread == 0:
        yield f"{said}; the base model's samples of a prompt do not differ in reward, so beta says no more yet"
        return
    nats, effective = optimum_kl(reward_PN, beta)
    far = min(spread**2 / (2 * beta**2), float(reward_PN.max() - reward_PN.mean()) / beta)
    yield f"{said}; base reward {float(reward_PN.mean()):.3g}, sd {spread:.2g} within a prompt"
    rest = f"and up to {far:.2g}, where better answers are rarer" if effective < 2 and far > nats else ""
    yield (
        f"KL guidance: aim for about {nats:.2g} nats a sequence {rest or 'at the optimum'} (importance sampling, "
        f"{effective:.1f} of {count} base samples effective a prompt)"
    )


def optimum_kl(reward_PN: Tensor, beta: float) -> tuple[float, float]:
    r"""KL(π*‖π0) of π* ∝ π0 exp(r/β), nats, mean over P prompts with N samples of π0 each; effective samples a prompt.

    :math:`KL = E_{\pi^*}[r]/\beta - \log E_{\pi_0} e^{r/\beta}` (Korbak et al. 2022) by self-normalised importance
    sampling, times N/(N-1), which makes its first order :math:`Var(r)/2\beta^2` unbiased. It sees no answer that the
    samples lack, and never exceeds log N times that factor. N >= 2.
    """
    count = reward_PN.shape[1]
    log_weight_PN = (reward_PN / beta).log_softmax(-1)
    weight_PN = log_weight_PN.exp()
    nats_P = (weight_PN * log_weight_PN).sum(-1) + torch.tensor(float(count)).log()
    return float(nats_P.mean()) * count / (count - 1), float((1 / (weight_PN**2).sum(-1)).mean())


def show(folder: Path) -> Iterator[str]:
    """The samples of a run's first and last evaluation: the same prompts with the same randomness."""
    rows = list(read_rows(folder / "samples.jsonl"))
    if not rows:
        return
    before, after = ([row for row in rows if row["step"] == ends["step"]] for ends in (rows[0], rows[-1]))
    for old, new in zip(before, after, strict=True):
        yield f"\nprompt: {old['prompt']}\n  before: {old['completion']}\n  after:  {new['completion']}"
    yield ""
