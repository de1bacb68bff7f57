"""A script's first moment and its output."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from common.console import command, outlive_output
from common.files import UserError, errors_in_one_line, printable


def python(code, **options):
    """Runs lines of Python in the repository; the libraries are not loaded, so this is quick."""
    command = [sys.executable, "-c", f"from common.console import prepare\n{code}"]
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **options)


def test_ctrl_c_while_the_libraries_load_is_one_line():
    code = 'prepare("train.py"); print("loading", flush=True); import time; time.sleep(60)'
    process = python(code)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "train.py: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("script", ["train.py", "Visulization.py"])
def test_a_script_is_prepared_before_its_libraries_load(script):
    lines = (ROOT / script).read_text().splitlines()
    assert lines.index(f'    prepare("{script}")') < lines.index("import torch")


def ignore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_no_account_an_old_console_and_a_background_job_are_no_obstacle():
    code = """
import getpass, io, os, pwd, signal, sys
def unknown(number): raise KeyError(number)
pwd.getpwuid = unknown
prepare("x")
print(getpass.getuser(), os.environ["MPLBACKEND"], "\u2713", flush=True)
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as the shell wants it
sys.stdout = io.StringIO()
prepare("x")
"""
    environment = dict(PATH=os.environ["PATH"], MPLBACKEND="module://matplotlib_inline")
    environment |= dict(PYTHONIOENCODING="cp1252")
    process = python(code, env=environment, preexec_fn=ignore_ctrl_c)
    assert process.communicate() == ("nobody agg \\u2713\n", "")


def test_a_printed_command_can_be_pasted(monkeypatch, tmp_path):
    words = ["it's", "$HOME *"]
    line = command("-c", "import sys; print(sys.argv[1:])", *words)
    assert subprocess.check_output(line, shell=True, text=True) == f"{words}\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    assert command("x.py") == "env/python x.py"
    monkeypatch.setattr("shutil.which", lambda _: sys.executable)
    assert command("x.py") == "python x.py"


def test_the_work_goes_on_when_its_output_is_lost(monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", Full())  # a terminal that is gone
    with outlive_output("train.py"):
        print("bars", file=sys.stderr, flush=True)
        print("a line")
    assert out.getvalue() == "a line\n"


def test_what_a_file_says_cannot_command_the_terminal():
    assert printable("caf\u00e9\x1b[2J\n\x07.png") == "caf\u00e9\ufffd[2J\ufffd\ufffd.png"
    words = re.escape("a script: error: \ufffd[31m one line")
    with pytest.raises(SystemExit, match=f"^{words}$"), errors_in_one_line("a script"):
        raise UserError("\x1b[31m one\n line")


def test_a_file_does_not_take_the_number_of_a_closed_stream(tmp_path):
    code = f"""
import os, sys
prepare("x")
file = open({str(tmp_path / "file")!r}, "w")
os.write(2, b"a library complains")
print(file.fileno() > 2, file=sys.stdout)
print("lost", file=sys.stderr)
"""
    process = python(code, preexec_fn=lambda: os.close(2))
    assert process.communicate()[0] == "True\n" and process.returncode == 0
    assert (tmp_path / "file").read_text() == ""
