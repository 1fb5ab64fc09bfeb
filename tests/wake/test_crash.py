"""`kill -9` of the gateway while events are accepted and delivered (bench/crash.py, smaller)."""

from __future__ import annotations

from pathlib import Path

from bench import crash


def test_no_acknowledged_event_is_lost_when_the_gateway_is_killed(tmp_path: Path) -> None:
    report = crash.run(tmp_path, events=120, sessions=12, kills=2)
    assert report.kills == 2
    assert sum(len(order) for order in report.acknowledged.values()) >= 100
    assert report.interrupted, "no kill hit a running heartbeat: this showed nothing"
    assert report.lost() == []
    assert report.out_of_order() == []
    assert report.repeated_without_cause() == []
