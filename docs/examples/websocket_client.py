"""Wake an agent's session over the gateway's WebSocket, and print the receipt.

    OPENCLAW_GATEWAY_TOKEN=ocg_… python websocket_client.py "CI finished" discord:channel:123

Needs `pip install websockets`. OPENCLAW_GATEWAY_URL is ws://127.0.0.1:8000 when it is not set.
"""

import json
import os
import sys

from websockets.sync.client import ClientConnection, connect


def call(gateway: ClientConnection, method: str, params: dict[str, object]) -> object:
    """Send one request and return the payload of its response; events are passed over."""
    gateway.send(json.dumps({"type": "req", "id": method, "method": method, "params": params}))
    while True:
        frame = json.loads(gateway.recv(timeout=10))
        if frame["type"] == "res" and frame["id"] == method:
            return frame["payload"] if frame["ok"] else sys.exit(frame["error"]["message"])


with connect(os.environ.get("OPENCLAW_GATEWAY_URL", "ws://127.0.0.1:8000")) as gateway:
    gateway.recv(timeout=10)  # connect.challenge: the gateway speaks first
    call(
        gateway,
        "connect",
        {
            "minProtocol": 3,
            "maxProtocol": 4,
            "client": {"id": "example", "version": "1", "platform": sys.platform, "mode": "cli"},
            "auth": {"token": os.environ["OPENCLAW_GATEWAY_TOKEN"]},
        },
    )
    text, session_key = sys.argv[1:]
    print(call(gateway, "wake", {"mode": "now", "text": text, "sessionKey": session_key}))  # noqa: T201
