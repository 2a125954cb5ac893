"""The mass that a policy puts on the true fixes of `fix`: exact, since they are six strings an x and can be listed."""

from typing import Any

import torch

from rlkl.evaluate import join, outputs, over_prompts
from rlkl.sampling import Prompts, given
from rlkl.tasks import fix
from rlkl.types import Rollout


def true_fixes(prompts: Prompts) -> Rollout:
    """Every true fix of every prompt's x, as completions that somebody wrote."""
    listed = [
        (place, fix.STRINGS[n].tolist())
        for place, x in enumerate(prompts.columns["x"])
        for n in fix.true_fixes([int(c) for c in x]).nonzero()[0]
    ]
    return given(
        [prompts.ids[place] for place, _ in listed],
        [string for _, string in listed],
        group_B=torch.tensor([prompts.group[place] for place, _ in listed]),
        origin="data",
    )


@torch.no_grad()
def measure(policy: Any, prompts: Prompts, device: torch.device, micro_batch: int) -> dict[str, float]:
    """The summed probability of an x's true fixes at temperature 1, mean over prompts; global over processes."""
    rollout = true_fixes(prompts).to(device)
    mass_B = join(outputs(policy, rollout, {"logp"}, micro_batch), "logp_BT").sum(-1).exp()
    return over_prompts("policy/eval/true_fixes", mass_B * (len(rollout) / len(prompts.ids)), rollout)
