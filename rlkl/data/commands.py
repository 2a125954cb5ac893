"""The commands ``rlkl data import|export|check``. What they need is imported when they run."""

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Annotated completions: import, export, check.")


class Format(StrEnum):
    """What can be imported."""

    QA_FEEDBACK = "qa-feedback"
    LABEL_STUDIO = "label-studio"
    DOCCANO = "doccano"
    RAGTRUTH = "ragtruth"


class Tool(StrEnum):
    """What can be exported to."""

    LABEL_STUDIO = "label-studio"
    DOCCANO = "doccano"


class Offsets(StrEnum):
    """What offsets in a foreign file count."""

    CODEPOINT = "codepoint"
    UTF16 = "utf16"


Output = Annotated[Path, typer.Option("--output", "-o", help="a new file")]
Overwrite = Annotated[bool, typer.Option(help="replace the output file")]
Counted = Annotated[Offsets, typer.Option(help="what offsets count; utf16 where JavaScript made or will read them")]


@app.command("import")
def import_(
    format: Format,
    path: Annotated[Path, typer.Argument(metavar="IN", help="the published or exported file")],
    output: Output,
    offsets: Counted = Offsets.CODEPOINT,
    source: Annotated[Path | None, typer.Option(help="RAGTruth's source_info.jsonl, where it is not beside IN")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn annotations from elsewhere into a JSONL file of annotated completions."""
    from rlkl.data import annotated, files, importers

    records, notes = importers.load(format.value, path, offsets.value, source)
    files.write(output, annotated.text(records), overwrite)
    print("\n".join([f"{output}: {_counted(records)}", *(f"note: {note}" for note in notes)]))


@app.command()
def export(
    format: Tool,
    path: Annotated[Path, typer.Argument(metavar="IN", help="a .jsonl file of annotated completions")],
    output: Output,
    offsets: Counted = Offsets.CODEPOINT,
    overwrite: Overwrite = False,
) -> None:
    """Write annotated completions for a labelling tool, with their spans to start from."""
    from rlkl.data import annotated, files, labelling

    records = annotated.read(path)
    files.write(output, labelling.WRITERS[format.value](records, offsets.value), overwrite)
    print(f"{output}: {_counted(records)}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="IN", help="a .jsonl file of annotated completions")],
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer's folder: count tokens and dropped spans")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="label=weight, once a label: check that all have one; needs --tokenizer")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="completions to show")] = 3,
) -> None:
    """Check a file of annotated completions, count its spans and show some of them."""
    from rich.console import Console

    from rlkl.data import annotated
    from rlkl.data import check as checks

    records = annotated.read(path)
    if weights and tokenizer is None:
        raise ValueError("--weights: weights are counted on tokens; name a tokenizer with --tokenizer")
    given = dict(map(_weight, weights)) if weights else None
    lines = list(checks.statistics(records, None if tokenizer is None else _tokenizer(tokenizer), given))
    print("\n".join(lines))
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    for text in checks.samples(records, samples, console.is_terminal):
        console.print(text)


def _counted(records: list[Any]) -> str:
    return f"{len(records)} completions, {sum(len(record.spans) for record in records)} spans"


def _weight(given: str) -> tuple[str, float]:
    label, _, number = given.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not label or not math.isfinite(weight):
        raise ValueError(f"--weights {given}: must read label=weight, for example wrong=-1")
    return label, weight


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not os.path.isdir(folder):
        raise ValueError(f"--tokenizer {folder}: no such folder; name one of a tokenizer, or of a model with its own")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
