"""The admin as a browser without scripts sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.urls import reverse

from tests.live import LiveGateway

# What the test client answers carries the context of the page beside the page.
Response = Any


def signed_in(user: User) -> Client:
    """Return a browser in which this user is signed in. No password is hashed, which takes long."""
    client = Client()
    client.force_login(user)
    return client


def viewing_user() -> User:
    """Return a member of the staff who may look at everything and change nothing."""
    user = User.objects.create_user("viewer", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__startswith="view_"))
    return user


def page(client: Client, name: str, *args: Any, query: str = "") -> str:
    response = client.get(reverse(f"admin:{name}", args=args) + query)
    assert response.status_code == 200, response
    return response.content.decode()


def said(response: Response) -> list[str]:
    return [str(message) for message in response.context["messages"]]


def errors_of(response: Response) -> dict[str, list[str]]:
    return dict(response.context["adminform"].form.errors)


def assert_stored_nowhere(secret: str) -> None:
    """Look for the secret in every column of every table, the messages on their way included."""
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')  # noqa: S608 - a name of the database's own
            assert secret not in repr(cursor.fetchall())


class Operator:
    """An operator of a real gateway, signed in, in a browser without scripts."""

    def __init__(self, gateway: LiveGateway) -> None:
        self._client = httpx.Client(base_url=gateway.url, follow_redirects=True, timeout=20)
        login = {"username": "admin", "password": gateway.admin_password, "next": "/admin/"}
        assert "Log out" in self.submit("/admin/login/", login)

    def page(self, address: str) -> str:
        return self._client.get(address).text

    def submit(self, address: str, changes: Mapping[str, str | None]) -> str:
        """Send the form at an address with these fields changed (None: unchecked); the answer."""
        fields = {**_fields(self.page(address)), **changes}
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
