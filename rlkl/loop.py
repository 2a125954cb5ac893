"""The one training loop: prompts -> sample -> reward -> KL -> credit -> loss -> step."""

from typing import TYPE_CHECKING

from torch import Tensor

from rlkl import kl
from rlkl.config import KLConfig
from rlkl.types import Batch, Metrics, PolicyOutput

if TYPE_CHECKING:
    from rlkl.trainers import Reinforce


def step_loss(
    trainer: "Reinforce", kl_config: KLConfig, beta: float, out: PolicyOutput, batch: Batch
) -> tuple[Tensor, Metrics]:
    """What is differentiated: the trainer's loss plus beta times the KL that is placed in the loss."""
    loss, metrics = trainer.loss(out, batch)
    penalty, more = kl.penalty(kl_config, out, batch)
    return loss + beta * penalty, metrics | more
