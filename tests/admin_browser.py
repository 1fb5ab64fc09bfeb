"""The admin as a browser without scripts sees it."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.urls import reverse

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
