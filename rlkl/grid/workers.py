"""Persistent processes that take run after run: importing takes seconds, and a crash shall end one run only.

Each is ``python -m rlkl.grid.workers``, not a fork or a spawned copy of the caller's main module, so it starts alike
from a command, a script or a notebook. A worker ends with its pipe, so none outlives the process that started it.
"""

import contextlib
import faulthandler
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

TICK = 0.5
"""Seconds between two looks at what runs, where nothing is reported."""
GOODBYE = 30
"""Seconds that a worker without work has to end: libraries write on until then."""


@dataclass(frozen=True)
class Job:
    """A run for a worker, its folder, and where its lines go until the folder is there (then to its log.txt).

    It goes on from its last checkpoint with ``resume``, and else begins anew.
    """

    config: dict[str, Any]
    folder: Path
    log: Path
    resume: bool = False


@dataclass(frozen=True)
class Event:
    """What happened to the job of this index: ``started``, ``made`` (its folder), or ``ended`` with its error or none.

    ``tick`` is about no job.
    """

    kind: str
    job: int = -1
    error: str | None = None


@dataclass
class Worker:
    """A process, this side of its pipe, and the index of its job."""

    process: "subprocess.Popen[bytes]"
    pipe: "connection.Connection"
    job: int | None = None


def slots(wanted: int | None, runs: int) -> list[dict[str, str]]:
    """The environment of each worker: its GPU, or else its share of the cores.

    The share is fixed by the comparison, not by what is left of it, since sums depend on the number of threads.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())])[
        : torch.cuda.device_count()
    ]
    alone = 1 if torch.accelerator.is_available() else cores
    count = min(wanted or len(gpus) or alone, runs)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [
        {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {})}
        for k in range(count)
    ]


def work(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> Iterator[Event]:
    """Do all jobs, one worker a slot; a worker that dies is replaced. Closing the iterator ends the workers."""
    todo = deque(range(len(jobs)))
    free = deque(slots)
    busy: list[tuple[Worker, Mapping[str, str]]] = []
    idle: list[tuple[Worker, Mapping[str, str]]] = []
    ended = False
    try:
        while todo or busy:
            while todo and (idle or free):
                slot = None if idle else free.popleft()
                worker, slot = idle.pop() if slot is None else (_start(slot), slot)
                worker.job = todo.popleft()
                busy.append((worker, slot))
                _give(worker, jobs[worker.job])
                yield Event("started", worker.job)
            connection.wait([worker.pipe for worker, _ in busy], timeout=TICK)
            for worker, slot in list(busy):
                for event in _hear(worker, jobs):
                    if event.kind == "ended":
                        busy.remove((worker, slot))
                        if worker.process.poll() is None:
                            idle.append((worker, slot))
                        else:
                            free.append(slot)
                    yield event
            yield Event("tick")
        ended = True
    finally:
        _end([worker for worker, _ in [*busy, *idle]], gently=ended)


def _start(slot: Mapping[str, str]) -> Worker:
    from rlkl.tasks.pretrain import LAUNCHERS

    here, there = Pipe()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)} | dict(slot)
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    environment["PYTHONIOENCODING"] = "utf-8"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "rlkl.grid.workers", str(there.fileno())],
        env=environment,
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the process that can say what became of the runs
    )
    there.close()
    return Worker(process, here)


def _give(worker: Worker, job: Job) -> None:
    with contextlib.suppress(OSError):  # it has just died, which its pipe will say
        worker.pipe.send((job, sys.argv))


def _hear(worker: Worker, jobs: Sequence[Job]) -> Iterator[Event]:
    """What a worker has said since, its death included."""
    assert worker.job is not None
    job = worker.job
    try:
        while worker.pipe.poll():
            kind, error = worker.pipe.recv()
            yield Event(kind, job, error)
            if kind == "ended":
                return
        dead = worker.process.poll() is not None
    except (EOFError, OSError):
        dead = True
    if dead:
        yield Event("ended", job, _died(worker, jobs[job]))


def _died(worker: Worker, job: Job) -> str:
    """One line on how a worker died in the middle of a job, kept in the run's error.txt."""
    try:
        code = worker.process.wait(timeout=5)
    except subprocess.TimeoutExpired:  # it has closed its pipe and lives
        worker.process.kill()
        code = worker.process.wait()
    _signal(worker, signal.SIGKILL)  # what it had started
    how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    said = f"its process died ({how}{hint})"
    if not (job.folder / "log.txt").is_file():
        return f"{said}; its last lines are in {job.log}"
    error = job.folder / "error.txt"
    error.write_text(f"{said}\nIts last lines are in {job.folder / 'log.txt'}.\n", encoding="utf-8")
    return f"{said} (see {error})"


def _end(workers: Sequence[Worker], gently: bool) -> None:
    """End workers: those without work are asked, and what does not end is killed with all that it started."""
    for worker in workers:
        if gently:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        else:
            _signal(worker, signal.SIGTERM)
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=GOODBYE if gently else 2)
        _signal(worker, signal.SIGKILL)
        worker.process.wait()
        worker.pipe.close()


def _signal(worker: Worker, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, number)


def main(handle: int) -> None:
    """The other side: jobs from the pipe until there is none."""
    os.set_inheritable(handle, False)
    pipe: connection.Connection = connection.Connection(handle)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    faulthandler.enable()
    while (given := jobs.get()) is not None:
        job, sys.argv = given  # what the run's card names as its command
        _send_output_to(job.log)
        pipe.send(("ended", _do(job, pipe)))


def _listen(pipe: "connection.Connection", jobs: "queue.SimpleQueue[Any]") -> None:
    """Pass jobs on; where the other side is gone, end at once, with all that was started here."""
    while True:
        try:
            jobs.put(pipe.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


def _send_output_to(log: Path) -> None:
    """From here on all that this process writes goes to this file, whatever writes it and wherever it moves."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _do(job: Job, pipe: "connection.Connection") -> str | None:
    """A run; what went wrong, on one line."""
    from rlkl import RunError, settings
    from rlkl.screen import Screen
    from rlkl.start import train

    config = settings.load(job.config)

    @contextlib.contextmanager
    def screen() -> Iterator[Screen]:
        os.replace(job.log, job.folder / "log.txt")
        pipe.send(("made", None))
        with Screen(True, config.train.steps) as lines:
            yield lines

    try:
        train(config, overwrite=not job.resume, resume=job.resume, screen=screen())
    except (RunError, ValueError) as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever a library raises before the run has a folder; the next run goes on
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())} (traceback in {job.log})"
    return None


if __name__ == "__main__":
    main(int(sys.argv[1]))
