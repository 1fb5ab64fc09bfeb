"""Mappings: which one answers a request, and the wake it makes of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hooks.configuration import MappingConfiguration
from hooks.errors import MappingError
from hooks.template import HookRequest
from wake.dispatch import WakeRequest


def on_path(mappings: Iterable[MappingConfiguration], path: str) -> list[MappingConfiguration]:
    """Return the mappings that may answer at `path`, in their order; outer slashes do not count."""
    wanted = path.strip("/")
    return [mapping for mapping in mappings if mapping.path in ("", wanted)]


def match(
    mappings: Iterable[MappingConfiguration], path: str, payload: Any
) -> MappingConfiguration | None:
    """Return the first mapping that answers this request, or None.

    A mapping with a source answers only where the payload's string `source` equals it.
    """
    source = payload.get("source") if isinstance(payload, dict) else None
    for mapping in on_path(mappings, path):
        if not mapping.source or mapping.source == source:
            return mapping
    return None


def make_wake(mapping: MappingConfiguration, request: HookRequest) -> WakeRequest:
    """Return the wake that a mapping makes of a request.

    Raises MappingError, never anything else: a stored template that is malformed, a text that
    renders empty, a session key that is not filled in whole.
    """
    if mapping.fault:
        raise MappingError(f'hook mapping "{mapping.name}" is broken: {mapping.fault}')
    try:
        text = mapping.text.render(request)
        session_key = _session_key(mapping, request)
    except RecursionError as error:
        raise MappingError(
            f'hook mapping "{mapping.name}" cannot write a value nested so deep'
        ) from error
    if not text.strip():
        raise MappingError("hook mapping requires text")
    return WakeRequest(
        text=text,
        source=f"hook:{mapping.name}",
        mode=mapping.mode,
        session_key=session_key,
        agent_id=mapping.agent_id,
        external=True,
    )


def _session_key(mapping: MappingConfiguration, request: HookRequest) -> str | None:
    """Return the mapping's session key, or None when it has none.

    Whatever is missing in a template is refused: requests that have nothing else in common would
    share the session that is left over, such as `hook:gh:` of `hook:gh:{{payload.id}}`.
    """
    written = mapping.session_key.render(request).strip()
    for expression in mapping.session_key.expressions:
        if not expression.render(request).strip():
            raise MappingError(
                f'hook mapping "{mapping.name}" requires a value for its session key: '
                f"{{{{{expression.written}}}}} is empty"
            )
    if mapping.session_key.expressions and not all(map(str.strip, written.split(":"))):
        raise MappingError(
            f'hook mapping "{mapping.name}" has a session key with an empty segment: '
            f"{written[:120]!a}"
        )
    return written or None
