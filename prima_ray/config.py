"""Configs: YAML and ``--set`` in, a validated frozen pydantic model out, with errors that a person can act on.

Precedence: defaults, YAML, ``--set``. Input paths in the YAML are relative to the YAML; input paths given by
``--set`` are relative to the working directory, as every path that is typed into a shell.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from prima_ray.base import InputPath, PrimaError, StrictConfig, is_uri

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (PyYAML's 1.1 reads ``1e-4`` as a string and ``NO`` as false); a repeated key is a mistake."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """Parse YAML text.

    Raises:
        PrimaError: the text is not YAML, or names a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise PrimaError(f"not valid YAML{line}: {getattr(error, 'problem', error)}", where=where) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        PrimaError: no such file, not text, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PrimaError("no such config file", where=path) from None
    except IsADirectoryError:
        raise PrimaError("is a folder, not a config file", where=path) from None
    except UnicodeDecodeError:
        raise PrimaError("is not UTF-8 text", where=path) from None
    loaded = parse_yaml(text, where=path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise PrimaError(f"holds a {type(loaded).__name__}, not keys and values", where=path)
    return loaded


def load_config(cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path``, apply ``key=value`` overrides and validate.

    Args:
        cls: the config class of the stage.
        path: a YAML file; None: defaults alone.
        overrides: ``a.b=value`` strings; values are YAML. Another ``kind`` of a section comes first, and the file's
            keys of the section that this kind does not have are left out.

    Raises:
        PrimaError: with the file or the override, the key, what is wrong and the nearest right key.
    """
    raw = {} if path is None else read_yaml(path)
    assigned: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise PrimaError(f"--set {override}: expected key=value", mend="Example: --set optimizer.lr=1e-4")
        assigned[key] = parse_yaml(value, where=f"--set {key}")
    for key in sorted(assigned, key=lambda key: not key.endswith(".kind")):
        _assign(cls, raw, key.split("."), assigned[key])
    where, base_dir = ("--set", Path.cwd()) if path is None else (path, Path(path).resolve().parent)
    return _validate(cls, raw, where=where, base_dir=base_dir, overrides=tuple(assigned))


def validate_config(cls: type[ConfigT], raw: Any, *, where: str | Path, base_dir: str | Path | None = None) -> ConfigT:
    """Validate plain data as ``cls``; pydantic's report becomes a `PrimaError` of one line."""
    return _validate(cls, raw, where=where, base_dir=base_dir, overrides=())


def _validate(
    cls: type[ConfigT], raw: Any, *, where: str | Path, base_dir: str | Path | None, overrides: Sequence[str]
) -> ConfigT:
    try:
        return cls.model_validate(raw, context={"base_dir": str(base_dir) if base_dir else None})
    except ValidationError as error:
        mistakes = [_explain(cls, item) for item in error.errors()]
    typed = [key for key in overrides if any(_is_at_or_below(wrong, key) for wrong, _ in mistakes)]
    if all(any(_is_at_or_below(wrong, key) for key in typed) for wrong, _ in mistakes):
        where = "--set"
    raise PrimaError("; ".join(text for _, text in mistakes), where=where)


def _is_at_or_below(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")


def dump_config(config: StrictConfig) -> str:
    """The resolved config as YAML: what `prima config` prints and a run directory keeps."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _assign(cls: type[BaseModel], raw: dict[str, Any], keys: list[str], value: Any) -> None:
    value = _typed_paths(cls, keys, value)
    node = raw
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise PrimaError(f"--set {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, it has no keys")
        node = child
    if keys[-1] == "kind":
        _leave_out_other_kinds(cls, node, keys[:-1], value)
    node[keys[-1]] = value


def _typed_paths(cls: type[BaseModel], keys: Sequence[str], value: Any) -> Any:
    """The value with what is a path in it made absolute: what is typed is relative to the working directory."""
    if isinstance(value, dict):
        return {key: _typed_paths(cls, [*keys, str(key)], inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed_paths(cls, keys, inner) for inner in value]
    if _is_input_path(cls, keys) and isinstance(value, str) and not is_uri(value) and not value.startswith("${"):
        return os.path.abspath(value)
    return value


def _leave_out_other_kinds(cls: type[BaseModel], section: dict[str, Any], keys: Sequence[str], kind: Any) -> None:
    """Keys of a section that only another kind of it knows go; misspelt ones stay, to be named."""
    kinds = {tag: model for model in _models_at(cls, keys) if (tag := _tag_of(model)) is not None}
    if kind in kinds:
        for name in [name for name in section if any(name in model.model_fields for model in kinds.values())]:
            if name not in kinds[kind].model_fields:
                del section[name]


def _models_at(cls: type[BaseModel], keys: Sequence[str]) -> list[type[BaseModel]]:
    """The models that the section named by ``keys`` may be of."""
    models: list[type[BaseModel]] = [cls]
    for key in keys:
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        models = [model for field in fields for model in _models_in(field.annotation)]
    return models


def _is_input_path(cls: type[BaseModel], keys: Sequence[str]) -> bool:
    marker = typing.get_args(InputPath)[1]
    fields = [model.model_fields.get(keys[-1]) for model in _models_at(cls, keys[:-1])]
    return any(marker in _metadata(field) for field in fields if field)


def input_paths(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of everything that a resolved config reads: its values of type `InputPath`, in sections and lists too
    (`literature.sources.0.path`).
    """
    marker = typing.get_args(InputPath)[1]
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        several = isinstance(value, list | tuple)
        for number, item in enumerate(value if several else [value]):
            where = f"{key}.{number}" if several else key
            if isinstance(item, BaseModel):
                yield from input_paths(item, f"{where}.")
            elif isinstance(item, str) and marker in _metadata(field):
                yield where, item


def _metadata(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for argument in typing.get_args(field.annotation):
        found.extend(getattr(argument, "__metadata__", ()))
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def _explain(cls: type[BaseModel], item: Any) -> tuple[str, str]:
    """The key as the user wrote it, and what is wrong with it."""
    location = [str(part) for part in item["loc"]]
    # A tagged union puts the tag into the location (`engine.deepspeed.zero`); the user never wrote it.
    written, models = _written_path(cls, location, ends_in_key=item["type"] == "extra_forbidden")
    key = ".".join(written)
    if item["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(written[-1], known, n=1, cutoff=0.5)
        hint = f", did you mean {'.'.join([*written[:-1], near[0]])!r}?" if near else f"; known: {', '.join(known)}"
        return key, f"unknown key {key!r}{hint}"
    if item["type"] == "missing":
        return key, f"missing key {key!r}"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tag = ".".join([*written, item["ctx"]["discriminator"].strip("'")])
        kinds = " or ".join(map(repr, _tags(models, location[-1])))
        if item["type"] == "union_tag_not_found":
            return tag, f"missing key {tag!r}: give {kinds}"
        return tag, f"{tag}: expected {kinds} (got {item['ctx']['tag']!r})"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if item["type"] == "value_error":
        return key, f"{key}: {message}" if key else message
    return key, f"{key}: {message[0].lower()}{message[1:]} (got {_short(item['input'])})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written_path(
    cls: type[BaseModel], location: Sequence[str], *, ends_in_key: bool
) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys as the user wrote them, and the models that the last key was looked up in.

    Args:
        ends_in_key: False where the last part may be a tag, because the mistake is one of the whole section.
    """
    written: list[str] = []
    models: list[type[BaseModel]] = [cls]
    for index, part in enumerate(location):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tagged = [model for model in models if _tag_of(model) == part]
        if not fields and tagged and (index < len(location) - 1 or not ends_in_key):
            models = tagged
            continue
        written.append(part)
        if index < len(location) - 1:
            inner = [model for field in fields for model in _models_in(field.annotation)]
            models = inner or models if fields else models
    return written, models


def _tags(models: Sequence[type[BaseModel]], last: str) -> list[str]:
    """The kinds that a section may be of, which is the value of the key ``last`` or an item of a list or mapping."""
    fields = [model.model_fields[last] for model in models if last in model.model_fields]
    sections = [model for field in fields for model in _models_in(field.annotation)] if fields else models
    return sorted({tag for model in sections if (tag := _tag_of(model)) is not None})


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = typing.get_args(field.annotation) if field else ()
    return str(arguments[0]) if arguments else None


def differing_keys(found: Any, wanted: Any, *, ignored: frozenset[str] = frozenset()) -> str:
    """The keys in which two resolved configs differ, for a message: the first five; empty where they are alike.

    Args:
        ignored: keys (`context`, `writer.calls`) that may differ, and all below them.
    """
    keys = [key for key in _differing(found, wanted) if not _is_below(key, ignored)]
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


def _differing(found: Any, wanted: Any, prefix: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        return [
            item
            for key in keys
            for item in _differing(found.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if found == wanted else [prefix]


def _is_below(key: str, above: frozenset[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:depth]) in above for depth in range(1, len(parts) + 1))
