"""The description of the HTTP door, as OpenAPI 3.1: for tools, and as a page for people.

Hooks have one address for all paths and a base path that is a setting, so the paths are written
here by hand and put in at the extension points of drf-spectacular. The description is public:
nothing in it comes from mappings, tokens or agents.
"""

from __future__ import annotations

from typing import Any, Final

from csp.constants import NONE, SELF, UNSAFE_INLINE
from csp.decorators import csp_replace
from django.utils.decorators import method_decorator
from drf_spectacular.renderers import (
    OpenApiJsonRenderer,
    OpenApiJsonRenderer2,
    OpenApiYamlRenderer,
    OpenApiYamlRenderer2,
)
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

from hooks.bodies import BODY_SECONDS
from hooks.configuration import hooks
from hooks.idempotency import KEPT_FOR
from hooks.mapping import MAX_ITEMS
from hooks.models import LONGEST_TURN_SECONDS
from hooks.throttling import FAILURES, WINDOW_SECONDS
from wake.dispatch import MAX_TEXT_BYTES
from wake.status import version

# Styles are set from scripts too, on elements. There is no form on the page, and no font.
_PAGE_POLICY: Final = {
    "style-src": [SELF, UNSAFE_INLINE],
    "form-action": [NONE],
    "font-src": None,
}

_KEY_HOURS: Final = KEPT_FOR.total_seconds() / 3600


class DescriptionView(SpectacularAPIView):
    """`GET /api/schema/`: the description, in JSON unless YAML is asked for."""

    renderer_classes = [
        OpenApiJsonRenderer2,
        OpenApiJsonRenderer,
        OpenApiYamlRenderer2,
        OpenApiYamlRenderer,
    ]
    # Else it is what the URL says, which is written into a header of the answer.
    api_version = version()


@method_decorator(csp_replace(_PAGE_POLICY), name="dispatch")
class DescriptionPage(SpectacularSwaggerSplitView):
    """`GET /api/`: the description to read and to try out; all it needs comes from this site."""

    # No OPTIONS, for which the page has no template.
    http_method_names = ["get", "head"]


def leave_out_views(endpoints: list[Any], **_: Any) -> list[Any]:
    """Return no endpoint: what a view's class tells is not what it answers."""
    return []


def describe_hooks(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Return the description with the hooks put in, below the present base path."""
    base_path = hooks().base_path
    return {
        **result,
        "info": {
            "title": result["info"]["title"],
            "version": version(),
            "description": _DESCRIPTION,
        },
        "paths": {
            f"{base_path}/wake": {"post": _WAKE},
            f"{base_path}/agent": {"post": _AGENT},
            f"{base_path}/{{path}}": {"post": _MAPPING},
        },
        "components": _COMPONENTS,
    }


def _component(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _schema(name: str) -> dict[str, str]:
    return _component("schemas", name)


def _object(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        **({"required": list(required)} if required else {}),
        **more,
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _text(description: str) -> dict[str, Any]:
    return {"text/plain": {"schema": {"type": "string", "description": description}}}


def _header(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": schema}


def _or_null(kind: str, description: str, **more: Any) -> dict[str, Any]:
    """Return the schema of a field that means the same when it is null as when it is missing."""
    return {"type": [kind, "null"], "description": description, **more}


_DESCRIPTION: Final = (
    "Hooks: requests from outside that wake an agent. A request is answered with a receipt once it "
    "is stored.\n\n"
    "After 429 and 503 nothing was stored: send it again. After no answer at all, send it again "
    "too, with the same idempotency key."
)

_RETRY_AFTER: Final = {
    "Retry-After": _header("Seconds to wait.", {"type": "integer", "minimum": 1})
}

_OK: Final = {"const": True}
_KEY_FIELD: Final = {
    "type": ["string", "integer", "null"],
    "description": "As the header Idempotency-Key, which comes first.",
}
_SESSION_KEY: Final = _or_null(
    "string", "The session, such as hook:build-7. Only where the policy lets requests choose it."
)
_AGENT_ID: Final = _or_null("string", "The agent; else the default one.")
_MODE: Final = {
    "type": ["string", "null"],
    "enum": ["now", "next-heartbeat", None],
    "default": "now",
}

_SCHEMAS: Final[dict[str, Any]] = {
    "WakeBody": _object(
        {
            "text": {
                "type": "string",
                "pattern": r"\S",
                "description": f"The event: {MAX_TEXT_BYTES // 1024} KiB at most.",
            },
            "mode": {**_MODE, "description": "When it is to be delivered."},
            "sessionKey": _SESSION_KEY,
            "agentId": _AGENT_ID,
            "idempotencyKey": _KEY_FIELD,
        },
        "text",
    ),
    "AgentBody": _object(
        {
            "message": {
                "type": "string",
                "pattern": r"\S",
                "description": f"What the turn is about: {MAX_TEXT_BYTES // 1024} KiB at most.",
            },
            "name": _or_null("string", "What the turn is called."),
            "agentId": _AGENT_ID,
            "sessionKey": _or_null(
                "string",
                "The session; else the policy's default one, else one of its own. Only where the "
                "policy lets requests choose it.",
            ),
            "wakeMode": {**_MODE, "description": "When the note about the outcome is to be read."},
            "deliver": _or_null(
                "boolean",
                "Whether the agent's main session gets a note about the outcome.",
                default=True,
            ),
            "timeoutSeconds": _or_null(
                "number",
                "How long the turn may take; else as the agent says.",
                minimum=1,
                maximum=LONGEST_TURN_SECONDS,
            ),
            "idempotencyKey": _KEY_FIELD,
        },
        "message",
    ),
    "Receipt": _object(
        {
            "ok": _OK,
            "mode": {"enum": ["now", "next-heartbeat"]},
            "eventOutcome": {
                "enum": ["queued", "coalesced", "replayed"],
                "description": "`coalesced`: an equal event was waiting. `replayed`: the "
                "idempotency key came before.",
            },
            "sessionKey": {"type": "string", "description": "In its canonical form."},
            "eventId": {"type": "string", "description": "The event that stands for the wake."},
        },
        "ok",
        "mode",
        "eventOutcome",
        "sessionKey",
        "eventId",
        additionalProperties=False,
    ),
    "TurnReceipt": _object(
        {
            "ok": _OK,
            "runId": {"type": "string", "description": "The id of the turn's first run."},
            "eventOutcome": {"const": "replayed", "description": "As in a receipt, if so."},
        },
        "ok",
        "runId",
        additionalProperties=False,
    ),
    "Receipts": _object(
        {
            "ok": _OK,
            "results": {
                "type": "array",
                "maxItems": MAX_ITEMS,
                "items": {"anyOf": [_schema("Receipt"), _schema("TurnReceipt")]},
            },
            "eventOutcome": {"const": "replayed", "description": "As in a receipt, if so."},
        },
        "ok",
        "results",
        additionalProperties=False,
        description="Of a mapping that makes one wake of each item of an array.",
    ),
    "Refusal": _object(
        {
            "ok": {"const": False},
            "error": {"type": "string", "description": "What is wrong, and what to change."},
        },
        "ok",
        "error",
        additionalProperties=False,
    ),
}

_REFUSAL: Final = _json(_schema("Refusal"))

_RESPONSES: Final[dict[str, Any]] = {
    "Refused": {
        "description": "Wrong and will stay wrong: bad JSON, an empty or too long text, an agent "
        "or a session key that will not do, or what the policy does not allow; `?token=` in the "
        "URL.",
        "content": {
            **_REFUSAL,
            **_text("A request that cannot be read, such as one with a NUL character in its path."),
        },
    },
    "Unauthorized": {
        "description": "No right credential.",
        "headers": {"WWW-Authenticate": _header("The way to show one.", {"const": "Bearer"})},
        "content": _text("Says nothing more."),
    },
    "NotFound": {
        "description": "No mapping matches. With hooks off there is nothing here at all, and the "
        "answer is the site's own.",
        "content": {**_REFUSAL, "text/html": {"schema": {"type": "string"}}},
    },
    "NotAllowed": {
        "description": "Not POST.",
        "headers": {"Allow": _header("The one method.", {"const": "POST"})},
        "content": _REFUSAL,
    },
    "TooSlow": {
        "description": f"The body was not complete within {BODY_SECONDS} s.",
        "content": _REFUSAL,
    },
    "TooLarge": {"description": "The body is over the policy's limit.", "content": _REFUSAL},
    "TooMany": {
        "description": "The session is full; or a wrong credential, after "
        f"{FAILURES} of them from this client in {WINDOW_SECONDS} s. Nothing was stored.",
        "headers": _RETRY_AFTER,
        "content": _REFUSAL,
    },
    "Failed": {
        "description": "A defect here, such as one in a mapping's transform. Nothing was stored.",
        "content": {**_REFUSAL, "text/html": {"schema": {"type": "string"}}},
    },
    "Unavailable": {
        "description": "The database cannot store now. Nothing was stored.",
        "headers": _RETRY_AFTER,
        "content": _REFUSAL,
    },
}

_ERRORS: Final[dict[str, Any]] = {
    "400": _component("responses", "Refused"),
    "401": _component("responses", "Unauthorized"),
    "404": _component("responses", "NotFound"),
    "405": _component("responses", "NotAllowed"),
    "408": _component("responses", "TooSlow"),
    "413": _component("responses", "TooLarge"),
    "429": _component("responses", "TooMany"),
    "500": _component("responses", "Failed"),
    "503": _component("responses", "Unavailable"),
}

_COMPONENTS: Final[dict[str, Any]] = {
    "schemas": _SCHEMAS,
    "responses": _RESPONSES,
    "parameters": {
        "IdempotencyKey": {
            "name": "Idempotency-Key",
            "in": "header",
            "description": f"The same key again within {_KEY_HOURS:g} hours, from the same "
            "credential at the same path, stores nothing and is answered with the first receipt.",
            "schema": {"type": "string"},
        }
    },
    "securitySchemes": {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "A hook token: `Authorization: Bearer TOKEN`.",
        },
        "header": {
            "type": "apiKey",
            "in": "header",
            "name": "X-OpenClaw-Token",
            "description": "A hook token in a header of its own.",
        },
    },
}


def _operation(
    name: str,
    summary: str,
    description: str,
    body: dict[str, Any],
    example: dict[str, Any],
    answers: dict[str, Any],
) -> dict[str, Any]:
    content = {"application/json": {"schema": body, "example": example}}
    return {
        "operationId": name,
        "tags": ["hooks"],
        "summary": summary,
        "description": description,
        "parameters": [_component("parameters", "IdempotencyKey")],
        "security": [{"bearer": []}, {"header": []}],
        "requestBody": {"required": True, "content": content},
        "responses": {**answers, **_ERRORS},
    }


_WAKE: Final = _operation(
    "wake",
    "Hand in an event",
    "The event waits in its session for that session's next heartbeat. Without a session key it "
    "goes to the agent's main session.",
    _schema("WakeBody"),
    {"text": "The backup is done"},
    {"200": {"description": "Stored.", "content": _json(_schema("Receipt"))}},
)

_AGENT: Final = _operation(
    "agent",
    "Ask for a turn of its own",
    "The message is handed to the agent alone, at once.",
    _schema("AgentBody"),
    {"message": "Summarise the failed build"},
    {"200": {"description": "Stored.", "content": _json(_schema("TurnReceipt"))}},
)

_MAPPING: Final = _operation(
    "mapping",
    "Send what a mapping takes",
    "Any JSON, as the sender writes it: the first mapping that matches makes a wake, or several, "
    "of it. A mapping may take a provider's signature in place of a hook token. Slashes in the "
    "path need not be escaped.",
    {},
    {"project": "website", "id": 42, "status": "passed"},
    {
        "200": {
            "description": "Stored.",
            "content": {
                **_json(
                    {"anyOf": [_schema("Receipt"), _schema("TurnReceipt"), _schema("Receipts")]}
                ),
                **_text("The answer to a sender's check of the address."),
            },
        },
        "204": {"description": "The mapping had nothing to do; nothing was stored."},
    },
)
_MAPPING["parameters"].insert(
    0,
    {
        "name": "path",
        "in": "path",
        "required": True,
        "description": "What the mapping is set to match.",
        "schema": {"type": "string", "minLength": 1},
    },
)
