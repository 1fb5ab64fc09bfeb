"""Indexes for looking on: what ended in a minute, and what is newest in one session.

The latter, for a session's history and its last heartbeat, on PostgreSQL only: its index of a
foreign key holds the session alone, so that it reads either every row of the session or, from the
newest one on, those of all sessions. On SQLite every index ends with the id, and one more like this
would be taken for the queue's partial indexes.
"""

from __future__ import annotations

from django.apps.registry import Apps
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

INDEXES = {
    "systemevent": models.Index(fields=["session", "id"], name="event_of_session"),
    "heartbeat": models.Index(fields=["session", "id"], name="heartbeat_of_session"),
}


def add(apps: Apps, editor: BaseDatabaseSchemaEditor) -> None:
    if editor.connection.vendor == "postgresql":
        for name, index in INDEXES.items():
            editor.add_index(apps.get_model("wake", name), index)


def remove(apps: Apps, editor: BaseDatabaseSchemaEditor) -> None:
    if editor.connection.vendor == "postgresql":
        for name, index in INDEXES.items():
            editor.remove_index(apps.get_model("wake", name), index)


class Migration(migrations.Migration):
    dependencies = [("wake", "0003_gateway_token_scopes")]

    operations = [
        migrations.AddIndex(
            "heartbeat", models.Index(fields=["finished_at"], name="heartbeat_finished")
        ),
        migrations.RunPython(add, remove),
    ]
