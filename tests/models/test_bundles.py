"""Bundles are written by kb-export, read back, and refused when they were changed."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build, read_config
from knowledge_boosting.models.config import MODEL
from knowledge_boosting.models.manifest import bundle_id, read_manifest
from knowledge_boosting.models.networks import load_large, load_pair, load_small, record_quality, write_bundle
from tests.golden_cases import FOLDER, TOLERANCE, Golden, worst
from tests.processes import refusal_here, run

CASE = "tse_delay3"
CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo/ss-48ms.json"


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
    opened = Bundle(bundle)
    pair, manifest = load_pair(opened), opened.manifest
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
        "small.onnx",
        "small.safetensors",
    ]


def test_untrained_bundles_depend_on_their_seed_and_are_marked(tmp_path: Path) -> None:
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
        bundle = Bundle(copy)
        load(bundle)
        assert bundle.manifest.id == read_manifest(whole).id
        with pytest.raises(InputError, match="this copy of the bundle lacks its"):
            other(bundle)


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
        load_large(Bundle(tmp_path))


def test_a_training_configuration_and_a_note_make_a_bundle_and_its_card(tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    note.write_text("## Data\n\nRead English.\n")
    config = json.loads((CONFIGS / "baselines/SM-TSE-25.json").read_text())
    result = run(
        *("kb-export", "--config", CONFIGS / "baselines/SM-TSE-25.json", "--untrained", "--note", note, "-o"),
        tmp_path / "whole",
    )
    assert result.returncode == 0, result.stderr
    assert "## Data\n\nRead English." in (tmp_path / "whole" / "README.md").read_text()
    assert read_manifest(tmp_path / "whole").model == MODEL.validate_python(config["model"])

    # Speaker layers, most of the bundle, take half the space. Everything else does not change.
    result = run(
        *("kb-export", "--config", CONFIGS / "baselines/SM-TSE-25.json", "--untrained", "--half-speaker", "-o"),
        tmp_path / "half",
    )
    assert result.returncode == 0, result.stderr
    size = {name: (tmp_path / name / "small.safetensors").stat().st_size for name in ("whole", "half")}
    assert size["half"] < 0.55 * size["whole"]
    whole, half = load_small(Bundle(tmp_path / "whole")), load_small(Bundle(tmp_path / "half"))
    for (name, one), other in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, one, rtol=5e-4 if ".speaker." in name else 0, atol=1e-7)


def test_check_finds_what_was_changed(
    golden_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(golden_bundle(CASE), copy)
    result = run("kb-export", "--check", copy)
    assert result.returncode == 0, result.stderr
    for part in ("small", "large"):
        digest = hashlib.sha256((copy / f"{part}.safetensors").read_bytes()).hexdigest()
        assert f"{part}.safetensors: sha256:{digest}" in result.stdout
    graph = copy / "small.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content + b"\0")
    assert "small.onnx: digest differs" in refusal_here("kb-export", capsys, "--check", copy)
    graph.write_bytes(content)
    weights = copy / "large.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "large.safetensors: digest differs" in refusal_here("kb-export", capsys, "--check", copy)
    weights.unlink()
    assert "lacks its large part" in refusal_here("kb-export", capsys, "--check", copy)
    assert "leave out the flags that make one" in refusal_here("kb-export", capsys, "--check", copy, "--untrained")
    assert "no bundle of that name" in refusal_here("kb-export", capsys, "--check", "nothing-like-it")


def test_recorded_figures_are_in_manifest_and_card_once(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(golden_bundle(CASE), copy)
    before = read_manifest(copy)
    for figure in (1.0, 2.5):
        record_quality(Bundle(copy), {"boosted_si_sdri": figure}, f"| boosted | {figure} |")
    manifest = read_manifest(copy)
    assert manifest.quality == {"boosted_si_sdri": 2.5}
    assert (manifest.id, manifest.digests, manifest.provenance) == (before.id, before.digests, before.provenance)
    card = (copy / "README.md").read_text()
    assert card.startswith((golden_bundle(CASE) / "README.md").read_text())
    assert card.count("## Measured") == 1
    assert "| boosted | 2.5 |" in card
    assert "1.0" not in card.partition("## Measured")[2]
    load_pair(Bundle(copy))


def test_bundles_and_configurations_of_schema_version_1_are_read(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    size = {"channels": 8, "hidden": 8, "blocks": 3, "heads": 4, "self_attention": False, "window": 50}
    framing = {"sample_rate": 16000, "chunk": 128, "lookahead": 64}
    alone = {"task": "ss", "microphones": 2, "framing": framing, "small": size, "large": None, "boosting": None}
    (tmp_path / "model.json").write_text(json.dumps(alone))
    model = read_config(tmp_path / "model.json")
    assert model == MODEL.validate_python({"task": "ss", "framing": framing, "network": size})
    write_bundle(tmp_path / "alone", build(model), model, untrained=True, source="none", configuration="model.json")
    for folder, changes in ((tmp_path / "alone", {"model": alone}), (golden_bundle(CASE), {})):
        now, before = Bundle(folder), tmp_path / "before" / folder.name
        shutil.copytree(folder, before)
        document = json.loads((folder / "bundle.json").read_text())
        (before / "bundle.json").write_text(json.dumps(document | changes | {"schema_version": 1}))
        assert (Bundle(before).id, Bundle(before).model) == (now.id, now.model)
        (load_small if changes else load_pair)(Bundle(before))
    # The id of ``tse-alone`` as it was first shipped.
    first = {**alone, "task": "tse", "small": {**size, "channels": 16, "hidden": 16}}
    (tmp_path / "model.json").write_text(json.dumps(first))
    digest = "sha256:defba0bd550bf68af3fb3f7c1e8e10bac527e00c3e7e3db9dae23bcb9f816075"
    assert bundle_id(read_config(tmp_path / "model.json"), {"small": digest}) == "28be4c33f286d090"
    (tmp_path / "model.json").write_text(json.dumps({**alone, "large": size}))
    with pytest.raises(InputError, match="large and boosting must be given both"):
        read_config(tmp_path / "model.json")
    (tmp_path / "model.json").write_text(json.dumps({**alone, "network": size}))
    with pytest.raises(InputError, match="network is for one network alone, and small is for a pair; give one"):
        read_config(tmp_path / "model.json")


def test_export_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, checkpoint = FOLDER / CASE / "config.json", FOLDER / CASE / "joint.ckpt"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "list.json").write_text("[]")
    out = tmp_path / "new"
    cases: list[tuple[list[object], str]] = [
        (["--config", config], "give --config FILE and --output DIRECTORY"),
        (["--config", config, "-o", out, "--untrained", "--note", tmp_path / "no.md"], "no.md: no such file"),
        (["--config", config, "-o", out], "give either --checkpoint FILE or --untrained"),
        (["--config", config, "-o", out, "--untrained", "--checkpoint", checkpoint], "give either"),
        (["--config", tmp_path / "no.json", "-o", out, "--untrained"], "no.json: no such file"),
        (["--config", tmp_path / "list.json", "-o", out, "--untrained"], "must hold a JSON object"),
        (["--config", DEMO, "-o", out, "--checkpoint", checkpoint], "tensor joint_model"),
        (["--config", config, "-o", out, "--checkpoint", config], "not a readable checkpoint"),
        (["--config", config, "-o", tmp_path / "there", "--untrained"], "exists already"),
        (["--config", config, "-o", tmp_path / "a name", "--untrained"], "is no name for a bundle"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for flags, expected in cases:
        assert expected in refusal_here("kb-export", capsys, *flags)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read as Linux gives it")
def test_wrong_sizes_in_the_manifest_cost_no_memory(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """The manifest is consistent and describes a very large network, but the weights belong to another network."""
    bundle = tmp_path / "bundle"
    shutil.copytree(golden_bundle("ss_delay6_compression2"), bundle)
    document = json.loads((bundle / "bundle.json").read_text())
    document["model"]["large"] |= {"channels": 1024, "hidden": 1024, "heads": 1, "window": 2, "blocks": 2}
    document["id"] = bundle_id(MODEL.validate_python(document["model"]), document["digests"])
    (bundle / "bundle.json").write_text(json.dumps(document))
    script = (
        "import resource, sys\n"
        "from knowledge_boosting.models.bundle import Bundle\n"
        "from knowledge_boosting.models.networks import load_large\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_large(Bundle(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, bundle], capture_output=True, text=True, check=True)
    why, grown = result.stdout.splitlines()
    assert "has shape" in why
    assert int(grown) < 100_000, "KiB"  # the network would need ten times as much
