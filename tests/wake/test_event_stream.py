"""Server-sent events, in pieces of any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wake.heartbeats.runners.event_stream import EventStream, EventTooLong

STREAMS = st.lists(
    st.sampled_from(
        [b"data", b":", b" ", b"\n", b"\r", b"\r\n", b"a", "ö".encode(), b"\xff", b"\xef\xbb\xbf"]
    ),
    max_size=40,
).map(b"".join)


def read(*pieces: bytes, max_bytes: int = 1000) -> list[str]:
    stream = EventStream(max_bytes)
    return [event for piece in pieces for event in stream.feed(piece)]


@pytest.mark.parametrize(
    ("written", "events"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\n\ndata:  b \n\n", ["a", " b "]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\r\n\n", ["a", "b", "c"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"data\n\n", [""]),
        (b"data: a\ndata\n\n", ["a\n"]),
        (b": a comment\n\n:\n\ndata: a\n: another\n\n", ["a"]),
        (b"event: error\nid: 1\nretry: 5\ndata: a\ndataset: no\n\n", ["a"]),
        (b"event: ping\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),
        ("data: größer\n\n".encode(), ["größer"]),
        (b"data: \xff\xc3\n\n", ["\N{REPLACEMENT CHARACTER}" * 2]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b'{"error": "x"}\n\n', []),
        (b"", []),
    ],
)
def test_events_are_those_of_the_standard(written: bytes, events: list[str]) -> None:
    assert read(written) == events


@given(STREAMS, st.lists(st.integers(0, 100)))
def test_it_does_not_matter_where_pieces_end(written: bytes, cuts: list[int]) -> None:
    at = sorted(min(cut, len(written)) for cut in cuts)
    pieces = [written[a:b] for a, b in zip([0, *at], [*at, len(written)], strict=True)]
    one_by_one = [written[i : i + 1] for i in range(len(written))]
    assert read(*pieces) == read(*one_by_one) == read(written)


@pytest.mark.parametrize("piece", [b"x", b"data: xxxxxx\n", b"data: " + b"x" * 100 + b"\n\n"])
def test_an_endless_event_is_not_kept(piece: bytes) -> None:
    with pytest.raises(EventTooLong):
        read(*[piece] * 1000, max_bytes=100)


def test_what_is_kept_is_bounded_for_each_event() -> None:
    assert read(*[b"data: " + b"x" * 80 + b"\n\n"] * 10, max_bytes=100) == ["x" * 80] * 10
    assert read(*[b": " + b"x" * 80 + b"\n"] * 10, max_bytes=100) == []
