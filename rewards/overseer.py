"""A judge as a source: "How good is this answer?", asked of a causal LM here or behind an endpoint."""

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlkl import Outage, RunError
from rlkl.config import OverseerSource
from rlkl.endpoint import Refused
from rlkl.rewards.function import pay_at_end
from rlkl.rewards.judges import LocalJudge, RemoteJudge, Unfit
from rlkl.types import Rollout, TokenRewards


class OverseerReward:
    r"""The judge's rating of prompt and completion, paid at the last policy token.

    Over ratings r of value :math:`v_r`, of which the judge says :math:`p_r`: :math:`\sum_r v_r p_r/\sum_r p_r`, or of
    two ratings the log-odds :math:`\log p_+-\log p_-` of the one of higher value. p is the judge's own law, at
    temperature 1. A judge that puts less than ``min_mass`` on the ratings has given none, which ends the run. Equal
    questions of a call are asked once; every completion is one query, wherever its judgement comes from.
    """

    def __init__(self, name: str, config: OverseerSource) -> None:
        self.name = name
        self.config = config
        self.layout = config.layout()
        self.judge: LocalJudge | RemoteJudge
        try:
            self.judge = RemoteJudge(config) if config.endpoint else LocalJudge(name, config)
        except Unfit as error:
            raise ValueError(f"rewards.{name}.{error}") from None

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout.

        Raises:
            RunError: a template names a column that is not there, a question is too long, or the judge gives no rating.
            Outage: the endpoint stays away or refuses; on all processes, where one of them meets it.
        """
        score_B, lost = None, None
        try:
            score_B = self._scores(rollout)
        except Outage as error:
            lost = str(error)
        said = gather_object([lost]) if self.config.endpoint else [lost]
        if met := [one for one in said if one is not None]:
            raise Outage(met[0])
        assert score_B is not None
        return pay_at_end(score_B, rollout)

    def probe(self, rollout: Rollout) -> None:
        """Ask about a few samples before anything is written; no queries are counted.

        Raises:
            ValueError: the template or the judge does not fit, or the endpoint refuses.
            Outage: the endpoint stays away.
        """
        try:
            self._scores(rollout)
        except RunError as error:
            said = f"{error} (on a few samples before the first step)"
            if isinstance(error, Outage) and not isinstance(error, Refused):
                raise Outage(said) from error
            raise ValueError(said) from error

    @torch.no_grad()
    def _scores(self, rollout: Rollout) -> Tensor:
        """The score of every sample, ``[B]``; equal questions are asked once."""
        asked = [self._question(rollout, i, text) for i, text in enumerate(rollout.texts())]
        once = list(dict.fromkeys(asked))
        try:
            scores = dict(zip(once, self.judge.scores(once, rollout.tokens_BT.device), strict=True))
        except Unfit as error:
            raise RunError(f"{self._at(rollout, asked.index(once[error.item]))}: {error}") from None
        except Outage as error:
            raise type(error)(f"{self._at(rollout, asked.index(once[error.item]))}: {error}") from None
        dtype = torch.float64 if rollout.behaviour_logp_BT is None else rollout.behaviour_logp_BT.dtype
        return torch.tensor([scores[question] for question in asked], dtype=dtype, device=rollout.tokens_BT.device)

    def _question(self, rollout: Rollout, i: int, completion: str) -> str:
        """The template, filled in for a sample."""
        columns = {name: values[i] for name, values in rollout.columns.items()} | {"completion": completion}
        question = ""
        for text, name in self.layout:
            if name is not None and not isinstance(columns.get(name), str):
                known = ", ".join(n for n, value in columns.items() if isinstance(value, str))
                raise RunError(f"{self._at(rollout, i)}: template: there is no text {{{name}}}; use {known}")
            question += text + ("" if name is None else columns[name])
        return question

    def _at(self, rollout: Rollout, i: int) -> str:
        return f"reward {self.name}: sample {int(rollout.sample_id_B[i])}"
