"""How log lines are written: for people, or as one JSON object each (the setting LOG_FORMAT).

Above the level DEBUG no line holds what an event, a prompt or a reply says, nor a secret. The texts
of exceptions may quote all of these. So only those of kinds that are known not to are written; of
others the line names the class, and the traceback shows where it was raised. With LOG_LEVEL=DEBUG
all of it is written.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DatabaseError

from wake.errors import WakeError

# The ids that a log call may give (`extra`), under which a JSON line has them as fields.
FIELDS: Final = ("run_id", "event_id", "session_key", "agent_id")
MAX_SAID_CHARACTERS: Final = 300

_HARMLESS: Final = (WakeError, DatabaseError, OSError, ImportError, ImproperlyConfigured)
# What the drivers raise, which Django's own are made of.
_DRIVERS: Final = ("sqlite3", "psycopg")


class LineFormatter(logging.Formatter):
    """A line for people: time, level, logger, message; a traceback follows on its own lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(_copy(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return exception_text(ei[1]) if ei[1] else ""


class JsonFormatter(logging.Formatter):
    """One JSON object on one line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _copy(record).getMessage(),
        }
        for name in FIELDS:
            if (value := getattr(record, name, None)) is not None:
                line[name] = str(value)
        if record.exc_info and record.exc_info[1]:
            line["exception"] = exception_text(record.exc_info[1])
        return json.dumps(line)


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _copy(record: logging.LogRecord) -> logging.LogRecord:
    """Return the record with its exceptions told safely, its traceback not yet rendered."""
    copied = logging.makeLogRecord(record.__dict__)
    copied.exc_text = None
    if isinstance(record.msg, BaseException):
        copied.msg = said(record.msg)
    if isinstance(record.args, tuple):
        copied.args = tuple(
            said(value) if isinstance(value, BaseException) else value for value in record.args
        )
    if record.name == "asyncio" and not _tells_all():
        # It writes what a lost task or callback ended with below its first line.
        copied.msg, copied.args = copied.getMessage().partition("\n")[0], ()
    return copied


def said(error: BaseException) -> str:
    """Return an exception's text if it can quote nobody, else its class."""
    if _tells_all():
        return str(error) or type(error).__name__
    if isinstance(error, _HARMLESS) or type(error).__module__.split(".")[0] in _DRIVERS:
        # A database's first line says what is wrong; further ones quote the row.
        return str(error).strip().partition("\n")[0][:MAX_SAID_CHARACTERS] or type(error).__name__
    return type(error).__name__


def exception_text(error: BaseException) -> str:
    """Return an exception with its traceback and those it came from."""
    if _tells_all():
        return "".join(traceback.format_exception(error)).rstrip("\n")
    parts: list[str] = []
    shown: set[int] = set()
    present: BaseException | None = error
    while present is not None and id(present) not in shown:
        shown.add(id(present))
        parts.append(_one_exception(present, present.__traceback__))
        earlier = present.__cause__
        if earlier is None and not present.__suppress_context__:
            earlier = present.__context__
        present = earlier
    return "\n".join(reversed(parts))


def _one_exception(error: BaseException, raised_at: TracebackType | None) -> str:
    frames = "".join(traceback.format_list(traceback.extract_tb(raised_at)))
    name, text = type(error).__name__, said(error)
    lines = [f"{frames}{name}" + ("" if text == name else f": {text}")]
    if isinstance(error, BaseExceptionGroup):
        lines += [exception_text(part) for part in error.exceptions]
    return "\n".join(lines)


def _tells_all() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)
