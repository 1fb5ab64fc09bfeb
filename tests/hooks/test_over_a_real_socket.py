"""Hooks through a gateway process, as `curl` sends them."""

from __future__ import annotations

import time

import httpx

from tests.live import LiveGateway

SETUP = """
from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy
AllowedSessionPrefix.objects.create(prefix="hook:")
HookPolicy.objects.update(allow_request_session_key=True)
HookMapping.objects.create(
    name="github", match_path="github", session_key="hook:gh:{{payload.number}}",
    text_template="{{headers.x-github-event}}: {{payload.title}}",
)
"""


def test_the_two_doors_and_their_refusals(live_gateway: LiveGateway) -> None:
    live_gateway.manage("shell", "-c", SETUP)
    headers = {"Authorization": f"Bearer {live_gateway.hook_token}", "X-GitHub-Event": "opened"}
    with httpx.Client(base_url=live_gateway.url, headers=headers) as client:
        deadline = time.monotonic() + 1  # by then the changes are in force
        while client.post("/hooks/github").status_code == 404 and time.monotonic() < deadline:
            pass
        receipt = client.post("/hooks/wake", json={"text": "hello", "sessionKey": "hook:A"})
        assert receipt.status_code == 200
        assert receipt.json()["sessionKey"] == "agent:main:hook:a"
        mapped = client.post("/hooks/github?kind=pr", json={"number": 7, "title": "Fix"})
        assert mapped.json()["sessionKey"] == "agent:main:hook:gh:7"

        def streamed() -> list[bytes]:
            return [b'{"text": "', b"x" * 300_000, b'"}']

        refusals = {
            400: client.post("/hooks/wake", content=b"{"),
            401: client.post("/hooks/wake", headers={"Authorization": "Bearer x"}),
            404: client.post("/hooks/elsewhere", json={}),
            405: client.get("/hooks/wake"),
            413: client.post("/hooks/wake", content=iter(streamed())),
        }
        assert {status: answer.status_code for status, answer in refusals.items()} == {
            status: status for status in refusals
        }
        assert refusals[401].text == "Unauthorized\n"
        assert all(refusals[status].json()["ok"] is False for status in (400, 404, 405, 413))
    counted = live_gateway.manage(
        "shell", "-c", "from wake.models import *; print('events', SystemEvent.objects.count())"
    )
    assert "events 2" in counted.stdout
    assert live_gateway.hook_token not in live_gateway.log()
