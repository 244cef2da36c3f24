"""The programs talk to the server they were given, and to nobody else; and leave no identity of the machine behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.training.test_training import PAIR, write_config, write_dataset

ROOT = Path(__file__).parent.parent
NAMESPACE = ["unshare", "--map-root-user", "--net"]
SECONDS = 20  # ONNX Runtime's first words to its maker come after nine


def namespace_or_skip() -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip, to make a network of its own")
    tried = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine does not let us make a network of our own ({tried.stderr.strip()})")


@pytest.mark.slow
def test_nothing_is_sent_but_the_session_and_no_trace_is_left(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """Client, server, export and training, with an empty home, where every packet is seen."""
    namespace_or_skip()
    (tmp_path / "bundle").symlink_to(golden_bundle("ss_delay6_compression2"))
    noise = np.random.default_rng(0).normal(0, 0.1, (16000 * SECONDS, 2))
    soundfile.write(tmp_path / "in.wav", noise, 16000)
    data = write_dataset(tmp_path / "data", 4, 0.25)
    write_config(tmp_path, data, epochs=1).rename(tmp_path / "train.json")
    (tmp_path / "config.json").write_text(json.dumps(PAIR))
    home = tmp_path / "home"
    home.mkdir()
    settings = {"HOME": str(home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.quiet_network", str(tmp_path)],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["codes"] == {"live": 0, "export": 0, "train": 0, "server": 0}, result.stderr
    assert seen["sessions"] > 100
    assert not seen["foreign"]
    left = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert not {path for path in left if not path.startswith((".cache/matplotlib/", ".cache/knowledge-boosting/"))}
