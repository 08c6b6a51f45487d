"""Configs from YAML and key=value, and back; every mistake is one clear line (host)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sif_jax.errors import InputError

Kind = TypeVar("Kind", bound=BaseModel)


class FieldRow(NamedTuple):
    key: str
    type: str
    default: str | None  # as YAML; None: required
    description: str


def load_config(kind: type[Kind], path: str | Path | None = None, overrides: Iterable[str] = ()) -> Kind:
    """Read a YAML file, lay `a.b=value` overrides over it, validate.

    An override's value is YAML, except that text fields take it as it is.

    Raises:
      InputError: an unreadable file, an unknown or missing key, a wrong value or an impossible combination.
    """
    values = {} if path is None else _read_yaml(Path(path))
    overridden = [_override(kind, values, override) for override in overrides]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _input_error(kind, error, path, overridden) from None


def dump_config(config: BaseModel, path: str | Path) -> None:
    """Write the whole config, defaults included, as YAML; a kill leaves the old file or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(config_text(config))
    os.replace(partial, path)


def config_text(config: BaseModel) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat_config(config: BaseModel) -> dict[str, Any]:
    """Leaf values by dotted key; a section that is null is a leaf."""
    return dict(_leaves(config.model_dump(mode="json")))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def describe(kind: type[BaseModel], prefix: str = "") -> Iterator[FieldRow]:
    """Every leaf key of a config, in order."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.description:
            yield FieldRow(prefix + name, _type_name(field.annotation), _default(field), field.description or "")
        if section is not None:
            yield from describe(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    choices = get_args(annotation) or (annotation,)
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(arguments)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        return f"[{_type_name(arguments[0])}, ...]"
    if annotation is NoneType:
        return "null"
    return "section" if _section(annotation) else annotation.__name__


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()


def _names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from _names(section, f"{prefix}{name}.")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's last duplicate key wins silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"cannot read this config ({error.strerror})", file=path, fix="check the path") from None
    except UnicodeDecodeError:
        raise InputError("not a text file", file=path, expected="YAML in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{line}{error.problem}", file=path, expected="YAML", fix="correct that line") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError("not a mapping", file=path, value=values, expected="lines of key: value")
    return values


def _override(kind: type[BaseModel], values: dict[str, Any], override: str) -> str:
    """Set one `a.b=value` in `values`; returns the key."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError("not an override", file="command line", value=override, expected="key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise InputError(f"{section} is not a section", file="command line", value=override)
    values[leaf] = _override_value(kind, key, text)
    return key


def _override_value(kind: type[BaseModel], key: str, text: str) -> Any:
    types = {row.key: row.type for row in describe(kind)}
    if key in types and types[key] in ("str", "str | null"):
        return None if text == "null" and types[key] == "str | null" else text
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError:
        raise InputError(f"{key} is not YAML", file="command line", value=text, fix="quote the value") from None


def _input_error(
    kind: type[BaseModel], error: ValidationError, path: str | Path | None, overridden: list[str]
) -> InputError:
    """The first problem as one line; unknown keys first, as they explain missing ones."""
    problem = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    here = any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden)
    file = "command line" if here or path is None else path
    match problem:
        case {"type": "extra_forbidden"}:
            return InputError(f"unknown key {key}", file=file, value=problem["input"], fix=_nearest(kind, key))
        case {"type": "missing"}:
            required = (row.key for row in describe(kind) if row.default is None)
            key = next((name for name in required if name == key or name.startswith(f"{key}.")), key)
            return InputError(
                f"{key} is missing", file=path, fix=f"add it to the config, or give {key}=… as an argument"
            )
        case {"type": "value_error", "ctx": {"error": reason}}:
            return InputError(f"{key}: {reason}" if key else str(reason), file=file)
        case {"type": "model_type" | "model_attributes_type"}:
            expected = "a section of key: value lines"
        case _:
            expected = problem["msg"].removeprefix("Input should be ")
    return InputError(f"wrong value of {key}", file=file, value=problem["input"], expected=expected)


def _nearest(kind: type[BaseModel], key: str) -> str:
    """The closest key of the same section, else of any section."""
    names = list(_names(kind))
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(names)}
    for candidates in (siblings, anywhere):
        near = difflib.get_close_matches(leaf, candidates, n=1)
        if near:
            return f"did you mean {candidates[near[0]]}?"
    return f"remove it; the keys here are {', '.join(siblings)}"
