"""An agent behind the http runner: checks the signature, takes the turn, answers.

    AGENT_SIGNING_SECRET=whsec_… python http_agent.py 9000
    manage.py agents set echo --url http://127.0.0.1:9000/

Needs nothing but Python. The signature is that of https://www.standardwebhooks.com: HMAC-SHA256
over `webhook-id.webhook-timestamp.body`, with the bytes that the base64 behind `whsec_` stands for.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOLERANCE_SECONDS = 5 * 60


def is_genuine(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> bool:
    """Whether these very bytes were signed with the secret, less than five minutes ago."""
    message_id = headers.get("webhook-id", "")
    timestamp = headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.".encode() + body
    right = b"v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest())
    shown = headers.get("webhook-signature", "").split()
    return any(hmac.compare_digest(right, signature.encode()) for signature in shown)


class Agent(BaseHTTPRequestHandler):
    """Takes turns. A status in the 200s is delivered; 500 would be tried again."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        secret = os.environ["AGENT_SIGNING_SECRET"]
        if not is_genuine(dict(self.headers), body, secret, time.time()):
            self.send_error(401)
            return
        turn = json.loads(body)
        print(turn["runId"], turn["sessionKey"], turn["prompt"], sep="\n", flush=True)  # noqa: T201
        answer = json.dumps({"reply": f"took {len(turn['events'])} events"}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Agent).serve_forever()
