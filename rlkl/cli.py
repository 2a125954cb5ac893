"""The commands. Torch is imported by the command that needs it, so ``rlkl --help`` is quick."""

import sys
import traceback
from typing import Annotated, Any

import typer

from rlkl import RunError, Stopped
from rlkl.data.commands import app as data

# click's ClickException: typer may carry a click of its own, whose exceptions the installed click does not know.
CommandLineError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decide how to fine-tune a language model from feedback, and trust the comparison.",
)
app.add_typer(data, name="data")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, see configs/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run of this name")] = False,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint of the run of this name")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the resolved configuration and the arithmetic")] = False,
    debug: Annotated[bool, typer.Option(help="print the traceback of an error")] = False,
) -> None:
    """Train a model as a configuration says."""
    if resume and overwrite:
        raise ValueError("--resume with --overwrite: one keeps the run of this name, the other replaces it; give one")
    if dry_run:
        from rlkl.settings import load
        from rlkl.summary import describe

        print(describe(load(config, overrides or [])))
        return
    from rlkl.faults import late
    from rlkl.launch import close, fail
    from rlkl.start import train as run

    try:
        run(config, overrides or [], overwrite=overwrite, resume=resume)
        close()
    except Stopped as stopped:
        close(stopped.code)
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(2 if isinstance(error, ValueError) else 1)
        raise late(error) from error.__cause__


@app.command()
def compare(
    config: Annotated[str, typer.Argument(help="a YAML file with base, arms and seeds, see docs/compare.md")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="do all its runs anew, finished ones too")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the runs and what differs between them")] = False,
) -> None:
    """Train every arm with every seed, and set them side by side; what is finished is kept."""
    from rlkl.grid.compare import compare as run

    run(config, overrides or [], overwrite=overwrite, dry_run=dry_run)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="folders of comparisons, of runs, or of both")],
    output: Annotated[str, typer.Option("--output", "-o", help="the page, replaced if it is there")] = "report.html",
    gold: Annotated[str | None, typer.Option(help="the reward that counts, of those under rewards:")] = None,
) -> None:
    """Put comparisons and runs on one page that needs no network: answers, figures, samples, settings."""
    from rlkl.report.build import report as build

    print(build(runs, output, gold))


@app.command("reward-model")
def reward_model(
    config: Annotated[str, typer.Argument(help="a YAML file, see configs/reward_model/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the reward model in the output folder")] = False,
) -> None:
    """Train a reward model from preferences or marked spans, and measure it on held-out records."""
    from rich.console import Console

    from rlkl.reward_model import build

    Console(highlight=False, emoji=False).print(build.table(build.train(config, overrides or [], overwrite=overwrite)))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="the folder of a finished run")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt of yours (what a user says, in a chat); may be repeated")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many held-out prompts, where you give none")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="completions a prompt")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
) -> None:
    """Print completions of a trained model."""
    from rlkl.runs import sample_run

    for row in sample_run(run, prompt or [], prompts, samples, seed):
        print(row)


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="the folder of a finished run")],
    prompts: Annotated[int | None, typer.Option(min=1, help="held-out prompts, at most")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="completions a prompt")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="randomness of the samples")] = None,
) -> None:
    """Evaluate a trained model against its reference on the run's held-out prompts."""
    from rlkl.runs import evaluate_run

    for name, value in sorted(evaluate_run(run, prompts, samples, seed).items()):
        print(f"{name:<32} {value:.6g}")


@app.command()
def search(
    config: Annotated[str, typer.Argument(help="the YAML file of a run, see configs/counterfactual.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many held-out prompts; of fewer all")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="completions a prompt, n of best-of-n")] = 64,
    best: Annotated[int, typer.Option(min=1, help="how many of them, by the run's rewards")] = 3,
    output: Annotated[str | None, typer.Option("--output", "-o", help="a new .jsonl file for the rows")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the output file")] = False,
) -> None:
    """Sample the untrained model of a run and print the best completions by the run's rewards."""
    from pathlib import Path

    from rich.console import Console

    from rlkl import search as room
    from rlkl.data.files import jsonl, write

    if output and Path(output).exists() and not overwrite:  # before the samples are made
        raise ValueError(f"{output}: exists; name another file, or pass --overwrite")
    rows = room.search(config, overrides or [], prompts=prompts, samples=samples, best=best)
    if output:
        write(Path(output), jsonl(rows), overwrite)
    Console(highlight=False, emoji=False).print(room.table(rows))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="the folder of a finished run")],
    folder: Annotated[str, typer.Option("--output", "-o", help="a new folder")],
    merge: Annotated[bool, typer.Option(help="merge the LoRA adapter into its base")] = False,
) -> None:
    """Copy the final model elsewhere, as from_pretrained reads it."""
    from rlkl.runs import export_run

    export_run(run, folder, merge)


@app.command()
def dashboard(
    runs: Annotated[list[str] | None, typer.Argument(help="folders of runs; the first names the project")] = None,
    rebuild: Annotated[bool, typer.Option(help="fill the dashboards of these runs anew from their files")] = False,
    with_: Annotated[list[str] | None, typer.Option("--with", help="rebuild this one instead of log.with")] = None,
) -> None:
    """Open trackio's page on this machine, or rebuild dashboards from metrics.jsonl and samples.jsonl."""
    from rlkl import dashboards
    from rlkl.config import LogConfig
    from rlkl.runs import read_config

    if (rebuild or with_) and not (rebuild and runs):
        raise ValueError("rlkl dashboard: --rebuild needs the folders of runs, and --with needs --rebuild")
    if rebuild:
        for run in runs or []:
            print("\n".join(dashboards.rebuild(run, with_ or ())))
        return
    dashboards.show(read_config(runs[0]).log.project if runs else LogConfig().project)


@app.command()
def doctor() -> None:
    """Say what this installation can do, and what is missing."""
    from rlkl.doctor import report

    lines, healthy = report()
    print("\n".join(lines))
    if not healthy:
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> int:
    """Every way of starting rlkl goes through here.

    Returns:
        0; 1 where a run could not go on; 2 for a mistake in what the user wrote; 130 after Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        result = app(given or ["--help"], prog_name="rlkl", standalone_mode=False)
    except CommandLineError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "rlkl"
        return _say(f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help", 2)
    except Stopped as stopped:
        return stopped.code if stopped.said else _say(str(stopped), stopped.code)
    except (typer.Abort, KeyboardInterrupt):
        result = 130
    except ValueError as error:
        return _say(str(error), 2)
    except RunError as error:
        return 1 if error.said else _say(str(error), 1)
    if result == 130:  # typer's answer to Ctrl-C too
        return _say("interrupted", 130)
    return result if isinstance(result, int) else 0


def _say(message: str, code: int) -> int:
    """Mistakes in a configuration are a line each; whatever ended a run is one line."""
    for text in message.splitlines() if code == 2 else [" ".join(message.split())]:
        print(f"rlkl: {text}", file=sys.stderr)
    return code
