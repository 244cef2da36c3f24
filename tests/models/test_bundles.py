"""Bundles: written by kb-export, read back, refused when changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.errors import InputError
from models.bundle import load_large, load_pair, load_small
from models.manifest import read_manifest
from tests.golden_cases import FOLDER, TOLERANCE, Golden, worst
from tests.processes import refusal, run

CASE = "tse_delay3"
DEMO = Path(__file__).parents[2] / "configs/demo/ss-48ms.json"


def test_a_published_checkpoint_becomes_a_bundle_that_computes_the_same(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    bundle = tmp_path / "tse"
    result = run(
        *("kb-export", "--config", FOLDER / CASE / "config.json", "--checkpoint", FOLDER / CASE / "joint.ckpt"),
        *("-o", bundle),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    pair, manifest = load_pair(str(bundle))
    case = golden(CASE)
    with torch.inference_mode():
        output = pair(case.mixture, case.speaker_embedding)
    assert worst(output.small, case.small_output) < TOLERANCE
    assert worst(output.large, case.large_output) < TOLERANCE
    assert (manifest.name, manifest.untrained, manifest.model.delay) == ("tse", False, 3)
    assert "joint.ckpt, sha256:" in manifest.provenance.source
    assert manifest.id in (bundle / "README.md").read_text()
    assert sorted(path.name for path in bundle.iterdir()) == [
        "README.md",
        "bundle.json",
        "large.safetensors",
        "small.safetensors",
    ]


def test_untrained_bundles_follow_their_seed_and_say_what_they_are(tmp_path: Path) -> None:
    ids = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run("kb-export", "--untrained", "--seed", seed, "--config", DEMO, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert "UNTRAINED" in result.stdout
        assert "UNTRAINED" in result.stderr
        assert "UNTRAINED" in (tmp_path / name / "README.md").read_text()
        manifest = read_manifest(tmp_path / name)
        assert manifest.untrained
        ids[name] = manifest.id
    assert ids["a"] == ids["b"] != ids["c"]


def test_each_side_needs_only_its_own_part(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    whole = golden_bundle(CASE)
    for part, load, other in (("small", load_small, load_large), ("large", load_large, load_small)):
        copy = tmp_path / part
        copy.mkdir()
        for name in ("bundle.json", f"{part}.safetensors"):
            (copy / name).write_bytes((whole / name).read_bytes())
        _, manifest = load(str(copy))
        assert manifest.id == read_manifest(whole).id
        with pytest.raises(InputError, match="this copy of the bundle lacks its"):
            other(str(copy))


@pytest.mark.parametrize("change", ["a bit", "other weights", "other size in the manifest"])
def test_changed_bundles_do_not_load(change: str, golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    for file in golden_bundle(CASE).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, manifest = tmp_path / "large.safetensors", tmp_path / "bundle.json"
    if change == "a bit":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 4
        weights.write_bytes(content)
    elif change == "other weights":
        state = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({name: 2 * value for name, value in state.items()}, weights)
    else:
        document = json.loads(manifest.read_text())
        document["model"]["large"]["hidden"] += 1
        manifest.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"large\.safetensors: digest differs|bundle\.json: .*id does not match"):
        load_large(str(tmp_path))


def test_export_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    config, checkpoint = FOLDER / CASE / "config.json", FOLDER / CASE / "joint.ckpt"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "list.json").write_text("[]")
    out = tmp_path / "new"
    cases: list[tuple[list[object], str]] = [
        (["--config", config], "Missing"),
        (["--config", config, "-o", out], "give either --checkpoint FILE or --untrained"),
        (["--config", config, "-o", out, "--untrained", "--checkpoint", checkpoint], "give either"),
        (["--config", tmp_path / "no.json", "-o", out, "--untrained"], "no.json: no such file"),
        (["--config", tmp_path / "list.json", "-o", out, "--untrained"], "must hold a JSON object"),
        (["--config", DEMO, "-o", out, "--checkpoint", checkpoint], "tensor joint_model"),
        (["--config", config, "-o", out, "--checkpoint", config], "not a readable checkpoint"),
        (["--config", config, "-o", tmp_path / "there", "--untrained"], "exists already"),
        (["--config", config, "-o", tmp_path / "a name", "--untrained"], "cannot name a bundle"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for flags, expected in cases:
        assert expected in refusal("kb-export", *flags)
    assert sorted(tmp_path.rglob("*")) == before
