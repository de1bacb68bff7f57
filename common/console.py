"""How a script begins, and what it prints to: early Ctrl-C, and output that gets lost."""

import getpass
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


def prepare(script: str) -> None:
    """Settle what libraries stumble over while they load; to be called before."""

    def stop(*_: Any) -> None:
        print(f"{script}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # an exception might be caught inside a library

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)  # until `errors_in_one_line`
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend is not to be had outside of it
    try:
        getpass.getuser()  # as PyTorch does
    except (ImportError, KeyError, OSError):  # a container's user without an account
        os.environ["LOGNAME"] = "nobody"
    # What is opened next takes the number of a closed stream: not a file that libraries print into.
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


class LosableStream:
    """A text stream whose failures are not exceptions: what cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:  # a full disk, a reader that is gone
            self.failure = error
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.failure = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outlive_output(script: str) -> Iterator[None]:
    """Let the body run on when its output can no longer be written; say so on stderr at its end."""
    output, errors = LosableStream(sys.stdout), LosableStream(sys.stderr)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            yield
    finally:
        for stream in (output, errors):
            stream.flush()
            if stream.failure:  # Python would try again at its end, and fail
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if output.failure and not errors.failure:
            errors.write(
                f"{script}: note: some of the output could not be written: {output.failure}\n"
            )
