"""Files that are whole or not there, and errors in one line. Imports nothing of the project."""

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class UserError(RuntimeError):
    """A problem that the user can fix; the message is one line that says how."""


def printable(text: object) -> str:
    """A text from a file, safe to print: line breaks and escape sequences are replaced."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)
    )


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def errors_in_one_line(script: str) -> Iterator[None]:
    """End in one line on stderr for what the user can fix, and Ctrl-C; not for a bug."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # a file's name may have characters that this terminal lacks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        one_line = " ".join(str(error).split())
        raise SystemExit(f"{script}: error: {printable(one_line)}") from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when it is complete.

    Until then it is `.NAME.PROCESS.part` beside it. A UserError if it cannot be written; an older
    file is as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; make room, or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # it has its name by now, unless something failed
            part.unlink()
