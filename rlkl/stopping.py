"""Stop strings: a completion ends with the token that completes one of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MARGIN = 4  # tokens: a character cut in two, or a leading space that a tokenizer strips, at the start of a tail


class StopStrings:
    """Looks for stop strings in decoded text, so it does not matter how they are cut into tokens.

    A stop string of n bytes touches at most n tokens, so only the last n + ``MARGIN`` are decoded at a step
    (about 10 microseconds a completion that is still open); what is found there is checked on the whole completion.
    """

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.stop, self.decode = stop, decode
        self.window = max(len(text.encode()) for text in stop) + MARGIN

    def completed(self, token_BT: Tensor, open_B: Tensor) -> Tensor:
        """Which of the open rows hold a stop string now; bool ``[B]``."""
        tails = token_BT[:, -self.window :].tolist()
        rows = [i for i in open_B.nonzero().flatten().tolist() if self._holds(tails[i])]
        found_B = torch.zeros_like(open_B)
        found_B[[i for i in rows if self._holds(token_BT[i].tolist())]] = True
        return found_B

    def _holds(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.stop)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string; all of it where there is none."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]
