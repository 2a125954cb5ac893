"""What differs between objectives, and nothing else. Imported as ``rlkl.trainers`` only."""

if __name__ != "rlkl.trainers":
    raise ImportError(f"{__name__}: import this package as rlkl.trainers")

from collections.abc import Callable
from typing import Any

from rlkl.trainers.dpo import DPO
from rlkl.trainers.ppo import PPO
from rlkl.trainers.reinforce import Reinforce
from rlkl.trainers.token_likelihood import TokenLikelihood
from rlkl.types import Trainer

TRAINERS: dict[str, Callable[[Any], Trainer]] = {
    "dpo": lambda config: DPO(config.kl.beta),
    "ppo": lambda config: PPO(config.trainer, config.credit),
    "reinforce": lambda config: Reinforce(config.trainer, config.credit),
    "token_likelihood": lambda config: TokenLikelihood(config.trainer, config.kl.beta),
}
"""``trainer.type`` to the trainer of a run, from its whole configuration."""

__all__ = ["DPO", "PPO", "TRAINERS", "Reinforce", "TokenLikelihood"]
