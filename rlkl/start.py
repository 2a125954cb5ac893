"""A run from its configuration: its folder, what it resumes from, and what is said where it ends early."""

import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rlkl import RunError, checkpoint, dashboards, faults, launch, settings, tracking
from rlkl.config import Config
from rlkl.lane import build
from rlkl.loop import run
from rlkl.screen import Screen


def train(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
    screen: AbstractContextManager[Screen] | None = None,
) -> Path:
    """Train as the configuration says and return the run's folder.

    ``resume`` goes on from the last checkpoint of the run of this name, or begins it; a finished one stays as it is.
    ``screen`` takes the place of this terminal; it is entered once the folder is there.

    Raises:
        ValueError: a mistake in the configuration, data or folder; nothing was written.
        RunError: the run could not go on; the traceback is in its error.txt.
        Stopped: it was asked to stop, and did after a step, with a checkpoint.
    """
    config = settings.load(source, overrides)
    dashboards.check(config.log)
    accelerator = launch.accelerator(config)
    folder = tracking.run_folder(config)
    if resume:
        checkpoint.check(folder, config)
    else:
        tracking.check_folder(folder, overwrite)
    if resume and settings.finished(folder):
        Screen(accelerator.is_main_process).say(f"{folder}: finished already; nothing to resume")
        return folder
    with accelerator.main_process_first():  # an embedded model is trained once
        lane = build(config)
    main = accelerator.is_main_process
    with tracking.claim(folder, overwrite or resume, main):
        last = checkpoint.steps(folder)[-1:] if resume else []
        accelerator.wait_for_everyone()
        try:
            if last:  # read before anything is cut
                checkpoint.load(lane, folder, last[0])
            if main and last:
                checkpoint.cut(folder, last[0])
            elif main:
                dashboards.forget(folder)
                tracking.create_folder(folder, config)
            accelerator.wait_for_everyone()
        except OSError as error:
            raise RunError(faults.told(error, config)) from error
        try:
            with (
                faults.requests(folder) as asked,
                screen or Screen(main, config.train.steps) as shown,
                dashboards.opened(folder, config, main) as copies,
            ):
                run([lane], [tracking.Tracker(folder, main, shown, copies)], accelerator, asked)
        except (Exception, SystemExit) as error:
            kept = faults.write_error(folder, traceback.format_exc())
            raise RunError(f"{faults.told(error, config)}{kept or ''}", said=kept is None) from error
    return folder
