"""The house rules: who may import whom, and what a device does without."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "knowledge_boosting"
ROOMS = {"common", "device_client", "models", "protos", "remote_server", "training"}
ALLOWED = {
    "common": set[str](),
    "protos": set[str](),
    "models": {"common"},
    "remote_server": {"common", "models", "protos"},
    "device_client": {"common", "models", "protos"},
    "training": {"common", "models"},
}
# What of models a device may import without torch, and the client's only module that needs torch.
FREE = {"arrivals", "bundle", "compiled", "config", "cpu_step", "manifest", "onnx_stream"}
FREE |= {"packed_network", "tasks", "transforms"}
TORCH_FREE = {f"{PACKAGE}.models.{name}" for name in FREE}
NEEDS_TORCH = f"{PACKAGE}.device_client.engines.torch_engine"


def modules(room: str) -> dict[str, Path]:
    return {
        f"{PACKAGE}." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / room).rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in modules(room).values():
        used = {name for name in imports(path) if name.split(".")[0] in ROOMS}
        assert not used, f"{path}: a room is imported by its whole name, {PACKAGE}.{min(used)}"
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith(f"{PACKAGE}.")}
        assert rooms & ROOMS <= ALLOWED[room] | {room}, path


# From the bottom up; what stands in one line may not import what stands beside it.
FLOORS = {
    "device_client": [
        {"audio", "engines", "speakers"},
        {"hints"},
        {"boosted_stream"},
        {"enhancer", "live", "replay"},
        {"commands"},
        {"main"},
    ],
    "training": [
        {"config", "workers"},
        {"data", "weights"},
        {"evaluation", "recipes"},
        {"learning"},
        {"commands"},
        {"trainer"},
    ],
}


@pytest.mark.parametrize("room", FLOORS)
def test_the_rooms_within_a_room_import_only_downwards(room: str) -> None:
    whole = f"{PACKAGE}.{room}"
    floor_of = {inner: number for number, rooms in enumerate(FLOORS[room]) for inner in rooms}
    assert {name.removeprefix(f"{whole}.").split(".")[0] for name in modules(room) if name != whole} == set(floor_of)
    for name, path in modules(room).items():
        inner = name.removeprefix(f"{whole}.").split(".")[0]
        for used in imports(path):
            if name != whole and used.startswith(f"{whole}."):
                other = used.removeprefix(f"{whole}.").split(".")[0]
                assert other == inner or floor_of[other] < floor_of[inner], f"{path} imports {used}"


def test_no_module_is_too_long_to_be_read() -> None:
    ours = [path for folder in (*ROOMS, PACKAGE, "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(ours) > 100
    long = {
        path.relative_to(ROOT).as_posix(): count for path in ours if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_module_imports_itself_through_others(room: str) -> None:
    there = modules(room)
    left = {name: (imports(path) & set(there)) - {name} for name, path in there.items()}
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_nothing_is_compared_with_the_name_of_a_task() -> None:
    """What a task is stands in a table; its name is written where one is chosen, and nowhere asked for."""
    for room in ROOMS:
        for path in modules(room).values():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                    assert not texts & {"tse", "ss"}, f"{path}:{node.lineno}"


def test_there_is_one_frame_loop() -> None:
    """What runs a network on a window and hints is called by the loop alone, and by the checks of engines."""
    elsewhere = [*ROOT.glob("benchmarks/*.py"), *modules("device_client").values()]
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in elsewhere
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
        if len(node.args) == 2
    }
    engines = {f"device_client/engines/{name}.py" for name in ("engine", "compiled_engine", "onnx_engine")}
    assert callers == {"device_client/boosted_stream.py"} | engines


def test_the_core_of_the_server_knows_no_transport() -> None:
    core = f"{PACKAGE}.remote_server.core"
    for path in (ROOT / "remote_server" / "core").glob("*.py"):
        used = imports(path)
        assert not {name for name in used if name.split(".")[0] in ("grpc", "grpc_health", "ray")}, path
        assert not {name for name in used if name.startswith(f"{PACKAGE}.remote_server") and not name.startswith(core)}


def test_the_rooms_are_all_there_is() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"benchmarks", "tests", PACKAGE} == ROOMS
    links = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()}
    assert links == ROOMS
    assert all((ROOT / PACKAGE / room).samefile(ROOT / room) for room in ROOMS)


def test_torch_is_imported_only_where_it_is_allowed() -> None:
    heavy = {name for name in modules("models") if name not in TORCH_FREE and name != f"{PACKAGE}.models"}
    for name, path in modules("device_client").items():
        if name != NEEDS_TORCH:
            used = {module for module in imports(path) if module.split(".")[0] == "torch" or module in heavy}
            assert not used, path
    for room in ("common", "protos"):
        for path in modules(room).values():
            assert "torch" not in {module.split(".")[0] for module in imports(path)}, path


def test_libraries_find_the_environment_prepared() -> None:
    """The package prepares it as the first that it does, and ONNX Runtime is loaded in one place."""
    package = ast.parse((ROOT / PACKAGE / "__init__.py").read_text()).body
    loaded = [node.module for node in package if isinstance(node, ast.ImportFrom)]
    assert loaded == ["importlib", "typing", f"{PACKAGE}.common.environment"]
    assert imports(ROOT / "common" / "environment.py") == {"os"}
    assert not imports(ROOT / "common" / "__init__.py")
    elsewhere = [*ROOT.glob("benchmarks/*.py"), *(path for room in ROOMS for path in modules(room).values())]
    users = {path.relative_to(ROOT).as_posix() for path in elsewhere if "onnxruntime" in imports(path)}
    assert users == {"models/onnx_stream.py"}


def test_there_is_one_speaker_encoder() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in modules(room).values()
        if "resemblyzer" in {module.split(".")[0] for module in imports(path)}
    }
    assert users == {"models/speaker_encoder.py"}


def test_loading_onnx_runtime_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    settings = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    script = f"import {PACKAGE}.models.onnx_stream"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=settings, check=True)
    assert not list(tmp_path.iterdir())


def test_the_client_imports_without_torch_and_without_the_server() -> None:
    names = [name for name in modules("device_client") if name != NEEDS_TORCH]
    script = (
        "import importlib, sys\n"
        "for name in ('torch', 'onnx', 'knowledge_boosting.remote_server'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "flags", ["", "--engine torch", "--with-large --reference samples/source1.flac --reference samples/source2.flac"]
)
def test_the_client_says_what_to_install_when_torch_is_missing(flags: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['kb-client', *sys.argv[1:]]\n"
        "from knowledge_boosting.device_client.main import main\n"
        "main()\n"
    )
    call = [
        "replay",
        "samples/mixture.flac",
        "-o",
        str(tmp_path / "o.wav"),
        "--bundle",
        "ss-compact",
        *flags.split(),
    ]
    without_torch = [sys.executable, "-c", script, *call]
    result = subprocess.run(without_torch, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "needs torch" in result.stderr
    assert "pip install" in result.stderr
    assert len(result.stderr.splitlines()) == 1
