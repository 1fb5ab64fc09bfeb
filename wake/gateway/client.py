"""A small synchronous client of the gateway protocol, for the command line.

It speaks to this gateway and to OpenClaw's own. Every step has a time limit, and every way to
fail ends in `GatewayClientError`, whose text is one line for a person.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from wake.connecting import (
    CLOSE_SECONDS,
    MAX_MESSAGE_BYTES,
    STEP_SECONDS,
    connect_params,
    is_this_machine,
    websocket_url,
)
from wake.redaction import without_credentials


class GatewayClientError(Exception):
    """The gateway could not be reached, or refused; the text says which."""


class GatewayClient:
    """A connection that is past its handshake."""

    def __init__(self, connection: ClientConnection, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """Return the payload of the response. Raises GatewayClientError when it is an error."""
        request_id = str(uuid4())
        self._connection.send(
            json.dumps({"type": "req", "id": request_id, "method": method, "params": params})
        )
        # A frame that the gateway could not read is answered under the id "invalid".
        response = self._wait_for(
            lambda frame: frame.get("type") == "res" and frame.get("id") in (request_id, "invalid")
        )
        if response.get("ok") is not True:
            error = response.get("error")
            message = error.get("message") if isinstance(error, dict) else None
            raise GatewayClientError(str(message or "the gateway refused without a reason"))
        return response.get("payload")

    def wait_for_challenge(self) -> None:
        """Wait until the gateway has spoken first."""
        self._wait_for(lambda frame: frame.get("event") == "connect.challenge")

    def _wait_for(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first frame that is wanted; others, such as events, are passed over."""
        deadline = time.monotonic() + self._seconds
        while True:
            message = self._connection.recv(max(0.0, deadline - time.monotonic()))
            try:
                frame = json.loads(message)
            except (ValueError, RecursionError) as error:
                raise GatewayClientError("the gateway sent something that is not JSON") from error
            if isinstance(frame, dict) and is_wanted(frame):
                return frame


@contextmanager
def connect(
    url: str, token: str, *, scopes: tuple[str, ...], seconds: float = STEP_SECONDS
) -> Iterator[GatewayClient]:
    """Connect to a gateway at a ws, wss, http or https URL, and shake hands.

    Raises GatewayClientError, also from within the block.
    """
    try:
        with open_websocket(
            websocket_url(url),
            open_timeout=seconds,
            close_timeout=CLOSE_SECONDS,
            max_size=MAX_MESSAGE_BYTES,
            # A proxy of the environment cannot reach what is meant by this machine.
            proxy=None if is_this_machine(url) else True,
        ) as connection:
            client = GatewayClient(connection, seconds)
            client.wait_for_challenge()
            client.call("connect", connect_params(token, scopes))
            yield client
    except TimeoutError as error:
        raise GatewayClientError(f"no answer from {_shown(url)} within {seconds:g} s") from error
    except ConnectionClosed as error:
        raise GatewayClientError(f"{_shown(url)} closed the connection: {error}") from error
    except (OSError, WebSocketException, ValueError, ImportError) as error:
        raise GatewayClientError(f"cannot connect to {_shown(url)}: {error}") from error


def _shown(url: str) -> str:
    return without_credentials(url)
