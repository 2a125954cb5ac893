"""What ``--dry-run`` prints. Torch-free."""

import yaml

from rlkl.config import GRADIENT, Config, dump


def describe(config: Config) -> str:
    """The resolved configuration and the arithmetic of its batches."""
    r, e = config.rollout, config.evaluate
    batch = r.prompts * r.samples_per_prompt
    steps = config.train.steps
    evaluations = 1 + steps // e.every + (steps % e.every > 0)
    return "\n".join(
        [
            yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True),
            f"# a step:      {r.prompts} prompts x {r.samples_per_prompt} samples = {batch} completions, "
            f"at most {batch * r.max_new_tokens} tokens",
            f"# micro-batch: {-(-batch // config.train.micro_batch)} x at most {config.train.micro_batch} completions",
            f"# the run:     {steps} steps, {steps * batch} completions, "
            f"at most {steps * batch * r.max_new_tokens} tokens",
            f"# evaluation:  {evaluations} x at most {e.prompts * e.samples_per_prompt} completions",
            f"# KL:          {config.kl.estimator} in the {config.kl.placement}, "
            f"window {config.kl.resolved_window(config.credit.horizon)}; "
            f"gradient: {GRADIENT[config.kl.placement, config.kl.estimator]}",
        ]
    )
