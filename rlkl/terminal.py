"""What a run says on the terminal."""

import itertools
from collections.abc import Iterator, Mapping

from accelerate import Accelerator

from rlkl import models
from rlkl.config import GRADIENT
from rlkl.evaluate import Evaluation, sample_rows
from rlkl.lane import Lane
from rlkl.launch import mismatch


def notices(lane: Lane, accelerator: Accelerator) -> Iterator[str]:
    """What a user should know before the first step."""
    config, model = lane.config, lane.policy.model
    batch = config.rollout.prompts * config.rollout.samples_per_prompt
    yield (
        f"{config.name}: {config.trainer.type}, {len(lane.train_prompts.ids)} prompts "
        f"({len(lane.held_out.ids)} held out), {config.rollout.prompts} x {config.rollout.samples_per_prompt} = "
        f"{batch} completions a step, {config.train.steps} steps, on {next(model.parameters()).device}"
    )
    rule = GRADIENT[config.kl.placement, config.kl.estimator]
    yield f"KL: beta {config.kl.beta:g}, {config.kl.estimator} in the {config.kl.placement}; its gradient: {rule}"
    if warning := mismatch(accelerator):
        yield warning
    if config.model.dtype == "bfloat16" and config.model.lora is None:
        yield "note: bfloat16 weights lose updates below 1/256 of a weight; prefer lora, or mixed_precision"
    if ignored := models.ignored_sampling(model):
        yield f"ignored from the generation config, for log-probs to mean what they say: {', '.join(ignored)}"
    if not lane.eos_ids:
        yield f"the model names no EOS: every completion runs to max_new_tokens={config.rollout.max_new_tokens}"
    if config.credit.horizon is not None and lane.eos_ids and not config.credit.centre_rewards:
        yield (
            f"warning: credit.horizon={config.credit.horizon} with an EOS action: a constant added to the reward "
            "changes the optimum, and J can fall below the base model's; set credit.centre_rewards=true"
        )


def line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """A step on one line of the terminal."""
    shown = [
        ("reward", "reward/train/total", "{:.3f}"),
        ("KL penalty", "kl/penalty", "{:.3f}"),
        ("beta", "kl/beta", "{:.3g}"),
        ("entropy", "policy/entropy", "{:.2f}"),
        ("grad", "policy/grad_norm", "{:.3f}"),
        ("s", "time/step", "{:.2f}"),
    ]
    parts = [f"{label} {form.format(metrics[key])}" for label, key, form in shown if key in metrics]
    return f"step {step:>{len(str(total))}}/{total}  " + "  ".join(parts)


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """An evaluation on one line: rewards with standard errors, canonical KL in nats."""
    rewards = [k for k in metrics if k.startswith("reward/eval/") and f"{k}_stderr" in metrics]
    parts = [f"{k.removeprefix('reward/eval/')} {metrics[k]:.3f} ± {metrics[f'{k}_stderr']:.3f}" for k in rewards]
    kl = f"KL {metrics['kl/sequence']:.3f} ± {metrics['kl/sequence_stderr']:.3f} nats/sequence"
    return f"eval @ {step}: " + "  ".join([*parts, kl, f"length {metrics['policy/eval/length']:.1f}"])


def show(before: Evaluation, after: Evaluation, count: int) -> Iterator[str]:
    """The same prompts with the same randomness, before and after."""
    pairs = zip(sample_rows(before), sample_rows(after), strict=True)
    for old, new in itertools.islice(pairs, count):
        yield f"\nprompt: {old['prompt']}\n  before: {old['completion']}\n  after:  {new['completion']}"
    yield ""
