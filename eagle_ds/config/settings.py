"""Reading a settings file into a pydantic tree: JSON without surprises, dotted overrides, errors that name the way out.

Knows nothing of recipes: every function is given the tree's class.
"""

from __future__ import annotations

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


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ValueError if it cannot be read, is no object, or names a key twice."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        beside = ", ".join(sorted(other.name for other in Path(path).parent.glob("*.json"))) if error.errno == errno.ENOENT else ""
        raise ValueError(f"cannot read {path}: {error.strerror}{f'; in that folder are {beside}' if beside else ''}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a JSON {type(tree).__name__}; a JSON object is expected")
    return tree


def dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below ``model`` as (dotted name, field), sections before what is in them."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_of(field)
        if section is not None:
            yield from dotted_fields(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a nested section, None for a plain value."""
    for kind in _alternatives(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def parse_overrides(model: type[BaseModel], tokens: Sequence[str]) -> dict[str, Any]:
    """``--a.b 3 --c=x`` as {"a.b": 3, "c": "x"}; values are JSON where that is possible.

    Raises ValueError for a name that ``model`` does not have, a missing value, or a stray word.
    """
    fields, values, rest = dict(dotted_fields(model)), {}, list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, raw = token.removeprefix("--").partition("=")
        if not token.startswith("--") and not equals:
            raise ValueError(f"cannot read the argument {token!r}; overrides look like --training.max_steps 10")
        if name not in fields:
            raise ValueError(f"{name} is not a setting{_hint(name, fields)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value, as in --{name} VALUE")
            raw = rest.pop(0)
        values[name] = _parse_value(raw, fields[name])
    return values


def apply_overrides(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` with each dotted name set; sections that are absent or null are created."""
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
    """Pydantic's complaints as one sentence each: dotted name, what is wrong, the nearest valid name or value."""
    fields = dict(dotted_fields(model))
    return "; ".join(_explain_one(problem, fields) for problem in error.errors())


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Names with the same last part (a setting looked for in the wrong section), else the most similar one."""
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return same_leaf[:3] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def join_or(words: Sequence[object]) -> str:
    """"1, 2 or 4"."""
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
    return f" ({description})" if description else ""


def _hint(name: str, fields: dict[str, FieldInfo]) -> str:
    like = nearest(name, list(fields))
    return f"; did you mean {join_or(like)}?" if like else "; --help lists all settings"


def _parse_value(raw: str, field: FieldInfo) -> Any:
    """JSON, except that a setting which takes text keeps its text: revision 1e5 is no number."""
    takes_text = any(kind is str or typing.get_origin(kind) is typing.Literal for kind in _alternatives(field.annotation))
    if takes_text and raw != "null" and not raw.startswith('"'):
        return raw
    try:
        return json.loads(raw)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(raw, raw)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the key {join_or(twice)} appears more than once")
    return dict(pairs)
