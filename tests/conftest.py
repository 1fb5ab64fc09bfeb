"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from pytest_django import DjangoDbBlocker

from hooks import authentication
from hooks import configuration as hooks_configuration
from tests.admin_browser import signed_in, viewing_user
from tests.live import LiveGateway
from wake import configuration


@pytest.fixture(scope="session")
def django_db_modify_db_settings(django_db_modify_db_settings_parallel_suffix: None) -> None:
    """Remove what a killed run left beside its SQLite file; Django removes the file alone."""
    name = settings.DATABASES["default"].get("TEST", {}).get("NAME")
    if connection.vendor == "sqlite" and name:
        for suffix in ("-wal", "-shm", "-journal"):
            Path(f"{name}{suffix}").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Close what threads of the servers under test still hold, so that the database can go."""
    yield
    if connection.vendor == "postgresql":
        with django_db_blocker.unblock(), connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.fixture(autouse=True)
def _fresh_configuration() -> Iterator[None]:
    """Forget what a process remembers: each test has a database of its own."""
    configuration.gateway.forget()
    hooks_configuration.hooks.forget()
    authentication._noted.clear()
    yield
    configuration.gateway.forget()
    hooks_configuration.hooks.forget()


@pytest.fixture
def live_gateway(tmp_path: Path) -> Iterator[LiveGateway]:
    """A real gateway process on a database of its own; stopped at the end."""
    with LiveGateway(tmp_path) as gateway:
        yield gateway


@pytest.fixture
def admin_client(db: None) -> Client:
    """A browser of a superuser."""
    return signed_in(User.objects.create_superuser("admin"))


@pytest.fixture
def viewer(db: None) -> Client:
    """A browser of somebody who may look at everything and change nothing."""
    return signed_in(viewing_user())
