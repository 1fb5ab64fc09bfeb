"""Text from and for a terminal: arguments may be any bytes, and not every terminal shows all."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from django.core.management.base import OutputWrapper


def text(argument: str) -> str:
    """Return an argument that is to be stored. Raises ArgumentTypeError for bytes that are no text.

    What is not in the terminal's encoding comes as lone surrogates, which no database takes.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!a} is not valid text") from error
    return argument


def printable(line: str) -> str:
    """Return a line that any terminal shows as it is, control characters written out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in line
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def one_line(words: str) -> str:
    """Return words as one printable line."""
    return printable(" ".join(words.split()))


def show(output: OutputWrapper, lines: Iterable[str]) -> None:
    """Print lines. That nobody reads them to their end is no failure."""
    try:
        for line in lines:
            output.write(printable(line))
        output.flush()
    except BrokenPipeError:
        # Else the interpreter tries once more at its end, and complains.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
