"""Every key of the configuration as a page: ``python -m rlkl.reference > docs/config.md``. Torch-free."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlkl.config import GRADIENT, REFUSED, Config
from rlkl.config.compare import CompareConfig
from rlkl.config.reward_model import FitConfig, RewardModelConfig

HEAD = """# Configuration

<!-- written by: python -m rlkl.reference > docs/config.md -->

A run is a YAML file of the sections below; `rlkl train CONFIG kl.beta=0.1 model.lora.rank=8` overrides single keys, and
`--dry-run` prints what results. Sections that have a `type` come in several kinds: changing the `type` on the command
line drops the other keys of that section. An unknown key or an impossible value is refused before anything is written.
"""
COLUMNS = ("key", "type", "default", "meaning")
SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def page() -> str:
    """The whole page."""
    top = [(name, field) for name, field in Config.model_fields.items() if not _sections(field.annotation)]
    nested = [(name, field) for name, field in Config.model_fields.items() if _sections(field.annotation)]
    return "\n".join(
        [
            HEAD,
            *_table("", top),
            *(text for name, field in nested for text in _section(name, field)),
            *_comparison(),
            *_reward_model(),
            *_kl(),
        ]
    )


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    """A heading, a table of the keys that kinds of the section share, and one for what each has of its own."""
    kinds = _sections(field.annotation)
    named = str(field.annotation).startswith("dict[")
    prefix = f"{name}.<name>" if named else name
    yield f"## `{name}`\n"
    if named:
        yield f"A mapping: {_meaning(field)}.\n"
    if len(kinds) > 1:
        yield f"One of {', '.join(f'`{_tag(kind)}`' for kind in kinds)}.\n"
    sharing = [kind for kind in kinds if len(kind.model_fields) > 1]
    shared = [n for n in sharing[0].model_fields if _is_shared(n, sharing)] if len(sharing) > 1 else []
    if shared:
        yield f"### {', '.join(f'`{_tag(kind)}`' for kind in sharing)}\n"
        yield from _table(prefix, [(n, sharing[0].model_fields[n]) for n in shared])
    for kind in kinds:
        if _tag(kind) is not None:
            yield f"### `{prefix}.type: {_tag(kind)}`\n"
        yield f"{_doc(kind)}\n"
        yield from _table(prefix, [(n, f) for n, f in kind.model_fields.items() if n not in shared])


def _is_shared(name: str, kinds: list[type[BaseModel]]) -> bool:
    return name != "type" and len({repr(kind.model_fields.get(name)) for kind in kinds}) == 1


def _table(prefix: str, fields: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    rows = list(_rows(prefix, fields))
    if not rows:
        return
    yield _row(COLUMNS)
    yield _row(["---"] * len(COLUMNS))
    yield from map(_row, rows)
    yield ""


def _rows(prefix: str, fields: list[tuple[str, FieldInfo]]) -> Iterator[list[str]]:
    """A row a key; the keys of a section within a section follow it."""
    for name, field in fields:
        if name == "type":
            continue
        key = f"{prefix}.{field.alias or name}".lstrip(".")
        inner = _sections(field.annotation)
        limits = [*_limits(field.metadata), *_inner_limits(field.annotation)]
        kind = "section" if inner else _kind(field.annotation)
        yield [f"`{key}`", ", ".join([kind, *limits]), _default(field), _meaning(field)]
        for section in inner:
            yield from _rows(key, list(section.model_fields.items()))


def _kind(annotation: Any) -> str:
    """A type for a reader: choices are listed, None is null."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _kind(args[0])
    if origin is Literal:
        return " \\| ".join(f"`{choice}`" for choice in args)
    if origin in (Union, types.UnionType):
        return " \\| ".join(_kind(arg) for arg in args)
    if origin is list:
        return f"list of {_kind(args[0])}"
    if origin is tuple:
        return f"{len(args)} x {_kind(args[0])}"
    if origin is dict:
        return f"mapping {_kind(args[0])} → {_kind(args[1])}"
    if annotation is Any:
        return "anything"
    return {int: "integer", float: "number", str: "text", bool: "`true` \\| `false`"}[annotation]


def _limits(metadata: list[Any]) -> Iterator[str]:
    for item in metadata:
        parts = (item.gt, item.ge, item.lt, item.le) if isinstance(item, Interval) else ()
        for one in [*(p for p in parts if p is not None), item]:
            if type(one) in SIGNS:
                attribute, sign = SIGNS[type(one)]
                yield f"{sign} {getattr(one, attribute)}"
        if isinstance(item, MinLen):
            yield "not empty"
        if isinstance(item, MultipleOf):
            yield f"a multiple of {item.multiple_of}"
        if getattr(item, "pattern", None):
            yield f"matches `{item.pattern}`".replace("|", "\\|")


def _inner_limits(annotation: Any) -> Iterator[str]:
    """Constraints of the number in ``Positive | None`` and the like."""
    for arg in get_args(annotation):
        for item in getattr(arg, "__metadata__", ()):
            yield from _limits([*getattr(item, "metadata", ()), item])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""  # its keys follow
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}`"
    return f"`{value}`".replace("\n", "\\n")


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def _doc(kind: type[BaseModel]) -> str:
    return " ".join((kind.__doc__ or "").split()).replace("``", "`")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in get_args(annotation) for section in _sections(arg)]


def _tag(kind: type[BaseModel]) -> str | None:
    field = kind.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field else None


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _comparison() -> Iterator[str]:
    """The keys of another kind of file."""
    yield "## A comparison\n"
    yield "`rlkl compare CONFIG` reads a file of these keys ([compare.md](compare.md)); overrides apply to them.\n"
    yield from _table("", list(CompareConfig.model_fields.items()))


def _reward_model() -> Iterator[str]:
    """The keys of a third kind of file."""
    yield "## A reward model\n"
    yield "`rlkl reward-model CONFIG` reads a file of these keys; `model` is a run's, without reference and critic.\n"
    fields = RewardModelConfig.model_fields
    yield from _table("", [(name, fields[name]) for name in ("output", "kind", "seed")])
    yield from _table("train", list(FitConfig.model_fields.items()))
    yield from (text.replace("## ", "### ") for text in _section("data", fields["data"]))


def _kl() -> Iterator[str]:
    """What the choices of ``kl`` mean."""
    yield "## The gradient of each KL penalty\n"
    yield "Its expectation on the policy's own samples, checked by enumeration (`tests/test_kl_oracle.py`).\n"
    yield _row(("`kl.placement`", "`kl.estimator`", "expected gradient"))
    yield _row(["---"] * 3)
    for (placement, estimator), rule in {**GRADIENT, **{k: f"refused: {why}" for k, why in REFUSED.items()}}.items():
        yield _row((placement, estimator, rule.replace("||", "\\|\\|").replace("pi0", "π0").replace("pi", "π")))


if __name__ == "__main__":
    print(page())
