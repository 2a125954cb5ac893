"""Texts with {placeholders} that configurations lay out. Torch-free."""

from collections.abc import Iterator
from string import Formatter


def parts(key: str, template: str) -> Iterator[tuple[str, str | None]]:
    """The template's texts, each with the placeholder behind it, None behind the last.

    Raises:
        ValueError: a brace is not closed, or a placeholder is no plain name; ``key`` is what the template is called.
    """
    try:
        found = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{key}={template!r}: {error}; a brace that is text is written twice") from None
    for text, name, spec, conversion in found:
        if name is not None and (not name.strip() or spec or conversion):
            raise ValueError(f"{key}={template!r}: {{{name}}} is no plain name; write {{completion}} or {{column}}")
        yield text, name


def fields(key: str, template: str) -> list[str]:
    """The placeholders of a template, in order.

    Raises:
        ValueError: as ``parts``, or there is text after the last placeholder.
    """
    found = list(parts(key, template))
    names = [name for _, name in found if name is not None]
    if found and found[-1][1] is None and names:
        raise ValueError(f"{key}={template!r}: ends in text; what is scored is the text of the last placeholder")
    return names


def context(key: str, template: str) -> list[tuple[str, str | None]]:
    """A template without its last placeholder: texts, each with the placeholder behind it."""
    found = list(parts(key, template))
    return [*found[:-1], (found[-1][0], None)]
