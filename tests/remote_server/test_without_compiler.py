"""The server without a C++ compiler: steps run in torch, and everything else is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [f"tests/remote_server/{name}.py" for name in ("test_abuse", "test_limits", "test_sessions")]


@pytest.mark.long
def test_sessions_limits_and_abuse_are_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/none", "XDG_CACHE_HOME": str(tmp_path)}
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadfile"]
    result = subprocess.run([*call, *FILES], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))
