"""What a configuration may ask for where a run learns from stored completions. Torch-free."""

from typing import TYPE_CHECKING

from rlkl.config.data import AnnotatedData, PairsData, StoredData

if TYPE_CHECKING:
    from rlkl.config import Config


def check(config: "Config") -> None:
    """Refuse what stored completions cannot give, and keys that nothing would read.

    Raises:
        ValueError: a trainer that needs the policy's own samples; a KL estimated from them; a key of sampling.
    """
    data = config.data
    if not isinstance(data, StoredData):
        return
    if config.trainer.type not in data.trainers:
        raise ValueError(
            f"trainer.type={config.trainer.type} with data.type={data.type}: it cannot learn from these "
            "stored completions (policy gradients need the policy's own samples); use trainer.type="
            + " or ".join(data.trainers)
        )
    _check_sampling(config)
    _check_kl(config)
    if isinstance(data, AnnotatedData):
        _check_annotations(config)
    if isinstance(data, PairsData):
        _check_watched(config)


def _check_watched(config: "Config") -> None:
    """A preference is the whole feedback; rewards can only watch."""
    for name, source in config.rewards.items():
        if source.type == "annotations" and source.labeller is None:
            raise ValueError(f"rewards.{name} with data.type=pairs: these records have no spans; name a labeller")
        if source.weight:
            raise ValueError(
                f"rewards.{name}.weight={source.weight:g} with data.type=pairs: stored preferences are learned from "
                f"without rewards; set rewards.{name}.weight=0 to watch it"
            )


def _check_sampling(config: "Config") -> None:
    rollout, usual = config.rollout, type(config.rollout).model_fields
    for name in ("samples_per_prompt", "temperature", "record", "replay"):
        value = getattr(rollout, name)
        if value != usual[name].default and (name, value) != ("samples_per_prompt", 1):
            raise ValueError(
                f"rollout.{name}={str(value).lower()} with data.type={config.data.type}: nothing is sampled in "
                "training, a record is learned from as it is stored; drop the key"
            )


def _check_kl(config: "Config") -> None:
    kl = config.kl
    if kl.target is not None:
        raise ValueError(
            f"kl.target={kl.target} with data.type={config.data.type}: beta adapts to a KL that is estimated from the "
            "policy's own samples, and training has none; fix kl.beta"
        )
    if kl.placement == "loss" and kl.estimator == "exact" and kl.beta > 0:
        raise ValueError(
            f"kl.estimator=exact with data.type={config.data.type}: its score term is exact on the policy's own "
            "samples only; use exact_local, or exact_forward"
        )


def _check_annotations(config: "Config") -> None:
    """Weights of labels have one place, and nothing else moves an annotated token."""
    used = [name for name, source in config.rewards.items() if source.type == "annotations" and source.weight]
    if not used:
        raise ValueError(
            "rewards with data.type=annotated: no source says what the labels weigh; add "
            "rewards.<name>={type: annotations, weights: {label: weight, ...}}"
        )
    for name, source in config.rewards.items():
        if source.type != "annotations" and source.weight:
            raise ValueError(
                f"rewards.{name}.weight={source.weight:g} with data.type=annotated: likelihood does not "
                f"read this source; set rewards.{name}.weight=0 to watch it"
            )
