# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses as JSON and back, for facts that travel through the store."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: Any) -> str:
    """A dataclass as JSON."""
    return json.dumps(dataclasses.asdict(value))


def decode(schema: type[T], text: str | bytes) -> T:
    """What `encode` made of a `schema`. Raises ValueError, KeyError or TypeError for anything else."""
    return typing.cast(T, _build(schema, json.loads(text)))


def _build(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(
            **{f.name: _build(hints[f.name], value[f.name]) for f in dataclasses.fields(hint)}
        )
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):  # of something and None
        return None if value is None else _build(arguments[0], value)
    if typing.get_origin(hint) is tuple:  # of one type, any number
        return tuple(_build(arguments[0], item) for item in value)
    return value
