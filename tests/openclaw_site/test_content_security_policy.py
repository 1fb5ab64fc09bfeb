"""What a browser may run and load: a strict policy, and what the admin and the API page add."""

from __future__ import annotations

import re

import pytest
from django.contrib.auth.models import User
from django.test import Client
from playwright.sync_api import Page

from tests.browser import chromium, needs_chromium, sign_in, watch
from tests.live import LiveGateway

STRICT = {
    "default-src": {"'none'"},
    "script-src": {"'self'"},
    "style-src": {"'self'"},
    "img-src": {"'self'", "data:"},
    "font-src": {"'self'"},
    "connect-src": {"'self'"},
    "form-action": {"'self'"},
    "frame-ancestors": {"'none'"},
    "base-uri": {"'none'"},
}
ADMIN = {
    **STRICT,
    "script-src": {"'self'", "'unsafe-eval'"},
    "style-src": {"'self'", "'unsafe-inline'"},
}
DESCRIPTION = {
    **{name: sources for name, sources in STRICT.items() if name != "font-src"},
    "style-src": {"'self'", "'unsafe-inline'"},
    "form-action": {"'none'"},
}


def policy(answer: object) -> dict[str, set[str]]:
    """Return the sources of each directive of an answer's policy."""
    parts = [part.split() for part in answer["Content-Security-Policy"].split(";")]  # type: ignore[index] # an answer of the test client
    return {name: set(sources) for name, *sources in parts}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", STRICT),
        ("/admin/", ADMIN),
        ("/admin/wake/session/", ADMIN),
        ("/admin/no-such-page/", ADMIN),
        ("/api/", DESCRIPTION),
        ("/api/schema/", STRICT),
        ("/hooks/wake", STRICT),
        ("/no-such-page", STRICT),
        ("/static/wake/console.js", STRICT),
        ("/?nul=%00", STRICT),
    ],
)
def test_every_answer_has_its_policy(
    admin_client: Client, path: str, expected: dict[str, set[str]]
) -> None:
    assert policy(admin_client.get(path)) == expected


@pytest.mark.django_db
def test_the_login_page_is_one_of_the_admins(client: Client) -> None:
    assert policy(client.get("/admin/login/")) == ADMIN
    assert policy(client.get("/")) == STRICT  # the way there


def test_the_console_has_nothing_inline(admin_client: Client) -> None:
    page = admin_client.get("/").content.decode()
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", page) == []
    addresses = re.findall(r"(?:src|href)=\"([^\"#]+)\"", page)
    assert [one for one in addresses if not re.match(r"/(?!/)", one)] == []


def visit(page: Page, path: str) -> None:
    page.goto(path)
    page.wait_for_load_state("networkidle")


@needs_chromium
def test_no_page_breaks_its_policy(live_gateway: LiveGateway) -> None:
    with chromium(live_gateway) as browser:
        page = browser.new_page()
        problems = watch(page)
        visit(page, "/admin/")
        sign_in(page, "admin", live_gateway.admin_password)
        page.get_by_role("heading", name="How things stand").wait_for()
        for path in (
            "/admin/wake/session/",
            "/admin/wake/agent/main/change/",
            "/admin/hooks/hookmapping/add/",
            "/admin/hooks/simulator/",
            "/api/",
        ):
            visit(page, path)
        # Alpine runs: what it hides and shows is where it belongs.
        page.goto("/admin/wake/session/")
        page.wait_for_function("window.Alpine && !document.documentElement.hasAttribute('x-cloak')")
        page.goto("/")
        page.locator("#connection[data-state=live]").wait_for()
        assert problems == []

        # A script that somebody got into the console does not run.
        page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.wasRun = true";
                document.body.append(script);
            }"""
        )
        assert page.evaluate("window.wasRun") is None
        assert [said for said in problems if "Content Security Policy" in said]


def test_who_is_not_of_the_staff_is_told_at_the_login_page(client: Client, db: None) -> None:
    client.force_login(User.objects.create_user("outsider"))
    answer = client.get("/", follow=True)
    assert answer.redirect_chain == [("/admin/login/?next=/", 302)]
    assert "You are signed in as outsider, who may not open this page" in answer.content.decode()
    assert "You are signed in" not in Client().get("/admin/login/").content.decode()
