"""The C++ code under the sanitizers for addresses and undefined behaviour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.compiled import needs_compiler

TESTS = {
    "tests/models/test_cpu_step.py": "any_streams or of_the_device or several",
    "tests/models/test_cpu_lstm.py": "not faster",
    "tests/models/test_cpu_attention.py": "",
}


def runtime(name: str) -> str:
    return subprocess.run(
        [os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("tests", TESTS)
def test_nothing_is_found(tests: str, tmp_path: Path) -> None:
    runtimes = [runtime(f"lib{name}.so") for name in ("asan", "ubsan")]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("this compiler has no sanitizers")
    environment = {
        **os.environ,
        "CXXFLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until its end
        "OMP_NUM_THREADS": "1",
    }
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", TESTS[tests] or "test"]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(tmp_path.rglob("*.so"))
