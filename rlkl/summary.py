"""The arithmetic of a run, and what ``--dry-run`` prints. Torch-free."""

from collections.abc import Iterator

import yaml

from rlkl import memory
from rlkl.config import AnnotationsSource, Config, dump, learned


def describe(config: Config) -> str:
    """The resolved configuration, the arithmetic of its batches, and the memory that they need."""
    rule = f"KL:          {penalty(config)}"
    tree = yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)
    first, *table = memory.lines(config)
    said = [*arithmetic(config), rule, *hazards(config), f"memory:      {first}", *table]
    return "\n".join([tree, *(f"# {text}" for text in said)])


def penalty(config: Config) -> str:
    """Where the KL penalty is, and what gradient that gives."""
    if config.holds_beta:
        return "held by the loss itself; no further penalty"
    window = f", window {config.kl.resolved_window(config.credit.horizon)}" if config.kl.placement == "reward" else ""
    rule = config.kl.gradient(config.credit.horizon)
    return f"{config.kl.estimator} in the {config.kl.placement}{window}; its gradient: {rule}"


def arithmetic(config: Config, ranks: int = 1) -> list[str]:
    """Completions and tokens of a step and of the whole run, and what each of ``ranks`` processes does of them."""
    r, e = config.rollout, config.evaluate
    batch = r.prompts * config.samples
    steps, piece = config.train.steps, config.train.micro_batch
    share = -(-r.prompts // ranks) * config.samples
    evaluations = 1 + steps // e.every + (steps % e.every > 0)
    drawn = f"{r.prompts} prompts x {r.samples_per_prompt} samples = {batch} completions"
    what = f"{batch} stored completions" if config.offline else drawn
    return [
        f"a step:      {what}, at most {batch * r.max_new_tokens} tokens",
        f"micro-batch: {-(-share // piece)} x at most {min(piece, share)} completions"
        + (f" on each of {ranks} processes" if ranks > 1 else ""),
        f"the run:     {steps} steps, {steps * batch} completions, at most {steps * batch * r.max_new_tokens} tokens",
        f"evaluation:  {evaluations} x at most {e.prompts * e.samples_per_prompt} completions",
    ]


def hazards(config: Config, lightest: float = 0.0) -> Iterator[str]:
    """Where nothing teaches, and where a likelihood loss has no optimum, a metastable one, or one that its data lack.

    ``lightest`` is the least weight of a stored token, where that is known. What a labeller weighs by itself is not.
    """
    trainer, kl = config.trainer, config.kl
    if config.rewards and not any(source.weight for source in config.rewards.values()):
        yield "warning: every source under rewards has weight 0: they are watched, and nothing is learned from them"
    yield from learned.unspent(config)
    if trainer.type != "token_likelihood":
        return
    worst = -min([*_weights(config), lightest], default=0.0)
    if trainer.loss == "signed" and worst > 0:
        said = f"warning: trainer.loss=signed with weights down to {-worst:g}: unbounded below"
        if kl.beta == 0:
            yield f"{said}, and kl.beta=0 holds nothing; use trainer.loss=unlikelihood"
        elif kl.estimator != "exact_forward":
            yield (
                f"{said}; reverse KL does not bound it: where there is an optimum it is metastable, and one step "
                "too far falls out of it; use trainer.loss=unlikelihood, or kl.estimator=exact_forward"
            )
        else:
            need = worst / kl.beta
            what = f"above {need:.3g}" if need < 1 else f"above {need:.3g}, which no token has"
            if config.credit.horizon != 1:
                what += " for a single mark, and more where the window of a token sums several"
            yield (
                f"{said}, unless kl.beta * pi0 > |weight| at every bad token, that is pi0 {what}; "
                "raise kl.beta, or use trainer.loss=unlikelihood"
            )
    if trainer.loss == "npo" and trainer.kappa < 1 and worst > 0:
        yield (
            f"warning: trainer.loss=npo with kappa={trainer.kappa:g}: below 1 its optimum is metastable under reverse "
            "KL, and one step too far falls out of it; use kappa=1"
        )
    if config.offline and trainer.loss == "rwr":
        yield "note: trainer.loss=rwr takes stored completions for samples of the reference; others teach another law"
    if config.offline and trainer.learned_offset and trainer.offset == "state":
        yield (
            "note: trainer.offset=state: where stored completions annotate one token a prefix, as spans do, a learned "
            "offset of the state absorbs the signal; use offset=none or prompt"
        )


def _weights(config: Config) -> Iterator[float]:
    """What tokens may weigh, as far as the configuration says; -1 stands for the scores of a function."""
    for source in config.rewards.values():
        if isinstance(source, AnnotationsSource):
            yield from (source.weight * w for w in (*source.weights.values(), source.unmarked or 0.0))
        elif source.weight:
            yield -abs(source.weight)
