"""What an operator's connection may do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Final

from wake.models import OperatorScope

READ: Final = OperatorScope.READ.value
WRITE: Final = OperatorScope.WRITE.value
ADMIN: Final = OperatorScope.ADMIN.value
ALL: Final = (ADMIN, READ, WRITE)

_PREFIX = "operator."
# As every version of the protocol writes a scope; nothing else is granted, stored or shown.
_SCOPE = re.compile(r"operator(?:\.[a-z]+)+", re.ASCII)
MAX_SCOPES: Final = 32


def includes(held: Collection[str], scope: str) -> bool:
    """Whether scopes that are held cover another: admin covers every operator scope, write read."""
    return (
        scope in held
        or (ADMIN in held and scope.startswith(_PREFIX))
        or (scope == READ and WRITE in held)
    )


def grant(asked: Iterable[str], held: Collection[str]) -> tuple[str, ...]:
    """Return the scopes of a connection: those it asked for that its credential holds.

    None asked for means all that the credential holds.
    """
    wanted = dict.fromkeys(asked) or dict.fromkeys(held)
    granted = (scope for scope in wanted if _SCOPE.fullmatch(scope) and includes(held, scope))
    return tuple(islice(granted, MAX_SCOPES))
