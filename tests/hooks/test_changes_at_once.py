"""What is saved in the admin is in force in a second process within one second."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.admin_browser import Operator
from tests.live import LiveGateway

WITHIN_SECONDS = 1.0


@pytest.fixture
def second(live_gateway: LiveGateway, tmp_path: Path) -> Iterator[LiveGateway]:
    """Another process on the same database; nothing is saved in it."""
    directory = tmp_path / "second"
    directory.mkdir()
    with LiveGateway(directory, arguments=("--no-heartbeats",), beside=live_gateway) as second:
        yield second


def within_a_second(post: Callable[[], httpx.Response], status: int) -> httpx.Response:
    began = time.monotonic()
    while (answer := post()).status_code != status:
        assert time.monotonic() - began < WITHIN_SECONDS, (answer.status_code, answer.text)
    return answer


def test_policy_prefix_token_and_mapping(live_gateway: LiveGateway, second: LiveGateway) -> None:
    operator = Operator(live_gateway)
    tokens = [live_gateway.hook_token]

    def post(path: str = "wake", **body: str) -> Callable[[], httpx.Response]:
        headers = {"Authorization": f"Bearer {tokens[-1]}"}
        return lambda: httpx.post(f"{second.url}/hooks/{path}", json=body, headers=headers)

    assert post(text="x")().status_code == 200
    assert post(text="x", sessionKey="hook:a")().status_code == 400

    policy = "/admin/hooks/hookpolicy/1/change/"
    allow = {"allow_request_session_key": "on", "prefixes-0-prefix": "hook:"}
    operator.submit(policy, {**allow, "prefixes-TOTAL_FORMS": "1"})
    within_a_second(post(text="x", sessionKey="hook:a"), 200)
    assert post(text="x", sessionKey="ci:a")().status_code == 400

    operator.submit(policy, {"prefixes-0-prefix": "ci:"})
    within_a_second(post(text="x", sessionKey="ci:a"), 200)
    assert post(text="x", sessionKey="hook:a")().status_code == 400

    mapping = {"name": "build", "match_path": "build", "text_template": "{{id}}"}
    assert post("build", id="7")().status_code == 404
    operator.submit("/admin/hooks/hookmapping/add/", {**mapping, "session_key": "ci:build"})
    answer = within_a_second(post("build", id="7"), 200)
    assert answer.json()["sessionKey"] == "agent:main:ci:build"

    page = operator.submit("/admin/hooks/hooktoken/add/", {"name": "new"})
    made = re.search(r"och_[\w-]+", page)
    assert made
    tokens.append(made[0])
    within_a_second(post(text="x"), 200)

    operator.submit(policy, {"enabled": None})
    within_a_second(post(text="x"), 404)
