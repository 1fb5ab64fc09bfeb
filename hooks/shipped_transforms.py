"""The transforms that come with the gateway. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from hooks.transforms import register

_LONGEST_VALUE: Final = 120
_LONGEST_LINE: Final = 999
# What a payload can be about, of the kinds that have a number and a title.
_NUMBERED: Final = ("pull_request", "issue", "discussion")
_RUNS: Final = ("workflow_run", "workflow_job", "check_run", "check_suite")


@register("github")
def github(
    payload: Any, headers: Mapping[str, str], query: Mapping[str, str], path: str
) -> dict[str, str] | None:
    """GitHub: what happened, where and by whom, as one line; a ping does nothing.

    push to main in octo/app by alice: 2 commits, "Fix the build"
    pull_request opened in octo/app by alice: #12 "Add a cache"
    workflow_run completed (failure) in octo/app by alice: "CI" on main

    What the payload does not say is left out. The line has under 1,000 characters.
    """
    event = _line(headers.get("x-github-event"))
    if event == "ping":
        return None
    return {"text": _github_line(event, payload)}


def _github_line(event: str, payload: Any) -> str:
    said = [event or "GitHub event", _value(payload, "action")]
    if outcome := _outcome(event, payload):
        said.append(f"({outcome})")
    if event == "push" and (branch := _branch(payload)):
        said.append(f"to {branch}")
    if where := _value(payload, "repository", "full_name") or _value(
        payload, "organization", "login"
    ):
        said.append(f"in {where}")
    if who := _value(payload, "sender", "login"):
        said.append(f"by {who}")
    line = " ".join(filter(None, said))
    details = ", ".join(_commits(payload) if event == "push" else _subjects(payload))
    return _shortened(f"{line}: {details}" if details else line, _LONGEST_LINE)


def _outcome(event: str, payload: Any) -> str:
    """Return how a run, a review, a deployment or a status ended; "merged" for a pull request."""
    if _at(payload, "action") == "closed" and _at(payload, "pull_request", "merged") is True:
        return "merged"
    return (
        _value(payload, event, "conclusion")
        or _value(payload, "review", "state")
        or _value(payload, "deployment_status", "state")
        or _value(payload, "state")
    )


def _branch(payload: Any) -> str:
    ref = _value(payload, "ref")
    if ref.startswith("refs/tags/"):
        return f"tag {ref.removeprefix('refs/tags/')}"
    return ref.removeprefix("refs/heads/")


def _commits(payload: Any) -> Iterator[str]:
    """Yield what a push did, its last commit at the end."""
    for done in ("created", "deleted", "forced"):
        if _at(payload, done) is True:
            yield done
    commits = _at(payload, "commits")
    if isinstance(commits, list) and commits:
        yield "1 commit" if len(commits) == 1 else f"{len(commits)} commits"
    if message := _value(payload, "head_commit", "message"):
        yield f'"{message}"'


def _subjects(payload: Any) -> Iterator[str]:
    """Yield what an event is about, from the parts that its payload has."""
    for kind in _NUMBERED:
        yield from _named(_number(payload, kind, "number"), _value(payload, kind, "title"))
    yield from _named(_value(payload, "release", "tag_name"), _value(payload, "release", "name"))
    for kind in _RUNS:
        name = _value(payload, kind, "name")
        branch = _value(payload, kind, "head_branch")
        yield from _named("", name, f"on {branch}" if branch else "")
    if reference_kind := _value(payload, "ref_type"):
        yield f"{reference_kind} {_value(payload, 'ref')}".strip()
    if comment := _value(payload, "comment", "body") or _value(payload, "review", "body"):
        yield f'"{comment}"'


def _named(label: str, name: str, more: str = "") -> Iterator[str]:
    if words := " ".join(filter(None, (label, f'"{name}"' if name else "", more))):
        yield words


def _at(value: Any, *steps: str) -> Any:
    for step in steps:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _value(payload: Any, *steps: str) -> str:
    """Return the first line of a text of the payload; empty when there is none."""
    return _line(_at(payload, *steps))


def _number(payload: Any, *steps: str) -> str:
    value = _at(payload, *steps)
    # Python refuses to write integers of thousands of digits.
    is_number = type(value) is int and 0 < value < 10**12
    return f"#{value}" if is_number else ""


def _line(value: Any) -> str:
    """Return a text's first line, without control and other invisible characters."""
    # Cut before it is split: a text can be as long as the whole body may be.
    start = value.strip()[: 2 * _LONGEST_VALUE] if isinstance(value, str) else ""
    first = next(iter(start.splitlines()), "")
    visible = (character if character.isprintable() else " " for character in first)
    return _shortened(" ".join("".join(visible).split()), _LONGEST_VALUE)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
