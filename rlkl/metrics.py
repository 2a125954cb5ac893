"""Every key of metrics.jsonl, with its unit: the one table behind docs/metrics.md. Torch-free.

``python -m rlkl.metrics`` prints that page; the tests compare it with the file and with what runs write.
"""

import re
from collections.abc import Iterator

PLACES = {
    "<source>": r"(?!total$|queries$|labels$)[\w.-]+?(?<!_stderr)",
    "<label>": r".+?(?<!_stderr)",
    "<bound>": r"\w+",
}
"""Variable parts of a key, and what may stand there: a source is a name under ``rewards:``, a label one of spans, a
bound one of ``train.budget``."""

METRICS: dict[str, tuple[str, str]] = {
    "reward/train/total": (
        "reward a sequence",
        "weighted sum of all sources, mean over the batch, without the KL penalty",
    ),
    "reward/train/<source>": (
        "reward a sequence",
        "what one source gave, clipped, before whitening and weight; mean over the batch",
    ),
    "reward/share/<source>": (
        "share",
        "of |weighted reward|, summed over the batch's tokens and over the sources: the part of one source; where two "
        "or more weigh more than 0",
    ),
    "reward/std/<source>": (
        "reward a sequence",
        "running standard deviation of what one source gave, over all training samples so far, by which it is divided; "
        "with whiten; a reward model that learned anew begins anew with the next step",
    ),
    "reward/eval/<source>": (
        "reward a sequence",
        "what one source gave on the held-out prompts, clipped, before whitening and weight; mean over prompts, at "
        "temperature 1",
    ),
    "reward/eval/<source>_stderr": ("reward a sequence", "its standard error over prompts; null for a single prompt"),
    "reward/c/<source>": ("1", "counterfactual score: the c in force in this step, where it is scheduled"),
    "reward/eval/gap/<source>": (
        "standard deviations",
        "how far this source has risen above the untrained policy's mean, minus the same of evaluate.gold, each in "
        "standard deviations of that source over the untrained policy's held-out samples (a model that has changed "
        "since scores them again); above 0 it claims more than gold gives",
    ),
    "reward/learn/<source>/loss": (
        "nats an outcome",
        "-log p of the outcomes that a joint predictor just observed, before it learned from them, mean",
    ),
    "reward/learn/<source>/rows": (
        "judgements",
        "comparisons without ties, or completions with marks, that the model has learned from; after it learned",
    ),
    "reward/learn/<source>/agreement": (
        "share",
        "new comparisons that the model before this update orders as the labeller did, or of marked tokens whether "
        "their score has the mark's sign",
    ),
    "reward/queries": (
        "calls",
        "scores asked so far in training, of all sources that weigh more than 0; a stored completion counts once, when "
        "it is first learned from: its labels were paid for once, however often it is seen",
    ),
    "reward/labels": (
        "labels",
        "judgements asked so far in training that a person gave or that stand for one, of all sources that weigh more "
        "than 0: docs/objectives.md says which; stored completions as in reward/queries",
    ),
    "reward/eval/queries": ("calls", "scores asked in this evaluation, of all sources that weigh more than 0"),
    "annotated/logp/<label>": (
        "nats a token",
        "log pi of the tokens that spans of this label mark, mean over tokens, on a fixed set of annotated "
        "completions: the held-out records of stored data, or else the base model's own held-out samples, labelled "
        "once (by every labeller of rewards:, those of weight 0 too; no training queries). `unmarked` are the tokens "
        "in no span, `marked`, where there are several labels, those in any; a label of several sources is "
        "`<source>.<label>`",
    ),
    "annotated/logp/<label>_stderr": ("nats a token", "its standard error over completions (ratio estimator)"),
    "annotated/change/<label>": ("nats a token", "the same mean of log pi - log pi0, token by token"),
    "annotated/change/<label>_stderr": ("nats a token", "its standard error over completions"),
    "annotated/moved/<label>": ("nats a token", "the same mean of |log pi - log pi0|"),
    "annotated/moved/<label>_stderr": ("nats a token", "its standard error over completions"),
    "kl/sequence": (
        "nats a sequence",
        "canonical KL(pi||pi0): exact token KLs summed along the policy's own samples of the held-out prompts at "
        "temperature 1; the one to compare runs by",
    ),
    "kl/sequence_stderr": ("nats a sequence", "its standard error over prompts; null for a single prompt"),
    "kl/token": ("nats a token", "the same sum over all samples, divided by their tokens"),
    "kl/penalty": (
        "nats a sequence",
        "log pi/pi0 of the training samples, summed over tokens, mean over the batch, at the training temperature and "
        "before beta; noisy, can be negative; it steers an adaptive beta; not on stored completions, where it is no KL",
    ),
    "kl/beta": ("reward a nat", "the coefficient in force in this step"),
    "policy/length": ("tokens", "policy tokens of a training sample, mean"),
    "policy/terminated": ("share", "training samples that ended by EOS or a stop, not by the length limit"),
    "policy/entropy": (
        "nats a sequence",
        "token entropies summed over a training sample; logged with trainer.entropy_coef above 0",
    ),
    "policy/sampling_gap": (
        "nats a token",
        "mean absolute difference of the log-probs of sampling and of training for the same tokens, where "
        "they were sampled; 0 up to rounding",
    ),
    "policy/skipped": ("share", "updates of the step left out: their gradient was not finite, or exactly zero"),
    "policy/grad_norm": ("1", "global norm of the gradient before it is clipped to optimiser.max_grad_norm"),
    "policy/learning_rate": ("1", "the optimiser's learning rate in this step"),
    "policy/epochs": ("passes", "over the samples of this step; PPO's target_kl may end them early"),
    "policy/clip_fraction": ("share", "PPO: tokens on which the clip binds, over all updates of the step"),
    "policy/approx_kl": (
        "nats a token",
        "PPO: k3 estimate of KL(sampling policy||policy) over all updates of the step; not the KL to the reference",
    ),
    "policy/ratio_min": ("1", "PPO: smallest ratio of policy to sampling policy at a sampled token"),
    "policy/ratio_max": ("1", "PPO: largest such ratio"),
    "policy/eval/entropy": ("nats a token", "exact entropy of the policy on its held-out samples, mean over tokens"),
    "policy/eval/length": ("tokens", "length of a held-out sample, mean"),
    "policy/eval/terminated": ("share", "held-out samples that ended by EOS or a stop"),
    "policy/eval/distinct_1": ("share", "distinct among all tokens of the held-out samples (Li et al. 2016)"),
    "policy/eval/distinct_2": ("share", "distinct among all their token bigrams"),
    "policy/eval/distinct_3": ("share", "distinct among all their token trigrams"),
    "policy/eval/self_bleu": (
        "share",
        "BLEU-4 in tokens of every held-out sample against all others (Zhu et al. 2018), counts summed over samples; "
        "1 = all are equal",
    ),
    "policy/eval/true_fixes": (
        "share",
        "task fix: exact mass of the policy on the true fixes of a held-out x at temperature 1, mean over prompts",
    ),
    "policy/eval/true_fixes_stderr": ("share", "its standard error over prompts; null for a single prompt"),
    "loss/policy": (
        "reward a sequence",
        "minus advantage times log-prob, summed over tokens: a surrogate, not minus J",
    ),
    "loss/kl": ("nats a sequence", "the KL term in the loss, before beta; with kl.placement=loss and beta above 0"),
    "loss/likelihood": ("nats a token", "the trainer's loss on the annotated tokens, mean, before the KL term"),
    "loss/preference": ("nats a pair", "DPO: -log sigmoid of the margin, mean over pairs"),
    "preference/margin": (
        "reward",
        "DPO: kl.beta times log pi/pi0 of the chosen minus that of the rejected completion, before the update, mean "
        "over pairs",
    ),
    "preference/accuracy": ("share", "DPO: pairs with a positive margin; a margin of 0 counts half"),
    "preference/eval/accuracy": ("share", "stored pairs: the same on all held-out ones, mean over pairs"),
    "preference/eval/accuracy_stderr": ("share", "its standard error over pairs; null for a single pair"),
    "preference/eval/margin": ("reward", "stored pairs: margin of the held-out ones, mean over pairs"),
    "preference/eval/margin_stderr": ("reward", "its standard error over pairs; null for a single pair"),
    "preference/tied": ("share", "DPO: training samples in no pair, for their rewards tie"),
    "loss/value": ("reward squared", "half the squared error of the learned value, mean over tokens"),
    "credit/advantage_std": ("reward", "standard deviation of the advantages over the batch's tokens"),
    "credit/explained_variance": (
        "share",
        "1 - Var(return - value) / Var(return) over the batch's tokens, where a value is learned; below 0 it hurts",
    ),
    "credit/return": ("reward", "return of a token, mean; with k1 in the reward its KL penalty is included"),
    "tokens/generated": ("tokens", "training tokens sampled so far"),
    "budget/ended/<bound>": ("flag", "1 in the last row of a run that this cap of train.budget ended"),
    "time/sample": ("seconds", "sampling, a step"),
    "time/reward": ("seconds", "scoring by the sources, a step"),
    "time/score": ("seconds", "log-probs of policy and reference on the samples, and credit, a step"),
    "time/update": ("seconds", "forward, backward and optimiser, a step"),
    "time/learn": ("seconds", "training of the sources that learn, a step"),
    "time/step": ("seconds", "the whole step, without evaluation"),
    "time/evaluate": ("seconds", "an evaluation"),
}
"""Key -> unit and meaning."""

SAMPLES = (
    "## Samples",
    "",
    "A row of `samples.jsonl` is a completion of an evaluation, the first of its prompt: `log.samples` rows an "
    "evaluation, the same prompts in the same order with the same randomness every time. `kl` and "
    "`reward/<source>` (before its weight) are of the completion; `tokens` holds lists of an entry a token, to "
    "four digits:",
    "",
    "| list | unit | meaning |",
    "| --- | --- | --- |",
    "| `text` | | what the token writes; together they are the completion. A character of several tokens is the last "
    "one's, EOS writes nothing |",
    "| `kl` | nats | exact KL(pi\\|\\|pi0) of the next-token distributions before it |",
    "| `logp`, `ref_logp` | nats | its log-prob under the policy and under the reference, at temperature 1 |",
    "| `reward/<source>` | reward | what the source pays at it, before the weight |",
    "| `advantage` | reward | the return that the run's credit gives it (weights, window, discount, centring; KL where "
    "it is paid as a reward) less the mean of the prompt's other samples. It is not always what trained the run: a "
    "learned value, another baseline and whitening are left out, so that runs can be compared, and DPO has no "
    "advantage of its own. For token likelihood it is the window of rewards, without a baseline; an annotation, which "
    "likelihood reads over its whole span, stands at the span's last token |",
)
"""The part of docs/metrics.md about samples.jsonl."""


def documented(key: str) -> list[str]:
    """The entries of the table that a key of metrics.jsonl falls under: exactly one, if all is well."""
    return [entry for entry in METRICS if re.fullmatch(_pattern(entry), key)]


def page() -> Iterator[str]:
    """The lines of docs/metrics.md."""
    yield "# Metrics"
    yield ""
    yield "Generated by `python -m rlkl.metrics > docs/metrics.md`; a test keeps it true."
    yield ""
    yield (
        "A row of `metrics.jsonl` has `step` (0 = the model before training) and keys of this table; rows of evaluated "
        "steps have `…/eval/…`, `annotated/…`, `kl/sequence` and `kl/token` too. A value that is not finite is `null` "
        "there and missing in the dashboards. `<source>` is a name under `rewards:`, `<label>` one of annotated spans, "
        "`<bound>` a key of `train.budget`. Everything is over the global batch, all processes together; times are "
        "the main process's."
    )
    yield ""
    yield "| key | unit | meaning |"
    yield "| --- | --- | --- |"
    for key, (unit, meaning) in METRICS.items():
        yield f"| `{key}` | {unit} | {meaning} |"
    yield ""
    yield from SAMPLES


def _pattern(entry: str) -> str:
    pattern = re.escape(entry)
    for place, allowed in PLACES.items():
        pattern = pattern.replace(re.escape(place), allowed)
    return pattern


if __name__ == "__main__":
    print("\n".join(page()))
