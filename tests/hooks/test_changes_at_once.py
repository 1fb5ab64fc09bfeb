"""What is saved in the admin is in force in a second process within one second."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.live import LiveGateway

WITHIN_SECONDS = 1.0


@pytest.fixture
def second(live_gateway: LiveGateway, tmp_path: Path) -> Iterator[LiveGateway]:
    """Another process on the same database; nothing is saved in it."""
    directory = tmp_path / "second"
    directory.mkdir()
    with LiveGateway(directory, arguments=("--no-heartbeats",), beside=live_gateway) as second:
        yield second


class Admin:
    """An operator's browser at the first process, without scripts."""

    def __init__(self, gateway: LiveGateway) -> None:
        self._client = httpx.Client(base_url=gateway.url, follow_redirects=True, timeout=20)
        login = {"username": "admin", "password": gateway.admin_password, "next": "/admin/"}
        assert "Log out" in self.submit("/admin/login/", login)

    def submit(self, address: str, changes: Mapping[str, str | None]) -> str:
        """Send the form at an address with these fields changed (None: unchecked); the answer."""
        form = self._client.get(address).text
        fields = {**_fields(form), **changes}
        data = {name: value for name, value in fields.items() if value is not None}
        answer = self._client.post(
            address, data=data, headers={"Referer": str(self._client.base_url)}
        )
        assert answer.status_code == 200, answer.text
        assert "errornote" not in answer.text, answer.text
        return answer.text


def _fields(page: str) -> dict[str, str | None]:
    """Return the values with which a page's form would be sent unchanged."""
    fields: dict[str, str | None] = {}
    for tag in re.findall(r"<input\b[^>]*>", page):
        attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
        name, kind = attributes.get("name"), attributes.get("type", "text")
        unchecked = kind in {"checkbox", "radio"} and "checked" not in re.sub(r'"[^"]*"', "", tag)
        if name and not unchecked and kind not in {"submit", "button", "file"}:
            fields[name] = attributes.get("value", "on" if kind == "checkbox" else "")
    text_area = r'<textarea[^>]*\bname="([^"]*)"[^>]*>\s*([^<]*)</textarea>'
    fields.update(re.findall(text_area, page))
    for name, options in re.findall(
        r'<select[^>]*\bname="([^"]*)"[^>]*>(.*?)</select>', page, re.DOTALL
    ):
        if chosen := re.search(r'<option value="([^"]*)"[^>]*\bselected\b', options):
            fields[name] = chosen[1]
    return fields


def within_a_second(post: Callable[[], httpx.Response], status: int) -> httpx.Response:
    began = time.monotonic()
    while (answer := post()).status_code != status:
        assert time.monotonic() - began < WITHIN_SECONDS, (answer.status_code, answer.text)
    return answer


def test_policy_prefix_token_and_mapping(live_gateway: LiveGateway, second: LiveGateway) -> None:
    admin = Admin(live_gateway)
    tokens = [live_gateway.hook_token]

    def post(path: str = "wake", **body: str) -> Callable[[], httpx.Response]:
        headers = {"Authorization": f"Bearer {tokens[-1]}"}
        return lambda: httpx.post(f"{second.url}/hooks/{path}", json=body, headers=headers)

    assert post(text="x")().status_code == 200
    assert post(text="x", sessionKey="hook:a")().status_code == 400

    policy = "/admin/hooks/hookpolicy/1/change/"
    allow = {"allow_request_session_key": "on", "prefixes-0-prefix": "hook:"}
    admin.submit(policy, {**allow, "prefixes-TOTAL_FORMS": "1"})
    within_a_second(post(text="x", sessionKey="hook:a"), 200)
    assert post(text="x", sessionKey="ci:a")().status_code == 400

    admin.submit(policy, {"prefixes-0-prefix": "ci:"})
    within_a_second(post(text="x", sessionKey="ci:a"), 200)
    assert post(text="x", sessionKey="hook:a")().status_code == 400

    mapping = {"name": "build", "match_path": "build", "text_template": "{{id}}"}
    assert post("build", id="7")().status_code == 404
    admin.submit("/admin/hooks/hookmapping/add/", {**mapping, "session_key": "ci:build"})
    answer = within_a_second(post("build", id="7"), 200)
    assert answer.json()["sessionKey"] == "agent:main:ci:build"

    page = admin.submit("/admin/hooks/hooktoken/add/", {"name": "new"})
    made = re.search(r"och_[\w-]+", page)
    assert made
    tokens.append(made[0])
    within_a_second(post(text="x"), 200)

    admin.submit(policy, {"enabled": None})
    within_a_second(post(text="x"), 404)
