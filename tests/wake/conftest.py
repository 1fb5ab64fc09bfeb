"""Fixtures for the tests of the gateway's WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from django.db import connection
from django.test.utils import setup_databases, teardown_databases
from pytest_django import DjangoDbBlocker, Settings

from tests.wake.gateway_server import TOKEN, Wire, connected, serving, stored_rows
from wake.gateway import hub

_SITE_DATABASE = connection.settings_dict["NAME"]


@pytest.fixture(scope="session")
def _test_database(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """The test database, also when pytest-django makes none: when no selected test declares it."""
    if connection.settings_dict["NAME"] != _SITE_DATABASE:
        yield
        return
    with django_db_blocker.unblock():
        made = setup_databases(verbosity=0, interactive=False, aliases={"default": None})
    yield
    with django_db_blocker.unblock():
        teardown_databases(made, verbosity=0)


@pytest.fixture(scope="session")
def _gateway_address(_test_database: None) -> Iterator[str]:
    from openclaw_site.asgi import application

    # The server's threads give their connections up after each use: what is left open would keep
    # the test database from being dropped.
    kept, connection.settings_dict["CONN_MAX_AGE"] = connection.settings_dict["CONN_MAX_AGE"], 0
    with serving(application) as url:
        yield url
    connection.settings_dict["CONN_MAX_AGE"] = kept


def _close_hubs() -> None:
    """Let no hub read a database and a configuration that belong to the next test."""
    for loop, one in list(hub._hubs.items()):
        if loop.is_running():
            asyncio.run_coroutine_threadsafe(one.close(), loop).result(10)


@pytest.fixture
def gateway_url(_gateway_address: str, transactional_db: None, settings: Settings) -> Iterator[str]:
    """The ws:// URL of the whole site, served on a real socket over the test's database."""
    settings.OPENCLAW_GATEWAY_TOKEN = TOKEN
    yield _gateway_address
    _close_hubs()


@pytest.fixture
def untouched_gateway_url(
    _gateway_address: str,
    _test_database: None,
    django_db_blocker: DjangoDbBlocker,
    settings: Settings,
) -> Iterator[str]:
    """The same for a test that stores nothing, which is checked; it spares emptying all tables."""
    settings.OPENCLAW_GATEWAY_TOKEN = TOKEN
    with django_db_blocker.unblock():
        yield _gateway_address
        _close_hubs()
        assert stored_rows() == 0


@pytest.fixture
def wire(gateway_url: str) -> Iterator[Wire]:
    """A connection that is past its handshake and holds every scope."""
    with connected(gateway_url) as connection:
        yield connection


@pytest.fixture
def untouched_wire(untouched_gateway_url: str) -> Iterator[Wire]:
    """A connection that is past its handshake, for a test that stores nothing."""
    with connected(untouched_gateway_url) as connection:
        yield connection
