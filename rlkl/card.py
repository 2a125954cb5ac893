"""The model card of a finished run: ``final/README.md``, from the run's own files."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlkl import settings
from rlkl.config import Config, PretrainedModel, dump
from rlkl.tracking import read_rows

SPANS = {"marked": "tokens in any span", "unmarked": "tokens in no span"}  # names that rlkl.moved gives

METHODS = {"reinforce": "REINFORCE", "ppo": "PPO", "token_likelihood": "token likelihood", "dpo": "DPO"}
PAPERS = {
    "reinforce": "Williams (1992). Simple statistical gradient-following algorithms for connectionist reinforcement "
    "learning. Machine Learning 8.",
    "ppo": "Schulman et al. (2017). Proximal policy optimization algorithms. arXiv:1707.06347.",
    "dpo": "Rafailov et al. (2023). Direct preference optimization: your language model is secretly a reward model. "
    "arXiv:2305.18290.",
    "unlikelihood": "Welleck et al. (2019). Neural text generation with unlikelihood training. arXiv:1908.04319.",
    "npo": "Zhang et al. (2024). Negative preference optimization. arXiv:2404.05868.",
    "regression": "Richemond et al. (2024). Offline regularised reinforcement learning for large language models "
    "alignment. arXiv:2405.19107.",
    "kl": "Ziegler et al. (2019). Fine-tuning language models from human preferences. arXiv:1909.08593.",
    "inference": "Korbak et al. (2022). RL with KL penalties is better viewed as Bayesian inference. arXiv:2205.11275.",
    "exact": "Amini et al. (2025). Better estimation of the Kullback–Leibler divergence between language models. "
    "arXiv:2504.10637.",
    "leave_one_out": "Kool et al. (2019). Buy 4 REINFORCE samples, get a baseline for free! ICLR workshop.",
    "group_norm": "Shao et al. (2024). DeepSeekMath. arXiv:2402.03300.",
    "gae": "Schulman et al. (2016). High-dimensional continuous control using generalized advantage estimation. "
    "arXiv:1506.02438.",
    "lora": "Hu et al. (2021). LoRA: low-rank adaptation of large language models. arXiv:2106.09685.",
}


def write(run: Path, folder: Path, adapter: bool) -> None:
    """Write the card of a run beside its model, with the figure; a card that is there is replaced.

    Args:
        run: the folder of a run whose last step was evaluated.
        folder: where the model is.
        adapter: whether that is a LoRA adapter, not a whole model.
    """
    figure = run / "curves.png"
    if figure.is_file():
        shutil.copyfile(figure, folder / figure.name)
    (folder / "README.md").write_text(text(run, adapter, figure.is_file()), encoding="utf-8")


def text(run: Path, adapter: bool, figure: bool = True) -> str:
    """The card: front matter as the Hub reads it, then Markdown."""
    config = settings.load(run / "config.yaml")
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    rows = list(read_rows(run / "metrics.jsonl"))
    head = yaml.safe_dump(_metadata(config, adapter), sort_keys=False, allow_unicode=True)
    body = [
        f"---\n{head}---\n",
        f"# {config.name}\n",
        f"{_base(config)}, fine-tuned by rlkl with {_method(config)} on {_feedback(config)} "
        f"{'and' if config.kl.beta else 'without'} a KL penalty{', as a LoRA adapter' if adapter else ''}.\n",
        *_results(config, rows),
        "![Reward and KL over training](curves.png)\n" if figure else "",
        *_details(config, rows),
        "## Limits\n",
        "It was optimised for these rewards on these prompts; nothing else was measured. Whatever the base model says "
        "wrong and the rewards do not see is still there, and its licence holds here too.\n",
        *_use(config, adapter),
        "## Versions\n",
        f"rlkl {environment['rlkl']}, Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
        + f"; on {environment['device']}.\n",
        f"```bash\n{_command(environment['command'])}\n```\n",
        f"<details><summary>Configuration</summary>\n\n```yaml\n{_shown(config)}```\n\n</details>\n",
        "## Citations\n",
        *(f"- {PAPERS[key]}" for key in _cited(config, adapter)),
    ]
    return "\n".join(line for line in body if line) + "\n"


def _metadata(config: Config, adapter: bool) -> dict[str, Any]:
    tags = ["rlkl", config.trainer.type, "kl-regularised", *(["lora"] if adapter else [])]
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _name(config),
        "base_model_relation": "adapter" if adapter else "finetune",
        "tags": tags,
    }


def _name(config: Config) -> str:
    """The base's Hub name, or the name of its folder."""
    model = config.model
    if not isinstance(model, PretrainedModel):
        return f"rlkl-{model.type}"
    return Path(model.path).resolve().name if Path(model.path).is_dir() else model.path


def _base(config: Config) -> str:
    if config.model.type in ("facts", "fix"):
        return f"The embedded base model of the task `{config.model.type}`"
    if config.model.type == "tiny":
        return "A tiny Llama, trained on the spot on the training records"
    return f"`{_name(config)}`"


def _method(config: Config) -> str:
    loss = getattr(config.trainer, "loss", None)
    return METHODS[config.trainer.type] + (f" ({loss})" if loss else "")


def _feedback(config: Config) -> str:
    if config.data.type == "pairs":
        return "stored preference pairs"
    if config.offline:
        return "stored completions with annotated spans"
    parts = [f"`{name}`" + (f" (weight {s.weight:g})" if s.weight != 1 else "") for name, s in config.rewards.items()]
    return f"the reward{'s' if len(parts) > 1 else ''} {', '.join(parts)}"


def _results(config: Config, rows: list[dict[str, Any]]) -> Iterator[str]:
    evaluated = [row for row in rows if "kl/sequence" in row]
    first, last = evaluated[0], evaluated[-1]
    names = [(key, f"reward `{name}`") for name in config.rewards if (key := f"reward/eval/{name}") in last]
    for kind, what in (("logp", "log p"), ("change", "change of log p")):
        labels = [key.split("/", 2)[2] for key in last if key.startswith(f"annotated/{kind}/")]
        names += [
            (f"annotated/{kind}/{label}", f"{what}, {SPANS.get(label, f'tokens marked `{label}`')}")
            for label in labels
            if not label.endswith("_stderr")
        ]
    names += [("kl/sequence", "KL to the reference, nats a sequence"), ("kl/token", "KL, nats a token")]
    names += [("policy/eval/entropy", "entropy, nats a token"), ("policy/eval/length", "length, tokens")]
    names += [("policy/eval/distinct_2", "distinct bigrams, share")]
    yield "## Result\n"
    yield "| | before | after |\n| --- | --- | --- |"
    for key, label in names:
        yield f"| {label} | {_value(first, key)} | {_value(last, key)} |"
    e = config.evaluate
    yield (
        f"\nMeans on held-out prompts (at most {e.prompts}, {e.samples_per_prompt} samples each, temperature 1) ± one "
        f"standard error over prompts, before the first and after step {last['step']}. The KL is exact at every token "
        "and summed along the model's own samples.\n"
    )
    if any(key.startswith("annotated/") for key in last):
        yield "Log-probs of annotated completions: means over tokens, in nats, ± one standard error over completions.\n"


def _value(row: dict[str, Any], key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_stderr")
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _details(config: Config, rows: list[dict[str, Any]]) -> Iterator[str]:
    last, r, kl = rows[-1], config.rollout, config.kl
    window = f", window {kl.resolved_window(config.credit.horizon)}" if kl.placement == "reward" else ""
    beta = f"β = {kl.beta:g}" if kl.target is None else f"β adapting to {kl.target:g} nats a sequence, from {kl.beta:g}"
    if kl.target is not None and last.get("kl/beta") is not None:
        beta += f" to {last['kl/beta']:.3g}"
    horizon = "the whole episode" if config.credit.horizon is None else f"{config.credit.horizon} tokens"
    data = getattr(config.data, "path", None)
    yield "## Method\n"
    baseline = "" if config.trainer.type == "token_likelihood" else f", baseline {config.credit.baseline}"
    yield f"- objective: {_method(config)}; reward window {horizon}{baseline}"
    yield f"- rewards: {', '.join(f'`{name}` = `{_public(s.origin)}`' for name, s in config.rewards.items())}"
    if config.holds_beta:
        yield f"- KL: {beta}, held by the loss itself"
    else:
        yield f"- KL: {beta}; {kl.estimator} in the {kl.placement}{window}; its gradient: {_rule(config)}"
    yield f"- reference: {'the base model itself' if config.model.reference == 'initial' else 'another model'}"
    yield f"- data: {config.data.type}" + (f", `{_public(data)}`" if data else "")
    drawn = f"prompts × {r.samples_per_prompt} completions"
    yield f"- {config.train.steps} steps of at most {r.prompts} {'stored completions' if config.offline else drawn}"
    if last.get("tokens/generated"):
        yield (
            f"- sampling: at most {r.max_new_tokens} tokens at temperature {r.temperature:g}; "
            f"{last['tokens/generated']:.0f} tokens generated, {last.get('reward/queries') or 0:.0f} scores asked for"
        )
    o = config.optimiser
    yield f"- AdamW, learning rate {o.learning_rate:g} ({o.schedule}), seed {config.seed}\n"


def _rule(config: Config) -> str:
    return config.kl.gradient(config.credit.horizon).replace("pi0", "π0").replace("pi", "π")


def _use(config: Config, adapter: bool) -> Iterator[str]:
    kind = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    yield "## Use\n"
    yield (
        f"```python\nfrom {kind[0]} import {kind[1]}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {kind[1]}.from_pretrained("{config.name}")  # this folder\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{config.name}")\n```\n'
    )


def _command(argv: list[str]) -> str:
    """As it was given, without absolute paths."""
    if Path(argv[0]).stem not in ("rlkl", "__main__"):
        return "rlkl train config.yaml"
    words = [word.rpartition("=") for word in argv[1:]]
    return shlex.join(["rlkl", *(f"{key}{sign}{_public(value)}" for key, sign, value in words)])


def _shown(config: Config) -> str:
    """The configuration without absolute paths."""
    tree = dump(config)
    for section in (tree["model"], tree["data"], *tree["rewards"].values()):
        for key in ("path", "reference", "scorer", "model", "cache"):
            if isinstance(section.get(key), str):
                section[key] = _public(section[key])
    shown: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return shown


def _public(path: str) -> str:
    """Where things lie on a disk is nobody else's business: the last part of an absolute path."""
    return Path(path).name if Path(path).is_absolute() else path


def _cited(config: Config, adapter: bool) -> list[str]:
    exact = config.kl.placement == "loss" and config.kl.estimator == "exact"
    found = [config.trainer.type, getattr(config.trainer, "loss", ""), *(["exact"] if exact else [])]
    found += ["kl", "inference"] if config.kl.beta else []
    found = [key for key in (*found, config.credit.baseline, config.credit.advantage) if key in PAPERS]
    return [*found, *(["lora"] if adapter or config.model.lora is not None else [])]
