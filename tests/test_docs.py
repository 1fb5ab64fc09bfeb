"""The documentation is current: what it says of settings, commands and formats, and its examples.

Blocks of the README under `<!-- run -->` are run against a real gateway, in their order; what
stands under `<!-- shows -->` is compared with what they print.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from tests.admin_browser import Operator
from tests.live import LiveGateway
from wake.configuration import AgentConfiguration
from wake.errors import SessionKeyError
from wake.gateway.methods import METHODS
from wake.gateway.reference import with_tables
from wake.heartbeats.prompt import build_prompt
from wake.heartbeats.runners import Turn
from wake.heartbeats.runners.http import request_body
from wake.models import DEFAULT_HEARTBEAT_PROMPT
from wake.queue import ClaimedEvent
from wake.session_keys import canonicalize
from wake.signing import new_signing_secret, signature_headers

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONTRACT = ROOT / "docs" / "contract.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))


def section(page: Path, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = page.read_text().partition(f"\n{heading}\n")
    assert found, f"{page.name} has no heading {heading!r}"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in `text`, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        row for place, row in enumerate(cells) if not _is_rule(row) and not _heads(cells, place)
    ]


def _is_rule(row: list[str]) -> bool:
    return all(set(cell) <= {"-"} for cell in row)


def _heads(cells: list[list[str]], place: int) -> bool:
    return place + 1 < len(cells) and _is_rule(cells[place + 1])


def test_every_setting_is_in_the_table_of_operations_and_nothing_else_is() -> None:
    source = (ROOT / "openclaw_site" / "settings.py").read_text()
    read = set(re.findall(r"\benv(?:\.\w+)?\(\s*\"([A-Z_]+)\"", source))

    described = {row[0].strip("`") for row in rows(section(OPERATIONS, "## Settings"))}

    assert len(read) > 5
    assert described == read


def test_every_command_is_in_the_contract() -> None:
    commands = {
        path.stem
        for path in ROOT.glob("*/management/commands/*.py")
        if not path.stem.startswith("_")
    }
    described = re.findall(r"^### `manage\.py (\w+)", CONTRACT.read_text(), re.MULTILINE)

    assert commands
    assert set(described) == commands


def test_every_option_of_our_commands_is_in_the_contract() -> None:
    text = section(CONTRACT, "## The command line")
    for path in ROOT.glob("*/management/commands/*.py"):
        for option in re.findall(r"\"(--[a-z][a-z-]+)\"", path.read_text()):
            assert option in text, f"{option} of {path.stem}"


def test_the_tables_of_the_protocol_are_what_the_code_declares() -> None:
    page = PROTOCOL.read_text()
    assert page == with_tables(page), "make docs writes them anew"


def test_every_method_says_what_it_answers() -> None:
    described = {row[0].strip("`"): row[3] for row in rows(section(PROTOCOL, "## Methods"))}
    assert set(described) == set(METHODS)
    assert all(described.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def session_key_examples() -> list[list[str]]:
    return rows(section(CONTRACT, "## Session keys"))


@pytest.mark.parametrize("row", session_key_examples(), ids=lambda row: f"{row[0]} {row[1]}")
def test_examples_of_session_keys_are_true(row: list[str]) -> None:
    written, agent, outcome = row[0].strip("`"), row[1].strip("`"), row[2]
    if outcome.startswith("refused: "):
        with pytest.raises(SessionKeyError) as refused:
            canonicalize(written, selected_agent=agent or None)
        assert outcome == f"refused: `{refused.value}`"
    else:
        found = canonicalize(written, selected_agent=agent or None)
        assert found is not None
        assert outcome == f"`{found.key}`"


def example_events() -> tuple[ClaimedEvent, ClaimedEvent]:
    return (
        ClaimedEvent(
            1,
            UUID("01a203ed-6f5d-7783-96f9-72a1e8369209"),
            "CI finished: 214 passed",
            "cli",
            False,
            datetime(2026, 11, 22, 15, 43, 41, 213000, UTC),
        ),
        ClaimedEvent(
            2,
            UUID("01a203ed-738f-70f0-9e76-84844bb73f66"),
            "The backup is done",
            "hook:wake",
            True,
            datetime(2026, 11, 22, 15, 43, 42, 0, UTC),
        ),
    )


def test_the_prompt_shown_is_the_prompt_built() -> None:
    shown = re.search(r"```text\n(.*?)\n```", section(CONTRACT, "## The prompt"), re.DOTALL)

    built = build_prompt(example_events(), DEFAULT_HEARTBEAT_PROMPT, "a1f7a67c375db51b")
    assert shown
    assert f"{shown[1]}\n" == built


def test_the_body_shown_is_what_the_http_runner_posts() -> None:
    shown = re.search(r"```json\n(.*?)\n```", section(CONTRACT, "### The runner `http`"), re.DOTALL)
    turn = Turn(
        run_id=UUID("01a203ed-6f5d-7783-96f9-72a1e8369210"),
        agent=AgentConfiguration(id="main", timeout=timedelta(minutes=10)),
        session_key="agent:main:discord:channel:123",
        reason="wake",
        attempt=1,
        prompt="[2026-11-22T15:43:41Z] System event …",
        events=example_events()[:1],
    )

    assert shown
    assert json.loads(shown[1]) == json.loads(request_body(turn))


def test_the_example_agent_tells_genuine_turns_from_others() -> None:
    is_genuine = runpy.run_path(str(ROOT / "docs" / "examples" / "http_agent.py"))["is_genuine"]
    secret, body, now = new_signing_secret(), '{"prompt": "ü"}'.encode(), datetime.now(UTC)
    headers = signature_headers(secret, "run-1", body, now)
    seconds = now.timestamp()

    assert is_genuine(headers, body, secret, seconds)
    assert is_genuine(
        headers | {"webhook-signature": f"v1,AAAA {headers['webhook-signature']}"},
        body,
        secret,
        seconds,
    )
    assert not is_genuine(headers, body + b" ", secret, seconds)
    assert not is_genuine(headers | {"webhook-id": "run-2"}, body, secret, seconds)
    assert not is_genuine(headers, body, new_signing_secret(), seconds)
    assert not is_genuine(headers, body, secret, seconds + 301)
    assert not is_genuine({}, body, secret, seconds)


# --- The README, walked -------------------------------------------------------------------------

_BLOCK = re.compile(r"<!-- (?P<mark>run[^>]*|shows) -->\n```\w+\n(?P<text>.*?)\n```", re.DOTALL)
_CHANGING = (
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "EVENT"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
)


def steps() -> Iterator[tuple[str, str, str]]:
    """Yield each block that is run: its mark, its text, and what the README says it shows."""
    blocks = list(_BLOCK.finditer(README.read_text()))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block["mark"] != "shows":
            assert following is not None
            assert following["mark"] == "shows", "every block that is run says what it shows"
            yield block["mark"], block["text"], following["text"]


def without_changing_parts(text: str) -> str:
    for pattern, name in _CHANGING:
        text = re.sub(pattern, name, text)
    return text.strip()


def let_requests_choose(operator: Operator) -> None:
    """Do what the README's numbered steps say."""
    policy = "/admin/hooks/hookpolicy/1/change/"
    page = operator.page(policy).lower()
    for label in re.findall(r"^\d\. .*\*\*(.+?)\*\*", README.read_text(), re.MULTILINE):
        assert label.lower() in page, f"the policy's page shows no {label!r}"
    operator.submit(policy, {"allow_request_session_key": "on", "prefixes-0-prefix": "hook:"})


def add_mapping(operator: Operator) -> None:
    """Fill the form in as the README's table says."""
    table = rows(section(README, "### 3. A hook mapping"))
    fields = {row[0].lower().replace(" ", "_"): row[1].strip("`") for row in table}
    operator.submit("/admin/hooks/hookmapping/add/", fields)


def run(block: str, gateway: LiveGateway) -> str:
    """Run a block as a person would, with this gateway's address; return what it prints."""
    script = (
        block.replace(".venv/bin/python manage.py", f"{sys.executable} {ROOT / 'manage.py'}")
        .replace(".venv/bin/python docs", f"{sys.executable} {ROOT / 'docs'}")
        .replace("127.0.0.1:8000", gateway.url.removeprefix("http://"))
    )
    ended = subprocess.run(
        ["/bin/sh", "-euc", script],
        cwd=gateway.directory,
        env={
            **gateway.environment,
            "HOOK_TOKEN": gateway.hook_token,
            "OPENCLAW_GATEWAY_TOKEN": gateway.gateway_token,
            "NO_PROXY": "127.0.0.1",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return ended.stdout


def test_the_readme_works_word_by_word(live_gateway: LiveGateway) -> None:
    shown, seen = [], []
    operator = Operator(live_gateway)
    for mark, block, shows in steps():
        if mark == "run with the policy":
            let_requests_choose(operator)
        elif mark == "run with the mapping":
            add_mapping(operator)
        shown.append(without_changing_parts(shows))
        seen.append(without_changing_parts(run(block, live_gateway)))

    assert len(shown) >= 6
    assert seen == shown


def test_the_github_workflow_posts_a_wake(live_gateway: LiveGateway) -> None:
    let_requests_choose(Operator(live_gateway))
    workflow = (ROOT / "docs" / "examples" / "github-actions.yml").read_text()
    script = workflow.partition("run: |\n")[2]

    ended = subprocess.run(
        ["/bin/sh", "-euc", script],
        env={
            "PATH": os.environ["PATH"],
            "NO_PROXY": "127.0.0.1",
            "WAKE_URL": live_gateway.url,
            "WAKE_HOOK_TOKEN": live_gateway.hook_token,
            "STATUS": "success",
            "GITHUB_REPOSITORY": "Acme/Website",
            "GITHUB_RUN_NUMBER": "7",
            "GITHUB_SHA": "0" * 40,
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )

    assert json.loads(ended.stdout)["sessionKey"] == "agent:main:hook:ci:acme/website"
