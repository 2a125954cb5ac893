"""How long a step takes, where, and beside trl: ``python -m benchmarks.throughput`` (``--help``; docs/performance.md).

Contestants take turns in one process, on the same threads, round after round; a ratio is of two turns of one round, so
what else the machine does falls on both. On a CPU, ratios and shares are of processor time, which leaves out waiting
for a processor that others use. Peak memory is that of a process of its own for each.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

import psutil  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.contestants import NAMES, OURS, PAIRS, build  # noqa: E402
from benchmarks.workload import SIZES, gemm_peak  # noqa: E402

STAGES = ("sample", "reward", "score", "loss+backward", "optimiser", "step")
BASELINES = Path(__file__).parent / "baselines"
Tree = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description="A step, by stage and beside trl."
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="the model and the batch (small)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every product (1)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="these contestants alone")
    parser.add_argument("--json", nargs="?", const="", help="write this file; by itself, the baseline of this hardware")
    parser.add_argument("--show", type=Path, help="print the table of such a file as Markdown, and measure nothing")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.show:
        print(markdown(json.loads(given.show.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(given.threads)
    if given.alone:
        print(json.dumps(alone(given.only[0], given.size)))
        return
    result = measure(given.only, given.size, given.rounds, given.threads)
    console = Console()
    console.width = max(console.width, 132)
    console.print(table(result), *ratio_lines(result), sep="\n")
    if given.json is not None:
        path = Path(given.json) if given.json else BASELINES / f"{hardware_name(given.threads)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(path)


def measure(names: Sequence[str], size: str, rounds: int, threads: int) -> Tree:
    """Everything that is reported: seconds, FLOPs and memory of each, and ratios with their spread."""
    memory = {name: in_a_process_of_its_own(name, size, threads) for name in names}
    load, peaks = [os.getloadavg()[0]], []
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        SIZES[size].model(Path(folder) / "model")
        contestants = {name: build(name, SIZES[size], Path(folder)) for name in names}
        for contestant in contestants.values():
            contestant.turn()
        for _ in range(rounds):
            peaks.append(gemm_peak(threads))
            for name, contestant in contestants.items():
                seconds[name].append(contestant.turn())
        work = {name: contestant.meter for name, contestant in contestants.items()}
    load.append(os.getloadavg()[0])
    found = {}
    for name in names:
        busy = [effort(turn, threads) for turn in seconds[name]]
        shares = [work[name].flops / time / peak for time, peak in zip(busy, peaks, strict=True)]
        stages = {s: statistics.median(turn.get(s, 0.0) for turn in seconds[name]) for s in STAGES[:-1]}
        found[name] = {
            "stages": {s: round(x, 5) for s, x in stages.items() if x},
            "step": spread([turn["step"] for turn in seconds[name]]),
            "processor": spread([turn["processor"] for turn in seconds[name]]),
            "tokens": {"forward": work[name].tokens, "trained": work[name].trained},
            "gflop": round(work[name].flops / 1e9, 3),
            "share_of_peak": spread(shares),
            "memory_mib": memory[name],
        }
    ratios = {}
    for ours, theirs in PAIRS.items():
        if ours in seconds and theirs in seconds:
            both = zip(seconds[ours], seconds[theirs], strict=True)
            ratios[f"{ours} / {theirs}"] = spread([effort(a, threads) / effort(b, threads) for a, b in both])
    return {
        "hardware": hardware(),
        "threads": threads,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "accelerate")},
        "load": [round(x, 1) for x in load],
        "rounds": rounds,
        "size": size,
        "workload": vars(SIZES[size]),
        "gemm_gflops": spread([x / 1e9 for x in peaks]),
        "contestants": found,
        "ratios": ratios,
    }


def effort(turn: dict[str, float], threads: int) -> float:
    """Seconds that a step keeps the device busy."""
    return turn["step"] if torch.cuda.is_available() else turn["processor"] / threads


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    middle = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{x:.4g}") for name, x in middle.items()}


def in_a_process_of_its_own(name: str, size: str, threads: int) -> Tree:
    """What :func:`alone` says."""
    words = ["--alone", "--only", name, "--size", size, "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.throughput", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said: Tree = json.loads(done.stdout.splitlines()[-1])
    return said


def alone(name: str, size: str) -> Tree:
    """Resident memory in MiB: after the imports, and at most during two steps; what a GPU allocated at most."""
    if name in OURS:
        import rlkl.loop  # noqa: F401
    else:
        import trl

        getattr(trl, name)
    imports = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        SIZES[size].model(Path(folder) / "model")
        build(name, SIZES[size], Path(folder)).turn()
    said = {"imports": imports / 2**20, "peak": peak_memory() / 2**20}
    if torch.cuda.is_available():
        said["cuda"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(x) for name, x in said.items()}


def peak_memory() -> int:
    """The most that this process ever held, in bytes. (What ``getrusage`` says may be its parent's.)"""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found.group(1)) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def hardware() -> Tree:
    """What it ran on, without a name of the machine."""
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpus.read_text(encoding="utf-8"), re.M) if cpus.exists() else None
    found = {"cpu": model.group(1) if model else platform.machine(), "cores": os.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def hardware_name(threads: int) -> str:
    """The file name of this hardware's baseline."""
    found = hardware()
    words = f"gpu-{found['gpu']}" if "gpu" in found else f"cpu-{found['cores']}core-{found['cpu']}-{threads}thread"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-")


HEAD = ("", *STAGES, "min–max", "processor", "GFLOP", "of peak", "memory")


def rows(result: Tree) -> list[list[str]]:
    """A line a contestant: milliseconds by stage, work, share of the peak, MiB over those of the imports."""
    lines = []
    for name, found in result["contestants"].items():
        times = [f"{1000 * found['stages'][s]:.0f}" if s in found["stages"] else "" for s in STAGES[:-1]]
        step, memory = found["step"], found["memory_mib"]
        held = memory.get("cuda", memory["peak"] - memory["imports"])
        lines.append(
            [
                name,
                *times,
                f"{1000 * step['median']:.0f}",
                f"{1000 * step['min']:.0f}–{1000 * step['max']:.0f}",
                f"{1000 * found['processor']['median']:.0f}",
                f"{found['gflop']:.0f}",
                f"{100 * found['share_of_peak']['median']:.0f} %",
                f"{held} MiB",
            ]
        )
    return lines


def ratio_lines(result: Tree) -> list[str]:
    """The ratios, and what they were measured with."""
    peak = result["gemm_gflops"]
    return [
        *(f"{n}: {r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" for n, r in result["ratios"].items()),
        f"GEMM peak: {peak['median']:.0f} GFLOP/s ({peak['min']:.0f}–{peak['max']:.0f}); {result['rounds']} rounds, "
        f"{result['threads']} thread(s) of {result['hardware']['cores']} cores, load {result['load'][0]} at the start "
        f"and {result['load'][1]} at the end",
    ]


def table(result: Tree) -> Table:
    """For the terminal."""
    shown = Table(title=f"a step in milliseconds (medians), size {result['size']}")
    for name in HEAD:
        shown.add_column(name, justify="right" if name else "left")
    for line in rows(result):
        shown.add_row(*line)
    return shown


def markdown(result: Tree) -> str:
    """For docs/performance.md."""
    lines = [HEAD, ("---", *("---:" for _ in HEAD[1:])), *rows(result)]
    return "\n".join(
        [*("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {x}" for x in ratio_lines(result))]
    )


if __name__ == "__main__":
    main()
