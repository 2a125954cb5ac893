"""Functions that a configuration names: found, and checked before anything starts. Torch-free."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlkl.config import Config
from rlkl.config.base import FUNCTION

KEYS = ("path", "labeller", "auditor", "outcome")
"""Keys of a source that name a function."""
Asked = tuple[str, str, tuple[str, ...]]
"""What :func:`resolve` is given."""


def resolve(path: str, key: str, *arguments: str) -> Callable[..., Any]:
    """The function named ``module:function`` under a key; modules of the working directory are found too.

    ``arguments`` are those that it will be given, by position.

    Raises:
        ValueError: there is no such module or function, the module itself raises, or the function takes others.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{key}={path}: cannot be imported ({said}); give module:function, importable from here"
        ) from error
    if not callable(function):
        raise ValueError(f"{key}={path}: module {module_name} has no function {name}; name one that it has")
    if arguments:
        _takes(function, f"{key}={path}", arguments)
    return function  # type: ignore[no-any-return]


def _takes(function: Callable[..., Any], named: str, arguments: Sequence[str]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        asked, these = ", ".join(arguments), "both" if len(arguments) > 1 else "that"
        raise ValueError(f"{named}: is called with ({asked}) and takes {signature}; let it take {these}") from None


def function(name: str, source: Any, key: str) -> Callable[..., Any] | None:
    """What :func:`resolve` finds under a key of the source ``name``; None where it names nothing.

    Raises:
        ValueError: as above.
    """
    path = getattr(source, key)
    return None if path is None else resolve(path, f"rewards.{name}.{key}", *_given(source, key))


def _given(source: Any, key: str) -> tuple[str, ...]:
    """The arguments of a function; none where they are not checked, as those of a score, which may be columns."""
    if key == "labeller":
        return ("completion_a", "completion_b") if getattr(source, "level", "") == "sequence" else ("completion",)
    return () if key == "path" else ("x", "x_prime")


def named(config: Config) -> Iterator[Asked]:
    """The functions of a run, as its rewards resolve them."""
    for name, source in config.rewards.items():
        for key in KEYS:
            path = getattr(source, key, None) if (source.type, key) != ("learned", "path") else None  # a folder
            if path is not None and re.fullmatch(FUNCTION, path):
                yield path, f"rewards.{name}.{key}", _given(source, key)


def mistakes(asked: Sequence[Asked]) -> list[str | None]:
    """What :func:`resolve` says of each, None where it finds a function; in a process of its own, which writes nothing.

    A module of a user may take memory or a GPU when it is imported, and one that this process imported before may have
    been changed since.

    Raises:
        ValueError: one of the modules ends the process that imports it.
    """
    if not asked:
        return []
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [sys.executable, "-m", "rlkl.importing", str(answer), json.dumps(asked)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
        )
        if answer.is_file():
            return list(json.loads(answer.read_text(encoding="utf-8")))
    named = ", ".join(dict.fromkeys(path for path, _, _ in asked))
    raise ValueError(f"importing {named} ended Python (exit code {done.returncode}); let these modules be importable")


def _mistake(path: str, key: str, arguments: Sequence[str]) -> str | None:
    try:
        resolve(path, key, *arguments)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    found = [_mistake(*one) for one in json.loads(sys.argv[2])]
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
