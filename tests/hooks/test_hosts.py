"""A Host that is not in ALLOWED_HOSTS."""

from __future__ import annotations

import pytest
from pytest_django import Settings

from tests.hooks.conftest import Send, error_of, rows


@pytest.mark.django_db
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("path", ["/hooks/wake", "/hooks/a/b"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "a b", "", "x" * 9000, "é"])
def test_a_hook_for_a_host_that_is_not_ours_is_refused_in_json(
    send: Send, settings: Settings, path: str, host: str, debug: bool
) -> None:
    settings.DEBUG = debug
    answer = send(path, {"text": "hello"}, headers={"Host": host})
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/json"
    assert f"Host {host[:120]!a} is not in ALLOWED_HOSTS" == error_of(answer)
    assert rows() == (0, 0, 0)


@pytest.mark.django_db
def test_other_pages_are_left_to_django(send: Send) -> None:
    answer = send("/admin/", headers={"Host": "evil.example"})
    assert answer.status_code == 400
    assert answer.headers["Content-Type"].startswith("text/html")
