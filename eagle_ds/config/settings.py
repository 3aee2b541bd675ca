"""Read a settings file for a tree of pydantic models: strict JSON, dotted overrides, errors with advice.

Nothing here is specific to recipes: every function takes the class of the tree's root.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def read_json(path: str | Path, usual_folder: str | Path | None = None) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Args:
        usual_folder: where such files are kept. If ``path`` does not exist, the error lists the JSON files of
            this folder; without it, those of the folder that ``path`` names.

    Raises ValueError if it cannot be read, is no object, or names a key twice.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        others = sorted(Path(usual_folder or Path(path).parent).glob("*.json"))
        hint = ""
        if error.errno == errno.ENOENT and others:
            listed = ", ".join(other.name for other in others)
            hint = f"; use {join_or(others)}" if usual_folder else f"; in that folder are {listed}"
        raise ValueError(f"cannot read {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a JSON {type(tree).__name__}; a JSON object is expected")
    return tree


def json_object(text: str | None, setting: str) -> dict[str, Any]:
    """Return the JSON object that the option ``setting`` gives, none if it is absent. Raises ValueError."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        value = f"no JSON ({error})"
    if not isinstance(value, dict):
        example = """'{"enable_thinking": false}'"""
        raise ValueError(f"{setting} {text}: expected a JSON object such as {example}, found {value}")
    return value


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these options of a tool was given and is below 1."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")


def dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of ``model`` as (dotted name, field). A section comes before the settings in it."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if (section := section_of(field)) is not None:
            yield from dotted_fields(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a nested section; None for a plain value."""
    kinds = (kind for kind in _alternatives(field.annotation) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def choices_of(field: FieldInfo) -> list[str]:
    """Return the values of a setting that takes one of a few words; empty for other settings."""
    literals = (kind for kind in _alternatives(field.annotation) if typing.get_origin(kind) is typing.Literal)
    return [value for kind in literals for value in typing.get_args(kind)]


def parse_overrides(model: type[BaseModel], tokens: Sequence[str]) -> dict[str, Any]:
    """Parse ``--a.b 3 --c=x`` into {"a.b": 3, "c": "x"}. Values are read as JSON if possible, else as text.

    Raises ValueError for a name that ``model`` does not have, a missing value, or a word without a name.
    """
    fields, values, rest = dict(dotted_fields(model)), {}, list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, raw = token.removeprefix("--").partition("=")
        if not token.startswith("--") and not equals:
            example = "overrides look like --training.max_steps 10"
            raise ValueError(f"cannot read the argument {token!r}; {example}")
        if name not in fields:
            raise ValueError(f"{name} is not a setting{_hint(name, fields)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value, as in --{name} VALUE")
            raw = rest.pop(0)
        values[name] = _parse_value(raw, fields[name])
    return values


def apply_overrides(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``tree`` with each dotted name set. Sections that are absent or null are created."""
    tree = json.loads(json.dumps(tree))
    for dotted, value in values.items():
        *path, leaf = dotted.split(".")
        section = tree
        for name in path:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[leaf] = value
    return tree


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Turn each of pydantic's errors into one sentence: dotted name, what is wrong, and how to fix it."""
    fields = dict(dotted_fields(model))
    return "; ".join(_explain_one(problem, fields) for problem in error.errors())


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return names with the same last part (settings of other sections), else the most similar name."""
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return same_leaf[:3] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def join_or(words: Sequence[object]) -> str:
    """Join words as in "1, 2 or 4"."""
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _explain_one(problem: Any, fields: dict[str, FieldInfo]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a setting{_hint(name, fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing{_meaning(name, fields)}"
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        return f"{name}: {reason}" if name else reason
    reason = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name} = {json.dumps(problem['input'], default=str)}: {reason}{_meaning(name, fields)}"


def _meaning(name: str, fields: dict[str, FieldInfo]) -> str:
    description = fields[name].description if name in fields else None
    return f" ({description.rstrip('.')})" if description else ""


def _hint(name: str, fields: dict[str, FieldInfo]) -> str:
    like = nearest(name, list(fields))
    return f"; did you mean {join_or(like)}?" if like else "; --help lists all settings"


def _parse_value(raw: str, field: FieldInfo) -> Any:
    """Read a value as JSON, except for a setting that takes text: the revision 1e5 is not a number."""
    kinds = _alternatives(field.annotation)
    takes_text = any(kind is str or typing.get_origin(kind) is typing.Literal for kind in kinds)
    if takes_text and raw != "null" and not raw.startswith('"'):
        return raw
    try:
        return json.loads(raw)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(raw, raw)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the key {join_or(twice)} appears more than once")
    return dict(pairs)
