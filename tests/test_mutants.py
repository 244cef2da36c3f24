"""No damaged file makes a program fail otherwise than by a line that says so."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import KINDS
from tests.processes import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parent.parent


def faults(kind: str, folder: Path, count: int) -> list[str]:
    """What readers do wrong with so many mutants; a process that is killed is one more fault, and the next goes on."""
    found, at = [], 0
    while at < count:
        call = [sys.executable, "-m", "tests.mutants", kind, str(folder), str(at), str(count - at)]
        run = subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        found += [line for line in run.stdout.splitlines() if line.startswith(f"{kind} ")]
        if run.returncode == 0:
            break
        assert (folder / "at").exists(), run.stderr
        at = int((folder / "at").read_text()) + 1
        found.append(f"{kind} {at - 1}: ended with {run.returncode}: {run.stderr.strip()[-300:]}")
        shutil.rmtree(folder / "mutant", ignore_errors=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "count",
    [pytest.param(25, marks=pytest.mark.slow), pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
def test_damaged_files(kind: str, count: int, tmp_path: Path) -> None:
    assert not faults(kind, tmp_path, count)
    assert resource.RLIMIT_AS is not None
