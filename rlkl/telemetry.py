"""Usage and error reports of the libraries that rlkl calls: off, unless the environment says otherwise."""

import os

OFF = {
    "DO_NOT_TRACK": "1",  # the common convention, see donottrack.sh; huggingface_hub among others reads it
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it transformers, datasets and trl
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio_client, which trackio imports
    "WANDB_ERROR_REPORTING": "false",  # crash reports of wandb; runs go to wandb only where log.with names it
}
"""Environment variables and the values they are given before any of these libraries is imported."""


def switch_off() -> None:
    """Set what the user has not set."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
