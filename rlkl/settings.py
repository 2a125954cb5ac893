"""YAML files and ``a.b=value`` overrides to a validated :class:`rlkl.config.Config`. Torch-free."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from rlkl.config import Config, dump

Checked = TypeVar("Checked", bound=BaseModel)


def load(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file, a mapping or a ``Config``, with ``key.sub=value`` overrides.

    Raises:
        ValueError: one line a mistake, each with the key, what is wrong and what to write instead.
    """
    if isinstance(source, Config):
        source = source.model_dump(mode="json", by_alias=True)
    tree = read(source)
    if "arms" in tree:
        where = f"{source}: " if isinstance(source, (str, Path)) else ""
        raise ValueError(f"{where}arms: this is a comparison of several runs, not a run; use rlkl compare")
    for override in overrides:
        put(tree, *parse(override))
    return check(resolve(tree), Config)


def read(source: str | Path | Mapping[str, Any]) -> DictConfig:
    """A mapping, or what a YAML file holds, as a tree that overrides can be put into.

    Raises:
        ValueError: neither, or there is no such file, or it holds something else.
    """
    if isinstance(source, Mapping):
        return OmegaConf.create(dict(source))
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{source!r}: a configuration is the path of a YAML file or a mapping of sections")
    path = Path(source)
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such configuration file; see configs/ for examples")
        tree = OmegaConf.load(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); see configs/ for examples") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path}: holds a {type(tree).__name__}; a configuration is a mapping of sections")
    return tree


def parse(override: str) -> tuple[str, Any]:
    """Key and value of ``key.sub=value``; the value is read as YAML.

    Raises:
        ValueError: it does not read so.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override}: an override reads key.sub=value, for example kl.beta=0.1")
    try:
        return key, OmegaConf.from_dotlist([f"value={text}"]).value
    except (YAMLError, OmegaConfBaseException):
        return key, text


def put(tree: DictConfig, key: str, value: Any) -> None:
    """Set ``key.sub`` in a tree; a changed ``type`` drops the other keys of its section, which belonged to the old one.

    Raises:
        ValueError: the key leads through something that is no section.
    """
    parent, _, leaf = key.rpartition(".")
    try:
        old = OmegaConf.select(tree, key)
        if leaf == "type" and old is not None and old != value:
            OmegaConf.update(tree, parent, {}, merge=False)
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}") from None


def resolve(tree: DictConfig) -> Any:
    """A tree as plain data, its interpolations resolved.

    Raises:
        ValueError: an interpolation leads nowhere.
    """
    try:
        return OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def check(data: Any, model: type[Checked]) -> Checked:
    """Plain data as the given model.

    Raises:
        ValueError: one line a mistake.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        said: dict[str, list[str]] = {}  # a value that fits no kind of its union fails once for every kind
        for key, what in (_explain(one, model) for one in error.errors()):
            said.setdefault(key, []).append(what)
        raise ValueError("\n".join(key + ", or ".join(whats) for key, whats in said.items())) from None


def _explain(error: Any, root: type[BaseModel]) -> tuple[str, str]:
    """One pydantic error as ``key: `` or ``key=value: ``, and what is wrong and to be done."""
    where, models = _locate(error["loc"], root)
    key = ".".join(where) or "configuration"
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = [f.alias or n for n, f in models[0].model_fields.items()]
        close = difflib.get_close_matches(where[-1], known, n=1)
        prefix = "".join(f"{part}." for part in where[:-1])
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
        return f"{key}: ", f"unknown key, {hint}"
    if kind == "missing":
        return f"{key}: ", "missing; this key has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = ", ".join(repr(_tag(model)) for model in models)
        return f"{key}.type: ", f"{given.get('type') or 'missing'}; give one of {tags}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if kind != "value_error" else message
    if kind == "value_error":
        return "" if key == "configuration" else f"{key}: ", message
    return f"{key}={given!r}: ", message


def _locate(loc: tuple[Any, ...], root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The key path as written in YAML (without union tags) and the models that may hold its last part."""
    where: list[str] = []
    model: Any = root
    for part in loc:
        tagged = [m for m in _members(model) if _tag(m) == part]
        if tagged and not _is_single(model):
            model = tagged[0]
            continue
        if get_origin(model) in (Union, UnionType) and not _members(model):
            continue  # the name of a plain type in a union such as float | str
        where.append(str(part))
        holder = model if isinstance(model, type) and issubclass(model, BaseModel) else None
        if holder is not None:
            field = next((f for n, f in holder.model_fields.items() if part in (n, f.alias)), None)
            if field is None:
                break
            model = field.annotation
        else:
            inner = [a for a in get_args(model) if a is not type(None)]
            model = inner[-1] if inner else model
        if len(_members(model)) == 1:
            model = _members(model)[0]
    return where, _members(model) or [root]


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation such as ``A | B`` or ``Annotated[A | B, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if str(annotation).startswith("dict["):
        return []
    return [m for arg in get_args(annotation) for m in _members(arg)]


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("type")
    return get_args(field.annotation)[0] if field and get_args(field.annotation) else None


def _is_single(annotation: Any) -> bool:
    return isinstance(annotation, type)


OUTPUT = ("name", "folder", "log", "save")
"""Sections and keys that change no result of a run."""


def finished(folder: Path) -> bool:
    """Whether a folder holds a finished run: its final model, the card of which is written last."""
    return (folder / "final" / "README.md").is_file() and (folder / "config.yaml").is_file()


def decisive(config: Config) -> dict[str, Any]:
    """What decides a run's results: its resolved keys, dotted, without those of its output."""
    leaves = flat({key: value for key, value in dump(config).items() if key not in OUTPUT})
    idle = {f"rewards.{name}.{key}" for name, s in config.rewards.items() for key in getattr(s, "logistics", ())}
    return {key: value for key, value in leaves if key not in {"train.shard", *idle}}  # where parameters lie


def differences(folder: Path, config: Config) -> list[str]:
    """How the run in a folder differs from one of this configuration, in what decides its results."""
    try:
        there = load(folder / "config.yaml")
    except ValueError as error:
        return [f"its config.yaml is not read by this version ({str(error).splitlines()[0]})"]
    old, new = decisive(there), decisive(config)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {show(old.get(key))}, now {show(new.get(key))}" for key in changed]


def show(value: Any) -> str:
    """A value as in YAML, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
