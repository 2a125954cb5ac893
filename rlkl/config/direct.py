"""What objectives without returns may be asked for: likelihood of tokens, and preferences. Torch-free."""

from typing import TYPE_CHECKING

from rlkl.config.objective import CreditConfig

if TYPE_CHECKING:
    from rlkl.config import Config


def check(config: "Config") -> None:
    """Refuse keys that would be ignored, and KL where it means nothing.

    Raises:
        ValueError: a key of credit that is not read; a KL beside that of the loss, or without a place; odd pairs.
    """
    if config.trainer.type == "token_likelihood":
        _check_credit(
            config,
            {"horizon", "gamma", "ema_decay", "lambda_"},
            "it weighs tokens by the sum over their window, without baseline or advantage",
        )
        if not config.holds_beta:
            _check_placed(config)
        if config.trainer.imitate is not None:
            _check_imitation(config, config.trainer.imitate)
    if config.trainer.type == "dpo":
        _check_pairs(config)
        _check_credit(config, set(), "preferences are of whole completions, without returns or baseline")
    if config.holds_beta:
        _check_held_beta(config)


def _check_credit(config: "Config", read: set[str], why: str) -> None:
    usual = CreditConfig()
    for name in CreditConfig.model_fields.keys() - read:
        if getattr(config.credit, name) != getattr(usual, name):
            key = CreditConfig.model_fields[name].alias or name
            raise ValueError(
                f"credit.{key}={getattr(config.credit, name)} with trainer.type={config.trainer.type}: {why}; "
                "drop the key"
            )


def _check_held_beta(config: "Config") -> None:
    kl, trainer = config.kl, config.trainer
    if kl.placement == "loss" or kl.beta == 0 or kl.target is not None or kl.window is not None:
        what = f"trainer.loss={trainer.loss}" if trainer.type == "token_likelihood" else f"trainer.type={trainer.type}"
        raise ValueError(
            f"kl with {what}: this loss holds kl.beta itself, above 0 and fixed; "
            "a further KL is refused: leave placement, estimator, window and target out"
        )


def _check_placed(config: "Config") -> None:
    if config.kl.beta > 0 and config.kl.estimator not in ("exact", "exact_local", "exact_forward"):
        raise ValueError(
            f"kl.estimator={config.kl.estimator} with trainer.type=token_likelihood: there is no return to put it "
            "in; use kl.placement=loss with exact, exact_local or (signed) exact_forward, or kl.beta=0"
        )


def _check_pairs(config: "Config") -> None:
    """Pairs must come out even."""
    samples, rows = config.rollout.samples_per_prompt, config.train.micro_batch
    if samples % 2 and not config.offline:
        raise ValueError(
            f"rollout.samples_per_prompt={samples} with trainer.type=dpo: samples are compared two by two; "
            "use an even number"
        )
    if rows % 2:
        raise ValueError(f"train.micro_batch={rows} with trainer.type=dpo: a pair stays together; use an even number")


def _check_imitation(config: "Config", best: int) -> None:
    """The best samples are those of several, each of whose tokens is marked for itself."""
    if config.offline:
        raise ValueError(
            f"trainer.imitate={best} with data.type={config.data.type}: it takes the best of several samples, and "
            "nothing is sampled; drop it"
        )
    if best >= config.rollout.samples_per_prompt:
        raise ValueError(
            f"trainer.imitate={best} with rollout.samples_per_prompt={config.rollout.samples_per_prompt}: "
            "all of them would be the best; sample more"
        )
    if config.credit.horizon != 1:
        raise ValueError(
            f"trainer.imitate={best} with credit.horizon={config.credit.horizon}: early tokens would weigh as many as "
            "come after them; set credit.horizon=1"
        )
