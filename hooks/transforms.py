"""Transforms: Python functions, registered by name, that a mapping may use beside its templates.

A transform is called with the request's `payload` (any JSON value), `headers` (by lower-case name,
without credentials), `query` and `path`. It returns the fields that it sets, of `FIELDS`, or None
for a request that is to do nothing (204). What it does not set, the mapping's templates do.

    @register("deploys")
    def deploys(payload, headers, query, path):
        \"\"\"One line for each deploy.\"\"\"
        return {"text": f"deployed {payload['version']}"}

The first line of its docstring is what the admin shows. A module with transforms is imported at
the start if the setting HOOK_TRANSFORMS names it. An error in a transform answers 500; the
traceback is in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

FIELDS: Final = frozenset({"text", "mode", "session_key"})

Transform: TypeAlias = Callable[
    [Any, Mapping[str, str], Mapping[str, str], str], Mapping[str, Any] | None
]

_registered: dict[str, Transform] = {}


def register(name: str) -> Callable[[Transform], Transform]:
    """Register the decorated function under `name`. Raises ValueError for a name that is taken."""

    def add(transform: Transform) -> Transform:
        if name in _registered:
            raise ValueError(f'a transform "{name}" is registered already')
        _registered[name] = transform
        return transform

    return add


def names() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_registered))


def find(name: str) -> Transform | None:
    """Return the transform registered under `name`, or None."""
    return _registered.get(name)


def summary(name: str) -> str:
    """Return what a transform does, in one line; empty when it does not say."""
    lines = (getattr(_registered.get(name), "__doc__", None) or "").strip().splitlines()
    return lines[0] if lines else ""
