"""The base models of `fix`: tiny transformers that learn the task's law, each trained in a process of its own.

They read and write one character a token: `0011>` is followed by x′ and `<eos>`, `>` alone by x′ whatever x was, and
`40111?` by the outcome, `+` or `-`. One writes edits for x′, the other critiques, which never begin with tag 1 or 2.
Their targets are the law's own next-token distributions and not samples of them, since at a chance of one in 80,000
samples would teach next to nothing.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlkl.tasks import fix
from rlkl.tasks.pretrain import EOS, PAD, cached, no_progress_bars, run_apart

LAW = {"tags": fix.TAGS, "floor": fix.FLOOR, "noise": fix.NOISE, "outcome": [fix.PASS, fix.FAIL, fix.MALFORMED]}
FIELD_LAWS = np.array(  # [field, value of x, tag, token]
    [
        [[fix.field_law([value] * fix.FIELDS, i, tag) for tag in range(8)] for value in range(fix.VALUES)]
        for i in range(fix.FIELDS)
    ]
)
CHARACTERS = "01234567>?" + fix.SAYS_PASS + fix.SAYS_FAIL
WRITES, ASKS, PASSES, FAILS, END = range(8, 13)
RECIPE: dict[str, Any] = {
    "hidden": 48,
    "layers": 2,
    "heads": 4,
    "steps": 1500,
    "batch": 96,
    "lr": 4e-3,
    "seed": 0,
    "even_tags": 0.5,  # share of first tokens that are drawn evenly, so that rare prefixes are learned too
    "even_fields": 0.1,  # the same for fields
}


def load_path(says: str = "edits") -> Path:
    """Return the folder of a base model and its tokeniser; the first call trains them, in about a minute.

    ``says`` is what the model writes after x: ``edits`` or ``critiques``.
    """
    edits = says == "edits"
    first_law = fix.tag_law() if edits else fix.critique_tag_law()
    recipe = RECIPE if edits else {**RECIPE, "seed": 1}  # from seed 0 critiques stay 0.05 nats from their law

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            job = Path(name)
            (job / "job.json").write_text(json.dumps({**recipe, "first_law": first_law.tolist()}))
            print(f"training fix's model of {says} on one CPU thread: about a minute", file=sys.stderr, flush=True)
            run_apart("rlkl.tasks.fix_model", job, folder)

    law = LAW if edits else {**LAW, "unsaid": fix.UNSAID}
    return cached("fix" if edits else "fix-critiques", {"law": law, **recipe}, build)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; tokens 0 to 7 of the task have ids 0 to 7."""
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, EOS, PAD])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=16,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def rows(
    count: int, rng: np.random.Generator, even_tags: float, even_fields: float, first_law: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` rows of each kind, each with the law of its next token: ids, their laws, and where there is one.

    ``first_law`` is that of the first token of x′, ``[8]``.
    """
    x = rng.integers(0, fix.VALUES, (2 * count, fix.FIELDS))
    ids = np.full((3 * count, 10), END)
    laws = np.zeros((3 * count, 10, len(CHARACTERS) + 2))
    tags = np.where(
        rng.random(2 * count) < even_tags, rng.integers(0, 8, 2 * count), rng.choice(8, 2 * count, p=first_law)
    )
    given = FIELD_LAWS[np.arange(fix.FIELDS), x, tags[:, None]]  # [2N, 4, 8]
    drawn = (rng.random((*x.shape, 1)) < given.cumsum(-1)).argmax(-1)
    fields = np.where(rng.random(x.shape) < even_fields, rng.integers(0, 8, x.shape), drawn)
    strings = np.concatenate([tags[:, None], fields], 1)
    conditional, alone, asked = (slice(k * count, (k + 1) * count) for k in range(3))
    ids[conditional, :5] = np.concatenate([x[:count], np.full((count, 1), WRITES)], 1)
    ids[conditional, 5:] = strings[:count]
    laws[conditional, 4, :8], laws[conditional, 5:9, :8] = first_law, given[:count]
    laws[conditional, 9, END] = 1
    ids[alone, 0], ids[alone, 1:6] = WRITES, strings[count:]
    laws[alone, 0, :8], laws[alone, 1:5, :8] = first_law, FIELD_LAWS[0, :, 0].mean(0)  # any field, whatever the tag
    laws[alone, 5, END] = 1
    outcome = fix.outcome()[strings[:count] @ (8 ** np.arange(5)[::-1])]
    ids[asked, :5], ids[asked, 5] = strings[:count], ASKS
    laws[asked, 5, PASSES], laws[asked, 5, FAILS] = outcome, 1 - outcome
    law = torch.from_numpy(laws).float()
    return torch.from_numpy(ids), law, law.sum(-1) > 0


def train(
    *,
    hidden: int,
    layers: int,
    heads: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    even_tags: float,
    even_fields: float,
    first_law: Sequence[float],
) -> LlamaForCausalLM:
    """A Llama that has learned the law, by AdamW on KL(law || model) of the next token, in fp32."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS) + 2,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=16,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END + 1,
            tie_word_embeddings=False,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        ids, law, known = rows(batch, rng, even_tags, even_fields, first_law)
        found = [  # two calls, since the rows without x are shorter
            model(input_ids=ids[part, :width], use_cache=False).logits[known[part, :width]]
            for part, width in ((slice(batch), 10), (slice(batch, None), 6))
        ]
        logp = torch.cat(found).log_softmax(-1)
        loss = torch.nn.functional.kl_div(logp, law[known], reduction="batchmean")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


def _train(job: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with no_progress_bars():
        train(**json.loads((job / "job.json").read_text())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    _train(Path(sys.argv[1]), Path(sys.argv[2]))
