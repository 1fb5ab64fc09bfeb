"""Mappings: which one answers a request, and the wakes it makes of it. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from hooks.configuration import MappingConfiguration
from hooks.credentials import Credential
from hooks.errors import MappingError, TransformFailed
from hooks.models import HookMapping
from hooks.policy import KeyOrigin
from hooks.template import HookRequest, Template
from hooks.transforms import FIELDS
from wake.dispatch import Mode, Turn, WakeRequest

MAX_ITEMS: Final = 200

OTHER_PATH: Final = "another path"
OTHER_SOURCE: Final = "another source"
CLOSED: Final = "the credential does not open it"

logger = logging.getLogger(__name__)


class Written(msgspec.Struct, frozen=True):
    """What a mapping writes for one item: `session_key` is None where it has none."""

    text: str
    session_key: str | None
    origin: KeyOrigin
    mode: Mode


def on_path(mappings: Iterable[MappingConfiguration], path: str) -> list[MappingConfiguration]:
    """Return the mappings that may answer at `path`, in their order; outer slashes do not count."""
    wanted = path.strip("/")
    return [mapping for mapping in mappings if mapping.path in ("", wanted)]


def why_not(
    mapping: MappingConfiguration, path: str, payload: Any, credential: Credential
) -> str | None:
    """Return why a mapping does not answer a request, or None when it does.

    A mapping with a source answers only where the payload's string `source` equals it.
    """
    if not on_path([mapping], path):
        return OTHER_PATH
    if mapping.source:
        source = payload.get("source") if isinstance(payload, dict) else None
        if mapping.source != source:
            return OTHER_SOURCE
    return None if credential.opens(mapping) else CLOSED


def items(mapping: MappingConfiguration, request: HookRequest) -> list[HookRequest]:
    """Return the request once for each item of the array that the mapping names, else as it is.

    In each the array holds that item alone, as the reference gateway does it. Raises MappingError:
    no such array, or more than 200 items.
    """
    if not mapping.for_each:
        return [request]
    payload = request.payload
    array = payload.get(mapping.for_each) if isinstance(payload, dict) else None
    if not isinstance(array, list):
        raise MappingError(
            f'hook mapping "{mapping.name}" expects an array in the payload\'s "{mapping.for_each}"'
        )
    if len(array) > MAX_ITEMS:
        raise MappingError(
            f'hook mapping "{mapping.name}" takes at most {MAX_ITEMS} items in '
            f'"{mapping.for_each}", not {len(array)}; nothing was stored'
        )
    return [replace(request, payload={**payload, mapping.for_each: [item]}) for item in array]


def transformed(mapping: MappingConfiguration, request: HookRequest) -> Mapping[str, Any] | None:
    """Return the fields that the mapping's transform sets; None when it wants nothing done.

    Raises TransformFailed for whatever goes wrong in it; the traceback is logged.
    """
    if mapping.transform is None:
        return {}
    try:
        fields = mapping.transform(request.payload, request.headers, request.query, request.path)
        if fields is None:
            return None
        return _checked(dict(fields))
    except Exception as error:
        logger.exception("hooks: the transform of mapping %s failed", mapping.name)
        raise TransformFailed("the transform of this hook failed") from error


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    if unknown := fields.keys() - FIELDS:
        raise ValueError(f"a transform sets {sorted(FIELDS)}, not {sorted(unknown)}")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    if "mode" in fields:
        Mode(fields["mode"])
    return fields


def write(
    mapping: MappingConfiguration, request: HookRequest, fields: Mapping[str, Any]
) -> Written:
    """Return the text and the session key for one item; what a transform set goes first.

    Raises MappingError, never anything else: a stored template that is malformed, a text that is
    empty, a session key that is not filled in whole.
    """
    if mapping.fault:
        raise MappingError(f'hook mapping "{mapping.name}" is broken: {mapping.fault}')
    try:
        text = fields["text"] if "text" in fields else mapping.text.render(request)
        if "session_key" in fields:
            key, origin = fields["session_key"].strip(), KeyOrigin.TRANSFORM
            if not key:  # as of a template: never the main session by accident
                raise MappingError(
                    f'hook mapping "{mapping.name}" requires a value for its session key: its '
                    "transform left it empty"
                )
        else:
            key, origin = _session_key(mapping, request)
    except RecursionError as error:
        raise MappingError(
            f'hook mapping "{mapping.name}" cannot write a value nested so deep'
        ) from error
    if not text.strip():
        raise MappingError("hook mapping requires text")
    return Written(text, key or None, origin, Mode(fields.get("mode", mapping.mode)))


def _session_key(mapping: MappingConfiguration, request: HookRequest) -> tuple[str, KeyOrigin]:
    """Return the mapping's session key, empty when it has none, and where it comes from.

    Whatever is missing in a template is refused: requests that have nothing else in common would
    share the session that is left over, such as `hook:gh:` of `hook:gh:{{payload.id}}`.
    """
    template: Template = mapping.session_key
    written = template.render(request).strip()
    if not template.expressions:
        return written, KeyOrigin.FIXED
    for expression in template.expressions:
        if not expression.render(request).strip():
            raise MappingError(
                f'hook mapping "{mapping.name}" requires a value for its session key: '
                f"{{{{{expression.written}}}}} is empty"
            )
    if not all(map(str.strip, written.split(":"))):
        raise MappingError(
            f'hook mapping "{mapping.name}" has a session key with an empty segment: '
            f"{written[:120]!a}"
        )
    return written, KeyOrigin.TEMPLATE


def make_wake(mapping: MappingConfiguration, written: Written) -> WakeRequest:
    """Return the wake that a mapping asks for with what it wrote."""
    turn = None
    if mapping.action == HookMapping.Action.AGENT:
        turn = Turn(mapping.name, mapping.deliver, mapping.timeout_seconds)
    return WakeRequest(
        text=written.text,
        source=f"hook:{mapping.name}",
        mode=written.mode,
        session_key=written.session_key,
        agent_id=mapping.agent_id,
        external=True,
        turn=turn,
    )
