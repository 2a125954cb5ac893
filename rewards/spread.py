"""The running standard deviation of what a source gives a completion in sum, over all processes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkl.reduce import global_sum


@dataclass
class Spread:
    r"""Count, mean and :math:`M=\sum_i(x_i-\bar x)^2` of all training samples so far.

    A batch is taken in whole (Chan et al. 1983): with :math:`\delta=\bar x_b-\bar x`,
    :math:`M\leftarrow M+M_b+\delta^2 n n_b/(n+n_b)`.
    """

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0

    def add(self, x_B: Tensor) -> None:
        """Take in a batch, of which every process has a part. To be called by all."""
        count, total = global_sum(torch.stack([x_B.new_tensor(float(len(x_B))), x_B.sum()]).double()).tolist()
        mean = total / count
        square = float(global_sum(((x_B.double() - mean) ** 2).sum()))
        delta, whole = mean - self.mean, self.count + count
        self.square += square + delta**2 * self.count * count / whole
        self.mean += delta * count / whole
        self.count = whole

    @property
    def std(self) -> float:
        """The population standard deviation; 1 where nothing varies, so that dividing by it changes nothing."""
        found = math.sqrt(self.square / self.count) if self.count else 0.0
        return found if found > 1e-8 else 1.0
