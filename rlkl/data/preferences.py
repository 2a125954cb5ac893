"""Records of preference pairs, with `prompt`, `chosen` and `rejected` as TRL has them."""

from collections.abc import Iterable, Mapping
from typing import Any

from rlkl.data.annotated import KINDS, kind, refuse

SIDES = ("chosen", "rejected")
Record = dict[str, Any]


def checked(rows: Iterable[tuple[str, Any]], source: str) -> list[Record]:
    """Records that come with their places: text under ``prompt``, or a conversation under ``messages``, and both sides.

    Raises:
        ValueError: there are none; a field is missing, empty or of another kind than the prompt; both sides are equal.
    """
    found = [_record(where, row) for where, row in rows]
    if not found:
        raise ValueError(f"{source}: empty; it needs at least one pair")
    return found


def _record(where: str, row: Any) -> Record:
    if not isinstance(row, Mapping):
        refuse(where, "", f"{kind(row)}; every record must be an object")
    for name in ("prompts", "completions", "messages"):
        if name in row:
            refuse(where, name, "this name has another meaning here; rename the column")
    prompt = row.get("prompt")
    if prompt is None:
        refuse(
            where,
            "prompt",
            f"missing (there are: {', '.join(row) or 'no fields'}); move what both sides begin with there",
        )
    values = {name: _side(where, name, row.get(name), prompt) for name in ("prompt", *SIDES)}
    if values["chosen"] == values["rejected"]:
        refuse(where, "rejected", "equal to chosen, which prefers nothing; leave the record out")
    others = {name: held for name, held in row.items() if name not in values}
    key = "prompt" if isinstance(prompt, str) else "messages"
    return {**others, key: values["prompt"], **{side: values[side] for side in SIDES}}


def _side(where: str, name: str, value: Any, prompt: Any) -> Any:
    """A text where the prompt is one, else a conversation, without the null fields that a table adds to messages."""
    if isinstance(prompt, str):
        if not isinstance(value, str) or not value:
            said = "empty" if value == "" else "missing" if value is None else kind(value)
            refuse(where, name, f"{said}; it must be {KINDS[str]}, as the prompt is, and not empty")
        return value
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        said = "missing" if value is None else "empty" if value == [] else kind(value)
        refuse(where, name, f"{said}; it must be text, or a list of {{role, content}} messages, in all three columns")
    messages = [{key: held for key, held in message.items() if held is not None} for message in value]
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                refuse(f"{where}: {name}[{i}]", key, f"{kind(message.get(key))}; it must be {KINDS[str]}")
    return messages
