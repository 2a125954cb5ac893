"""What differs between objectives, and nothing else. Imported as ``rlkl.trainers`` only."""

if __name__ != "rlkl.trainers":
    raise ImportError(f"{__name__}: import this package as rlkl.trainers")

from rlkl.trainers.ppo import PPO
from rlkl.trainers.reinforce import Reinforce
from rlkl.trainers.token_likelihood import TokenLikelihood

TRAINERS = {"ppo": PPO, "reinforce": Reinforce, "token_likelihood": TokenLikelihood}

__all__ = ["PPO", "TRAINERS", "Reinforce", "TokenLikelihood"]
