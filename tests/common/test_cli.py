"""Tests for the common behaviour of all commands."""

import re
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.processes import COMMANDS, PATIENCE, call_here, environment, refusal_here

WITH_COMMANDS = {"kb-client": ["replay", "live", "devices", "enroll", "bench"], "kb-server": ["status"]}
CALLS = [(name, *part) for name in COMMANDS for part in [(), *((command,) for command in WITH_COMMANDS.get(name, ()))]]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_shows_values_as_they_are_written(
    call: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    name, *part = call
    texts = []
    for flag in ("--help", "-h"):
        assert call_here(name, *part, flag) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert f"Usage: {' '.join(call)}" in texts[0]
    # A user does not write the names of Python types.
    assert not re.search(r"<(str|int|float|bool|path|file|list|tuple|choice)", texts[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_here(name, "--version") == 0
    assert capsys.readouterr().out == f"knowledge-boosting {version('knowledge-boosting')}\n"


@pytest.mark.parametrize("call", [("kb-client", "replay"), ("kb-server", "status"), ("kb-train",)], ids=" ".join)
def test_the_message_for_a_wrong_call_names_the_help_of_that_command(
    call: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *part = call
    assert f"No such option: --frobnicate (see '{' '.join(call)} --help')" == refusal_here(
        name, capsys, *part, "--frobnicate"
    ).replace(" (Possible options: --trace)", "")


def test_the_message_for_an_unknown_choice_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal_here("kb-client", capsys, "replay", "x.wav", "-o", "y.wav", "--clock", "sundial")
    assert line.startswith("Invalid value for '--clock': 'sundial' is not one of 'virtual', 'real' (see ")


def test_a_shell_can_complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KB_CLIENT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "kb-client re")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert call_here("kb-client") == 0
    assert capsys.readouterr().out.split() == ["replay"]


def run_interrupted(number: signal.Signals, definitions: str, body: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of this body, which sends itself a signal, and check that it ends as every interrupted command."""
    script = (
        "import io, os, signal, threading, time\n"
        "import numpy as np\n"
        "import soundfile\n"
        "from knowledge_boosting.common import cli\n"
        f"{definitions}\n"
        "app = cli.Application()\n"
        "@app.command()\n"
        f"def work() -> None:\n{textwrap.indent(body, '    ')}\n"
        "cli.run(app, 'work', 'client')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert result.returncode == 1
    assert result.stderr == ("work: error: interrupted\n" if number == signal.SIGINT else "")
    return result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_waits_for_no_library(number: signal.Signals, tmp_path: Path) -> None:
    """A thread that never ends stands for the threads of gRPC, which can wait forever for an interrupted call."""
    body = (
        "threading.Thread(target=threading.Event().wait).start()\n"
        "print('begun')\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(1000)\n"
        "finally:\n"
        f"    open({str(tmp_path / 'cleaned')!r}, 'w').close()\n"
    )
    assert run_interrupted(number, "", body).stdout == "begun\n"
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_a_destructor_is_not_lost(number: signal.Signals) -> None:
    """Python prints and ignores what a destructor raises."""
    destructor = f"class Destructor:\n    def __del__(self) -> None: signal.raise_signal({int(number)})\n"
    run_interrupted(number, destructor, "Destructor()\ntime.sleep(1000)\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_a_callback_is_not_reported_as_its_failure(number: signal.Signals) -> None:
    """libsndfile reports a callback that failed, because it was interrupted, as an error of its own."""
    file = (
        "class File(io.BytesIO):\n"
        "    def write(self, data: bytes) -> int:\n"
        f"        signal.raise_signal({int(number)})\n"
        "        return super().write(data)\n"
    )
    run_interrupted(number, file, "soundfile.write(File(), np.zeros(16), 16000, format='WAV')\ntime.sleep(1000)\n")
