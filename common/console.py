"""A script's start, its command, and output that gets lost."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO


def prepare(script: str) -> None:
    """Settle what libraries stumble over, before they load."""

    def stop(*_: Any) -> None:
        print(f"{script}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # a library might catch an exception

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)  # until `errors_in_one_line`
    os.environ["MPLBACKEND"] = "agg"  # a notebook's fails in a script
    # PyTorch needs a name; a container's user may have none.
    os.environ.setdefault("LOGNAME", os.environ.get("USER", "nobody"))
    # Else a file takes a closed stream's number, and what libraries print.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # Windows' may not be UTF-8


def command(script: str | Path, *arguments: object, processes: int = 1) -> str:
    """What to type to run a script with this very Python."""
    python = Path(sys.executable)
    if python == Path(shutil.which("python") or ""):
        python = "python"
    elif python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    words = [python, script, *arguments]
    if processes > 1:
        words[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return shlex.join(map(str, words))


class LosableStream:
    """A stream that loses what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.failure = stream, None

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError) as error:  # a full disk
            self.failure = error

    def flush(self) -> None:
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outlive_output(script: str) -> Iterator[None]:
    """Run on when output cannot be written, and say so at the end."""
    output, errors = LosableStream(sys.stdout), LosableStream(sys.stderr)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            yield
    finally:
        for stream in (output, errors):
            if stream.failure:  # Python would try again at exit
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if output.failure:
            what = "some of the output could not be written"
            errors.write(f"{script}: note: {what}: {output.failure}\n")
