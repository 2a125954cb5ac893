"""The predictor of outcomes that learns: a copy of the scorer, taught what came of the policy's samples."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlkl.config import CounterfactualSource
from rlkl.policy import Policy
from rlkl.sampling import given
from rlkl.types import Rollout

Ids = list[int]
Pair = tuple[Ids, Ids]
"""The tokens of what stands before an outcome, and those of the outcome."""
Observed = Callable[[Rollout, int], list[Pair]]
"""What came of the first so many samples of a rollout."""


class Predictor:
    """log p(y′|x′) of a copy of the scorer, in fp32. Every process holds it, and learns from the samples of all.

    Each time it makes ``updates`` AdamW steps on what has just been observed, and forgets the rows.
    """

    def __init__(self, model: Any, config: CounterfactualSource) -> None:
        self.model = copy.deepcopy(model).float()
        self.policy = Policy(self.model, reference=self.model).eval()
        self.model.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.config, self.budget = config, config.budget or 0
        self.spent = 0

    def prepare(self, samples: Callable[[int], Rollout], observed: Observed) -> dict[str, float]:
        """Observe and learn from one batch after the other, until the share ``start`` of the budget is spent."""
        told: dict[str, float] = {}
        first, k = self.config.taught[0], 0
        while self.spent < first:
            told = self._learn(samples(k), first - self.spent, observed)
            k += 1
        return {**told, "labels": float(self.spent)}

    def learn(self, rollout: Rollout, step: int, observed: Observed) -> dict[str, float]:
        """Observe and learn from the samples of every N-th step while there is budget left."""
        left = self.budget - self.spent
        return {} if step % self.config.every or left <= 0 else self._learn(rollout, left, observed)

    def _learn(self, rollout: Rollout, left: int, observed: Observed) -> dict[str, float]:
        """Ask for ``left`` outcomes at most over all processes; their mean -log p before it learned, nats."""
        counts = gather_object([len(rollout)])
        mine = max(0, min(len(rollout), left - sum(counts[: PartialState().process_index])))
        pairs, asked = list(gather_object(observed(rollout, mine))), min(left, sum(counts))
        device = rollout.tokens_BT.device
        self.place(device)
        before = 0.0
        for k in range(self.config.updates):
            self.optimiser.zero_grad()
            for start in range(0, len(pairs), self.config.micro_batch):
                contexts, rows = zip(*pairs[start : start + self.config.micro_batch], strict=True)
                with torch.enable_grad():
                    logp_BT = self.policy(given(contexts, rows).to(device), {"logp"}).get("logp_BT")
                    loss = -logp_BT.sum() / len(pairs)
                    loss.backward()
                before += float(loss.detach()) if k == 0 else 0.0
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
        self.optimiser.zero_grad()
        self.spent += asked
        return {"labels": float(asked), "loss": before}

    def place(self, device: torch.device) -> None:
        """Move to a device, AdamW's moments too."""
        if next(self.model.parameters()).device != device:
            self.policy.to(device)
            self.optimiser.load_state_dict(self.optimiser.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Weights, AdamW's moments and the labels that were asked for."""
        moments = self.optimiser.state_dict()["state"]
        return {
            "spent": self.spent,
            **{f"model.{name}": x.detach().clone() for name, x in self.model.named_parameters()},
            **{f"adam.{i}.{key}": torch.as_tensor(x) for i, held in moments.items() for key, x in held.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.spent = state["spent"]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"model.{name}"])
        moments: dict[int, dict[str, Any]] = {}
        for name, x in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = x
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
