"""Files that are whole or not there, and errors in one line."""

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class UserError(RuntimeError):
    """A problem that the user can fix, as the message says."""


def printable(text: object) -> str:
    """A text without line breaks and escape sequences."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def user_path(text: str | Path) -> Path:
    """A path in which ~ is the user's home."""
    return Path(os.path.expanduser(text))


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def errors_in_one_line(script: str) -> Iterator[None]:
    """Show a UserError or Ctrl-C in one line on stderr."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        line = printable(" ".join(str(error).split()))
        raise SystemExit(f"{script}: error: {line}") from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when it is complete.

    A UserError if it cannot be written; an older file stays.
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
        raise UserError(f"cannot write {path}: {reason}; choose another folder") from error
    finally:
        with suppress(OSError):
            part.unlink()
