"""The whole time of `manage.py system_event`, beside that of setting up an empty Django project.

    python -m bench cli [--rounds 20]

Both are processes that start, do their one thing and end, in turns; the medians are compared. The
empty project is what `django-admin startproject` makes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from bench import machine
from bench.report import Report
from tests.live import ROOT

HELP = "whole-process time of system_event"
AIM = 2.5
EMPTY = "import django; django.setup()"
MIGRATED = (
    "from django.core.management import call_command; call_command('migrate', verbosity=0)\n"
    "from wake.models import GatewaySettings; GatewaySettings.ensure()"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20)


def run(options: argparse.Namespace, directory: Path) -> Report:
    return measure(directory, rounds=options.rounds)


def measure(directory: Path, *, rounds: int) -> Report:
    manage = [sys.executable, str(ROOT / "manage.py")]
    settings = {"DATABASE_URL": f"sqlite:///{directory / 'cli.sqlite3'}", "SECRET_KEY": "bench"}
    _seconds([*manage, "shell", "-v0", "-c", MIGRATED], settings)
    _seconds([sys.executable, "-m", "django", "startproject", "empty", str(directory)], {})
    empty = {"DJANGO_SETTINGS_MODULE": "empty.settings", "PYTHONPATH": str(directory)}
    report = Report("cli", machine.describe(directory))
    commands: list[float] = []
    empties: list[float] = []
    # The first of each finds files that nobody has read yet.
    for number in range(rounds + 1):
        spent = _seconds([sys.executable, "-c", EMPTY], empty)
        event = [*manage, "system_event", f"event {number}", "--session-key", "bench"]
        ours = _seconds(event, settings)
        if number:
            empties.append(spent)
            commands.append(ours)
    report.add("empty project", median(empties) * 1000, "ms")
    report.add("system_event", median(commands) * 1000, "ms")
    ratios = [ours / spent for ours, spent in zip(commands, empties, strict=True)]
    report.ratio("system_event / empty project", ratios, AIM, "less")
    return report


def _seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    # DJANGO_SETTINGS_MODULE of this process is not meant for `startproject`.
    inherited = {
        name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"
    }
    began = time.perf_counter()
    subprocess.run(command, env={**inherited, **environment}, check=True, capture_output=True)
    return time.perf_counter() - began
