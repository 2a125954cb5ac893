"""What is measured: a model, prompts and a reward that are the same for everybody, and how work is counted."""

import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from rlkl.data.annotated import Span
from rlkl.tasks.pretrain import train_tokenizer


@dataclass(frozen=True)
class Workload:
    """One step: ``prompts`` x ``samples`` rows of ``prompt_tokens`` + ``new_tokens``, none shorter, in fp32."""

    hidden: int
    layers: int
    vocabulary: int
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.samples

    def model(self, folder: Path) -> Path:
        """An untrained Llama and its tokenizer, saved, since trl reads its reference from a path."""
        tokenizer = train_tokenizer(["some words to make a tokenizer of"], 270)
        set_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=max(self.hidden // 64, 2),
            max_position_embeddings=self.prompt_tokens + self.new_tokens,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def texts(self) -> list[str]:
        """Prompts of digits, each of which is one token."""
        draw = random.Random(0)
        return ["".join(draw.choices("0123456789", k=self.prompt_tokens)) for _ in range(4 * self.prompts)]


SIZES = {
    "tiny": Workload(32, 1, 300, 2, 2, 6, 6),
    "small": Workload(256, 4, 4096, 8, 4, 32, 64),
    "medium": Workload(1024, 16, 32768, 8, 8, 128, 256),
}


def scattered(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The reward of everybody: cheap, and hardly ever the same for two completions, since DPO leaves ties out."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def marks(completion: str) -> list[Span]:
    """The labeller of token likelihood: every other character is right, the rest are wrong."""
    return [Span(i, i + 1, "right" if i % 2 else "wrong") for i in range(len(completion))]


class Clock:
    """Seconds by stage, with what the device still has to do waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @staticmethod
    def now() -> float:
        """The time, once the device is idle."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, owner: Any, name: str, stage: str) -> None:
        """From now on calls of ``owner.name`` count as ``stage``."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            started = self.now()
            try:
                return function(*given, **named)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + self.now() - started

        setattr(owner, name, timed)


class Meter:
    r"""Counts tokens and floating-point operations by watching what passes the trunks of policy and reference.

    A forward of r rows and s new tokens after c cached ones takes :math:`2 r s M + 4 L D r (s c + s(s+1)/2)` in the
    trunk (M weights in matrices, L layers of width D, causal attention) and :math:`2 V D` a position in the
    vocabulary head: one position a row while decoding, else every completion token. A backward pass is two
    forwards. What is computed a second time to save memory is not counted, nor is anything but these products.
    """

    def __init__(self, workload: Workload, trunks: list[Any]) -> None:
        self.workload = workload
        self.reset()
        for trunk in trunks:
            self.matrices = sum(p.numel() for n, p in trunk.named_parameters() if p.ndim == 2 and "embed" not in n)
            trunk.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, trunk: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        w = self.workload
        ids_BS = named["input_ids"] if "input_ids" in named else given[0]
        rows, new = ids_BS.shape
        cache = named.get("past_key_values")
        before = int(cache.get_seq_length()) if cache is not None else 0
        attended = rows * (new * before + new * (new + 1) / 2)
        positions = rows * (w.new_tokens if new > w.prompt_tokens else 1)
        flops = 2 * ids_BS.numel() * self.matrices + 4 * w.layers * w.hidden * attended
        flops += 2 * positions * w.vocabulary * w.hidden
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in trunk.parameters())
        self.tokens += ids_BS.numel()
        self.trained += ids_BS.numel() if trains else 0
        self.flops += flops * (3 if trains else 1)

    def reset(self) -> None:
        """Count from zero."""
        self.tokens = self.trained = 0
        self.flops = 0.0


def gemm_peak(threads: int, size: int = 1536, tries: int = 5) -> float:
    """The best of several fp32 products of square matrices, in FLOP/s; by processor time on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):
        started, busy = Clock.now(), time.process_time()
        torch.mm(a, b)
        wall, busy = Clock.now() - started, (time.process_time() - busy) / threads
        best = min(best, wall if device == "cuda" else busy)
    return 2 * size**3 / best
