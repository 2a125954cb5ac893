"""rlkl: decide how to fine-tune a language model from feedback, and trust the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkl import telemetry

__version__ = "0.1.0"

telemetry.switch_off()


class RunError(RuntimeError):
    """A run cannot go on (exit 1). What the user wrote wrong is a ValueError (exit 2).

    ``said``: another process of the run tells the user, this one is to be silent.
    """

    def __init__(self, message: str, said: bool = False) -> None:
        super().__init__(message)
        self.said = said


class Outage(RunError):
    """What a run needs from outside stays away: the last step is saved before the run ends.

    ``item``: which of several questions met it.
    """

    item = 0


class Stopped(BaseException):
    """A run was asked to stop (Ctrl-C, SIGTERM) and did, after a step, with a checkpoint. ``code`` is the exit code.

    ``said``: another process of the run tells the user, this one is to be silent.
    """

    def __init__(self, message: str, code: int, said: bool = False) -> None:
        super().__init__(message)
        self.code, self.said = code, said


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Train as a YAML file, a mapping or a ``rlkl.config.Config`` says; the Python face of ``rlkl train``.

    Args:
        config: a run's configuration.
        overrides: ``key.sub=value`` strings, as on the command line.
        overwrite: replace the run of this name.
        resume: go on from its last checkpoint, with the same results as without the interruption.

    Returns:
        The run's folder: config.yaml, env.json, metrics.jsonl, samples.jsonl, curves.png, checkpoints/, reference/,
        final/.

    Raises:
        ValueError: a mistake in the configuration, the data or the folder; nothing was written.
        RunError: the run could not go on; its folder holds the traceback in error.txt.
        Stopped: Ctrl-C or SIGTERM; the step was finished and saved.
    """
    from rlkl.start import train as run

    return run(config, overrides, overwrite=overwrite, resume=resume)


def compare(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, overwrite: bool = False) -> Path:
    """Train every arm of a comparison with every seed, side by side; the Python face of ``rlkl compare``.

    Args:
        config: a comparison's YAML file or mapping: base, arms, seeds.
        overrides: ``key.sub=value`` strings, as on the command line.
        overwrite: do all runs anew, finished ones too.

    Returns:
        The comparison's folder: compare.yaml, summary.json, frontier.png, and a folder a run.

    Raises:
        ValueError: a mistake in the configuration or a folder; nothing was started.
        RunError: runs failed; the others are finished.
    """
    from rlkl.grid.compare import compare as run

    return run(config, overrides, overwrite=overwrite)
