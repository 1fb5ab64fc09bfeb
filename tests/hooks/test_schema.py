"""The description of the HTTP door is valid, current, and true of what the door answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from io import StringIO
from typing import Any

import httpx
import pytest
import schemathesis
from django.conf import settings
from django.core.management import call_command
from django.test import Client
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hooks import tokens
from hooks.models import HookMapping
from tests.hooks.conftest import Send, set_policy
from tests.live import ROOT, LiveGateway
from wake.models import Agent

CONFORMANCE: list[CheckFunction] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 30

# One mapping of each kind of answer; the last takes every path.
SETUP = """
from hooks.models import HookMapping
for position, values in enumerate((
    {"match_path": "each", "for_each": "items", "text_template": "{{items[0]}}"},
    {"match_path": "keyed", "session_key": "hook:{{id}}", "text_template": "x"},
    {"match_source": "turn", "action": "agent", "text_template": "{{payload}}"},
    {"match_source": "wake", "text_template": "{{path}} {{payload}}"},
    {"match_path": "fuzz", "text_template": "{{payload}}"},
)):
    HookMapping.objects.create(name=f"m{position}", position=position, **values)
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    directory = tmp_path_factory.mktemp("schema")
    with LiveGateway(directory, arguments=("--no-heartbeats",)) as gateway:
        gateway.manage("shell", "-v0", "-c", SETUP)
        deadline = time.monotonic() + 5
        while post(gateway, "fuzz", {}).status_code == 404:
            assert time.monotonic() < deadline
        yield gateway


def post(gateway: LiveGateway, path: str, body: Any, **headers: str) -> httpx.Response:
    credential = {"Authorization": f"Bearer {gateway.hook_token}", **headers}
    return httpx.post(f"{gateway.url}/hooks/{path}", json=body, headers=credential, timeout=40)


def described(gateway: LiveGateway) -> dict[str, APIOperation[Any, Any, Any, Any]]:
    """Return the operations of the description by the end of their paths."""
    schema = schemathesis.openapi.from_url(f"{gateway.url}/api/schema/")
    operations = (found.ok() for found in schema.get_all_operations() if isinstance(found, Ok))
    return {operation.path.rsplit("/", 1)[-1]: operation for operation in operations}


@pytest.mark.django_db
def test_it_is_valid_openapi() -> None:
    call_command("spectacular", validate=True, fail_on_warn=True, stdout=StringIO())


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("accepted", "content_type"),
    [
        ("*/*", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/json"),
        ("application/vnd.oai.openapi", "application/vnd.oai.openapi"),
    ],
)
def test_it_is_json_unless_yaml_is_asked_for(
    client: Client, accepted: str, content_type: str
) -> None:
    answer = client.get("/api/schema/", headers={"Accept": accepted})
    assert answer.status_code == 200
    assert answer["Content-Type"].partition(";")[0] == content_type


@pytest.mark.django_db
def test_its_paths_are_below_the_present_base_path(client: Client) -> None:
    set_policy(base_path="/in/here")
    assert list(client.get("/api/schema/").json()["paths"]) == [
        "/in/here/wake",
        "/in/here/agent",
        "/in/here/{path}",
    ]


@pytest.mark.django_db
def test_it_says_nothing_of_what_is_set_up(client: Client) -> None:
    token, _ = tokens.create("partner-token")
    agent = Agent.objects.create(pk="secretary", name="Secretary")
    mapping = HookMapping.objects.create(
        name="acquisition", match_path="merger", session_key="hook:board", agent=agent
    )
    for page in ("/api/schema/", "/api/"):
        shown = client.get(page).content.decode()
        for private in (token.name, token.hint, agent.pk, agent.name, mapping.name, "merger"):
            assert private not in shown


@pytest.mark.django_db
def test_its_receipts_have_the_fields_of_real_ones(client: Client, send: Send) -> None:
    schemas = client.get("/api/schema/").json()["components"]["schemas"]
    HookMapping.objects.create(
        name="each", match_path="each", for_each="items", text_template="{{items[0]}}"
    )
    bodies = {
        "Receipt": ("/hooks/wake", {"text": "hello"}),
        "TurnReceipt": ("/hooks/agent", {"message": "hello"}),
        "Receipts": ("/hooks/each", {"items": ["a", "b"]}),
    }
    for name, (path, body) in bodies.items():
        first, again = (
            json.loads(send(path, body, headers={"Idempotency-Key": "k"}).content) for _ in range(2)
        )
        assert set(first) == set(schemas[name]["required"])
        assert set(again) == set(schemas[name]["properties"])


@pytest.mark.django_db
@pytest.mark.parametrize(("path", "name"), [("wake", "WakeBody"), ("agent", "AgentBody")])
def test_the_door_reads_every_field_that_is_described(
    client: Client, send: Send, path: str, name: str
) -> None:
    body = client.get("/api/schema/").json()["components"]["schemas"][name]
    (text,) = body["required"]
    # Of a mode, all that is not next-heartbeat means now.
    fields = set(body["properties"]) - {"mode", "wakeMode"}
    for field in fields:
        answer = send(f"/hooks/{path}", {text: "hello", field: []})
        assert answer.status_code == 400
        assert field in json.loads(answer.content)["error"]


@pytest.mark.django_db
@pytest.mark.parametrize("seconds", ["minimum", "maximum"])
def test_a_turn_may_take_as_long_as_is_described_and_no_longer(
    client: Client, send: Send, seconds: str
) -> None:
    schemas = client.get("/api/schema/").json()["components"]["schemas"]
    bound = schemas["AgentBody"]["properties"]["timeoutSeconds"][seconds]
    beyond = bound + (1 if seconds == "maximum" else -1)
    for value, status in ((bound, 200), (beyond, 400)):
        answer = send("/hooks/agent", {"message": "hello", "timeoutSeconds": value})
        assert answer.status_code == status


@pytest.mark.django_db
def test_every_status_of_the_contract_is_described(client: Client) -> None:
    contract = (ROOT / "docs" / "contract.md").read_text()
    statuses = set(re.findall(r"^\| (\d{3}) \|", contract.partition("## HTTP hooks")[2], re.M))
    responses = client.get("/api/schema/").json()["paths"]["/hooks/{path}"]["post"]["responses"]

    assert len(statuses) > 5
    assert statuses <= set(responses)


@pytest.mark.parametrize(
    ("operation", "path", "body", "status"),
    [
        ("wake", "wake", {"text": "hello"}, 200),
        ("agent", "agent", {"message": "hello"}, 200),
        ("{path}", "each", {"items": ["a", "b"]}, 200),
        ("{path}", "any/turn", {"source": "turn"}, 200),
        ("{path}", "each", {"items": []}, 204),
        ("wake", "wake", {}, 400),
        ("wake", "wake?token=x", {"text": "hello"}, 400),
        ("{path}", "a%00b", {}, 400),
        ("{path}", "keyed", {"id": 1}, 400),
        ("{path}", "nobody", {}, 404),
        ("wake", "wake", {"text": "x" * 300_000}, 413),
    ],
)
def test_a_real_answer_is_as_described(
    gateway: LiveGateway, operation: str, path: str, body: Any, status: int
) -> None:
    answer = post(gateway, path, body)
    assert answer.status_code == status
    case = described(gateway)[operation].Case()
    case.validate_response(answer, checks=CONFORMANCE)


def test_another_method_is_refused_as_described(gateway: LiveGateway) -> None:
    answer = httpx.get(f"{gateway.url}/hooks/wake")
    assert answer.status_code == 405
    described(gateway)["wake"].Case().validate_response(answer, checks=CONFORMANCE)


def test_wrong_credentials_are_refused_as_described(gateway: LiveGateway) -> None:
    operation = described(gateway)["wake"]
    seen = []
    for _ in range(21):
        answer = post(gateway, "wake", {"text": "hello"}, Authorization="Bearer wrong")
        operation.Case().validate_response(answer, checks=CONFORMANCE)
        seen.append(answer.status_code)
    assert seen == [401] * 20 + [429]
    assert post(gateway, "wake", {"text": "hello"}).status_code == 200


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("path", "fixed", "usual"),
    [
        ("wake", None, {200, 400}),
        ("agent", None, {200, 400}),
        ("{path}", {"path": "fuzz"}, {200, 400}),
        ("{path}", None, {404}),
    ],
    ids=["wake", "agent", "mapping", "any-path"],
)
def test_whatever_is_sent_is_answered_as_described(
    gateway: LiveGateway,
    path: str,
    fixed: dict[str, str] | None,
    usual: set[int],
    mode: GenerationMode,
) -> None:
    """Requests made from the description, right ones and wrong ones: no defect, no surprise."""
    statuses: set[int] = set()
    credential = {"Authorization": f"Bearer {gateway.hook_token}"}

    @given(case=described(gateway)[path].as_strategy(mode, path_parameters=fixed))
    @hypothesis_settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def send_and_check(case: Case[Any]) -> None:
        answer = case.call(headers=credential)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=[not_a_server_error, *CONFORMANCE])

    send_and_check()
    assert statuses & usual
    assert "Traceback" not in gateway.log()


@pytest.mark.django_db
def test_the_page_is_made_of_files_of_this_site_without_inline_scripts(client: Client) -> None:
    page = client.get("/api/").content.decode()
    links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)

    assert len(links) == 5
    for link in links:
        assert link.startswith(("/api/", f"/{settings.STATIC_URL.strip('/')}/"))
        assert client.get(link).status_code == 200
    assert re.findall(r"<script(?![^>]* src=)", page) == []


@pytest.mark.django_db
@pytest.mark.parametrize(
    "page", ["/api/", "/api/schema/", "/api/schema/?version=%0D%0AX:1", "/api/schema/?lang=%FF./"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
@pytest.mark.parametrize("accepted", ["*/*", "text/html", "image/png"])
def test_no_request_for_a_page_is_a_defect(
    client: Client, page: str, method: str, accepted: str
) -> None:
    answer = client.generic(method, page, headers={"Accept": accepted})
    assert answer.status_code in {200, 405, 406}
