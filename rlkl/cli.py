"""The commands. Torch is imported by the command that needs it, so ``rlkl --help`` is quick."""

import sys
import traceback
from typing import Annotated

import click
import typer

from rlkl import RunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decide how to fine-tune a language model from feedback, and trust the comparison.",
)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, see configs/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run of this name")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the resolved configuration and the arithmetic")] = False,
    debug: Annotated[bool, typer.Option(help="print the traceback of an error")] = False,
) -> None:
    """Train a model as a configuration says."""
    if dry_run:
        from rlkl.settings import load
        from rlkl.summary import describe

        print(describe(load(config, overrides or [])))
        return
    from rlkl.loop import train as run

    try:
        run(config, overrides or [], overwrite=overwrite)
    except Exception:
        if debug:
            traceback.print_exc()
        raise


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="the folder of a finished run")],
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt of yours; may be repeated")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many held-out prompts, where you give none")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="completions a prompt")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
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
    seed: Annotated[int | None, typer.Option(min=0, help="randomness of the samples")] = None,
) -> None:
    """Evaluate a trained model against its reference on the run's held-out prompts."""
    from rlkl.runs import evaluate_run

    for name, value in sorted(evaluate_run(run, prompts, samples, seed).items()):
        print(f"{name:<32} {value:.6g}")


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
    try:
        result = app(argv, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("rlkl: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        return _say(error, 2)
    except RunError as error:
        return _say(error, 1)
    return result if isinstance(result, int) else 0


def _say(error: Exception, code: int) -> int:
    for text in str(error).splitlines():
        print(f"rlkl: {text}", file=sys.stderr)
    return code
