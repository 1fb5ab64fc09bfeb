"""The gateway's WebSocket on a real socket in this process, and a client that hides nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import uvicorn
from django.db.models import Model
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from wake.gateway.frames import MAX_HANDSHAKE_BYTES
from wake.models import Heartbeat, PresenceEntry, Session, SystemEvent
from wake.websocket_protocol import GatewayWebSocketProtocol

TOKEN = "the-shared-gateway-token"
Json = dict[str, Any]


@contextmanager
def serving(
    application: Any,
    *,
    http: Any = "auto",
    ws: Any = GatewayWebSocketProtocol,
    ws_max_size: int = MAX_HANDSHAKE_BYTES,
) -> Iterator[str]:
    """Serve an ASGI application with uvicorn on a thread, and give its ws:// URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            http=http,
            ws=ws,
            ws_max_size=ws_max_size,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


class Wire:
    """One connection: what is sent and received, frame by frame."""

    def __init__(self, url: str, **options: Any) -> None:
        self._opened = connect(
            url, open_timeout=10, close_timeout=1, proxy=None, max_size=None, **options
        )
        self.numbers: list[int] = []  # of the events that came
        self.connection = self._opened.__enter__()
        self.challenge: Json = self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def receive(self, seconds: float = 10) -> Json:
        frame: Json = json.loads(self.connection.recv(seconds))
        if frame["type"] == "event":
            self.numbers.append(frame["seq"])
        return frame

    def response(self, seconds: float = 10) -> Json:
        """Return the next response; events before it are passed over."""
        while (frame := self.receive(seconds))["type"] == "event":
            pass
        return frame

    def event(self, name: str, seconds: float = 10) -> Json:
        """Return the payload of the next such event; other frames before it are passed over."""
        while (frame := self.receive(seconds)).get("event") != name:
            pass
        payload: Json = frame["payload"]
        return payload

    def send(self, frame: object) -> None:
        self.connection.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    def ask(self, method: str, params: object = None) -> str:
        """Send a request and return its id."""
        request_id = str(uuid4())
        frame = {"type": "req", "id": request_id, "method": method}
        self.send(frame if params is None else {**frame, "params": params})
        return request_id

    def response_to(self, request_id: str) -> Json:
        """Return the response; events and other responses before it are passed over."""
        while True:
            frame = self.receive()
            if frame["type"] == "res" and frame["id"] == request_id:
                return frame

    def call(self, method: str, params: object = None) -> Json:
        return self.response_to(self.ask(method, params))

    def payload(self, method: str, params: object = None) -> Any:
        """Return the payload of a call that must succeed."""
        response = self.call(method, params)
        assert response["ok"] is True, response
        return response["payload"]

    def error(self, method: str, params: object = None) -> Json:
        """Return the error of a call that must fail."""
        response = self.call(method, params)
        assert response["ok"] is False, response
        assert "payload" not in response
        error: Json = response["error"]
        return error

    def close_code(self, seconds: float = 10) -> int:
        """Wait for the end, letting nothing but events come before it, and return its code."""
        try:
            frame = self.response(seconds)
        except ConnectionClosed as closed:
            assert closed.rcvd  # noqa: PT017 - a close is what is wanted
            return closed.rcvd.code
        raise AssertionError(f"expected a close, got {frame!r}")


def connect_params(**changes: Any) -> Json:
    """Return the params of a good `connect`; None takes a field away."""
    params: Json = {
        "minProtocol": 4,
        "maxProtocol": 4,
        "client": {
            "id": "cli",
            "version": "2026.9.6",
            "platform": "linux",
            "deviceFamily": "Linux",
            "mode": "cli",
            "instanceId": str(uuid4()),
        },
        "caps": [],
        "auth": {"token": TOKEN},
        "role": "operator",
        **changes,
    }
    return {name: value for name, value in params.items() if value is not None}


def connected(url: str, *, options: Json | None = None, **changes: Any) -> Wire:
    """Return a connection past its handshake; `options` are the library's."""
    wire = Wire(url, **(options or {}))
    assert wire.payload("connect", connect_params(**changes))["type"] == "hello-ok"
    return wire


def stored_rows() -> int:
    """Return how many rows requests have left behind; none does where all were refused."""
    kinds: tuple[type[Model], ...] = (Session, SystemEvent, Heartbeat, PresenceEntry)
    return sum(kind._default_manager.count() for kind in kinds)
