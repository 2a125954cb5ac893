"""What can end a run early, and what a user should be told: memory, full disks, Ctrl-C, rewards that hang.

Where a run has several processes one of them tells: the first that writes the run's error.txt. A process that fails
writes it before it goes, so those that lose it find it there.
"""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from rlkl import RunError
from rlkl.config import Config
from rlkl.reduce import global_max

PATIENCE = 5.0  # seconds
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Signals that ask a run to stop, and the exit code that tells so."""


@contextlib.contextmanager
def requests(folder: Path) -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM become a request, the exit code that ``asked()`` returns; a second one ends at once.

    ``asked`` is to be called by all processes, and the same everywhere: 0 until any of them was asked to stop.
    A failure among several processes is told undisturbed: SIGTERM, by which launchers end the others, is ignored then,
    and brings no promise to finish the step where another process of the run in ``folder`` has told its error.
    """
    found = [0]

    def note(number: int, _frame: FrameType | None) -> None:
        if found[0]:
            raise KeyboardInterrupt
        found[0] = SIGNALS[signal.Signals(number)]
        if os.environ.get("RANK", "0") == "0" and not (folder / "error.txt").exists():
            os.write(2, b"rlkl: finishing the step, then saving; once more ends at once\n")

    def asked() -> int:
        return int(global_max(torch.tensor(found[0], device=_device())))

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield asked
        return
    old = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    except Exception:
        if several():
            del old[signal.SIGTERM]
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _device() -> torch.device:
    """Where the process group talks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def limit(seconds: float | None, what: str) -> Iterator[None]:
    """Let what a stranger wrote take so long and no longer; none elsewhere than in the main thread.

    Raises:
        RunError: the time is over.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second, where the first one is swallowed
    try:
        yield
    except _TooLong as error:
        raise RunError(
            f"{what}: no answer within {seconds:g} s (timeout); raise timeout if that is its pace"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class _TooLong(BaseException):
    """The time of a stranger's function is over; no ``except Exception`` of its own shall keep that."""


def told(error: BaseException, config: Config) -> str:
    """What ended a run, on a line, with what can be done about it."""
    if isinstance(error, RunError):
        return str(error)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if lost(error):
        return f"another process of this run ended; go on with --resume ({said[:120]})"
    if out_of_memory(error):
        return f"out of memory: {'; '.join(levers(config))} ({said[:120]})"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in said:
        return f"no space left on the disk of {config.folder}: make room, then go on with --resume ({said})"
    return said


def lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run has gone."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return several() and isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    texts = ("not enough memory", "can't allocate memory", "out of memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def levers(config: Config) -> list[str]:
    """The keys that trade time for memory, where they are not at their end, and leave results as they are."""
    t, r = config.train, config.rollout
    batch = r.prompts * r.samples_per_prompt
    found = [f"lower train.micro_batch (now {min(t.micro_batch, batch)})"] if min(t.micro_batch, batch) > 1 else []
    found += [] if t.gradient_checkpointing else ["set train.gradient_checkpointing=true"]
    found += [f"lower train.head_chunk (now {t.head_chunk})"] if t.head_chunk > 64 else []
    found += [f"lower rollout.micro_batch (now {min(r.micro_batch, batch)})"] if min(r.micro_batch, batch) > 1 else []
    return found or ["take a smaller model, or lower rollout.max_new_tokens"]


def write_error(folder: Path, text: str) -> str | None:
    """Keep a traceback in the run's folder, as far as the disk allows; where it is, for the message.

    None where another process was first, which then tells the user.
    """
    try:
        with open(folder / "error.txt", "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return None
    except OSError:
        return ""
    return f" (traceback in {folder / 'error.txt'})"


def late(error: Exception) -> Exception:
    """What a process says of an error before the run began, in time for one of several to say it.

    A mistake that all processes find is told by the first one; the launcher then ends the others while they wait.
    """
    if not several() or isinstance(error, RunError) or (os.environ.get("RANK") == "0" and not lost(error)):
        return error
    time.sleep(PATIENCE)
    return RunError("another process of this run ended before it began") if lost(error) else error
