"""Checking configs and rows of run sheets by the schemas of `workflow/schemas`. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache

import yaml

from dag.stages.artefacts import PACKAGE

# In a checkout they lie with the workflow, in an installed package with the package.
SCHEMAS = next(folder for folder in (PACKAGE.parent / "workflow" / "schemas", PACKAGE / "schemas") if folder.is_dir())


class StudyError(ValueError):
    """A config or run sheet that cannot be run: one line that names file, key or row, what was found and what is allowed."""


@cache
def _schema(name: str):
    import jsonschema

    schema = yaml.safe_load((SCHEMAS / name).read_text())
    return jsonschema.Draft202012Validator(schema)


def validate(value: dict, schema: str, where: str) -> None:
    """Raises StudyError at the first fault of a value. where: the file, and the row, that it came from."""
    from jsonschema.exceptions import best_match

    error = best_match(_schema(schema).iter_errors(value))
    if error is not None:
        raise StudyError(f"{where}: {_dotted(error.absolute_path)}: {_told(error)}")
    for key, number in _numbers(value):
        if not math.isfinite(number):  # no limit of a schema refuses NaN
            raise StudyError(f"{where}: {_dotted(key)}: {number} is not a finite number")


def _told(error) -> str:
    """What jsonschema found, and, where that names no expectation, the schema's own words of it."""
    if error.validator == "anyOf" and "description" in error.schema:
        return f"{error.instance!r} is none of what is allowed here. {error.schema['description']}"
    if error.validator == "additionalProperties" and error.validator_value is False:
        return f"{error.message}; allowed: {', '.join(sorted(error.schema['properties']))}"
    return error.message


def _dotted(key: Iterable) -> str:
    return ".".join(map(str, key)) or "top level"


def _numbers(value, key: tuple = ()) -> Iterator[tuple[tuple, float]]:
    """(key, number) of every float in a value, however deep."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(part, (*key, name))
