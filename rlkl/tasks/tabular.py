"""A tabular causal LM: one row of logits for every prefix. Whatever policy exists, it can represent."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TabularConfig(PretrainedConfig):  # type: ignore[misc]
    """``vocab_size`` tokens, sequences of up to ``max_position_embeddings`` tokens, prompt included."""

    model_type = "rlkl_tabular"

    def __init__(self, vocab_size: int = 3, max_position_embeddings: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings


class TabularLM(PreTrainedModel):  # type: ignore[misc]
    """Logits looked up by the whole prefix; the cache is the index of the prefix.

    A prefix is numbered in bijective base V: the empty one is 0, and appending token a to prefix n gives
    n*V + a + 1. So prefixes of every length have a row of their own.
    """

    config_class = TabularConfig
    main_input_name = "input_ids"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        lengths = range(config.max_position_embeddings + 1)
        self.table = nn.Parameter(torch.zeros(sum(config.vocab_size**n for n in lengths), config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Logits start as they are: at zero, or as set by the caller."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits at every position; masked positions leave the prefix as it is."""
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = seen[:, -input_ids.shape[1] :].bool()
        index = past_key_values if past_key_values is not None else torch.zeros_like(input_ids[:, 0])
        rows = []
        for t in range(input_ids.shape[1]):
            grown = index * self.config.vocab_size + input_ids[:, t] + 1
            index = torch.where(seen[:, t] & (grown < len(self.table)), grown, index)
            rows.append(index)
        return CausalLMOutputWithPast(logits=self.table[torch.stack(rows, 1)], past_key_values=index)


def random_tabular(vocab_size: int, length: int, seed: int, scale: float = 1.0) -> TabularLM:
    """A float64 table with standard-normal logits times ``scale``, for sequences of ``length`` tokens."""
    model: TabularLM = TabularLM(TabularConfig(vocab_size=vocab_size, max_position_embeddings=length)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.table.copy_(scale * torch.randn(model.table.shape, generator=generator, dtype=torch.float64))
    return model
