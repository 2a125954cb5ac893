"""Scores of a reward model: one number a row of tokens, read at its last token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkl.rows import widen
from rlkl.sampling import pad


@torch.no_grad()
def scores(model: Any, rows: Sequence[Sequence[int]], micro_batch: int) -> Tensor:
    """The model's score head at the last token of every row, ``[B]``, at least fp32.

    The last token is found by its place: rows are padded on the right, which a causal trunk never sees, whatever the
    pad id. (The models' own forward of transformers looks for the last id that is not the pad id.)
    """
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(rows), micro_batch):
        ids_BS, length_B = pad(rows[start : start + micro_batch])
        hidden_BSD = model.base_model(input_ids=ids_BS.to(device), use_cache=False).last_hidden_state
        last_BD = hidden_BSD[torch.arange(len(length_B), device=device), length_B.to(device) - 1]
        found.append(widen(model.score(last_BD)).squeeze(-1))
    return torch.cat(found)
