"""A client in another language than the server's, written from the protocol page alone.

Node with its `ws` package, in `node_client/`, tests a real gateway from outside: the handshake with
and without a device's proof, every row of the page's tables, and every event.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.live import LiveGateway
from tests.wake.gateway_server import TOKEN, serving
from wake.gateway.connection import Connection

CLIENT = Path(__file__).with_name("node_client")
NODE_SECONDS = 60
# The agents main and ops are echoes, failing fails once and for all, retired is there no more.
AGENTS = """
from django.core.management import call_command
call_command("agents", "set", "main", program=["/bin/cat"])
call_command("agents", "set", "ops", program=["/bin/cat"])
failing = ["/bin/sh", "-c", "echo nobody is at home >&2; exit 1"]
call_command("agents", "set", "failing", "--max-attempts", "1", program=failing)
call_command("agents", "set", "retired", "--disable")
call_command("agents", "set", "boxed", "--runner", "inbox", "--every", "off")
"""
QUICKLY = (
    "--no-audit",
    "--no-fund",
    "--prefer-offline",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
)
OLDEST_NODE = 18  # the one of Debian 12
# How npm says that it could not reach the registry; anything else is a defect.
UNREACHABLE = (
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONN",
    "ENETUNREACH",
    "EHOSTUNREACH",
    "TIMEDOUT",
    "TIMEOUT",
)


def _node_is_there() -> bool:
    if not shutil.which("node") or not shutil.which("npm"):
        return False
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    return int(version.stdout.removeprefix("v").split(".")[0]) >= OLDEST_NODE


pytestmark = pytest.mark.skipif(
    not _node_is_there(), reason=f"Node {OLDEST_NODE} or newer with npm is not installed"
)


@pytest.fixture
def client(tmp_path: Path) -> Path:
    """A directory with the client and the packages that its lock file names."""
    directory = tmp_path / "node_client"
    shutil.copytree(CLIENT, directory, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        ["npm", "ci", *QUICKLY],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if installed.returncode and any(code in installed.stderr for code in UNREACHABLE):
        pytest.skip("npm cannot reach its registry, and has no copy of the package ws")
    assert installed.returncode == 0, installed.stderr
    return directory


@pytest.fixture
def impatient_url(gateway_url: str) -> Iterator[str]:
    """The ws:// URL of a gateway that waits a second for `connect` and ticks every 0.2 s."""
    with serving(Connection.as_asgi(handshake_seconds=1, tick_seconds=0.2)) as url:
        yield url


def _assert_passes(client: Path, files: list[Path], environment: Mapping[str, str]) -> None:
    """Run Node's tests in these files one after the other; what it prints names each of them."""
    assert files
    with (client / "output").open("w+") as output:
        process = subprocess.Popen(
            ["node", "--test", "--test-concurrency=1", "--test-reporter=spec", *files],
            cwd=client,
            env={**os.environ, "NO_COLOR": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status: int | str = process.wait(NODE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"not ended after {NODE_SECONDS} s"
        output.seek(0)
        said = output.read()
    assert status == 0, f"{status}\n{said}"
    assert "skipped 0\n" in said
    assert "pass 0\n" not in said


def test_a_client_written_from_the_protocol_page_alone(
    client: Path, impatient_url: str, tmp_path: Path
) -> None:
    last = client / "shutdown.test.mjs"
    others = sorted(set(client.glob("*.test.mjs")) - {last})
    given = {"OPENCLAW_GATEWAY_TOKEN": TOKEN}
    with LiveGateway(tmp_path, environment=given) as gateway:
        gateway.manage("shell", "-c", AGENTS)
        assert gateway.process
        environment = {
            "GATEWAY_URL": gateway.ws_url,
            "GATEWAY_TOKEN": TOKEN,
            "GATEWAY_PID": str(gateway.process.pid),
            "ADMIN_PASSWORD": gateway.admin_password,
            "IMPATIENT_GATEWAY_URL": impatient_url,
        }
        _assert_passes(client, others, environment)
        _assert_passes(client, [last], environment)
        assert gateway.stop() == 0
