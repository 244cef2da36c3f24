"""Tests for Ctrl-C while a command loads its modules, and for servers whose parent process has ended."""

import os
import select
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import environment

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *((name, "typer") for name in SCRIPTS),
        ("kb-client", "knowledge_boosting.common.call_credentials"),
        ("kb-client", "onnxruntime"),
        ("kb-client", "matplotlib.figure"),
    ],
)
def test_ctrl_c_while_modules_are_read_gives_no_traceback(name: str, module: str, tmp_path: Path) -> None:
    """Interrupt a command when a module has been loaded, which ``-X importtime`` shows, at several stages."""
    place, function = SCRIPTS[name].split(":")
    # This is what an installed script does.
    script = f"import sys; from {place} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"
    arguments = ["--help"]
    if name == "kb-client":
        arguments = [
            "replay",
            str(ROOT / "samples/mixture.flac"),
            "-o",
            str(tmp_path / "o.wav"),
            "--bundle",
            "ss-alone",
        ]
        arguments += ["--plot", str(tmp_path / "p.png")]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", script, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                process.send_signal(signal.SIGINT)
                break
        else:
            raise AssertionError(f"{module} is not imported")
        words = [line.rstrip() for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode in (-signal.SIGINT, 1)
    assert words in ([], [f"{name}: error: interrupted"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open to wait for a process that is not a child")
def test_a_test_run_that_is_killed_leaves_no_server(golden_bundle: Callable[[str], Path]) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.processes import running_server\n"
        "with running_server(Path(sys.argv[1])) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(golden_bundle("ss_delay6_compression2"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    ) as run:
        assert run.stdout is not None
        server = os.pidfd_open(int(run.stdout.readline()))
        try:
            run.kill()
            assert select.select([server], [], [], 60)[0], "the server is still running"
        finally:
            os.close(server)
