"""`kill -9` of the gateway while events are accepted and delivered (bench/crash.py, smaller)."""

from __future__ import annotations

from pathlib import Path

from bench import crash


def test_no_acknowledged_event_is_lost_when_the_gateway_is_killed(tmp_path: Path) -> None:
    count = crash.play(tmp_path, events=120, sessions=12, kills=2)
    assert count.kills == 2
    assert sum(len(order) for order in count.acknowledged.values()) >= 100
    assert count.interrupted, "no kill hit a running heartbeat: this showed nothing"
    assert count.lost() == []
    assert count.out_of_order() == []
    assert count.repeated_without_cause() == []
