"""JSON lines in, whole files out."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

NESTED = 100  # levels of a value; Python's own limit depends on where it is reached
DIGITS = 1000  # of a whole number; Python reads 4300, in quadratic time
CORRECT = "correct this record, or leave it out"


def text(path: Path, remedy: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: there is no such file (``remedy`` says which one is meant), or it cannot be read, or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {remedy}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None


def lines(path: Path, remedy: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each with its place, ``path:line``; blank lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(text(path, remedy).split("\n"), 1):  # U+2028 and the like may stand in JSON strings
        if line.strip():
            yield (where := f"{path}:{number}"), parse(where, line)


def parse(where: str, content: str, remedy: str = CORRECT) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a number too long to be read (in which field).
    """
    long: list[str] = []

    def whole(digits: str) -> Any:
        if len(digits) <= DIGITS:
            return int(digits)
        long.append(digits)
        return ...

    try:
        found = json.loads(content, parse_int=whole)
        if content.count("[") + content.count("{") > NESTED:
            _check_depth(found)
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}" if "\n" in content.strip() else ""
        raise ValueError(f"{where}: not valid JSON{place}: {error.msg}; {remedy}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested more than {NESTED} levels deep; {remedy}") from None
    if long:
        said = f"a number of {len(long[0])} digits, at most {DIGITS} are read; {remedy}"
        raise ValueError(": ".join([where, *_place(found), said]))
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(NESTED + 1):
        held = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for one in held for inner in one]
    if level:
        raise RecursionError


def _place(value: Any) -> list[str]:
    """Where ``...`` stands in a value: of a list of records the number from 1, and the path of its field."""
    found = _path(value) or []
    names = [f"record {int(found.pop(0)[1:-1]) + 1}"] if isinstance(value, list) and found else []
    return [*names, "".join(found).removeprefix(".")] if found else names


def _path(value: Any) -> list[str] | None:
    """The steps to the first ``...`` in a value."""
    if value is ...:
        return []
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in steps:
        if (rest := _path(held)) is not None:
            return [f".{key}" if isinstance(value, dict) else f"[{key}]", *rest]
    return None


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: str, overwrite: bool = False) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: it exists and must not be replaced, or its folder does not, or it cannot be written.
    """
    try:
        if path.exists() and (path.is_dir() or not overwrite):
            raise ValueError(f"{path}: exists; name another file{'' if path.is_dir() else ', or pass --overwrite'}")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
        with whole(path) as part:
            part.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another file") from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``, whose place it takes once it is written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
