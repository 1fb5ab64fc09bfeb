"""The command runner: a program on this machine takes the turn.

The prompt is its standard input, its standard output is the reply, and exit status 0 means that
the turn was taken. It runs without a shell, in the gateway's working directory, as the gateway's
user, in a session and process group of its own.

What becomes of the processes it leaves behind:

* when the run is cut short (time limit, lost lease, stop), its whole group is ended;
* when it ends by itself, its turn is over. What it left in the background with its output closed
  or redirected is left alone; what still holds the output a second later is ended with the group.

The child is started by `subprocess` and not by the event loop, so that it is the same under
asyncio and uvloop: the latter hands every inheritable descriptor down, the listening socket of the
gateway among them, and gives sockets where programs expect pipes (`/dev/stdin` cannot be opened).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final
from uuid import UUID, uuid5

from wake import cores
from wake.heartbeats.runners import (
    MAX_ERROR_CHARACTERS,
    MAX_REPLY_BYTES,
    Delivered,
    Failed,
    Outcome,
    Runner,
    Turn,
    cut,
)

TERMINATE_GRACE_SECONDS: Final = 2.0
TERMINATE_POLL_SECONDS: Final = 0.02
OUTPUT_GRACE_SECONDS: Final = 1.0
REAP_SECONDS: Final = 1.0

_CHUNK_BYTES = 64 * 1024
# A character that is cut in two at the end must not eat into what may be kept.
_MAX_KEPT_BYTES = MAX_REPLY_BYTES + 3

# The gateway's own settings: everything openclaw_site/settings.py reads from the environment, and
# what others of its parts read there. An agent gets the rest, its own keys and proxies included.
GATEWAY_VARIABLES: Final = frozenset(
    {
        "AGENT_KEY_VARIABLES",
        "ALLOWED_HOSTS",
        "CSRF_TRUSTED_ORIGINS",
        "DATABASE_URL",
        "DEBUG",
        "HEARTBEAT_LEASE_SECONDS",
        "HOOK_TRANSFORMS",
        "LOG_FORMAT",
        "LOG_LEVEL",
        "METRICS_PUBLIC",
        "OPENCLAW_HEARTBEATS",
        "OPENCLAW_ONE_CORE",
        "PGPASSFILE",
        "PGPASSWORD",
        "REDIS_URL",
        "SECRET_KEY",
        "SECRET_KEY_FALLBACKS",
        "SECURE_COOKIES",
        "TEST_DATABASE",
        "TRUSTED_PROXIES",
    }
)
GATEWAY_VARIABLE_PREFIXES: Final = ("DJANGO_", "OPENCLAW_GATEWAY_", "OPENCLAW_HOOKS_")


def agent_environment(inherited: Mapping[str, str], turn: Turn) -> dict[str, str]:
    """Return the environment of an agent's program: no setting of the gateway, and the turn's ids.

    A list of what is held back, not of what is let through: agents need their own API keys,
    proxies and homes, whose names nobody can list.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name not in GATEWAY_VARIABLES and not name.startswith(GATEWAY_VARIABLE_PREFIXES)
    }
    return kept | {
        "OPENCLAW_SESSION_KEY": turn.session_key,
        "OPENCLAW_AGENT_ID": turn.agent.id,
        "OPENCLAW_RUN_ID": str(turn.run_id),
        "OPENCLAW_REASON": turn.reason,
    }


# What an argument may hold for the turn. Nothing that comes from outside is among it, because
# arguments may be a shell's to read: the session key is in the environment.
_PLACEHOLDER = re.compile(r"\{(session_id|agent_id|run_id)\}")
_SESSIONS = UUID("6f0d1e0c-5c0e-5d5b-9f52-1d1f4b6f3c57")


def filled(
    command: Sequence[str], *, agent_id: str, session_key: str, run_id: UUID
) -> tuple[str, ...]:
    """Return the command with `{session_id}`, `{agent_id}` and `{run_id}` filled in.

    The session id is a UUID, always the same one for a session: for programs that keep its
    conversation under an id that they are given. All other braces stay as they are.
    """
    values = {
        "session_id": str(uuid5(_SESSIONS, f"{agent_id} {session_key}")),
        "agent_id": agent_id,
        "run_id": str(run_id),
    }
    return tuple(_PLACEHOLDER.sub(lambda match: values[match[1]], argument) for argument in command)


class CommandRunner(Runner):
    """Runs the agent's command, once for each turn.

    `terminate_grace` is how many seconds a group has between SIGTERM and SIGKILL, `output_grace`
    how many its output may stay open after the program has ended.
    """

    def __init__(
        self,
        look_again: Callable[[], None] = lambda: None,
        *,
        terminate_grace: float = TERMINATE_GRACE_SECONDS,
        output_grace: float = OUTPUT_GRACE_SECONDS,
    ) -> None:
        super().__init__(look_again)
        self._terminate_grace = terminate_grace
        self._output_grace = output_grace

    async def run(self, turn: Turn) -> Outcome:
        """Run the program to its end and return what it said.

        Failures can all be tried again: a program that is missing may be installed by then.
        """
        command = filled(
            turn.agent.command,
            agent_id=turn.agent.id,
            session_key=turn.session_key,
            run_id=turn.run_id,
        )
        if not command:
            return Failed("the agent has no command")
        try:
            program = _Program(command, turn.prompt.encode(), agent_environment(os.environ, turn))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            return Failed(cut(f'could not start "{command[0]}": {reason}'))
        try:
            await program.run(self._terminate_grace, self._output_grace)
        finally:
            program.close()
        return _outcome(program.exit_status, bytes(program.output), bytes(program.errors))


def _outcome(exit_status: int, output: bytes, errors: bytes) -> Outcome:
    if exit_status == 0:
        return Delivered(cut(output.decode("utf-8", "replace")))
    ending = f"killed by signal {_signal_name(-exit_status)}"
    if exit_status > 0:
        ending = f"exit status {exit_status}"
    # Some say why on standard output, and nothing on standard error.
    said = errors if errors.strip() else output[-MAX_ERROR_CHARACTERS:]
    reason = cut(said.decode("utf-8", "replace")).strip()
    return Failed(f"{ending}: {reason}" if reason else ending)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time signals have no names
        return str(number)


class _Program:
    """A program under way: fed with its input, its output read to the end and kept within bounds.

    Nothing in here waits for another part: a program that neither reads its input nor stops
    writing cannot block itself or the event loop.
    """

    def __init__(
        self, arguments: Sequence[str], given: bytes, environment: Mapping[str, str]
    ) -> None:
        """Start it. Raises OSError, or ValueError for an argument that holds a NUL."""
        self.output = bytearray()
        self.errors = bytearray()
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._output_ended = asyncio.Event()
        self._given = memoryview(given)
        self._watched: dict[IO[bytes], Callable[[int], object]] = {}
        self._open_outputs: set[IO[bytes]] = set()
        cores.leave()
        self._process = subprocess.Popen(  # noqa: S603 - no shell; the command is the operator's
            list(arguments),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    @property
    def exit_status(self) -> int:
        """The exit status, or the negative number of the signal that killed it. After `run`."""
        status = self._process.returncode
        assert status is not None  # noqa: S101
        return status

    async def run(self, terminate_grace: float, output_grace: float) -> None:
        """Feed and read it until it has ended. Whatever cuts that short ends its group."""
        over = False
        try:
            self._begin()
            await self._exited.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(output_grace):
                    await self._output_ended.wait()
                    over = True
        finally:
            if not over:
                await self._end_group(terminate_grace)

    def close(self) -> None:
        """Let go of the pipes."""
        for stream in list(self._watched):
            self._unwatch(stream)

    def _begin(self) -> None:
        # A thread, because it is the one way to learn of an exit that depends neither on the event
        # loop nor on the pipes, which others may hold open.
        threading.Thread(target=self._wait, name="command-runner", daemon=True).start()
        given, output, errors = self._process.stdin, self._process.stdout, self._process.stderr
        assert given is not None  # noqa: S101 - all three are pipes
        assert output is not None  # noqa: S101
        assert errors is not None  # noqa: S101
        add_reader, remove_reader = self._loop.add_reader, self._loop.remove_reader
        self._open_outputs = {output, errors}
        self._watch(given, self._loop.add_writer, self._loop.remove_writer, self._feed, given)
        self._watch(output, add_reader, remove_reader, self._read, output, self._keep_output)
        self._watch(errors, add_reader, remove_reader, self._read, errors, self._keep_errors)

    async def _end_group(self, grace: float) -> None:
        """SIGTERM to the group, and SIGKILL to what is left of it after the grace.

        A second cancellation cuts the grace short, never the killing.
        """
        try:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    # A group has no event of its own to wait for.
                    while self._signal_group(0):  # noqa: ASYNC110
                        await asyncio.sleep(TERMINATE_POLL_SECONDS)
        finally:
            self._signal_group(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await self._exited.wait()

    def _signal_group(self, number: int) -> bool:
        """Whether there was a process in the group to signal.

        The group's number cannot have gone to others while a process of it is left.
        """
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _wait(self) -> None:
        self._process.wait()
        # The event loop may be gone by then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._exited.set)

    def _watch(
        self,
        stream: IO[bytes],
        add: Callable[..., object],
        remove: Callable[[int], object],
        react: Callable[..., None],
        *arguments: object,
    ) -> None:
        os.set_blocking(stream.fileno(), False)
        self._watched[stream] = remove
        add(stream.fileno(), react, *arguments)

    def _unwatch(self, stream: IO[bytes]) -> None:
        remove = self._watched.pop(stream)
        remove(stream.fileno())
        stream.close()

    def _feed(self, stream: IO[bytes]) -> None:
        try:
            sent = os.write(stream.fileno(), self._given[:_CHUNK_BYTES])
        except BlockingIOError:
            return
        except OSError:  # it does not want to read any more, which is its right
            sent = len(self._given)
        self._given = self._given[sent:]
        if not self._given:
            self._unwatch(stream)

    def _read(self, stream: IO[bytes], keep: Callable[[bytes], None]) -> None:
        try:
            chunk = os.read(stream.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return
        if chunk:
            keep(chunk)
            return
        self._unwatch(stream)
        self._open_outputs.discard(stream)
        if not self._open_outputs:
            self._output_ended.set()

    def _keep_output(self, chunk: bytes) -> None:
        self.output += chunk[: _MAX_KEPT_BYTES - len(self.output)]

    def _keep_errors(self, chunk: bytes) -> None:
        self.errors += chunk
        del self.errors[:-MAX_ERROR_CHARACTERS]
