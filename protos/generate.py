"""Regenerate the stubs of ``hints.proto``: ``python -m knowledge_boosting.protos.generate [FOLDER]``."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def generate(folder: Path) -> None:
    """Write ``knowledge_boosting/protos/hints_pb2*.py*`` to a folder.

    Raises:
        RuntimeError: protoc found an error in ``hints.proto``.
    """
    outputs = ("python", "pyi", "grpc_python", "mypy_grpc")
    arguments = ["protoc", f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--{kind}_out={folder}" for kind in outputs]
    if protoc.main([*arguments, str(ROOT / "knowledge_boosting" / "protos" / "hints.proto")]):
        raise RuntimeError("protoc failed; its message is above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
