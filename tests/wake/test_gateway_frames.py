"""Whatever a client sends, the gateway answers within the protocol, and never raises or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from tests.wake.gateway_server import Wire, connect_params, connected
from wake.gateway import scopes
from wake.gateway.frames import InvalidFrame, decode_params, decode_request
from wake.gateway.methods import METHODS
from wake.gateway.outbox import Outbox
from wake.gateway.presence import PERIODIC_REASONS, is_news, parse_line

_numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | _numbers | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=10,
)
_FIELDS = [
    *["mode", "text", "sessionKey", "agentId", "enabled", "host", "reason", "tags", "device"],
    *["key", "search", "limit", "offset", "before", "state", "runId", "minutes"],
]
likely_params = st.dictionaries(
    st.sampled_from(_FIELDS),
    st.sampled_from(
        [
            "now",
            "Node: a (b) · mode c",
            "agent:main:x",
            "main",
            "",
            "agent:ops",
            1.5,
            7,
            "\0",
            "e1h1",
        ]
    )
    | json_values,
)
requests = st.fixed_dictionaries(
    {
        "type": st.just("req") | json_values,
        "id": st.text(min_size=1, max_size=8) | json_values,
        "method": st.sampled_from([*METHODS, "connect"]) | json_values,
    },
    optional={"params": likely_params | json_values},
)
# Unpaired surrogates: JSON can write them, UTF-8 cannot.
surrogates = st.just('{"type":"req","id":"\\ud800","method":"wake"}')
frames = (
    st.text(max_size=50)
    | st.binary(max_size=50)
    | surrogates
    | (requests | json_values).map(json.dumps)
)

_settings = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_response(frame: Mapping[str, Any]) -> None:
    """Check that a frame is a response of the protocol's shape."""
    assert frame["type"] == "res"
    assert isinstance(frame["id"], str)
    if frame["ok"] is True:
        assert set(frame) == {"type", "id", "ok", "payload"}
        return
    assert set(frame) == {"type", "id", "ok", "error"}
    assert frame["error"]["code"] in {"INVALID_REQUEST", "FORBIDDEN", "UNAVAILABLE"}
    assert frame["error"]["message"]
    assert "internal error" not in frame["error"]["message"]


@_settings
@given(sent=st.lists(frames, max_size=12))
def test_every_frame_after_hello_has_one_answer(gateway_url: str, sent: list[str | bytes]) -> None:
    with connected(gateway_url) as wire:
        for frame in sent:
            wire.send(frame)
        for _ in sent:
            check_response(wire.response())
        assert wire.payload("health")["ok"] is True


@_settings
@given(sent=st.lists(frames, min_size=1, max_size=3))
def test_a_bad_first_frame_is_answered_at_most_once_and_closed(
    untouched_gateway_url: str, sent: list[str | bytes]
) -> None:
    with Wire(untouched_gateway_url) as wire:
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - where it ends is open
            for frame in sent:
                wire.send(frame)
            check_response(wire.response())
            wire.response()
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1008


@_settings
@given(sent=st.lists(st.binary(min_size=1, max_size=40), max_size=5), is_known=st.booleans())
def test_bytes_that_are_no_websocket_end_their_connection_only(
    untouched_gateway_url: str, untouched_wire: Wire, sent: list[bytes], is_known: bool
) -> None:
    with Wire(untouched_gateway_url) as wire:
        if is_known:
            wire.payload("connect", connect_params())
        with contextlib.suppress(OSError):  # it may be closed half-way
            for junk in sent:
                wire.connection.socket.sendall(junk)
            wire.connection.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - after what there is to say
            while True:
                wire.receive(5)
    assert untouched_wire.payload("health")["ok"] is True


@_settings
@given(changes=st.dictionaries(st.sampled_from([*connect_params(), "scopes"]), json_values))
def test_connect_with_any_params_is_taken_or_refused(
    untouched_gateway_url: str, changes: dict[str, Any]
) -> None:
    with Wire(untouched_gateway_url) as wire:
        response = wire.call("connect", {**connect_params(), **changes})
        check_response(response)
        if response["ok"]:
            assert wire.call("last-heartbeat")["type"] == "res"
        else:
            assert wire.close_code() in {1002, 1008}


@given(
    data=st.binary()
    | frames.map(
        lambda frame: frame if isinstance(frame, bytes) else frame.encode("utf-8", "replace")
    )
)
def test_decoding_raises_nothing_but_its_own_error(data: bytes) -> None:
    with contextlib.suppress(InvalidFrame):
        request = decode_request(data)
        for method in METHODS.values():
            with contextlib.suppress(InvalidFrame):
                decode_params(request.params, method.params)


def test_deep_nesting_is_an_invalid_frame() -> None:
    deep = b'{"type":"req","id":"1","method":"x","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(InvalidFrame, match="nested too deep"):
        decode_request(deep)


def test_wrong_params_are_named_for_every_required_field() -> None:
    for method in METHODS.values():
        for field in msgspec.structs.fields(method.params):
            with pytest.raises(InvalidFrame, match=f"^{field.encode_name} ") as refused:
                decode_params(
                    msgspec.Raw(b'{"%b":{"a":1}}' % field.encode_name.encode()), method.params
                )
            assert "object" not in str(refused.value)


# --- Scopes ---------------------------------------------------------------------------------------

_SCOPES = st.sampled_from([*scopes.ALL, "operator.approvals", "root", "operator"])


@given(asked=st.lists(_SCOPES), held=st.sets(_SCOPES))
def test_granted_scopes_are_asked_for_and_held(asked: list[str], held: set[str]) -> None:
    granted = scopes.grant(asked, held)
    assert set(granted) <= set(asked or held)
    for scope in ("operator.read", "operator.write", "operator.admin"):
        assert scopes.includes(held, scope) or not scopes.includes(granted, scope)


# --- Presence lines -------------------------------------------------------------------------------


@given(text=st.text(alphabet="Node: ·()apmoderasn\n\0xy"))
def test_any_presence_line_can_be_read_and_stored(text: str) -> None:
    for value in parse_line(f"Node:{text}").values():
        assert 0 < len(value) <= 100


@given(stored=st.dictionaries(st.sampled_from(["host", "ip", "reason"]), st.sampled_from("ab")))
def test_the_same_report_again_is_no_news(stored: dict[str, str]) -> None:
    assert not is_news(stored, stored)
    for reason in PERIODIC_REASONS:
        assert not is_news(stored, {**stored, "reason": reason})
    assert is_news(stored, {**stored, "host": "another"})


# --- Sending --------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_is_dropped() -> None:
    reading = asyncio.Event()
    sent: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        await reading.wait()
        sent.append(message)

    outbox = Outbox(send, limit=10)
    running = asyncio.create_task(outbox.run())
    outbox.put("12345")
    await asyncio.sleep(0)  # the first one is being sent
    outbox.put("12345")
    assert not outbox.closed
    outbox.put("1")
    assert outbox.closed
    outbox.put("after the end")
    reading.set()
    await asyncio.wait_for(running, 5)
    assert sent == [
        {"type": "websocket.send", "text": "12345"},
        {"type": "websocket.close", "code": 1008, "reason": "slow consumer"},
    ]


async def test_what_is_read_makes_room() -> None:
    sent: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    outbox = Outbox(send, limit=10)
    running = asyncio.create_task(outbox.run())
    for number in range(20):
        outbox.put(f"{number:08}")
        await asyncio.sleep(0)
    outbox.close(1000, "")
    outbox.close(1008, "only the first close counts")
    await asyncio.wait_for(running, 5)
    assert [message.get("text") for message in sent] == [*(f"{n:08}" for n in range(20)), None]
    assert sent[-1]["code"] == 1000
