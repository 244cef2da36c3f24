"""The files of deploy/, as far as the tools to judge them are here: make lint-deploy installs those that pip has."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
VARIANTS = ("plain", "tls")


def tool(name: str) -> str:
    """The path of a program, from the environment of the tests or the machine; the test is skipped without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def accepted(*call: object) -> str:
    """What a program prints that must not complain."""
    result = subprocess.run([*map(str, call)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def rendered(variant: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The objects of a variant, which have passed the check of Kubernetes' own schemas."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    file = tmp_path / f"{variant}.yaml"
    file.write_text(accepted(tool("kubectl"), "kustomize", DEPLOY / "kubernetes" / variant))
    accepted(tool("kubernetes-validate"), "--strict", file)
    return list(yaml.safe_load_all(file.read_text()))


def test_yaml_is_well_written() -> None:
    accepted(tool("yamllint"), "--strict", "--config-file", DEPLOY / ".yamllint.yaml", DEPLOY)


def test_the_dockerfile_has_no_known_faults() -> None:
    accepted(tool("hadolint"), DEPLOY / "docker" / "Dockerfile")


def test_images_begin_from_what_cannot_change() -> None:
    stages: list[str] = []
    for line in (DEPLOY / "docker" / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            _, image, _, stage = line.split()
            assert image in stages or re.search("@sha256:[0-9a-f]{64}$", image), image
            stages.append(stage)
    assert len(stages) > 1


def test_systemd_understands_the_unit_and_finds_it_well_confined(tmp_path: Path) -> None:
    analyze, unit = tool("systemd-analyze"), tmp_path / "kb-server.service"
    text = (DEPLOY / "systemd" / "kb-server.service").read_text()
    unit.write_text(text.replace("/opt/kb-server/bin/kb-server", sys.executable))
    # What it does not know it only warns of.
    verified = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    accepted(analyze, "security", "--offline=yes", "--threshold=20", unit)


def test_systemd_waits_longer_than_a_drain_takes() -> None:
    text = (DEPLOY / "systemd" / "kb-server.service").read_text()
    drain, wait = re.search(r"--drain-seconds (\d+)", text), re.search(r"TimeoutStopSec=(\d+)", text)
    assert drain
    assert wait
    assert int(wait[1]) >= int(drain[1]) + 5


def test_systemd_bounds_what_a_server_takes() -> None:
    text = (DEPLOY / "systemd" / "kb-server.service").read_text()
    assert {"MemoryMax", "TasksMax", "LimitNOFILE"} <= set(re.findall(r"^(\w+)=", text, re.MULTILINE))


def test_the_lock_has_the_versions_of_the_constraints_and_digests_of_all() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    locked = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([\w.-]+)==([^\s;]+)[^\n]*\n((?:    --hash=sha256:[0-9a-f]{64}[ \\]*\n)+)", locked, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^\S+==", locked, re.MULTILINE)) > 50
    for name, version, _ in entries:
        assert pinned.get(name, version) == version
    assert {"torch", "grpcio", "onnxruntime", "resemblyzer"} <= {name for name, *_ in entries}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubernetes_waits_longer_than_a_drain_takes(variant: str, tmp_path: Path) -> None:
    deployment = next(thing for thing in rendered(variant, tmp_path) if thing["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    drain = re.search(r"--drain-seconds[= ](\d+)", " ".join(container["args"]))
    assert drain
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + int(drain[1]) + 5
    # A server that drains says NOT_SERVING, and may not be killed for it before it is done.
    probe = container["livenessProbe"]
    assert probe["periodSeconds"] * probe.get("failureThreshold", 3) >= pause + int(drain[1])


def test_the_server_with_tls_has_its_files_from_secrets(tmp_path: Path) -> None:
    deployment = next(thing for thing in rendered("tls", tmp_path) if thing["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert "--insecure" not in container["args"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    secrets = {mounts[volume["name"]] for volume in pod["volumes"] if "secret" in volume}
    files = [argument.partition("=")[2] for argument in container["args"] if "/" in argument]
    assert len(files) == 3
    assert {str(Path(file).parent) for file in files} == secrets


def test_the_scaler_passes_kubernetes_schemas() -> None:
    accepted(tool("kubernetes-validate"), "--strict", DEPLOY / "kubernetes" / "autoscaler.yaml")
