"""Transforms: the registry, what a mapping makes of one, and GitHub's events as one line each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from hypothesis import example, given
from hypothesis import strategies as st

from hooks import transforms
from hooks.models import HookMapping
from hooks.shipped_transforms import github
from hooks.transforms import Transform
from tests.hooks.conftest import Send, error_of, rows
from tests.live import ROOT
from wake.models import SystemEvent

NAME = "of a test"
REPOSITORY = {"full_name": "octo/app"}
ALICE = {"login": "alice"}


@pytest.fixture
def register(db: None) -> Iterator[Any]:
    """Register a transform, and a mapping at /hooks/t that uses it; undone at the end."""

    def register(transform: Transform, **values: Any) -> None:
        transforms.register(NAME)(transform)
        HookMapping.objects.create(name="t", match_path="t", transform=NAME, **values)

    yield register
    transforms._registered.pop(NAME, None)


def line(event: str, payload: Any) -> str:
    fields = github(payload, {"x-github-event": event}, {}, "github")
    assert fields is not None
    assert list(fields) == ["text"]
    return str(fields["text"])


@pytest.mark.parametrize(
    ("event", "payload", "text"),
    [
        (
            "push",
            {
                "ref": "refs/heads/fix/cache",
                "commits": [{}],
                "head_commit": {"message": "  Fix\tthe build\n\nIt was broken."},
                "pusher": {"name": "alice"},
            },
            'push to fix/cache in octo/app by alice: 1 commit, "Fix the build"',
        ),
        (
            "push",
            {"ref": "refs/heads/old", "deleted": True, "commits": [], "head_commit": None},
            "push to old in octo/app by alice: deleted",
        ),
        (
            "push",
            {"ref": "refs/tags/v1.2", "created": True, "head_commit": {"message": "Release"}},
            'push to tag v1.2 in octo/app by alice: created, "Release"',
        ),
        (
            "push",
            {"ref": "refs/heads/main", "forced": True, "commits": [{}, {}, {}]},
            "push to main in octo/app by alice: forced, 3 commits",
        ),
        (
            "pull_request",
            {"action": "opened", "pull_request": {"number": 12, "title": "Add a cache"}},
            'pull_request opened in octo/app by alice: #12 "Add a cache"',
        ),
        (
            "pull_request",
            {"action": "closed", "pull_request": {"number": 12, "title": "A", "merged": True}},
            'pull_request closed (merged) in octo/app by alice: #12 "A"',
        ),
        (
            "pull_request",
            {"action": "closed", "pull_request": {"number": 12, "title": "A", "merged": False}},
            'pull_request closed in octo/app by alice: #12 "A"',
        ),
        (
            "pull_request_review",
            {
                "action": "submitted",
                "review": {"state": "approved", "body": "Well done"},
                "pull_request": {"number": 12, "title": "A"},
            },
            'pull_request_review submitted (approved) in octo/app by alice: #12 "A", "Well done"',
        ),
        (
            "issues",
            {"action": "closed", "issue": {"number": 7, "title": "It fails"}},
            'issues closed in octo/app by alice: #7 "It fails"',
        ),
        (
            "issue_comment",
            {
                "action": "created",
                "issue": {"number": 7, "title": "It fails"},
                "comment": {"body": "Here too.\r\nOn Linux."},
            },
            'issue_comment created in octo/app by alice: #7 "It fails", "Here too."',
        ),
        (
            "release",
            {"action": "published", "release": {"tag_name": "v1.2", "name": "Faster"}},
            'release published in octo/app by alice: v1.2 "Faster"',
        ),
        (
            "workflow_run",
            {
                "action": "completed",
                "workflow_run": {"name": "CI", "conclusion": "failure", "head_branch": "main"},
            },
            'workflow_run completed (failure) in octo/app by alice: "CI" on main',
        ),
        (
            "check_suite",
            {"action": "completed", "check_suite": {"conclusion": "success", "head_branch": "x"}},
            "check_suite completed (success) in octo/app by alice: on x",
        ),
        (
            "deployment_status",
            {"action": "created", "deployment_status": {"state": "failure"}},
            "deployment_status created (failure) in octo/app by alice",
        ),
        (
            "create",
            {"ref_type": "branch", "ref": "cache"},
            "create in octo/app by alice: branch cache",
        ),
        ("star", {"action": "created"}, "star created in octo/app by alice"),
        ("fork", {}, "fork in octo/app by alice"),
    ],
)
def test_an_event_of_github_is_one_line(event: str, payload: Any, text: str) -> None:
    assert line(event, {**payload, "repository": REPOSITORY, "sender": ALICE}) == text


@pytest.mark.parametrize(
    ("event", "payload", "text"),
    [
        ("push", {}, "push"),
        ("push", [], "push"),
        ("issues", {"action": 5, "issue": "x", "repository": None, "sender": [ALICE]}, "issues"),
        ("issues", {"issue": {"number": True, "title": ["x"]}}, "issues"),
        ("issues", {"issue": {"number": 10**5000}}, "issues"),
        ("issues", {"issue": {"number": 7}}, "issues: #7"),
        ("member", {"action": "added", "organization": {"login": "octo"}}, "member added in octo"),
        ("", {"action": "opened", "sender": ALICE}, "GitHub event opened by alice"),
        (" \n", None, "GitHub event"),
    ],
)
def test_what_is_missing_or_of_another_type_is_left_out(
    event: str, payload: Any, text: str
) -> None:
    assert line(event, payload) == text


def test_without_the_header_there_is_still_a_text() -> None:
    assert github({"zen": "Keep it short."}, {}, {}, "github") == {"text": "GitHub event"}


def test_a_ping_does_nothing() -> None:
    assert github({"zen": "Keep it short."}, {"x-github-event": "ping"}, {}, "github") is None


def test_a_long_title_is_cut_and_what_follows_it_stays() -> None:
    said = line("issue_comment", {"issue": {"title": "x" * 500}, "comment": {"body": "Here too"}})
    assert said == f'issue_comment: "{"x" * 119}…", "Here too"'


# The fields that the transform looks at.
NAMES = st.sampled_from(
    [
        "action",
        "ref",
        "ref_type",
        "commits",
        "head_commit",
        "message",
        "created",
        "deleted",
        "forced",
        "repository",
        "full_name",
        "organization",
        "login",
        "sender",
        "pull_request",
        "issue",
        "discussion",
        "number",
        "title",
        "merged",
        "release",
        "tag_name",
        "name",
        "workflow_run",
        "check_suite",
        "conclusion",
        "head_branch",
        "review",
        "state",
        "comment",
        "body",
        "deployment_status",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("x\n" * 2000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=12),
    max_leaves=40,
)
LONG = "w" * 5000
EVERYTHING = {
    "action": LONG,
    "ref": LONG,
    "ref_type": LONG,
    "repository": {"full_name": LONG},
    "sender": {"login": LONG},
    "issue": {"number": 10**11, "title": LONG},
    "pull_request": {"number": 10**11, "title": LONG},
    "release": {"tag_name": LONG, "name": LONG},
    "workflow_run": {"name": LONG, "conclusion": LONG, "head_branch": LONG},
    "check_run": {"name": LONG, "head_branch": LONG},
    "comment": {"body": LONG},
}


@example("workflow_run", EVERYTHING)
@example("push\x00\u2028\x1b[31m", {"action": "\u202eevil\ud800\u200b", "sender": {"login": "\r"}})
@given(
    st.sampled_from(["push", "pull_request", "workflow_run", "", "x" * 2000]) | st.text(),
    VALUES | st.dictionaries(NAMES, VALUES, max_size=20),
)
def test_any_payload_is_one_short_visible_line(event: str, payload: Any) -> None:
    fields = github(payload, {"x-github-event": event}, {}, "github")
    if fields is None:
        assert event.strip() == "ping"
        return
    text = fields["text"]
    assert 0 < len(text) < 1000
    assert text.isprintable()
    assert text == text.strip()


def test_the_first_line_of_a_docstring_is_what_the_admin_shows() -> None:
    assert "github" in transforms.names()
    assert transforms.summary("github") == (
        "GitHub: what happened, where and by whom, as one line; a ping does nothing."
    )
    assert transforms.summary("nobody registered this") == ""


def test_a_name_can_be_registered_once() -> None:
    with pytest.raises(ValueError, match='a transform "github" is registered already'):
        transforms.register("github")(github)


def test_a_mapping_names_only_a_transform_that_is_registered(db: None) -> None:
    mapping = HookMapping(name="x", transform="os.system", session_key="hook:x")
    with pytest.raises(ValidationError) as raised:
        mapping.full_clean()
    assert raised.value.message_dict == {"transform": ['no transform is registered as "os.system"']}


def test_a_transform_sees_the_request_and_the_templates_write_what_it_leaves(
    register: Any, send: Send
) -> None:
    seen: list[Any] = []

    def transform(*request: Any) -> dict[str, str]:
        seen.extend(request)
        return {"mode": "next-heartbeat"}

    register(transform, session_key="hook:t", text_template="from the template")
    response = send("/hooks/t?kind=x", {"a": 1}, headers={"X-Event": "e", "X-Api-Key": "secret"})
    assert response.status_code == 200, response.content
    payload, headers, query, path = seen
    assert (payload, query, path) == ({"a": 1}, {"kind": "x"}, "t")
    assert headers["x-event"] == "e"
    assert not {"authorization", "x-api-key"} & set(headers)
    assert SystemEvent.objects.get().text == "from the template"


def test_a_session_key_of_a_transform_comes_from_outside(register: Any, send: Send) -> None:
    register(lambda *_: {"text": "x", "session_key": "hook:elsewhere"})
    response = send("/hooks/t", {})
    assert response.status_code == 400
    assert "requests may choose the session" in error_of(response)
    assert rows() == (0, 0, 0)


@pytest.mark.parametrize(
    "returned",
    [{"text": 5}, {"agent": "ops"}, {"mode": "soon"}, "text", 5],
    ids=["not a string", "unknown field", "unknown mode", "a string", "a number"],
)
def test_a_transform_that_returns_nonsense_is_a_defect(
    register: Any, send: Send, returned: Any
) -> None:
    register(lambda *_: returned, text_template="x")
    assert send("/hooks/t", {}).status_code == 500
    assert rows() == (0, 0, 0)


def test_a_defect_is_in_the_log_and_not_in_the_answer(
    register: Any, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    def transform(*_: Any) -> dict[str, str]:
        raise RuntimeError("the password is hunter2")

    register(transform, text_template="x")
    response = send("/hooks/t", {})
    assert response.status_code == 500
    assert b"hunter2" not in response.content
    assert "hunter2" in caplog.text
    assert rows() == (0, 0, 0)


def test_a_module_that_cannot_be_imported_is_told_by_the_setting() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "manage.py", "check"],
        env={**os.environ, "HOOK_TRANSFORMS": "no_such_module"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(
        "HOOK_TRANSFORMS: cannot import no_such_module: "
        "ModuleNotFoundError: No module named 'no_such_module'"
    )
