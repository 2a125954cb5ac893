"""An auditor's verdicts on an input and on an edit of it: a function's, or a frozen classifier's likeliest labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlkl import models
from rlkl.config import CounterfactualSource
from rlkl.importing import function

Verdict = Callable[[str, str | None], Any]
"""``(x, x′ or None)`` to a verdict that can be compared; without x′, on x."""


class ClassifierAuditor:
    """The likeliest label of a sequence-classification model, which reads texts with its own tokenizer.

    ``laid_out(x, x_prime)`` is the text that it reads of an edit; of an input it reads x. Each text goes through the
    model alone, so that padding cannot change a verdict.

    Raises:
        ValueError: the folder holds no such model.
    """

    def __init__(self, path: str, key: str, laid_out: Callable[[str, str], str]) -> None:
        self.model, self.tokenizer = models.classifier(path, key)
        self.laid_out = laid_out
        self.context = models.context_length(self.model)

    @torch.no_grad()
    def __call__(self, x: str, x_prime: str | None = None) -> str:
        """The label's name.

        Raises:
            ValueError: the text has no token, or more than the model can read.
        """
        text = x if x_prime is None else self.laid_out(x, x_prime)
        ids: Sequence[int] = self.tokenizer(text)["input_ids"]
        if not ids or (self.context is not None and len(ids) > self.context):
            raise ValueError(f"the classifier reads 1 to {self.context} tokens, and {text[:40]!r}... has {len(ids)}")
        device = next(self.model.parameters()).device
        label = int(self.model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].argmax())
        return str(self.model.config.id2label.get(label, label))


def auditor(name: str, config: CounterfactualSource) -> Verdict | None:
    """The auditor of a source, if it has one.

    Raises:
        ValueError: it cannot be imported or loaded.
    """
    if config.auditor is None or not config.classifies:
        return function(name, config, "auditor")
    template, key = config.template_auditor, f"rewards.{name}.auditor"
    try:
        return ClassifierAuditor(config.auditor, key, lambda x, y: template.format(x=x, x_prime=y))
    except ValueError as error:
        raise ValueError(f"{error}; a function is module:function") from None
