"""Server-sent events, as HTML's standard defines the format: pure, bytes in, data out."""

from __future__ import annotations

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class EventTooLong(ValueError):
    """One event of a stream is longer than its reader keeps."""


class EventStream:
    """Takes a stream in pieces of any size; what it gives back does not depend on where they end.

    `max_bytes` bounds what is kept of an event that is not whole yet.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._held_bytes = 0
        self._at_start = True
        # The last piece ended in a carriage return: a line feed that follows belongs to it.
        self._after_return = False

    def feed(self, piece: bytes) -> list[str]:
        """Return the data of the events that this piece completes, in their order.

        Bytes that are not UTF-8 become U+FFFD. Raises EventTooLong.
        """
        if not piece:
            return []
        ended_in_return, self._after_return = self._after_return, piece.endswith(b"\r")
        if ended_in_return and piece.startswith(b"\n"):
            piece = piece[1:]
        events: list[str] = []
        *ends, rest = _LINE_END.split(piece)
        for end in ends:
            self._line += end
            event = self._take_line(bytes(self._line))
            if event is not None:
                events.append(event)
            self._line.clear()
        self._line += rest
        if self._held_bytes + len(self._line) > self._max_bytes:
            raise EventTooLong(f"an event of more than {self._max_bytes} bytes")
        return events

    def _take_line(self, line: bytes) -> str | None:
        """Return the data of the event that this line ends, if it ends one that has any."""
        if self._at_start:
            line, self._at_start = line.removeprefix(_BYTE_ORDER_MARK), False
        if not line:
            data, self._data, self._held_bytes = self._data, [], 0
            return b"\n".join(data).decode("utf-8", "replace") if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._held_bytes += len(value)
            if self._held_bytes > self._max_bytes:
                raise EventTooLong(f"an event of more than {self._max_bytes} bytes")
        return None
