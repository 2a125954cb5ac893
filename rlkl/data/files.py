"""JSON lines in, whole files out."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def text(path: Path, remedy: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: there is no such file (``remedy`` says which one is meant), or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {remedy}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None


def lines(path: Path, remedy: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each with its place, ``path:line``; blank lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(text(path, remedy).split("\n"), 1):  # U+2028 and the like may stand in JSON strings
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}") from None


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: str, overwrite: bool = False) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: it exists and must not be replaced, or its folder does not.
    """
    if path.exists() and (path.is_dir() or not overwrite):
        raise ValueError(f"{path}: exists; name another file{'' if path.is_dir() else ', or pass --overwrite'}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)  # a temporary file is private, the result need not be
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
