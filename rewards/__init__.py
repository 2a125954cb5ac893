"""Where rewards come from; every source gives causal ``[B, T]`` rewards. Imported as ``rlkl.rewards`` only."""

if __name__ != "rlkl.rewards":
    raise ImportError(f"{__name__}: import this package as rlkl.rewards")

from rlkl.rewards.function import FunctionReward

REWARDS = {"function": FunctionReward}
