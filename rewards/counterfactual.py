"""The counterfactual score: what an edit owes to its original, token by token, and what its outcome says."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkl import RunError, models
from rlkl.config import CounterfactualSource
from rlkl.config.templates import context
from rlkl.faults import limit
from rlkl.importing import function
from rlkl.policy import Policy
from rlkl.rewards.auditor import auditor
from rlkl.rewards.function import pay_at_end, probe_causality
from rlkl.rewards.predictor import Pair, Predictor
from rlkl.rewards.reading import Reading, completions
from rlkl.sampling import given, pad
from rlkl.types import Rollout, TokenRewards

Ids = list[int]
EMBEDDED = ("fix", "facts")


class CounterfactualReward:
    r"""The score of x′ as an edit of x, dense and causal.

    At token t :math:`b_t=\log p(x'_t\mid x,x'_{<t})-c\log p(x'_t\mid x'_{<t})`; at the last policy token
    :math:`+\lambda_y\log p(y'\mid x')+(g-1)\sum_t b_t`, with g = 1 where the auditor's verdict on x′ is another than
    that on x (or there is no auditor), else 0. The scorer is frozen: its parameters never change; so is the predictor
    of outcomes, unless it is ``joint``. An EOS of the policy counts as a token where the scorer has one. Every
    completion is one query, and one label where there is an auditor; every outcome that joint observes is a label.
    """

    def __init__(self, name: str, config: CounterfactualSource) -> None:
        self.name = name
        self.config = config
        self.c = config.c
        self.auditor = auditor(name, config)
        self.own = config.scorer == "reference"  # then the tokenizer is the policy's
        self.scorer: Any = None
        self.tokenizer: Any = None
        self.context: int | None = None
        self.outcomes = function(name, config, "outcome")
        self.predictor: Predictor | None = None
        if not self.own:
            self._load(config.scorer)

    def _load(self, path: str) -> None:
        key = f"rewards.{self.name}.scorer"
        if path in EMBEDDED:
            from rlkl.tasks import facts, fix_model

            path = str((facts if path == "facts" else fix_model).load_path())
        model, self.tokenizer = models.from_folder(path, "auto", key)
        model.requires_grad_(False)
        if self.config.predictor == "joint":
            self.predictor = Predictor(model, self.config)
        self.scorer = Policy(model, reference=model).eval()
        self.context = models.context_length(model)

    def check(self, tokenizer: Any) -> None:
        """Learn how the policy's tokens are to be read.

        Raises:
            ValueError: another tokenizer has no offsets; there is no token to begin p(x′) with.
        """
        if self.own:
            self.tokenizer = tokenizer
        self.same = self.own or tokenizer.get_vocab() == self.tokenizer.get_vocab()
        if not self.same and not self.tokenizer.is_fast:
            raise ValueError(
                f"rewards.{self.name}.scorer={self.config.scorer}: another tokenizer than the policy's must be a fast "
                "one, which knows offsets; use another scorer"
            )
        if self.config.contrasts and context("", self.config.template_marginal) == [("", None)]:
            self._begin("", "template_marginal", ValueError)

    def bind(self, policy: Any) -> None:
        """Take the run's policy, whose reference may be the scorer."""
        if self.own:
            self.scorer = policy
            if isinstance(policy, Policy):  # which processes may have wrapped by now
                self.context = models.context_length(policy.model if policy.reference is None else policy.reference)

    def at(self, step: int) -> dict[str, float]:
        """Set c for a training step; where it is scheduled it is a metric."""
        self.c = self.config.c_at(step)
        return {} if self.config.c_end is None else {f"reward/c/{self.name}": self.c}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout.

        Raises:
            RunError: a template names a column that is not there, a row is longer than the scorer can read, the auditor
                fails, or a score is not finite.
        """
        asked = self._columns(rollout)
        bracket_BT = self._bracket(rollout, asked)
        total_B = bracket_BT.sum(-1)
        end_B = self.config.lambda_y * self._outcome(rollout, asked) + (self._gate(rollout, asked) - 1) * total_B
        value_BT = bracket_BT + pay_at_end(end_B, rollout).value_BT
        bad = (~value_BT.isfinite().all(-1)).nonzero()
        if len(bad):
            raise RunError(f"{self._at(rollout, int(bad[0]))} got a score that is not finite; every one must be")
        judged = len(rollout) if self.config.judged else 0
        return TokenRewards(value_BT, rollout.policy_mask_BT, queries=len(rollout), labels=judged)

    def prepare(self, samples: Callable[[int], Rollout], seed: int) -> dict[str, float]:
        """Let a joint predictor learn from outcomes of the untrained policy's samples.

        Raises:
            RunError: the outcome of a sample cannot be had.
        """
        return {} if self.predictor is None else self.predictor.prepare(samples, self._observed)

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Let a joint predictor learn from the outcomes of a step's samples.

        Raises:
            RunError: as above.
        """
        return {} if self.predictor is None else self.predictor.learn(rollout, step, self._observed)

    @property
    def spent(self) -> int:
        """Outcomes that a joint predictor has learned from."""
        return 0 if self.predictor is None else self.predictor.spent

    def state_dict(self) -> dict[str, Any]:
        """What the predictor has learned."""
        return {} if self.predictor is None else self.predictor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        assert self.predictor is not None
        self.predictor.load_state_dict(state)

    def _observed(self, rollout: Rollout, count: int) -> list[Pair]:
        """What came of the first ``count`` samples: what stands before y′, and the y′ that was observed."""
        assert self.outcomes is not None
        key, pairs = "template_outcome", []
        with limit(self.config.timeout, f"reward {self.name}: the outcome"):
            for i, columns in enumerate(self._columns(rollout)[:count]):
                x, at = self._text("outcome", rollout, i, columns, "x"), self._at(rollout, i)
                try:
                    said = self.outcomes(x, columns["x_prime"])
                except RunError:
                    raise
                except (Exception, SystemExit) as error:  # whatever a stranger's function raises
                    raise RunError(f"{at}: the outcome: {type(error).__name__}: {error}") from error
                if not isinstance(said, str) or not said:
                    raise RunError(f"{at}: the outcome is {said!r}; return a text")
                ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
                pairs.append((self._ids(key, rollout, i, columns), ids))
        return pairs

    @torch.no_grad()
    def probe(self, rollout: Rollout) -> None:
        """Check once that templates fit the data and that the dense part is causal; the auditor is not asked.

        Raises:
            ValueError: they do not, or it is not.
        """

        def dense(variant: Rollout) -> Tensor:
            return self._bracket(variant, self._columns(variant))

        try:
            value_BT = dense(rollout)
            self._outcome(rollout, self._columns(rollout))
        except RunError as error:
            raise ValueError(f"{error} (on a few samples before the first step)") from error
        half = any(p.dtype != torch.float32 for p in self.scorer.parameters())  # which round by the shape of a batch
        probe_causality(dense, value_BT, rollout, self.name, tolerance=0.1 if half else 1e-3)

    def _columns(self, rollout: Rollout) -> list[dict[str, Any]]:
        """What templates may name, a sample."""
        rows = []
        for i, text in enumerate(rollout.texts()):
            columns = {name: values[i] for name, values in rollout.columns.items()}
            wanted = {} if self.config.y_prime is None else {"y_prime": self.config.y_prime}
            rows.append({"x": columns.get("prompt"), **columns, **wanted, "x_prime": text, "completion": text})
        return rows

    def _bracket(self, rollout: Rollout, asked: Sequence[dict[str, Any]]) -> Tensor:
        """log p(x′_t|x, x′_<t) - c log p(x′_t|x′_<t) at policy tokens, ``[B, T]``."""
        scored = completions(rollout, self.tokenizer, self.same)
        given_BT = self._dense("template_conditional", rollout, asked, scored)
        if self.c == 0:
            return given_BT
        return given_BT - self.c * self._dense("template_marginal", rollout, asked, scored)

    def _dense(self, key: str, rollout: Rollout, asked: Sequence[dict[str, Any]], scored: Reading) -> Tensor:
        """Log-probs of completions after the text of a template, each paid at a policy token, ``[B, T]``."""
        contexts = [self._ids(key, rollout, i, columns) for i, columns in enumerate(asked)]
        logp_BS = self._logp(key, rollout, contexts, scored.rows)
        mask_BT = rollout.policy_mask_BT
        paid_BS = pad(scored.paid)[0].to(mask_BT.device) if any(scored.paid) else torch.zeros_like(logp_BS).long()
        value_BT = logp_BS.new_zeros(mask_BT.shape).scatter_add(1, paid_BS, logp_BS)
        return value_BT * mask_BT

    def _outcome(self, rollout: Rollout, asked: Sequence[dict[str, Any]]) -> Tensor:
        """log p(y′|x′), ``[B]``; 0 without a template."""
        key, template = "template_outcome", self.config.template_outcome
        if template is None:
            return torch.zeros(len(rollout), device=rollout.tokens_BT.device)
        name = template.rpartition("{")[2].rstrip("}")
        contexts = [self._ids(key, rollout, i, columns) for i, columns in enumerate(asked)]
        answers = [
            self.tokenizer(self._text(key, rollout, i, columns, name), add_special_tokens=False)["input_ids"]
            for i, columns in enumerate(asked)
        ]
        if empty := [i for i, row in enumerate(answers) if not row]:
            raise RunError(f"{self._at(rollout, empty[0])}: {key}: y' has no token; give every record a {name}")
        return self._logp(key, rollout, contexts, answers).sum(-1)

    def _gate(self, rollout: Rollout, asked: Sequence[dict[str, Any]]) -> Tensor:
        """1 where the verdict on x′ is another than that on x, ``[B]``; 1 everywhere without an auditor."""
        gate_B = torch.ones(len(rollout), device=rollout.tokens_BT.device)
        if self.auditor is None:
            return gate_B
        verdicts: dict[str, Any] = {}
        with limit(self.config.timeout, f"reward {self.name}: the auditor"):
            for i, columns in enumerate(asked):
                x = self._text("auditor", rollout, i, columns, "x")
                try:
                    if x not in verdicts:
                        verdicts[x] = self.auditor(x, None)
                    gate_B[i] = float(bool(self.auditor(x, columns["x_prime"]) != verdicts[x]))
                except RunError:
                    raise
                except (Exception, SystemExit) as error:  # whatever a stranger's function raises
                    at = self._at(rollout, i)
                    raise RunError(f"{at}: the auditor: {type(error).__name__}: {error}") from error
        return gate_B

    def _ids(self, key: str, rollout: Rollout, i: int, columns: dict[str, Any]) -> Ids:
        """The ids of a template's text before what is scored: the prompt's own, where it is the prompt."""
        parts = context(key, getattr(self.config, key))
        text = "".join(a + ("" if n is None else self._text(key, rollout, i, columns, n)) for a, n in parts)
        if self.same and text and text == columns.get("prompt"):
            return rollout.prompt_BP[i, : int(rollout.prompt_length_B[i])].tolist()
        found: Ids = self.tokenizer(text)["input_ids"]
        return found or self._begin(self._at(rollout, i) + ": ", key, RunError)

    def _begin(self, at: str, key: str, error: Callable[[str], Exception]) -> Ids:
        """What stands for an empty text: BOS."""
        if found := self.tokenizer("")["input_ids"] or [b for b in [self.tokenizer.bos_token_id] if b is not None]:
            return list(found)
        known = self.tokenizer.eos_token or "\\n"
        raise error(
            f"{at}rewards.{self.name}.{key}={getattr(self.config, key)!r}: the scorer's tokenizer has no BOS to begin "
            f"with; begin the template with a text, such as {known!r} if documents follow it in the scorer's training"
        )

    def _text(self, key: str, rollout: Rollout, i: int, columns: dict[str, Any], name: str) -> str:
        """A column's text."""
        if isinstance(columns.get(name), str):
            return str(columns[name])
        known = ", ".join(n for n, value in columns.items() if isinstance(value, str))
        raise RunError(f"{self._at(rollout, i)}: {key}: there is no text {{{name}}}; use {known}")

    def _logp(self, key: str, rollout: Rollout, contexts: Sequence[Ids], rows: Sequence[Ids]) -> Tensor:
        """The scorer's log-probs of rows after their contexts, ``[B, S]``, 0 beyond a row, at temperature 1."""
        for i, (before, row) in enumerate(zip(contexts, rows, strict=True)):
            length = len(before) + len(row)
            if self.context is not None and length > self.context:
                at = self._at(rollout, i)
                raise RunError(
                    f"{at} has {length} tokens in {key}; the scorer reads {self.context} at most; shorten it"
                )
        scorer = self.scorer
        if self.predictor is not None and key == "template_outcome":
            self.predictor.place(rollout.tokens_BT.device)
            scorer = self.predictor.policy
        elif not self.own:
            scorer.to(rollout.tokens_BT.device)
        device, width, size = rollout.tokens_BT.device, max(map(len, rows)), self.config.micro_batch
        parts = []
        for start in range(0, len(rows), size):
            read = given(contexts[start : start + size], rows[start : start + size], width).to(device)
            parts.append(scorer(read, {"ref_logp"}).get("ref_logp_BT"))
        return torch.cat(parts)

    def _at(self, rollout: Rollout, i: int) -> str:
        return f"reward {self.name}: sample {int(rollout.sample_id_B[i])}"
