"""PostgreSQL's index `event_of_session` goes: `event_session` does what it did, and each is written."""

from __future__ import annotations

from django.apps.registry import Apps
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

INDEX = models.Index(fields=["session", "id"], name="event_of_session")


def remove(apps: Apps, editor: BaseDatabaseSchemaEditor) -> None:
    if editor.connection.vendor == "postgresql":
        editor.remove_index(apps.get_model("wake", "systemevent"), INDEX)


def add(apps: Apps, editor: BaseDatabaseSchemaEditor) -> None:
    if editor.connection.vendor == "postgresql":
        editor.add_index(apps.get_model("wake", "systemevent"), INDEX)


class Migration(migrations.Migration):
    dependencies = [("wake", "0006_event_indexes")]

    operations = [migrations.RunPython(remove, add)]
