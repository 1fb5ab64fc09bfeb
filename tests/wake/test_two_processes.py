"""Two heartbeat processes share the work of one database."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from django.conf import settings

from tests.live import ROOT, LiveGateway

# Enough on SQLite to see that the two share; the full number where several machines would.
SESSIONS = 1000 if settings.DATABASES["default"]["ENGINE"].endswith("postgresql") else 100

# A directory can be made once only: a second run of the session at the same time would show.
AGENT = """
lock="$0/lock-$OPENCLAW_SESSION_KEY"
mkdir "$lock" 2>/dev/null || echo "$OPENCLAW_SESSION_KEY" >> "$0/at-the-same-time"
cat > /dev/null
echo "$PPID $OPENCLAW_SESSION_KEY" >> "$0/runs"
rmdir "$lock"
"""
FILL = f"""
from django.utils import timezone
from wake import queue
from wake.models import DueReason
from wake.session_keys import SessionKey
now = timezone.now()
queue.enqueue(
    [queue.Entry(SessionKey("main", f"agent:main:s{{n % {SESSIONS}}}"), f"event {{n}}", "cli",
                 False, queue.Due(now, DueReason.WAKE)) for n in range(2 * {SESSIONS})],
    now=now, max_queued=10,
)
"""
COUNT = (
    "from wake.models import SystemEvent, Heartbeat; "
    "print(SystemEvent.objects.filter(state='delivered').count(), "
    "Heartbeat.objects.exclude(status='delivered').count())"
)


def test_all_due_sessions_are_done_and_none_twice_at_a_time(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    with LiveGateway(tmp_path, arguments=("--no-heartbeats",)) as gateway:
        gateway.manage(
            "agents", "set", "main", "--every", "off", "--", "/bin/sh", "-c", AGENT, str(inbox)
        )
        gateway.manage("shell", "-c", FILL)
        workers = [
            subprocess.Popen(
                [sys.executable, ROOT / "manage.py", "heartbeats"],
                cwd=tmp_path,
                env=gateway.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(2)
        ]
        try:
            deadline = time.monotonic() + 60
            runs: list[list[str]] = []
            while len(runs) < SESSIONS and time.monotonic() < deadline:
                time.sleep(0.1)
                if (inbox / "runs").exists():
                    runs = [line.split() for line in (inbox / "runs").read_text().splitlines()]
        finally:
            for worker in workers:
                worker.terminate()
            statuses = [worker.wait(30) for worker in workers]
        delivered, unsettled = gateway.manage("shell", "-v0", "-c", COUNT).stdout.split()
    assert statuses == [0, 0]
    assert not (inbox / "at-the-same-time").exists()
    assert Counter(session for _, session in runs) == {
        f"agent:main:s{number}": 1 for number in range(SESSIONS)
    }
    share = Counter(worker for worker, _ in runs)
    assert len(share) == 2, "one of the processes did nothing"
    assert (delivered, unsettled) == (str(2 * SESSIONS), "0")
