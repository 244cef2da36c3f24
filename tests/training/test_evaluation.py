"""kb-evaluate gives the figures of a separate computation on four mixtures of one second."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure as Picture
from matplotlib.image import imread
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.audio import (
    perceptual_evaluation_speech_quality,
    scale_invariant_signal_distortion_ratio,
    short_time_objective_intelligibility,
    signal_noise_ratio,
)

from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import Alone, NetworkSize
from knowledge_boosting.models.manifest import UNTRAINED_NOTICE, read_manifest
from knowledge_boosting.models.networks import load_pair, write_bundle
from knowledge_boosting.models.pair import BoostedPair, delay_hints
from knowledge_boosting.training.config import FolderData, TrainingConfig
from knowledge_boosting.training.evaluation.files import RESULT_FILES
from knowledge_boosting.training.evaluation.results import RESAMPLES, Figure, Results, bootstrap
from tests.arrivals import arrival_pair
from tests.golden_cases import Golden
from tests.processes import call_here

Made = Callable[[str], Path]
SAMPLES = Path(__file__).parents[2] / "samples"
LENGTH, ITEMS = 16000, 4
DELAY6, DELAY0, TSE = "ss_delay6_compression2", "ss_delay0", "tse_delay6"
TINY = Alone(task="ss", network=NetworkSize(channels=4, hidden=4, blocks=2))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for number in (0, 1):
        speech, _ = soundfile.read(SAMPLES / f"source{number + 1}.flac")
        for item in range(ITEMS):
            folder = root / "test" / str(item)
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"source{number:02d}.wav", speech[32000 * item :][:LENGTH], 16000)
            embedding = rng.standard_normal((1, 256)).astype(np.float32)
            torch.save(torch.from_numpy(embedding), folder / f"spk_id{number:02d}.pt")
    return root


@dataclass(frozen=True)
class Outcome:
    """The result of a call of kb-evaluate."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def results(self) -> Results:
        return Results.model_validate_json((self.folder / "results.json").read_text())

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open() as file:
            return list(csv.DictReader(file))

    def of_items(self, metric: str) -> dict[tuple[str, str, str], list[float]]:
        """Return a figure of every item by model, system and delay."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for line in self.table("items.csv"):
            key = line["model"], line["system"], line["delay_frames"]
            found.setdefault(key, []).append(float(line[metric]))
        return found


def call(*arguments: object, output: Path) -> Outcome:
    """Run kb-evaluate in this process, which is faster than a separate process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = call_here("kb-evaluate", *arguments, "-o", output)
    return Outcome(code, stdout.getvalue(), stderr.getvalue(), output)


def evaluate(*arguments: object, output: Path) -> Outcome:
    outcome = call(*arguments, output=output)
    assert outcome.code == 0, outcome.stderr
    return outcome


def refusal(*arguments: object, output: Path) -> str:
    """Return the one line of a refused call, after checking that it wrote no files."""
    before = sorted(output.parent.iterdir())
    outcome = call(*arguments, output=output)
    assert outcome.code == 2, outcome.stderr
    assert not outcome.stdout
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, outcome.stderr
    assert sorted(output.parent.iterdir()) == before
    return lines[0].removeprefix("kb-evaluate: error: ")


def ends(figure: Figure) -> tuple[float, float, float]:
    assert figure.mean is not None
    assert figure.low is not None
    assert figure.high is not None
    return figure.mean, figure.low, figure.high


# The separate computation of figures.


def read_item(dataset: Path, item: int) -> Tensor:
    folder = dataset / "test" / str(item)
    voices = [soundfile.read(folder / f"source{number:02d}.wav", dtype="float32")[0].T for number in (0, 1)]
    return torch.from_numpy(np.stack(voices))


def expected_figures(estimate: Tensor, sources: Tensor, mixture: Tensor, *, slow: bool = True) -> dict[str, float]:
    """Compute the figures of an estimate ``[S, M, N]`` with torchmetrics, for the best order of its sources."""

    def si_sdr(signals: Tensor) -> float:
        return float(scale_invariant_signal_distortion_ratio(signals, sources, zero_mean=True).mean())

    ordered = max((estimate[list(order)] for order in permutations(range(len(sources)))), key=si_sdr)
    before = mixture.expand_as(sources)
    figures = {
        "si_sdri": si_sdr(ordered) - si_sdr(before),
        "snri": float((signal_noise_ratio(ordered, sources) - signal_noise_ratio(before, sources)).mean()),
    }
    if slow:
        figures["stoi"] = float(short_time_objective_intelligibility(ordered, sources, 16000).mean())
        figures["pesq"] = float(perceptual_evaluation_speech_quality(ordered, sources, 16000, "wb").mean())
    return figures


@torch.inference_mode()
def expected_outputs(pair: BoostedPair, mixture: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Compute the outputs of the systems of a pair for a mixture ``[M, N]``, with wrong hints from ``other``."""
    output = pair(mixture[None])
    steps = output.hints.shape[1]
    alone = pair(mixture[None], None, torch.full((steps,), NEVER))
    # The small network processes this mixture, and the large network the other one.
    padded = torch.nn.functional.pad(mixture, (0, steps * 128 + 64 - mixture.shape[-1]))
    delayed = delay_hints(pair(other[None]).hints, pair.config.delay)
    wrong, _ = pair.small(padded[None], pair.small.initial_state(1), delayed)
    return {
        "small_without_hints": alone.small[0],
        "boosted": output.small[0],
        "boosted_wrong_hints": wrong[0, ..., : mixture.shape[-1]],
        "large": output.large[0],
    }


@pytest.fixture(scope="module")
def measured(dataset: Path, golden_bundle: Made, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All figures of one pair, with STOI and PESQ from a worker process."""
    output = tmp_path_factory.mktemp("measured") / "out"
    return evaluate(golden_bundle(DELAY6), "--data", dataset, "--workers", 1, output=output)


@pytest.fixture(scope="module")
def streamed(dataset: Path, golden_bundle: Made, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    output = tmp_path_factory.mktemp("streamed") / "out"
    arguments = (golden_bundle(DELAY6), "--data", dataset, "--items", 2, "--metrics", "si_sdri,snri", "--streaming")
    return evaluate(*arguments, output=output)


def test_the_four_outputs_agree(measured: Outcome) -> None:
    assert sorted(path.name for path in measured.folder.iterdir()) == sorted(RESULT_FILES)
    assert all((measured.folder / name).stat().st_mode & 0o044 for name in RESULT_FILES)
    picture = imread(measured.folder / "results.png")
    assert picture.shape[0] > 200
    assert picture.std() > 0.05
    results = measured.results
    assert results.data.items == ITEMS
    assert results.data.seconds == ITEMS * LENGTH / 16000
    assert [row.system for row in results.rows] == [
        "mixture",
        "small_without_hints",
        "boosted",
        "boosted_wrong_hints",
        "large",
    ]
    lines = [line for line in measured.stdout.splitlines() if "(" in line and "…" in line]
    assert len(lines) == len(results.rows)
    for row, summary, line in zip(results.rows, measured.table("results.csv"), lines, strict=True):
        delay = "" if row.delay_frames is None else str(row.delay_frames)
        assert (row.model or "", row.system, delay) == (summary["model"], summary["system"], summary["delay_frames"])
        for metric, figure in row.figures.items():
            of_items = measured.of_items(metric)[row.model or "", row.system, delay]
            assert len(of_items) == figure.items == int(summary[f"{metric}_items"]) == ITEMS
            mean, low, high = ends(figure)
            assert mean == pytest.approx(np.mean(of_items), abs=1e-4)
            assert min(of_items) - 1e-4 <= low <= mean <= high <= max(of_items) + 1e-4
            columns = (metric, f"{metric}_low", f"{metric}_high")
            assert tuple(float(summary[column]) for column in columns) == (mean, low, high)
            digits = 3 if metric == "stoi" else 2
            interval = f" ({low:.{digits}f}…{high:.{digits}f})" if low < high else ""
            assert f" {mean:.{digits}f}{interval}" in line


def test_figures_are_those_of_torchmetrics_on_the_models_own_output(
    measured: Outcome, dataset: Path, golden: Callable[[str], Golden]
) -> None:
    pair = golden(DELAY6).pair
    sources = [read_item(dataset, item) for item in range(ITEMS)]
    for item in (0, ITEMS - 1):  # the last item gets the hints of the first as wrong hints
        mixture = sources[item].sum(0)
        outputs = expected_outputs(pair, mixture, sources[(item + 1) % ITEMS].sum(0))
        for system, estimate in {"mixture": mixture.expand(2, -1, -1), **outputs}.items():
            expected = expected_figures(estimate, sources[item], mixture)
            for metric, value in expected.items():
                found = [of for key, of in measured.of_items(metric).items() if key[1] == system]
                assert len(found) == 1
                assert found[0][item] == pytest.approx(value, abs=2e-3), (system, metric)


def test_the_mixture_improves_by_nothing(measured: Outcome) -> None:
    for metric in ("si_sdri", "snri"):
        assert measured.of_items(metric)["", "mixture", ""] == [0.0] * ITEMS
    figure = measured.results.rows[0].figures["si_sdri"]
    assert (figure.mean, figure.low, figure.high) == (0, 0, 0)


def test_streaming_agrees_with_whole_signals_and_says_how_far(streamed: Outcome, measured: Outcome) -> None:
    assert streamed.results.path == "streaming"
    record = streamed.results.streaming
    assert record is not None
    assert record.largest_difference_db < 0.01
    differences = []
    for metric in ("si_sdri", "snri"):
        whole = measured.of_items(metric)
        for key, of_items in streamed.of_items(metric).items():
            # With two items, the second gets the hints of the first as wrong hints.
            shared = 1 if key[1] == "boosted_wrong_hints" else 2
            differences += np.abs(np.subtract(of_items[:shared], whole[key][:shared])).tolist()
    assert max(differences) < 0.01
    assert record.largest_difference_db >= max(differences) - 2e-6
    assert f"within {record.largest_difference_db:.1g} dB" in streamed.stdout
    assert measured.results.streaming is None


def test_a_difference_between_streaming_and_whole_signals_is_found(
    dataset: Path, golden_bundle: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small network that ignores its hints when streaming is found by the comparison."""
    from knowledge_boosting.models.pair import SmallModel

    forward = SmallModel.forward

    def forgetful(self: SmallModel, samples: Tensor, state: Any, hints: Tensor | None = None) -> Any:
        return forward(self, samples, state, None if hints is None else hints * (hints.shape[1] > 1))

    monkeypatch.setattr(SmallModel, "forward", forgetful)
    arguments = ("--data", dataset, "--items", 1, "--metrics", "si_sdri", "--streaming")
    record = evaluate(golden_bundle(DELAY6), *arguments, output=tmp_path / "out").results.streaming
    assert record is not None
    assert record.largest_difference_db > 0.1
    assert record.system == "boosted"


def test_several_bundles_at_their_own_and_at_other_delays(
    dataset: Path, golden: Callable[[str], Golden], golden_bundle: Made, tmp_path: Path
) -> None:
    alone = tmp_path / "lone"
    torch.manual_seed(0)
    write_bundle(alone, build(TINY), TINY, untrained=True, source="random", configuration="test")
    models = (golden_bundle(DELAY0), golden_bundle(DELAY6), alone)
    arguments = ("--data", dataset, "--items", 2, "--delays", "6,2", "--metrics", "si_sdri")
    outcome = evaluate(*models, *arguments, output=tmp_path / "out")
    rows = [(row.model, row.system, row.delay_frames, row.trained_delay) for row in outcome.results.rows]
    assert rows == [
        (None, "mixture", None, None),
        (DELAY0, "small_without_hints", None, None),
        (DELAY0, "boosted", 0, True),
        (DELAY0, "boosted", 2, False),
        (DELAY0, "boosted", 6, False),
        (DELAY0, "boosted_wrong_hints", 0, True),
        (DELAY0, "large", None, None),
        (DELAY6, "small_without_hints", None, None),
        (DELAY6, "boosted", 2, False),
        (DELAY6, "boosted", 6, True),
        (DELAY6, "boosted_wrong_hints", 6, True),
        (DELAY6, "large", None, None),
        ("lone", "alone", None, None),
    ]
    assert [(model.delay_frames, model.delay_ms, model.compression) for model in outcome.results.models] == [
        (0, 0.0, 1),
        (6, 48.0, 2),
        (None, None, None),
    ]
    assert outcome.results.rows[3].delay_ms == 16.0
    assert outcome.stdout.count("16 ms*") == 2
    assert "trained for another delay" in outcome.stdout

    # These are the same weights in a pair with a delay of two frames.
    pair = golden(DELAY6).pair
    boosting = pair.config.boosting.model_copy(update={"delay": 2})
    retimed = BoostedPair(pair.config.model_copy(update={"boosting": boosting})).eval()
    retimed.load_state_dict(pair.state_dict())
    sources = read_item(dataset, 0)
    with torch.inference_mode():
        expected = expected_figures(retimed(sources.sum(0)[None]).small[0], sources, sources.sum(0), slow=False)
    assert outcome.of_items("si_sdri")[DELAY6, "boosted", "2"][0] == pytest.approx(expected["si_sdri"], abs=1e-3)


def test_what_a_pair_gains_over_a_network_alone_is_counted_item_by_item(
    dataset: Path, golden_bundle: Made, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    write_bundle(tmp_path / "lone", build(TINY), TINY, untrained=True, source="random", configuration="test")
    shutil.copytree(golden_bundle(DELAY6), tmp_path / "pair")
    models = (tmp_path / "lone", tmp_path / "pair")
    arguments = ("--data", dataset, "--metrics", "si_sdri,snri", "--delays", "2", "--record")
    outcome = evaluate(*models, *arguments, output=tmp_path / "out")
    of_items = {
        (model, system): values
        for (model, system, delay), values in outcome.of_items("si_sdri").items()
        if delay != "2"
    }
    systems = ["small_without_hints", "boosted", "boosted_wrong_hints", "large"]
    found = outcome.results.comparisons
    assert [(gain.model, gain.system, gain.over) for gain in found] == [("pair", system, "lone") for system in systems]
    for gain in found:
        differences = np.subtract(of_items["pair", gain.system], of_items["lone", "alone"])
        assert gain.si_sdri.mean == pytest.approx(differences.mean(), abs=1e-3)
        # The interval is that of the four differences, so it lies within their range.
        _, low, high = ends(gain.si_sdri)
        assert differences.min() - 1e-3 <= low < differences.mean() < high <= differences.max() + 1e-3
    boosted = found[1].si_sdri
    assert f"{boosted.mean:+.2f} ({boosted.low:+.2f}…{boosted.high:+.2f})" in outcome.stdout

    # The figures are in the bundles now, and the bundles can still be loaded.
    manifest = read_manifest(tmp_path / "pair")
    by_system = {
        row.system: row for row in outcome.results.rows if row.model == "pair" and row.trained_delay is not False
    }
    assert manifest.quality["boosted_si_sdri"] == by_system["boosted"].figures["si_sdri"].mean
    assert manifest.quality["large_snri"] == by_system["large"].figures["snri"].mean
    assert "alone_si_sdri" in read_manifest(tmp_path / "lone").quality
    card = (tmp_path / "pair" / "README.md").read_text()
    assert f"| boosted, over lone | {boosted.mean:+.2f} ({boosted.low:+.2f}…{boosted.high:+.2f}) |" in card
    load_pair(Bundle(tmp_path / "pair"))


def test_target_speech_extraction(
    dataset: Path, golden: Callable[[str], Golden], golden_bundle: Made, tmp_path: Path
) -> None:
    arguments = ("--data", dataset, "--items", 2, "--metrics", "si_sdri")
    outcome = evaluate(golden_bundle(TSE), *arguments, output=tmp_path / "out")
    assert outcome.results.task == "tse"
    found = outcome.of_items("si_sdri")
    for item in (0, 1):  # the target is source 0 for even items and source 1 for odd items
        sources = read_item(dataset, item)
        target = sources[item : item + 1]
        speaker = torch.load(dataset / "test" / str(item) / f"spk_id{item:02d}.pt")
        with torch.inference_mode():
            output = golden(TSE).pair(sources.sum(0)[None], speaker)
        for system, estimate, delay in (("boosted", output.small, "6"), ("large", output.large, "")):
            expected = expected_figures(estimate[0], target, sources.sum(0), slow=False)
            assert found[TSE, system, delay][item] == pytest.approx(expected["si_sdri"], abs=1e-3)
    assert "Target speech extraction" in outcome.stdout


def test_the_bootstrap_interval_is_that_of_normal_data() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    figure = bootstrap(values, seed=0)
    mean, low, high = ends(figure)
    assert mean == pytest.approx(values.mean(), abs=1e-4)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (high - mean, mean - low) == pytest.approx((half, half), rel=0.1)
    assert bootstrap(values, seed=0) == figure
    assert bootstrap(values, seed=1) != figure
    # The width of an interval depends on the number of items, not on the number of resamples.
    assert RESAMPLES >= 2000
    _, low10, high10 = ends(bootstrap(values[:40], seed=0))
    assert (high10 - low10) / (high - low) == pytest.approx(np.sqrt(10), rel=0.3)


def test_figures_that_an_item_does_not_have_are_left_out() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert bootstrap(values, seed=0) == bootstrap(values[[0, 2]], seed=0)
    assert bootstrap(values, seed=0).items == 2
    assert bootstrap(values[:1], seed=0).model_dump() == {"mean": 1, "low": None, "high": None, "items": 1}
    assert bootstrap(values[1:2], seed=0).model_dump() == {"mean": None, "low": None, "high": None, "items": 0}


def test_the_same_call_gives_the_same_files_and_the_seed_is_of_the_bootstrap_alone(
    dataset: Path, golden_bundle: Made, tmp_path: Path
) -> None:
    arguments = (golden_bundle(DELAY6), "--data", dataset, "--items", 3, "--metrics", "si_sdri")
    first = evaluate(*arguments, output=tmp_path / "first")
    before = {name: (first.folder / name).read_bytes() for name in RESULT_FILES}
    again = evaluate(*arguments, output=first.folder)
    assert {name: (again.folder / name).read_bytes() for name in RESULT_FILES} == before
    other = evaluate(*arguments, "--seed", 1, output=tmp_path / "other")
    assert (other.folder / "items.csv").read_bytes() == before["items.csv"]
    assert other.results.bootstrap.seed == 1
    of_items = list(other.of_items("si_sdri").values())
    for row, values in zip(other.results.rows, of_items, strict=True):
        assert ends(row.figures["si_sdri"]) == pytest.approx(ends(bootstrap(np.array(values), seed=1)), abs=2e-4)


def test_untrained_weights_are_marked_wherever_figures_appear(
    dataset: Path, golden_bundle: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Picture, "suptitle", lambda _self, text, **_: titles.append(text))
    torch.manual_seed(0)
    random = tmp_path / "random"
    write_bundle(random, build(TINY), TINY, untrained=True, source="random", configuration="test")
    arguments = ("--data", dataset, "--items", 2, "--metrics", "si_sdri")

    outcome = evaluate(random, *arguments, output=tmp_path / "out")
    assert outcome.results.notice == UNTRAINED_NOTICE
    assert [row.untrained for row in outcome.results.rows] == [False, True]
    assert [line["untrained"] for line in outcome.table("results.csv")] == ["false", "true"]
    assert [line["untrained"] for line in outcome.table("items.csv")] == ["false", "true"] * 2
    assert UNTRAINED_NOTICE in outcome.stdout.splitlines()[1]
    assert "random (UNTRAINED)" in outcome.stdout
    assert UNTRAINED_NOTICE in titles[-1]

    mixed = evaluate(golden_bundle(DELAY6), random, *arguments, output=tmp_path / "mixed")
    assert mixed.results.notice is not None
    for text in (mixed.results.notice, titles[-1], mixed.stdout.splitlines()[1]):
        assert "UNTRAINED: random " in text
        assert DELAY6 not in text.replace(str(tmp_path), "")
    assert f"{DELAY6} (UNTRAINED)" not in mixed.stdout

    trained = evaluate(golden_bundle(DELAY6), *arguments, output=tmp_path / "trained")
    assert trained.results.notice is None
    assert "UNTRAINED" not in trained.stdout + titles[-1] + (trained.folder / "results.csv").read_text()


def test_one_item_has_no_interval_and_no_wrong_hints(dataset: Path, golden_bundle: Made, tmp_path: Path) -> None:
    arguments = ("--data", dataset, "--items", 1, "--metrics", "snri")
    outcome = evaluate(golden_bundle(DELAY6), *arguments, output=tmp_path / "out")
    assert [row.system for row in outcome.results.rows] == ["mixture", "small_without_hints", "boosted", "large"]
    assert outcome.results.metrics == ["si_sdri", "snri"]
    assert all(figure.low is None for row in outcome.results.rows for figure in row.figures.values())
    assert {line["si_sdri_low"] for line in outcome.table("results.csv")} == {""}


def test_an_item_without_speech_has_no_stoi(dataset: Path, golden_bundle: Made, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "data")
    click = np.zeros((LENGTH, 2))
    click[100] = 0.5
    for number in (0, 1):
        soundfile.write(root / "test" / "1" / f"source{number:02d}.wav", click * (number - 0.6), 16000)
    arguments = ("--data", root, "--items", 2, "--metrics", "si_sdri,stoi", "--workers", 0)
    outcome = evaluate(golden_bundle(DELAY6), *arguments, output=tmp_path / "out")
    for row in outcome.results.rows:
        assert {metric: figure.items for metric, figure in row.figures.items()} == {"si_sdri": 2, "stoi": 1}
    stoi = [line["stoi"] for line in outcome.table("items.csv")]
    assert all(stoi[:5])
    assert not any(stoi[5:])
    assert "over fewer items" in outcome.stdout
    assert not outcome.stderr


@pytest.fixture
def run_folder(golden: Callable[[str], Golden], dataset: Path, tmp_path: Path) -> Path:
    """A run whose best checkpoint is the second one, with the weights of a parity case."""
    pair = golden(DELAY6).pair
    data = FolderData(root=str(dataset), split="test")
    folder = tmp_path / "my-run"
    (folder / "best").mkdir(parents=True)
    settings = TrainingConfig(model=pair.config, train=data, validation=data, epochs=1)
    (folder / "config.json").write_text(settings.model_dump_json())
    good = {f"model.{name}": weight for name, weight in pair.state_dict().items()}
    bad = {name: torch.zeros_like(weight) for name, weight in good.items()}
    for name, state in (("last", bad), ("best/epoch000_3.10dB", bad), ("best/epoch001_12.00dB", good)):
        torch.save({"state_dict": state}, folder / f"{name}.ckpt")
    return folder


def test_a_run_is_its_best_checkpoint(run_folder: Path, dataset: Path, golden_bundle: Made, tmp_path: Path) -> None:
    arguments = ("--data", dataset, "--items", 2, "--metrics", "si_sdri")
    run = evaluate(run_folder, *arguments, output=tmp_path / "run")
    bundle = evaluate(golden_bundle(DELAY6), *arguments, output=tmp_path / "bundle")
    assert [row.figures for row in run.results.rows] == [row.figures for row in bundle.results.rows]
    model = run.results.models[0]
    assert (model.name, model.kind, model.checkpoint) == ("my-run", "run", "best/epoch001_12.00dB.ckpt")
    assert model.id.startswith("sha256:")
    shutil.rmtree(run_folder / "best")
    (run_folder / "last.ckpt").unlink()
    assert "no checkpoint" in refusal(run_folder, *arguments, output=tmp_path / "refused")


def test_models_with_the_same_name_are_distinguished(dataset: Path, tmp_path: Path) -> None:
    paths = [tmp_path / parent / "same" for parent in ("a", "b")]
    for path in paths:
        write_bundle(path, build(TINY), TINY, untrained=True, source="random", configuration="test")
    arguments = ("--data", dataset, "--items", 1, "--metrics", "si_sdri")
    outcome = evaluate(*paths, *arguments, output=tmp_path / "out")
    assert [row.model for row in outcome.results.rows] == [None, *map(str, paths)]


def test_a_failure_leaves_earlier_results_as_they_were(dataset: Path, tmp_path: Path) -> None:
    model = build(TINY)
    weight = model.get_parameter("small.network.output_conv.conv.weight")
    with torch.no_grad():
        weight.fill_(3e38)
    write_bundle(tmp_path / "huge", model, TINY, untrained=True, source="made by hand", configuration="test")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in RESULT_FILES:
        (folder / name).write_text("earlier")
    arguments = ("--data", dataset, "--metrics", "si_sdri")
    outcome = call(tmp_path / "huge", *arguments, output=folder)
    assert outcome.code == 1
    assert "not finite" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(RESULT_FILES, "earlier")
    assert call(tmp_path / "huge", *arguments, output=tmp_path / "none").code == 1
    assert not (tmp_path / "none").exists()


def test_calls_that_cannot_be_carried_out(
    dataset: Path, golden_bundle: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    lone = tmp_path / "lone"
    write_bundle(lone, build(TINY), TINY, untrained=True, source="random", configuration="test")
    slow = TINY.model_copy(update={"framing": TINY.framing.model_copy(update={"sample_rate": 8000})})
    write_bundle(tmp_path / "8k", build(slow), slow, untrained=True, source="random", configuration="test")
    pair, data = golden_bundle(DELAY6), ("--data", dataset)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((pair, "--data", tmp_path / "none"), "no such folder"),
        ((pair, *data, "--split", "dev"), "dev: no such folder"),
        ((pair, "--data", tmp_path, "--split", "empty"), "no numbered items"),
        (
            (pair, *data, "--metrics", "si_sdri,sdr"),
            "--metrics: 'sdr' is unknown; choose from si_sdri, snri, stoi, pesq, wer",
        ),
        ((pair, *data, "--delays", "0,-1"), "--delays 0,-1: give numbers of frames"),
        ((pair, *data, "--delays", "1;2"), "--delays 1;2: give numbers of frames"),
        ((pair, *data, "--delays", "9999"), "--delays 9999: give numbers of frames"),
        ((lone, *data, "--delays", "1"), "--delays: is for pairs"),
        ((pair, *data, "--device", "tpu"), "--device tpu: must be"),
        ((pair, *data, "--device", "cuda:"), "--device cuda:: must be"),
        ((pair, *data, "--device", "cuda:1"), "has 1 CUDA devices"),
        ((pair, *data, "--items", 0), "--items"),
        ((pair, *data, "--workers", -1), "--workers"),
        (("nonesuch", *data), "nonesuch: no bundle of that name or path"),
        ((tmp_path / "empty", *data), "neither bundle.json (a bundle) nor config.json (a run)"),
        ((pair, pair, *data), "given twice"),
        ((pair, golden_bundle(TSE), *data), "task is tse"),
        ((tmp_path / "8k", *data), "works at 8000 Hz"),
        (data, "BUNDLE_OR_RUN"),
    ]
    for arguments, message in cases:
        assert message in refusal(*arguments, output=tmp_path / "out")
    outcome = call(pair, *data, output=tmp_path / "file" / "out")
    assert outcome.code == 2
    assert "cannot make the folder" in outcome.stderr
    (tmp_path / "taken" / "items.csv").mkdir(parents=True)
    assert "items.csv: is a folder" in refusal(pair, *data, output=tmp_path / "taken")


def test_data_that_cannot_be_measured(dataset: Path, golden_bundle: Made, tmp_path: Path) -> None:
    def broken(item: int, name: str, samples: NDArray[np.float64] | None, rate: int = 16000) -> Path:
        """Copy the dataset, and replace or delete a file of one item."""
        root = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        path = shutil.copytree(dataset, root) / "test" / str(item) / name
        path.unlink()
        if samples is not None:
            soundfile.write(path, samples, rate)
        return root

    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (LENGTH, 2))
    one_ear = noise * [1, 0]
    short = broken(2, "source00.wav", noise[:3000])
    soundfile.write(short / "test" / "2" / "source01.wav", noise[:3000], 16000)
    cases: list[tuple[str, Path, tuple[str, ...]]] = [
        (DELAY6, broken(3, "source01.wav", None), ("source01.wav", "no such file")),
        (DELAY6, broken(3, "source01.wav", noise, 8000), ("source01.wav", "2 channels at 8000 Hz")),
        (DELAY6, broken(3, "source01.wav", noise[:, :1]), ("source01.wav", "1 channels")),
        (DELAY6, broken(3, "source01.wav", noise[:-1]), ("source01.wav", "as long as")),
        (DELAY6, broken(3, "source01.wav", one_ear), ("test/3", "silent at a microphone")),
        (DELAY6, short, ("test/2", "shorter than 0.5 s", "--metrics")),
        (TSE, broken(3, "spk_id01.pt", None), ("spk_id01.pt", "speaker embedding")),
    ]
    for name, root, messages in cases:
        line = refusal(golden_bundle(name), "--data", root, output=tmp_path / "out")
        assert all(message in line for message in messages), line
    # Other metrics support short items, and items of different lengths.
    outcome = evaluate(golden_bundle(DELAY6), "--data", short, "--metrics", "snri", output=tmp_path / "out")
    assert outcome.results.data.seconds == pytest.approx((3 * LENGTH + 3000) / 16000, abs=1e-3)


def test_fewer_items_than_requested_give_a_warning(dataset: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "lone", build(TINY), TINY, untrained=True, source="random", configuration="test")
    arguments = ("--data", dataset, "--items", 9, "--metrics", "si_sdri")
    outcome = evaluate(tmp_path / "lone", *arguments, output=tmp_path / "out")
    assert outcome.stderr == f"warning: {dataset / 'test'}: has 4 items, fewer than --items 9\n"
    assert json.loads((outcome.folder / "results.json").read_text())["data"]["items"] == ITEMS


def test_pairs_are_measured_over_simulated_networks(
    dataset: Path, golden: Callable[[str], Golden], golden_bundle: Made, tmp_path: Path
) -> None:
    pair = arrival_pair(window=20)
    write_bundle(tmp_path / "arrival", pair, pair.config, untrained=True, source="random", configuration="test")
    networks = ["delay=36", "delay=52", "delay=500"]
    flags = ("--data", dataset, "--items", 2, "--metrics", "si_sdri", "--streaming", "--networks", ",".join(networks))
    outcome = evaluate(tmp_path / "arrival", golden_bundle(DELAY6), *flags, "--delays", 9, output=tmp_path / "out")
    figures = {
        (row["model"], row["system"], row["delay_ms"] or row["network"]): float(row["si_sdri"])
        for row in outcome.table("items.csv")
        if row["item"] == "0"
    }
    assert outcome.results.streaming is not None
    assert outcome.results.streaming.largest_difference_db < 1e-3
    sources = read_item(dataset, 0)
    frames = torch.arange(-(-LENGTH // 128))

    def expected(of: BoostedPair, ready_at: Tensor) -> float:
        with torch.inference_mode():
            estimate = of(sources.sum(0)[None], None, ready_at).small[0]
        return expected_figures(estimate, sources, sources.sum(0), slow=False)["si_sdri"]

    # The server adds 4 ms. A hint that arrives between two frames is used from the second one on.
    fixed, never = golden(DELAY6).pair, torch.full_like(frames, NEVER)
    for of, name, where, ready_at in (
        (pair, "arrival", "delay=36", frames + 5),
        (pair, "arrival", "delay=52", frames + 7),
        (pair, "arrival", "delay=500", never),
        (pair, "arrival", "72.0", frames + 9),
        (pair, "arrival", "48.0", frames + 6),
        (fixed, DELAY6, "delay=36", frames),
        (fixed, DELAY6, "delay=52", never),
    ):
        assert figures[name, "boosted", where] == pytest.approx(expected(of, ready_at), abs=1e-3), (name, where)
    assert figures["arrival", "small_without_hints", ""] == pytest.approx(expected(pair, never), abs=1e-3)
    assert len({round(value, 2) for key, value in figures.items() if key[:2] == ("arrival", "boosted")}) == 5


@pytest.mark.parametrize("network", ["wlan", "delay", "delay=-1", "loss=0.6", "bandwidth=3", "delay=1+", "jitter=nan"])
def test_unknown_networks_are_refused(network: str, dataset: Path, golden_bundle: Made, tmp_path: Path) -> None:
    line = refusal(golden_bundle(DELAY6), "--data", dataset, "--networks", f"wifi,{network}", output=tmp_path / "out")
    assert line.startswith(f"--networks {network}: give one of lan, wifi")
