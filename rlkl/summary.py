"""The arithmetic of a run, and what ``--dry-run`` prints. Torch-free."""

import yaml

from rlkl import memory
from rlkl.config import Config, dump


def describe(config: Config) -> str:
    """The resolved configuration, the arithmetic of its batches, and the memory that they need."""
    rule = f"KL:          {penalty(config)}"
    tree = yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)
    first, *table = memory.lines(config)
    return "\n".join([tree, *(f"# {text}" for text in [*arithmetic(config), rule, f"memory:      {first}", *table])])


def penalty(config: Config) -> str:
    """Where the KL penalty is, and what gradient that gives."""
    if config.holds_beta:
        return "held by the loss itself; no further penalty"
    window = f", window {config.kl.resolved_window(config.credit.horizon)}" if config.kl.placement == "reward" else ""
    rule = config.kl.gradient(config.credit.horizon)
    return f"{config.kl.estimator} in the {config.kl.placement}{window}; its gradient: {rule}"


def arithmetic(config: Config, ranks: int = 1) -> list[str]:
    """Completions and tokens of a step and of the whole run, and what each of ``ranks`` processes does of them."""
    r, e = config.rollout, config.evaluate
    batch = r.prompts * config.samples
    steps, piece = config.train.steps, config.train.micro_batch
    share = -(-r.prompts // ranks) * config.samples
    evaluations = 1 + steps // e.every + (steps % e.every > 0)
    drawn = f"{r.prompts} prompts x {r.samples_per_prompt} samples = {batch} completions"
    what = f"{r.prompts} stored completions" if config.offline else drawn
    return [
        f"a step:      {what}, at most {batch * r.max_new_tokens} tokens",
        f"micro-batch: {-(-share // piece)} x at most {min(piece, share)} completions"
        + (f" on each of {ranks} processes" if ranks > 1 else ""),
        f"the run:     {steps} steps, {steps * batch} completions, at most {steps * batch * r.max_new_tokens} tokens",
        f"evaluation:  {evaluations} x at most {e.prompts * e.samples_per_prompt} completions",
    ]
