"""A stand-in for an OpenAI-compatible chat server, and the answers that such servers give."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Received:
    """One request as the server saw it; header names in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Who said what."""
        return [(message["role"], message["content"]) for message in self.body["messages"]]


@dataclass
class ChatServer:
    """A server that gives the answers a test has set, in their order, and the last one for good."""

    origin: str
    answers: list[Answer] = field(default_factory=list)
    requests: list[Received] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """The base URL, as an agent has it."""
        return f"{self.origin}/v1"


@contextlib.contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Serve on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append(Received(self.path, headers, json.loads(body)))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Listening(ThreadingHTTPServer):
        request_queue_size = 128

    with Listening(("127.0.0.1", 0), Handler) as listening:
        server = ChatServer(f"http://127.0.0.1:{listening.server_port}")
        serving = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        yield server
        listening.shutdown()


def says(
    body: bytes | Any, status: int = 200, kind: str = "application/json", **headers: str
) -> Answer:
    """Answer with this body, or with this object as JSON (`retry_after` is Retry-After)."""
    written = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(written)))
        request.end_headers()
        request.wfile.write(written)

    return answer


def streams(pieces: Sequence[bytes], *, breaks_off: bool = False) -> Answer:
    """Answer with these pieces of a stream, each sent by itself; end it, or only the connection."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream; charset=utf-8")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for piece in pieces:
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if breaks_off:
            request.close_connection = True
        else:
            request.wfile.write(b"0\r\n\r\n")

    return answer


def whole(reply: str | None, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """Return a whole answer, as a server gives it that is not asked to stream."""
    message = {"role": "assistant", "content": reply} | message
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": {}}


def chunk(content: str | None = None, finish_reason: str | None = None, **delta: Any) -> bytes:
    """Return one event of a stream."""
    if content is not None:
        delta["content"] = content
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def event(data: Any) -> bytes:
    """Return one server-sent event that holds this object."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def stream(*words: str) -> list[bytes]:
    """Return a whole stream, as vLLM sends it: who speaks, the words, why it ends, the usage."""
    usage = event({"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 9}})
    said = [chunk(word) for word in words]
    return [chunk("", role="assistant"), *said, chunk(finish_reason="stop"), usage, DONE]
