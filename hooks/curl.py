"""Command lines that send a hook, for people to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from hooks.configuration import MappingConfiguration, frozen
from hooks.models import HookToken

_EXAMPLE: Final = "example"
# An example with more than so many items in an array is of no use to anybody.
_MOST_ITEMS: Final = 10


def line(
    url: str, body: str | None, *, token: str = "", headers: Mapping[str, str] | None = None
) -> str:
    """Return a command line that posts `body`, or with None what is in the file payload.json.

    Without a token it shows the one in the variable TOKEN.
    """
    authorization = (
        shlex.quote(f"Authorization: Bearer {token}") if token else '"Authorization: Bearer $TOKEN"'
    )
    parts = [
        f"curl {shlex.quote(url)}",
        f"-H {authorization}",
        "-H 'Content-Type: application/json'",
    ]
    for name, value in (headers or {}).items():
        # curl takes a name with a colon and nothing after it for a header to leave out.
        parts.append(f"-H {shlex.quote(f'{name}: {value}' if value else f'{name};')}")
    # Not -d, for which a body that starts with @ names a file.
    data = "--data-binary @payload.json" if body is None else f"--data-raw {shlex.quote(body)}"
    parts.append(data)
    return " \\\n  ".join(parts)


def for_token(row: HookToken, token: str, address: str) -> str:
    """Return a command line that tries a token, or what is missing for one.

    `address` is that of the hooks, for example http://127.0.0.1:8000/hooks. A token that is limited
    is tried at one of its mappings.
    """
    if not row.limited:
        return line(f"{address}/wake", json.dumps({"text": "Hello from outside"}), token=token)
    mapping = row.mappings.order_by("-enabled", "position", "pk").first()
    if mapping is None:
        return "It opens nothing yet: it is limited to mappings, and none is chosen."
    settings = frozen(mapping)
    path = quote(settings.path or _EXAMPLE)
    body = json.dumps(example_payload(settings), ensure_ascii=False)
    return line(f"{address}/{path}", body, token=token)


def example_payload(mapping: MappingConfiguration) -> dict[str, Any]:
    """Return a payload with a value for everything that the mapping's templates read of it."""
    payload: dict[str, Any] = {"source": mapping.source} if mapping.source else {}
    for expression in (*mapping.text.expressions, *mapping.session_key.expressions):
        if expression.head == "payload" and expression.steps and _is_short(expression.steps):
            payload = _with_example(payload, expression.steps)
    if mapping.for_each:
        payload.setdefault(mapping.for_each, [{}])
    return payload or {"text": "Hello from outside"}


def _is_short(steps: Sequence[str | int]) -> bool:
    return all(isinstance(step, str) or step < _MOST_ITEMS for step in steps)


def _with_example(value: Any, steps: Sequence[str | int]) -> Any:
    """Return `value` with something at the end of `steps`; what is there already stays."""
    if not steps:
        return _EXAMPLE if value is None else value
    step, rest = steps[0], steps[1:]
    if isinstance(step, str):
        fields = value if isinstance(value, dict) else {}
        return {**fields, step: _with_example(fields.get(step), rest)}
    items = list(value) if isinstance(value, list) else []
    items += [None] * (step + 1 - len(items))
    items[step] = _with_example(items[step], rest)
    return items
