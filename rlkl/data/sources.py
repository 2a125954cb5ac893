"""Records with a prompt each, from JSONL files and from ``datasets``."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlkl.config.data import AnnotatedData, DatasetsData, JsonlData, PairsData, TableData
from rlkl.data import annotated, files, preferences

Record = dict[str, Any]
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}
TAKEN = ("prompts", "completions")  # arguments of the reward functions


def read(config: JsonlData | DatasetsData | AnnotatedData | PairsData, held_out: str | None = None) -> list[Record]:
    """The records, each with its text under ``prompt``, or else its conversation under ``messages``.

    Those of annotated data are as they stand in their file, with completion and spans; pairs have both sides.

    Args:
        held_out: the file or split to read in place of the configured one.

    Raises:
        ValueError: the source cannot be read or is empty, or a record lacks its prompt.
    """
    if isinstance(config, AnnotatedData):
        return list(_annotated(config, Path(held_out or config.path)))
    if isinstance(config, JsonlData):
        path, key = Path(held_out or config.path), "held_out" if held_out else "path"
        rows = files.lines(path, f"data.{key} names a .jsonl file, one JSON object a line")
        return _checked(rows, config, str(path))
    if isinstance(config, PairsData) and config.path.endswith(".jsonl"):
        if config.split != type(config).model_fields["split"].default:
            raise ValueError(
                f"data.split={config.split} with data.path={config.path}: a .jsonl file is read whole; drop it"
            )
        path, key = Path(held_out or config.path), "held_out" if held_out else "path"
        return preferences.checked(files.lines(path, f"data.{key} names a .jsonl file, one pair a line"), str(path))
    split = held_out or config.split
    if isinstance(config, PairsData):
        table = DatasetsData(type="datasets", path=config.path, split=split)
        return preferences.checked(_table(table, split), f"{config.path}[{split}]")
    return _checked(_table(config, split), config, f"{config.path}[{split}]")


def _annotated(config: AnnotatedData, path: Path) -> Iterator[Record]:
    for record in annotated.read(path):
        row = annotated.row(record)
        if config.prompt is not None:
            if (text := _text(row.get(config.prompt))) is None:
                known = ", ".join(row)
                raise ValueError(
                    f"{path}: record {record.id!r}: no text in column {config.prompt!r} (columns: {known}); "
                    "name another in data.prompt"
                )
            row = {key: value for key, value in row.items() if key != "messages"} | {"prompt": text}
        yield row


def _table(config: DatasetsData, split: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from huggingface_hub.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        rows = _load(config, split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        said = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"data.path={config.path}, split {split}: cannot be read ({said[0]}); give a local file or folder, "
            "or a Hub name while online"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{config.path}[{split}] record {number}", row


def _load(config: DatasetsData, split: str) -> Any:
    import datasets

    path = Path(config.path)
    if (path / "state.json").is_file():
        if split != "train":
            raise ValueError("a saved Dataset has no splits and takes no slice; save a DatasetDict, or use a share")
        return datasets.load_from_disk(config.path)
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(config.path)
        if split not in saved:
            raise ValueError(
                f"no such split in this saved DatasetDict, which takes no slice; splits: {', '.join(saved)}"
            )
        return saved[split]
    if path.is_file() and path.suffix not in FORMATS:
        raise ValueError(f"a {path.suffix or 'nameless'} file; known: {', '.join(FORMATS)}")
    if path.is_file():
        return datasets.load_dataset(FORMATS[path.suffix], data_files=config.path, split=split)
    return datasets.load_dataset(config.path, config.name, data_files=config.data_files, split=split)


def _checked(rows: Iterable[tuple[str, Any]], config: TableData, source: str) -> list[Record]:
    """The checks that all sources share; ``rows`` come with where they stand."""
    role, column = config.column
    found: list[Record] = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}; every line must be a JSON object")
        if taken := [name for name in TAKEN if name in row]:
            raise ValueError(f"{where}: column {taken[0]!r} is an argument of the reward functions; rename it")
        value = conversation(row.get(column)) if role == "messages" else _text(row.get(column))
        if value is None:
            what = "list of {role, content} messages" if role == "messages" else "text"
            known = ", ".join(row) or "none"
            raise ValueError(
                f"{where}: no {what} in column {column!r} (columns: {known}); map it with data.columns.{role}"
            )
        others = {name: held for name, held in row.items() if name != "prompt"}
        found.append({**others, role: value})
    if not found:
        raise ValueError(f"{source}: empty; it needs at least one record")
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def conversation(value: Any) -> list[dict[str, str]] | None:
    """Messages without the null fields that a table adds to them."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    messages = [{k: v for k, v in message.items() if v is not None} for message in value]
    texts = [message.get(key) for message in messages for key in ("role", "content")]
    return messages if all(isinstance(text, str) for text in texts) else None
