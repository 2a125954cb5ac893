"""Scores of a reward model: one number a row of tokens, read at its last token, or one a token."""

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


@torch.no_grad()
def token_scores(model: Any, rows: Sequence[Sequence[int]], micro_batch: int) -> list[Tensor]:
    """A token model's score of every token of every row, at least fp32; rows are padded on the right, as above."""
    device = next(model.parameters()).device
    found: list[Tensor] = []
    for start in range(0, len(rows), micro_batch):
        ids_BS, length_B = pad(rows[start : start + micro_batch])
        score_BS = widen(model(input_ids=ids_BS.to(device)).logits.squeeze(-1))
        found += [score_S[:n] for score_S, n in zip(score_BS, length_B.tolist(), strict=True)]
    return found


def check_causal(model: Any, row: Sequence[int], key: str = "model") -> None:
    """Refuse a token model that reads on: the scores of half a row must be those within the whole.

    Raises:
        ValueError: they differ.
    """
    half = max(len(row) // 2, 1)
    whole_S, half_S = token_scores(model, [row, row[:half]], 1)
    if not torch.allclose(whole_S[:half], half_S, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{key}: {type(model).__name__} reads later tokens than the one it scores; take the trunk of a causal LM"
        )
