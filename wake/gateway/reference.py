"""The tables of docs/protocol.md, made of what the code declares.

A test compares them with the page; `make docs` writes them into it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "protocol.md"


def with_tables(page: str) -> str:
    """Return the page with the tables put in, each between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, table in (("methods", _methods()), ("events", _events())):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"the page has no place for the table of {name}")
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


def _methods() -> str:
    from wake.gateway.methods import METHODS

    return _table(
        ("method", "scope", "params", "answer"),
        (
            (
                f"`{method.name}`",
                method.scope.removeprefix("operator.")
                + (", or a token of the agent" if method.for_agents else ""),
                ", ".join(_params(method.params)) or "none",
                " ".join((inspect.getdoc(method.function) or "").split()),
            )
            for method in METHODS.values()
        ),
    )


def _params(params: type) -> Iterator[str]:
    import msgspec

    from wake.gateway.frames import expectation

    for field in msgspec.structs.fields(params):
        is_required, words = expectation(params, field.encode_name)
        yield f"`{field.encode_name}{'' if is_required else '?'}` ({words})"


def _events() -> str:
    from wake.gateway.frames import EVENTS

    rows = ((f"`{name}`", *said) for name, said in EVENTS.items())
    return _table(("event", "to whom, when", "payload"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines
    )


def main() -> None:
    """Write the tables into the page."""
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openclaw_site.settings")
    django.setup()
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
