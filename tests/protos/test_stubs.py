"""Test that the committed stubs are those of ``hints.proto``."""

import os
import sys
from pathlib import Path

import pytest

from knowledge_boosting import protos
from knowledge_boosting.protos.generate import generate

COMMITTED = Path(protos.__file__).parent


def stubs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("hints_pb2*.py*")}


def test_the_committed_stubs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # protoc searches its mypy plugins in PATH, which does not contain the folder of an environment that is not active.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    generate(tmp_path)
    generated = stubs(tmp_path / "knowledge_boosting" / "protos")
    assert generated.keys() == {"hints_pb2.py", "hints_pb2.pyi", "hints_pb2_grpc.py", "hints_pb2_grpc.pyi"}
    assert generated == stubs(COMMITTED)
