"""The command runner, with real programs, on both event loops that it has to serve."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from openclaw_site import settings
from tests.wake.processes import is_alive
from tests.wake.turns import RUN_ID, command_turn
from wake.heartbeats.runners import MAX_ERROR_CHARACTERS, MAX_REPLY_BYTES, Delivered, Failed
from wake.heartbeats.runners.command import CommandRunner, agent_environment

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

PYTHON = (sys.executable, "-c")
SHELL = ("/bin/sh", "-c")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run[Any]]:
    """Run a coroutine on the event loop under test."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


async def written(path: Path) -> str:
    """Return what a program wrote there as one line, once it did."""
    line = ""
    async with asyncio.timeout(10):
        while not line.endswith("\n"):
            await asyncio.sleep(0.01)
            line = _read(path)
    return line.strip()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_prompt_is_the_input_and_the_output_is_the_reply(run: Run[Any]) -> None:
    turn = command_turn("/bin/cat", prompt="größer\nals")
    assert run(CommandRunner().run(turn)) == Delivered("größer\nals")


def test_no_shell_touches_the_arguments(run: Run[Any]) -> None:
    arguments = ("$HOME", "a b", "*", "; exit 3", "")
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    outcome = run(CommandRunner().run(command_turn(*PYTHON, program, *arguments)))
    assert isinstance(outcome, Delivered)
    assert json.loads(outcome.reply) == list(arguments)


def test_another_exit_status_is_a_failure_with_the_end_of_standard_error(run: Run[Any]) -> None:
    turn = command_turn(*SHELL, "echo a reply; echo no such model >&2; exit 3")
    assert run(CommandRunner().run(turn)) == Failed("exit status 3: no such model")
    assert run(CommandRunner().run(command_turn("/bin/false"))) == Failed("exit status 1")


def test_of_a_long_standard_error_the_end_is_kept(run: Run[Any]) -> None:
    program = "import sys; sys.stderr.write('x' * 3_000_000 + '\\0 the reason'); sys.exit(1)"
    outcome = run(CommandRunner().run(command_turn(*PYTHON, program)))
    assert isinstance(outcome, Failed)
    assert outcome.error.endswith("x\N{REPLACEMENT CHARACTER} the reason")
    assert len(outcome.error) <= MAX_ERROR_CHARACTERS + len("exit status 1: ")


def test_a_signal_is_named(run: Run[Any]) -> None:
    turn = command_turn(*SHELL, "echo out of memory >&2; kill -KILL $$")
    assert run(CommandRunner().run(turn)) == Failed("killed by signal SIGKILL: out of memory")


def test_a_program_that_cannot_be_started_is_named(run: Run[Any], tmp_path: Path) -> None:
    missing, not_executable = tmp_path / "missing", tmp_path / "notes.txt"
    not_executable.write_text("no program")
    for program, reason in (
        (str(missing), "No such file or directory"),
        (str(not_executable), "Permission denied"),
        ("no-such-program-anywhere", "No such file or directory"),
        ("/bin/true\0", "embedded null byte"),
    ):
        outcome = run(CommandRunner().run(command_turn(program)))
        shown = program.replace("\0", "\N{REPLACEMENT CHARACTER}")
        assert outcome == Failed(f'could not start "{shown}": {reason}')
    assert isinstance(run(CommandRunner().run(command_turn())), Failed)


@pytest.mark.parametrize(
    "program", ["true", "exec <&-; echo read nothing", "head -c 10 >/dev/null"]
)
def test_a_program_need_not_read_its_prompt(run: Run[Any], program: str) -> None:
    turn = command_turn(*SHELL, program, prompt="x" * 300_000)
    assert isinstance(run(CommandRunner().run(turn)), Delivered)


def test_a_big_prompt_and_a_big_reply_do_not_wait_for_each_other(run: Run[Any]) -> None:
    program = (
        "import sys; sys.stdout.write('o' * 1_000_000); sys.stdout.flush(); "
        "sys.stderr.write('e' * 1_000_000); sys.stderr.flush(); "
        "sys.exit(0 if len(sys.stdin.read()) == 300_000 else 1)"
    )
    turn = command_turn(*PYTHON, program, prompt="x" * 300_000)
    assert run(CommandRunner().run(turn)) == Delivered("o" * MAX_REPLY_BYTES)


def test_a_reply_is_cut_between_characters_and_can_be_stored(run: Run[Any]) -> None:
    program = "import sys; sys.stdout.buffer.write(b'a' + chr(0x1F600).encode() * 80_000)"
    outcome = run(CommandRunner().run(command_turn(*PYTHON, program)))
    # One byte, and then as many characters of four bytes as fit.
    assert outcome == Delivered("a" + "\U0001f600" * ((MAX_REPLY_BYTES - 1) // 4))

    program = r"import sys; sys.stdout.buffer.write(b'a\0b\xff\xfe\xed\xa0\x80')"
    outcome = run(CommandRunner().run(command_turn(*PYTHON, program)))
    assert isinstance(outcome, Delivered)
    assert outcome.reply.startswith("a\N{REPLACEMENT CHARACTER}b")
    assert "\0" not in outcome.reply
    outcome.reply.encode()


def test_output_without_end_takes_no_memory(run: Run[Any]) -> None:
    program = "head -c 50000000 /dev/zero; head -c 50000000 /dev/zero >&2"
    tracemalloc.start()
    try:
        assert isinstance(run(CommandRunner().run(command_turn(*SHELL, program))), Delivered)
        assert tracemalloc.get_traced_memory()[1] < 16 * MAX_REPLY_BYTES
    finally:
        tracemalloc.stop()


def test_the_environment_holds_the_turn_and_nothing_of_the_gateway(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "SECRET_KEY",
        "SECRET_KEY_FALLBACKS",
        "DATABASE_URL",
        "REDIS_URL",
        "DEBUG",
        "PGPASSWORD",
        "DJANGO_SETTINGS_MODULE",
        "DJANGO_SUPERUSER_PASSWORD",
        "OPENCLAW_GATEWAY_TOKEN",
        "OPENCLAW_GATEWAY_PASSWORD",
        "OPENCLAW_HOOKS_TOKEN",
    ):
        monkeypatch.setenv(name, "hidden-value")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the agent's own")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    outcome = run(CommandRunner().run(command_turn("env")))
    assert isinstance(outcome, Delivered)
    assert "hidden-value" not in outcome.reply
    lines = set(outcome.reply.splitlines())
    assert lines >= {
        "OPENCLAW_SESSION_KEY=agent:main:discord:channel:123",
        "OPENCLAW_AGENT_ID=main",
        f"OPENCLAW_RUN_ID={RUN_ID}",
        "OPENCLAW_REASON=wake",
        "ANTHROPIC_API_KEY=the agent's own",
        "HTTPS_PROXY=http://proxy.example:3128",
        f"PATH={os.environ['PATH']}",
    }


def test_no_variable_that_the_settings_read_reaches_an_agent() -> None:
    """What the settings read from the environment later is held back too, or this fails."""
    read = {
        argument.value
        for call in ast.walk(ast.parse(inspect.getsource(settings)))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "env"
        for argument in call.args[:1]
        if isinstance(argument, ast.Constant)
    }
    assert {"SECRET_KEY", "DATABASE_URL", "OPENCLAW_HOOKS_TOKEN"} <= read
    inherited = dict.fromkeys(map(str, read), "hidden")
    assert "hidden" not in agent_environment(inherited, command_turn("env")).values()


def test_a_program_gets_its_three_streams_and_no_other_descriptor(run: Run[Any]) -> None:
    """An inheritable one, as the gateway's listening socket is, would outlive the gateway in it."""
    program = (
        "import json, os; opened = open('/dev/stdin').read(); "
        "print(json.dumps([opened, [fd for fd in range(3, 256) if os.path.exists("
        "f'/proc/self/fd/{fd}')]]))"
    )
    reading, writing = os.pipe()
    try:
        os.set_inheritable(writing, True)
        outcome = run(CommandRunner().run(command_turn(*PYTHON, program)))
    finally:
        os.close(reading)
        os.close(writing)
    assert isinstance(outcome, Delivered), outcome
    assert json.loads(outcome.reply) == ["the prompt", []]


def test_a_run_leaves_no_descriptor_open_here(run: Run[Any]) -> None:
    holds_its_input = "exec 3<&0; sleep 2 <&3 3<&- >/dev/null 2>&1 &"

    async def many() -> tuple[int, int]:
        await CommandRunner().run(command_turn("/bin/true"))
        before = len(os.listdir("/proc/self/fd"))
        turns = [
            command_turn("/bin/cat"),
            command_turn("/bin/false"),
            command_turn("/nowhere"),
            command_turn(*SHELL, "exec <&- >&- 2>&-", prompt="x" * 300_000),
            command_turn(*SHELL, holds_its_input, prompt="x" * 300_000),
        ]
        outcomes = await asyncio.gather(*(CommandRunner().run(turn) for turn in turns * 10))
        assert sum(isinstance(outcome, Delivered) for outcome in outcomes) == 30
        await asyncio.sleep(0)
        return before, len(os.listdir("/proc/self/fd"))

    before, after = run(many())
    assert after <= before


def test_a_cancelled_run_ends_its_whole_group(run: Run[Any], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = (
        f"sleep 300 & (sleep 300 & echo $$ $! > {pids}.inner; wait) & echo $$ $! > {pids}; wait"
    )

    async def cancelled() -> list[int]:
        task = asyncio.create_task(
            CommandRunner(terminate_grace=0.8).run(command_turn(*SHELL, program))
        )
        found = f"{await written(pids)} {await written(Path(f'{pids}.inner'))}".split()
        await cancel(task)
        return [int(pid) for pid in found]

    started = time.monotonic()
    assert [pid for pid in run(cancelled()) if is_alive(pid)] == []
    assert time.monotonic() - started < 30


def test_a_cancelled_program_may_tidy_up(run: Run[Any], tmp_path: Path) -> None:
    ready, tidy = tmp_path / "ready", tmp_path / "tidy"
    # The child of the shell that the signal ends at once has its time as well.
    inner = (
        "import signal, sys, time\n"
        "def tidy(*_):\n"
        f"    time.sleep(0.2); open({str(tidy)!r}, 'w').write('tidied up\\n'); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, tidy); open({str(ready)!r}, 'w').write('ready\\n')\n"
        "time.sleep(300)"
    )

    async def cancelled() -> None:
        turn = command_turn(*SHELL, '"$0" -c "$1"; true', sys.executable, inner)
        task = asyncio.create_task(CommandRunner(terminate_grace=0.8).run(turn))
        await written(ready)
        await cancel(task)

    run(cancelled())
    assert tidy.read_text() == "tidied up\n"


IGNORES_SIGTERM = "trap '' TERM; echo $$ > {pid}; while :; do sleep 0.05; done"


def test_a_program_that_ignores_sigterm_is_killed(run: Run[Any], tmp_path: Path) -> None:
    program = IGNORES_SIGTERM.format(pid=tmp_path / "pid")

    async def cancelled() -> int:
        task = asyncio.create_task(
            CommandRunner(terminate_grace=0.2).run(command_turn(*SHELL, program))
        )
        pid = int(await written(tmp_path / "pid"))
        await cancel(task)
        return pid

    assert not is_alive(run(cancelled()))


def test_a_second_cancellation_cuts_the_grace_short(run: Run[Any], tmp_path: Path) -> None:
    program = IGNORES_SIGTERM.format(pid=tmp_path / "pid")

    async def cancelled_twice() -> tuple[int, float]:
        task = asyncio.create_task(
            CommandRunner(terminate_grace=60).run(command_turn(*SHELL, program))
        )
        pid = int(await written(tmp_path / "pid"))
        task.cancel()
        await asyncio.sleep(0.1)
        assert is_alive(pid)
        started = time.monotonic()
        await cancel(task)
        return pid, started

    pid, started = run(cancelled_twice())
    while is_alive(pid):  # the kernel may take a moment
        assert time.monotonic() - started < 30


def test_a_run_cancelled_at_its_very_start_leaves_nothing_behind(
    run: Run[Any], tmp_path: Path
) -> None:
    async def cancelled() -> None:
        program = f"echo $$ >> {tmp_path}/pids; exec sleep 300"
        for steps in range(4):
            task = asyncio.create_task(
                CommandRunner(terminate_grace=0.5, output_grace=0.2).run(
                    command_turn(*SHELL, program)
                )
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            await cancel(task)

    run(cancelled())
    pids = tmp_path / "pids"
    left = [pid for pid in pids.read_text().split() if is_alive(int(pid))] if pids.exists() else []
    assert left == []


def test_what_still_holds_the_output_after_the_end_is_ended(run: Run[Any], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    started = time.monotonic()
    turn = command_turn(*SHELL, f"sleep 300 & echo $! > {pid}; echo done")
    assert run(CommandRunner(terminate_grace=0.5, output_grace=0.2).run(turn)) == Delivered(
        "done\n"
    )
    assert time.monotonic() - started < 30
    assert not is_alive(int(pid.read_text()))


def test_what_let_go_of_the_output_is_left_alone(run: Run[Any], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"sleep 300 </dev/null >/dev/null 2>&1 & echo $! > {pid_file}; echo done"
    started = time.monotonic()
    assert run(CommandRunner(output_grace=60).run(command_turn(*SHELL, daemon))) == Delivered(
        "done\n"
    )
    pid = int(pid_file.read_text())
    try:
        assert is_alive(pid)
        assert time.monotonic() - started < 30
    finally:
        os.kill(pid, signal.SIGKILL)


def test_runs_go_on_side_by_side(run: Run[Any]) -> None:
    async def many() -> list[Any]:
        runner = CommandRunner()
        turns = [
            command_turn(*SHELL, "sleep 0.5; cat", prompt=f"{number} " * 20_000)
            for number in range(40)
        ]
        return await asyncio.gather(*(runner.run(turn) for turn in turns))

    started = time.monotonic()
    assert run(many()) == [Delivered(f"{number} " * 20_000) for number in range(40)]
    assert time.monotonic() - started < 10
