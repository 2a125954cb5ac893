"""A reward model that is trained during the run, from a labeller's judgements of the run's own samples.

Both schedules learn by one recipe, from the same trunk with the same fresh head, and ask for ``budget`` labels at most:

- ``frozen`` asks for all of them before the first step, about samples of the untrained policy, and learns once;
- ``online`` asks for the share ``start`` of them there, and for the others about the samples of every N-th step, all
  of them until the budget is spent. Each time it learns anew, from all labels so far: its last model has seen as many
  as the frozen one, and does not depend on how those before it were trained.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rlkl import RunError, models, scoring
from rlkl.config import AnnotationsSource, LearnedSource
from rlkl.faults import limit
from rlkl.importing import function
from rlkl.reward_model.fit import fit
from rlkl.rewards.annotations import AnnotationReward
from rlkl.rewards.learned import LearnedReward
from rlkl.types import Rollout, TokenRewards

Row = dict[str, Any]


class TaughtReward:
    """``level=sequence``: the labeller compares two samples of a prompt, the model learns by Bradley and Terry.

    ``level=token``: he marks spans of a sample, and the model learns the weights of its tokens by regression. A
    comparison is one label, a tie too, of which nothing is learned; so are the spans of a sample. Every process asks
    about its own samples; the first one trains.
    """

    clips = True  # as the model that it teaches does

    def __init__(self, name: str, config: LearnedSource) -> None:
        assert config.labeller is not None and config.budget is not None
        self.name, self.config, self.budget = name, config, config.budget
        self.base: str | Path = config.path
        if config.path == "facts":
            from rlkl.tasks import facts

            self.base = facts.load_path()
        self.prefer: Any = function(name, config, "labeller")
        self.scorer = LearnedReward(name, config, models.beginner(self.base, config.level, f"rewards.{name}.path"))
        self.marks: AnnotationReward | None = None
        if config.level == "token":
            weights, labeller = config.weights or {}, config.labeller
            marks = AnnotationsSource(
                type="annotations", labeller=labeller, weights=weights, timeout=config.timeout, unmarked=0.0
            )
            self.marks = AnnotationReward(name, marks)
        self.rows: list[Row] = []
        self.spent = 0
        self.seed = 0

    def check(self, tokenizer: Any) -> None:
        """Compare the vocabularies, where weights of the policy's tokens become targets of the model's.

        Raises:
            ValueError: they differ.
        """
        self.scorer.check(tokenizer)
        if self.marks is not None and self.scorer.policy is not None:
            raise ValueError(
                f"rewards.{self.name}.path={self.config.path}: its tokenizer is not the policy's, which level=token "
                "with a labeller needs; start from a model with the policy's tokenizer"
            )

    def probe(self, rollout: Rollout) -> None:
        """That of the model that is taught."""
        self.scorer.probe(rollout)

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """What the present model says: a query a completion, and no label.

        Raises:
            RunError: nothing has been learned yet.
        """
        if not self.spent:
            raise RunError(f"reward {self.name}: it learns from labels in the course of a run, and has none yet")
        return self.scorer(rollout)

    def prepare(self, samples: Callable[[int], Rollout], seed: int) -> dict[str, float]:
        """Ask about samples of the untrained policy, and learn."""
        self.seed = seed
        first, k, rows = self.config.taught[0], 0, []
        while self.spent < first:
            rows += self._ask(samples(k), first - self.spent)
            k += 1
        return self._learn(rows, self.spent)

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Ask about the samples of every N-th step while there is budget left, and learn anew."""
        if self.config.schedule == "frozen" or step % self.config.every or self.spent >= self.budget:
            return {}
        before = self.spent
        return self._learn(self._ask(rollout, self.budget - before), self.spent - before)

    def state_dict(self) -> dict[str, Any]:
        """The model's weights, and the judgements that it learned from."""
        if not self.spent:
            return {}
        weights = {f"model.{name}": x for name, x in self.scorer.model.state_dict().items()}
        return {**weights, "rows": self.rows, "spent": self.spent, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.rows, self.spent, self.seed = state["rows"], state["spent"], state["seed"]
        self._take({name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")})

    def _take(self, weights: dict[str, torch.Tensor]) -> None:
        self.scorer.model.load_state_dict(weights)

    def _ask(self, rollout: Rollout, left: int) -> list[Row]:
        """Judgements of a batch, ``left`` at most, in its order; ties are counted and are no rows."""
        groups: dict[int, list[int]] = {}
        for i, group in enumerate(rollout.group_B.tolist()):
            groups.setdefault(group, []).append(i)
        size = 1 if self.marks is not None else 2
        asked = [g[k : k + size] for g in groups.values() for k in range(0, len(g) - size + 1, size)]
        counts = gather_object([len(asked)])
        mine = asked[: max(0, left - sum(counts[: PartialState().process_index]))]
        self.spent += min(left, sum(counts))
        return list(gather_object(self._compared(rollout, mine) if self.marks is None else self._marked(rollout, mine)))

    def _compared(self, rollout: Rollout, pairs: list[list[int]]) -> list[Row]:
        ids, texts, rows = self.scorer.rows(rollout), rollout.texts(), []
        for i, j in pairs:
            first, second = (int(rollout.sample_id_B[k]) for k in (i, j))
            at = f"reward {self.name}: the labeller, samples {first} and {second}"
            try:
                with limit(self.config.timeout, at):
                    better = self.prefer(texts[i], texts[j])
            except RunError:
                raise
            except (Exception, SystemExit) as error:  # whatever a stranger's function raises
                raise RunError(f"{at}: {type(error).__name__}: {error}") from error
            if better not in (0, 1, 2):
                raise RunError(f"{at}: returned {better!r}; return 1 or 2 for the better, or 0 for a tie")
            if better:
                chosen, rejected = (i, j) if better == 1 else (j, i)
                rows.append({"chosen_ids": ids[chosen], "rejected_ids": ids[rejected]})
        return rows

    def _marked(self, rollout: Rollout, singles: list[list[int]]) -> list[Row]:
        assert self.marks is not None
        part = rollout.rows(torch.tensor([i for (i,) in singles], dtype=torch.long))
        ids = self.scorer.rows(part)  # before anybody is asked
        part = self.marks.annotate(part)
        targets = zip(part.get("annotation_BT").tolist(), part.get("annotated_BT").tolist(), strict=True)
        rows = []
        lengths = zip(part.prompt_length_B.tolist(), part.length_B.tolist(), strict=True)
        for row, (asked, said), (weights, marked) in zip(ids, lengths, targets, strict=True):
            target = [w if m else None for w, m in zip(weights[:said], marked, strict=False)]
            rows.append({"ids": row, "target": [*[None] * asked, *target]})
        return rows

    def _learn(self, new: list[Row], asked: int) -> dict[str, float]:
        """Train anew on all judgements so far. To be called by all processes with the same rows."""
        told = {"rows": float(len(self.rows) + len(new)), "labels": float(asked)}
        if self.rows and new:  # how far the model that these samples were trained on may be trusted
            told["agreement"] = self._agreement(new)
        self.rows = self.rows + new
        if not self.rows:
            raise RunError(
                f"reward {self.name}: all of {asked} comparisons are ties, so there is nothing to learn; raise budget"
            )
        if new:
            held: list[Any] = [None]
            if PartialState().is_main_process:
                held = [self._trained()]
            broadcast_object_list(held)
            if isinstance(held[0], str):
                raise RunError(held[0])
            self._take(held[0])
            told["anew"] = 1.0
        return told

    def _trained(self) -> dict[str, torch.Tensor] | str:
        """The weights, or why there are none."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                fit(
                    Path(folder),
                    self.base,
                    self.rows,
                    self.config.fit.model_dump(mode="json"),
                    kind=self.config.level,
                    seed=self.seed,
                    cpu=not torch.cuda.is_available(),
                )
            except RunError as error:
                return f"reward {self.name}: {error}"
            model, _ = models.reward_model(folder, f"rewards.{self.name}.path", self.config.level)
            return {name: x.clone() for name, x in model.state_dict().items()}

    def _agreement(self, rows: list[Row]) -> float:
        """Share of new pairs that the present model orders as the labeller did; of marked tokens, their sign."""
        model, size = self.scorer.model, self.config.micro_batch
        if self.marks is None:
            sides = [[row[f"{side}_ids"] for row in rows] for side in ("chosen", "rejected")]
            chosen, rejected = (scoring.scores(model, ids, size) for ids in sides)
            return float((chosen > rejected).float().mean())
        scores = scoring.token_scores(model, [row["ids"] for row in rows], size)
        pairs = [
            (s, w) for x, row in zip(scores, rows, strict=True) for s, w in zip(x.tolist(), row["target"], strict=True)
        ]
        known = [s * w > 0 for s, w in pairs if w]
        return sum(known) / len(known) if known else 1.0
