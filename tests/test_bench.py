"""The benches run, and what they say can be believed: shown on servers of known behaviour."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from bench import cli, connections, latency, start, wake
from bench.chart import draw
from bench.load import Load, Wakes, head_of_whole
from bench.report import Report, histogram, quantiles
from tests.live import ROOT

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"eventId":"e"}'

# Given a request and when the server began, in seconds of monotonic(): its answer, or None to
# close the connection.
Answer = Callable[[bytes, float], bytes | None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Serve on a real socket, a thread for each connection, one request after the other."""
    listening = socket.create_server(("127.0.0.1", 0))
    began = time.monotonic()

    def serve(sock: socket.socket) -> None:
        with sock:
            while request := sock.recv(65_536):
                said = answer(request, began)
                if said is None:
                    return
                sock.sendall(said)

    def accept() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hooks/wake"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def stall(request: bytes, began: float) -> bytes:
    """Answer nobody between 0.2 s and 0.6 s after the beginning."""
    since = time.monotonic() - began
    if 0.2 < since < 0.6:
        time.sleep(0.6 - since)
    return ANSWER


def test_a_stall_is_seen_by_all_that_were_to_be_sent_meanwhile() -> None:
    with server(stall) as url, Load(Wakes(url, ""), connections=2) as load:
        outcome = load.at_rate(200, 1)
    assert outcome.statuses == {200: 200}
    # Of 200 requests 80 fall into the stall, and wait for what is left of it: half of them more
    # than half of it. Without the correction two would be seen to wait, one for each connection.
    assert 30 <= sum(latency > 0.2 for latency in outcome.latencies) <= 60
    assert 0.3 < max(outcome.latencies) < 0.6


def test_a_closed_loop_has_one_request_under_way_on_each_connection() -> None:
    with server(stall) as url, Load(Wakes(url, ""), connections=2) as load:
        outcome = load.closed_loop(0.8)
    assert sum(latency > 0.2 for latency in outcome.latencies) == 2


def test_what_is_never_answered_counts_with_how_long_it_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.load.GRACE_SECONDS", 0.2)

    def hang(request: bytes, began: float) -> bytes:
        time.sleep(1)
        return ANSWER

    with server(hang) as url, Load(Wakes(url, ""), connections=2) as load:
        outcome = load.at_rate(50, 0.4)
    assert outcome.unanswered == len(outcome.latencies) == 20
    assert min(outcome.latencies) == pytest.approx(0.22, abs=0.1)
    assert max(outcome.latencies) == pytest.approx(0.6, abs=0.1)


def test_a_rate_is_kept() -> None:
    with server(lambda request, began: ANSWER) as url, Load(Wakes(url, "")) as load:
        outcome = load.at_rate(500, 0.5)
    assert outcome.statuses == {200: 250}
    assert outcome.seconds == pytest.approx(0.5, abs=0.1)


def test_every_connection_that_ends_is_replaced_and_what_broke_is_counted() -> None:
    answers = iter([ANSWER.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), None, ANSWER])

    def answer(request: bytes, began: float) -> bytes | None:
        return next(answers)

    with server(answer) as url, Load(Wakes(url, ""), connections=1) as load:
        outcome = load.number(3)
    assert (outcome.statuses, outcome.broken, outcome.unanswered) == ({200: 2}, 1, 0)


def test_requests_are_wakes_with_texts_that_differ_for_sessions_in_turn() -> None:
    seen: list[bytes] = []

    def answer(request: bytes, began: float) -> bytes:
        seen.append(request)
        return ANSWER

    with (
        server(answer) as url,
        Load(Wakes(url, "a-token", 2), connections=1, keep_ids=True) as load,
    ):
        outcome = load.number(4)
    heads, bodies = zip(*(request.split(b"\r\n\r\n") for request in seen), strict=True)
    assert all(b"\r\nAuthorization: Bearer a-token\r\n" in head for head in heads)
    sent = [msgspec.json.decode(body) for body in bodies]
    assert [body["sessionKey"] for body in sent] == ["hook:bench:0", "hook:bench:1"] * 2
    assert len({body["text"] for body in sent}) == 4
    assert outcome.answered_at.keys() == {"e"}


@pytest.mark.parametrize(
    ("answer", "is_whole"),
    [
        (ANSWER, True),
        (ANSWER[:-1], False),
        (ANSWER[:20], False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
    ],
)
def test_an_answer_is_taken_when_it_is_whole(answer: bytes, is_whole: bool) -> None:
    assert (head_of_whole(answer) is not None) == is_whole


def test_quantiles_and_steps() -> None:
    ordered = [number / 1000 for number in range(1, 101)]  # 1 ms to 100 ms
    assert quantiles(ordered) == {
        "p50": 0.051,
        "p90": 0.091,
        "p99": 0.1,
        "p99.9": 0.1,
        "max": 0.1,
    }
    assert histogram(ordered) == {
        "up to 1 ms": 1,
        "up to 2 ms": 1,
        "up to 5 ms": 3,
        "up to 10 ms": 5,
        "up to 20 ms": 10,
        "up to 50 ms": 30,
        "up to 100 ms": 50,
    }
    assert histogram([]) == {}


# --- Each bench, small --------------------------------------------------------------------------


def test_our_own_gateway_is_compared_and_all_that_it_answered_is_stored(tmp_path: Path) -> None:
    report = wake.compare(tmp_path, seconds=0.3, rounds=1, turn_ms=0)
    assert report.failures == []
    assert report.value("answered") > 0
    assert 0 < report.value("gateway / bare ASGI function") < 1
    assert report.value("bare SQLite, 32 rows a commit") > report.value(
        "bare SQLite, 1 row a commit"
    )


@pytest.mark.parametrize("runner", ["http", "command"])
def test_every_wake_is_followed_to_its_runner(tmp_path: Path, runner: str) -> None:
    report = latency.measure(tmp_path, rate=20, sessions=5, seconds=0.5, runner=runner)
    assert report.failures == []
    assert report.value("answered") == 10
    assert report.value("answer to runner, max") > 0


def test_a_gateway_is_timed_to_its_ready_line_and_weighed(tmp_path: Path) -> None:
    report = start.measure(tmp_path, rounds=1, wakes=20)
    assert report.failures == []
    assert 0 < report.value("ready after") < 60
    assert report.value("resident after 20 wakes") > 20


def test_the_command_line_is_compared_with_an_empty_project(tmp_path: Path) -> None:
    report = cli.measure(tmp_path, rounds=1)
    assert report.value("system_event / empty project") > 0.5


def test_connections_are_told_of_an_event(tmp_path: Path) -> None:
    options = argparse.Namespace(connections=10, no_deflate=False, no_slow_client=True)
    report = connections.run(options, tmp_path)
    assert report.failures == []
    assert report.value("told of one event") == 10


def test_the_queue_is_timed_on_databases_of_its_own_and_the_reports_make_a_chart(
    tmp_path: Path,
) -> None:
    # In a process of its own: it moves Django's connection from database to database.
    bench = [sys.executable, "-m", "bench"]
    written = tmp_path / "queue.json"
    cases = ["--cases", "64/32,128/64", "--rounds", "1", "--each", "1"]
    said = subprocess.run(
        [*bench, "queue", *cases, "--json", written],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    report = msgspec.json.decode(written.read_bytes(), type=Report)
    assert report.value("128 in 64: enqueue 1") > 0
    assert {ratio.name for ratio in report.ratios} == {
        "128 in 64: enqueue 1",
        "128 in 64: enqueue 32",
        "128 in 64: claim and settle 2",
    }
    assert str(ROOT) not in written.read_text()
    assert socket.gethostname() not in said.stdout
    chart = draw({"queue": msgspec.json.decode(written.read_bytes())})
    bars = ElementTree.fromstring(chart).findall("{*}rect")  # noqa: S314 - our own
    assert len(bars) == 3
