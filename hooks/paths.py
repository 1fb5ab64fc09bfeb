"""Where hooks live: below a base path that an operator may change at any time."""

from __future__ import annotations

from hooks.configuration import hooks


class HookPathConverter:
    """Matches the paths below the present base path; its value is the path below it.

    With hooks off nothing matches, and the site answers as if they did not exist.
    """

    regex = r"(?s:.+)"

    def to_python(self, value: str) -> str:
        relative = hooks().relative_path(f"/{value}")
        if relative is None:
            raise ValueError("no hook")
        return relative

    def to_url(self, value: str) -> str:
        return f"{hooks().base_path}/{value}".removeprefix("/")
