"""`manage.py runserver`: Django's development server, with daphne behind it.

Here, and not through the app `daphne`, because that one loads its server for every command.
"""

from daphne.management.commands.runserver import Command  # type: ignore[import-untyped]

__all__ = ["Command"]
