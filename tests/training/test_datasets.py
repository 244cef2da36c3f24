"""Examples from a folder in the published layout and from dynamic mixing, their order and their loading."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file, save_file
from scipy.signal import fftconvolve
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import Alone, ModelConfig, NetworkSize
from knowledge_boosting.models.speaker_encoder import speaker_embedding
from knowledge_boosting.training.config import DynamicData, FolderData
from knowledge_boosting.training.data.dynamic_mixing import DynamicMixing, render
from knowledge_boosting.training.data.loading import Batch, EpochOrder, Loader
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.data.responses import write_bank
from tests.processes import PATIENCE, environment

SPEECH = Path(__file__).parent / "speech"
RATE = 16000
LENGTH = 1600
Task = Literal["tse", "ss"]


def model(task: Task) -> ModelConfig:
    return Alone(task=task, network=NetworkSize(channels=4, hidden=4))


# A folder in the published layout.


def voice(item: int, source: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the samples ``[N, M]`` of a file in the folder below."""
    random = np.random.default_rng([item, source])
    return random.uniform(-0.4, 0.4, (LENGTH, 2)).astype(np.float32)


def embedding(item: int, source: int) -> Tensor:
    return torch.arange(256.0)[None] + 1000 * item + 500 * source


def write_item(folder: Path, item: int) -> None:
    folder.mkdir(parents=True)
    for source in (0, 1):
        soundfile.write(folder / f"source{source:02d}.wav", voice(item, source), RATE, subtype="FLOAT")
        torch.save(embedding(item, source), folder / f"spk_id{source:02d}.pt")


@pytest.fixture(scope="module")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for item in (0, 1, 2, 9, 10, 11):
        write_item(root / "val" / f"{item:02d}", item)
    (root / "val" / "metadata.csv").touch()
    return root


@pytest.fixture
def root(_pristine: Path, tmp_path: Path) -> Path:
    """A dataset of six items that a test can change."""
    return Path(shutil.copytree(_pristine, tmp_path / "data"))


def folder_of(
    root: Path,
    task: Task = "ss",
    *,
    training: bool = False,
    skip_broken: bool = False,
    items: int | None = None,
    seed: int = 0,
) -> MixtureFolder:
    data = FolderData(root=str(root), split="val", items=items)
    return MixtureFolder(data, model(task), seed=seed, training=training, skip_broken=skip_broken)


def equal(one: Any, other: Any) -> bool:
    """Return whether two examples or batches are identical."""
    return bool(one.keys() == other.keys()) and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


def test_items_come_in_the_order_of_their_numbers(root: Path) -> None:
    """The padding of the numbers differs between datasets."""
    shutil.move(root / "val" / "09", root / "val" / "9")
    shutil.move(root / "val" / "02", root / "val" / "0002")
    assert [path.name for path in folder_of(root).items] == ["00", "01", "0002", "9", "10", "11"]


@pytest.mark.parametrize(("items", "expected"), [(None, 6), (4, 4), (100, 6)])
def test_only_the_first_items_are_used(items: int | None, expected: int, root: Path) -> None:
    folder = folder_of(root, items=items)
    assert len(folder) == expected
    assert [path.name for path in folder.items] == ["00", "01", "02", "09", "10", "11"][:expected]


def test_separation_gets_both_sources_and_their_sum(root: Path) -> None:
    example = folder_of(root).example((0, 3))
    expected = torch.from_numpy(np.stack([voice(9, source).T for source in (0, 1)]))
    assert torch.equal(example["sources"], expected)
    assert torch.equal(example["mixture"], expected[0] + expected[1])
    assert example["names"] == str(root / "val" / "09")
    assert "speaker_embedding" not in example


def targets(folder: MixtureFolder, epoch: int) -> list[int]:
    """Return which source is the target of each item, after checking that the embedding belongs to it."""
    found = []
    for index, path in enumerate(folder.items):
        item, example = int(path.name), folder.example((epoch, index))
        both = torch.from_numpy(np.stack([voice(item, source).T for source in (0, 1)]))
        target = 0 if torch.equal(example["sources"][0], both[0]) else 1
        assert torch.equal(example["sources"], both[target : target + 1])
        assert torch.equal(example["mixture"], both.sum(0))
        assert torch.equal(example["speaker_embedding"], embedding(item, target)[0])
        found.append(target)
    return found


def test_evaluation_extracts_the_same_target_whatever_epoch_and_seed(root: Path) -> None:
    chosen = targets(folder_of(root, "tse"), 0)
    assert set(chosen) == {0, 1}
    assert targets(folder_of(root, "tse"), 7) == chosen
    assert targets(folder_of(root, "tse", seed=5), 0) == chosen


def test_training_draws_the_target_anew_every_epoch(root: Path) -> None:
    epochs = range(12)
    folder = folder_of(root, "tse", training=True)
    drawn = [targets(folder, epoch) for epoch in epochs]
    for item in zip(*drawn, strict=True):
        assert set(item) == {0, 1}
    assert [targets(folder_of(root, "tse", training=True), epoch) for epoch in epochs] == drawn
    assert [targets(folder_of(root, "tse", training=True, seed=1), epoch) for epoch in epochs] != drawn


def rewrite(path: Path, samples: np.ndarray[Any, Any], rate: int = RATE) -> None:
    soundfile.write(path, samples, rate, subtype="FLOAT")


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


class MaliciousObject:
    """An object that runs code if it is unpickled without ``weights_only``."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self._mark,))


Damage = Callable[[Path], object]
NAN = np.where(np.arange(2 * LENGTH).reshape(LENGTH, 2) == 77, np.nan, 0.1).astype(np.float32)
DAMAGES: list[tuple[str, str, Damage]] = [
    ("missing", "source01.wav", Path.unlink),
    ("8 kHz", "source00.wav", lambda path: rewrite(path, voice(0, 0), 8000)),
    ("mono", "source01.wav", lambda path: rewrite(path, voice(0, 0)[:, 0])),
    ("three channels", "source01.wav", lambda path: rewrite(path, np.zeros((LENGTH, 3)))),
    ("NaN", "source01.wav", lambda path: rewrite(path, NAN)),
    ("infinite", "source00.wav", lambda path: rewrite(path, np.full((LENGTH, 2), np.inf))),
    ("no samples", "source00.wav", lambda path: rewrite(path, np.zeros((0, 2)))),
    ("cut in the samples", "source01.wav", lambda path: truncate(path, 0.5)),
    ("cut in the samples", "source00.wav", lambda path: truncate(path, 0.5)),
    ("cut in the header", "source01.wav", lambda path: truncate(path, 0.002)),
    ("empty file", "source00.wav", lambda path: path.write_bytes(b"")),
    ("text", "source00.wav", lambda path: path.write_text("no audio")),
    ("longer", "source01.wav", lambda path: rewrite(path, np.zeros((LENGTH + 1, 2)))),
]
EMBEDDING_DAMAGES: list[tuple[str, str, Damage]] = [
    ("missing", "spk_id00.pt", Path.unlink),
    ("cut", "spk_id00.pt", lambda path: truncate(path, 0.5)),
    ("empty file", "spk_id00.pt", lambda path: path.write_bytes(b"")),
    ("text", "spk_id00.pt", lambda path: path.write_text("no tensor")),
    ("another size", "spk_id00.pt", lambda path: torch.save(torch.zeros(1, 192), path)),
    ("no tensor", "spk_id00.pt", lambda path: torch.save([0.0] * 256, path)),
    ("NaN", "spk_id00.pt", lambda path: torch.save(torch.full((1, 256), math.nan), path)),
    ("malicious", "spk_id00.pt", lambda path: torch.save(MaliciousObject(path.parent / "ran"), path)),
]


@pytest.mark.parametrize(
    ("task", "file", "damage"),
    [
        pytest.param(task, file, damage, id=f"{task} {file} {name}")
        for task, damages in (("ss", DAMAGES), ("tse", EMBEDDING_DAMAGES))
        for name, file, damage in damages
    ],
)
def test_a_broken_item_is_an_error_or_left_out(
    task: Task, file: str, damage: Damage, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file. If broken items are skipped, a warning names it, and the next item replaces it."""
    good = folder_of(root, task)
    expected = good.example((0, 3))
    item = root / "val" / "02"
    damage(item / file)
    with pytest.raises(InputError) as caught:
        folder_of(root, task).example((0, 2))
    message = str(caught.value)
    assert str(item) in message
    assert file in message
    assert "\n" not in message
    assert capsys.readouterr().err == ""

    skipping = folder_of(root, task, skip_broken=True)
    substitute = skipping.example((0, 2))
    assert substitute["names"] == str(root / "val" / "09")
    if task == "ss":
        assert equal(substitute, expected)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: skipped: ")
    assert file in warning
    assert len(warning.splitlines()) == 1
    assert not (item / "ran").exists()


def test_after_the_last_item_the_first_takes_its_place(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("10", "11"):
        (root / "val" / name / "source00.wav").unlink()
    assert folder_of(root, skip_broken=True).example((0, 4))["names"] == str(root / "val" / "00")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_all_items_broken_is_an_error_even_when_skipping(root: Path) -> None:
    for path in root.glob("val/*/source00.wav"):
        path.unlink()
    with pytest.raises(InputError, match="every item is broken"):
        folder_of(root, skip_broken=True).example((0, 0))


def test_a_folder_that_is_missing_or_without_items_is_refused(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty" / "val").mkdir()
    with pytest.raises(InputError, match=r"none/val: no such folder"):
        folder_of(root / "none")
    with pytest.raises(InputError, match=r"empty/val: has no numbered items"):
        folder_of(root / "empty")


# The order of examples.


def batches(order: EpochOrder, epoch: int = 0) -> list[list[tuple[int, int]]]:
    order.set_epoch(epoch)
    return list(order)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("items", "batch_size", "devices"), [(40, 8, 4), (43, 8, 2), (43, 6, 3), (5, 4, 1)])
def test_all_devices_together_see_the_batches_of_one(items: int, batch_size: int, devices: int, shuffle: bool) -> None:
    whole = EpochOrder(items, batch_size, seed=3, shuffle=shuffle)
    shares = [
        EpochOrder(items, batch_size, seed=3, shuffle=shuffle, rank=rank, devices=devices) for rank in range(devices)
    ]
    for epoch in (0, 1):
        expected = batches(whole, epoch)
        together = [batches(share, epoch) for share in shares]
        assert len(whole) == len(expected) == len(together[0])
        for number, batch in enumerate(expected):
            parts = [share[number] for share in together]
            assert all(parts)
            assert {place for part in parts for place in part} == set(batch)
            if len(batch) == batch_size:
                assert [len(part) for part in parts] == [batch_size // devices] * devices


def test_no_device_is_left_without_an_example() -> None:
    """All devices take the same number of steps, so a device without an example in the last batch repeats one."""
    shares = [batches(EpochOrder(9, 4, seed=0, shuffle=False, rank=rank, devices=4)) for rank in range(4)]
    assert [share[-1] for share in shares] == [[(0, 8)]] * 4


def test_evaluation_goes_through_every_item_in_order() -> None:
    order = EpochOrder(43, 8, seed=0, shuffle=False)
    assert len(order) == 6
    assert [place for batch in batches(order, 2) for place in batch] == [(2, index) for index in range(43)]


def test_training_sees_full_batches_of_different_items() -> None:
    order = EpochOrder(43, 8, seed=0, shuffle=True)
    assert len(order) == 5
    places = [place for batch in batches(order, 2) for place in batch]
    assert {epoch for epoch, _ in places} == {2}
    assert len({index for _, index in places}) == len(places) == 40
    assert [len(batch) for batch in batches(EpochOrder(3, 8, seed=0, shuffle=True))] == [3]


def test_shuffling_differs_by_epoch_and_seed_and_is_reproducible() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [index for batch in batches(EpochOrder(40, 8, seed=seed, shuffle=True), epoch) for _, index in batch]

    assert order(0, 0) == order(0, 0)
    different = [order(0, 0), order(0, 1), order(0, 2), order(1, 0), order(1, 1), list(range(40))]
    assert len({tuple(one) for one in different}) == len(different)
    assert all(sorted(one) == list(range(40)) for one in different)


@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_an_interrupted_epoch_goes_on_where_it_stopped(first: int) -> None:
    whole = EpochOrder(43, 8, seed=0, shuffle=True)
    rest = EpochOrder(43, 8, seed=0, shuffle=True, first_batch=first)
    assert batches(rest, 6) == batches(whole, 6)[first:]
    assert batches(rest, 7) == batches(whole, 7)  # the next epoch is whole again


# Loading in worker processes.


@pytest.mark.parametrize("task", ["ss", "tse"])
def test_worker_processes_change_nothing(task: Task, root: Path) -> None:
    def epochs(workers: int) -> list[Batch]:
        order = EpochOrder(6, 2, seed=1, shuffle=True)
        loader = Loader(folder_of(root, task, training=True), order, workers)
        seen = []
        for epoch in (0, 1):
            order.set_epoch(epoch)
            seen += list(loader)
        return seen

    alone, together = epochs(0), epochs(2)
    assert len(alone) == len(together) == 6
    assert all(equal(one, other) for one, other in zip(alone, together, strict=True))
    sources = 2 if task == "ss" else 1
    assert alone[0]["sources"].shape == (2, sources, 2, LENGTH)
    assert alone[0]["mixture"].shape == (2, 2, LENGTH)
    assert len(alone[0]["names"]) == 2
    if task == "tse":
        assert alone[0]["speaker_embedding"].shape == (2, 256)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_item_gives_the_same_error_in_every_process(workers: int, root: Path) -> None:
    (root / "val" / "01" / "source00.wav").unlink()
    loader = Loader(folder_of(root), EpochOrder(6, 2, seed=0, shuffle=False), workers)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value).startswith(str(root / "val" / "01" / "source00.wav"))
    assert "\n" not in str(caught.value)


def test_a_process_that_exits_during_an_epoch_ends_its_workers(root: Path) -> None:
    script = (
        "from knowledge_boosting.models.config import MODEL\n"
        "from knowledge_boosting.training.config import FolderData\n"
        "from knowledge_boosting.training.data.loading import EpochOrder, Loader\n"
        "from knowledge_boosting.training.data.mixture_folder import MixtureFolder\n"
        f"data = FolderData(root={str(root)!r}, split='val')\n"
        "model = MODEL.validate_python({'task': 'ss', 'small': {'channels': 4, 'hidden': 4}})\n"
        "folder = MixtureFolder(data, model, seed=0, training=True, skip_broken=False)\n"
        "batches = iter(Loader(folder, EpochOrder(6, 2, seed=0, shuffle=False), 1))\n"
        "print(len(next(batches)['names']))\n"
    )
    # If the process waited for its workers, it would not end.
    left = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert (left.returncode, left.stdout) == (0, "2\n"), left.stderr


def test_items_of_different_lengths_do_not_make_a_batch(root: Path) -> None:
    for source in (0, 1):
        rewrite(root / "val" / "01" / f"source{source:02d}.wav", np.zeros((LENGTH // 2, 2)))
    with pytest.raises(InputError, match="length differs"):
        list(Loader(folder_of(root), EpochOrder(6, 2, seed=0, shuffle=False), 0))


# Dynamic mixing.

SECONDS = 0.5
TAPS = 300


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rooms, whose responses are decaying noise, weaker at the second ear."""
    random = np.random.default_rng(0)
    responses = random.standard_normal((3, 2, 2, TAPS)) * np.exp(-np.arange(TAPS) / 40) * [[1.0], [0.5]]
    path = tmp_path_factory.mktemp("bank") / "responses.safetensors"
    save_file({"responses": responses.astype(np.float32)}, path)
    return path


def mixing(
    bank: Path,
    task: Task = "ss",
    *,
    speech: Path | Sequence[Path] = SPEECH,
    seed: int = 0,
    speed: float = 0.0,
    skip_broken: bool = False,
    candidates: int = 1,
    seconds: float = SECONDS,
    **conditions: Any,
) -> DynamicMixing:
    folders = [speech] if isinstance(speech, Path) else speech
    data = DynamicData(
        speech=tuple(map(str, folders)),
        responses=str(bank),
        items=8,
        seconds=seconds,
        speed=speed,
        level_difference_db=4.0,
        level_dbfs=(-35.0, -25.0),
        candidates=candidates,
        **conditions,
    )
    return DynamicMixing(data, model(task), seed=seed, skip_broken=skip_broken)


def collate(examples: Sequence[dict[str, Any]]) -> Batch:
    batch: dict[str, Any] = {"names": [example["names"] for example in examples]}
    for key in examples[0].keys() - {"names"}:
        batch[key] = torch.stack([example[key] for example in examples])
    return cast("Batch", batch)


@pytest.fixture(scope="module")
def drawn(bank: Path) -> Batch:
    """Eight examples for separation before rendering."""
    examples = mixing(bank)
    return collate([examples.example((0, index)) for index in range(8)])


def power(signal: Tensor) -> Tensor:
    """Return the mean square of ``[..., M, N]`` over microphones and samples."""
    return signal.double().square().mean((-2, -1))


def test_an_example_is_two_speakers_in_a_room_of_the_bank(bank: Path, drawn: Batch) -> None:
    assert drawn["speech"].shape == (8, 2, RATE * SECONDS)
    assert drawn["responses"].shape == (8, 2, 2, TAPS)
    assert drawn["level_difference_db"].shape == (8,)
    for name in drawn["names"]:
        first, second = name.split(" + ")
        assert first.split("-")[0] != second.split("-")[0]
    rooms = torch.from_numpy(load_file(bank)["responses"])
    known = torch.cat([rooms, rooms.flip(1)])
    for responses in drawn["responses"]:
        assert any(torch.equal(responses, room) for room in known)
    assert len({responses.numpy().tobytes() for responses in drawn["responses"]}) > 2


@pytest.fixture(scope="module")
def disturbed(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> DynamicMixing:
    """Dynamic mixing with all conditions and a bank with two listeners."""
    folder = tmp_path_factory.mktemp("disturbed")
    responses = load_file(bank)["responses"]
    mono = np.repeat(responses[:, :, :1], 2, axis=2)
    write_bank(folder / "bank", np.concatenate([responses, mono]), ["head"] * 3 + ["mono"] * 3)
    rng = np.random.default_rng(0)
    for name, length in (("a.wav", 3000), ("b.wav", round(3 * SECONDS * RATE))):
        soundfile.write(folder / name, rng.normal(0, 0.1, length), RATE)
    return mixing(
        folder / "bank",
        noise=str(folder),
        noise_db=(10.0, 20.0),
        pauses=0.5,
        ear_difference_db=20.0,
        level_change_db=6.0,
    )


def test_noise_comes_from_a_room_with_the_same_listener(disturbed: DynamicMixing) -> None:
    listeners = set()
    for index in range(24):
        example = disturbed.example((0, index))
        mono = [torch.equal(example[key][:, 0], example[key][:, 1]) for key in ("responses", "noise_responses")]
        assert mono[0] == mono[1]
        listeners.add(mono[0])
        assert example["noise"].shape == (2, round(RATE * SECONDS))
        assert not torch.equal(*example["noise"])
        assert example["noise"].std() == pytest.approx(0.1, rel=0.05)
    assert listeners == {True, False}


def test_noise_is_as_far_below_the_voices_as_drawn(disturbed: DynamicMixing) -> None:
    batch = collate([disturbed.example((1, index)) for index in range(8)])
    rendered = render(batch)
    noise = rendered["mixture"] - rendered["sources"].sum(1)
    # The change of level is undone.
    way = 10 ** (batch["level_change_db"][:, None] * torch.linspace(-0.5, 0.5, noise.shape[-1]) / 20)
    ratio = power(rendered["sources"].sum(1) / way[:, None]) / power(noise / way[:, None])
    torch.testing.assert_close(10 * ratio.log10(), batch["noise_db"].double(), atol=0.05, rtol=0)


def test_ears_differ_and_levels_change_as_drawn(disturbed: DynamicMixing) -> None:
    batch = collate([disturbed.example((2, index)) for index in range(8)])
    plain = {key: value for key, value in batch.items() if key not in ("ear_difference_db", "level_change_db")}
    ears, level = batch["ear_difference_db"], batch["level_change_db"]
    assert ears.abs().max() > 4
    assert (ears.abs() <= 20).all()
    assert (level.abs() <= 6).all()
    before, after = render(cast("Batch", plain))["sources"], render(batch)["sources"]
    change = 20 * (after / before).abs().log10()
    audible = before.abs() > 1e-4
    left, right = (change[:, :, ear].masked_fill(~audible[:, :, ear], torch.nan).nanmedian(-1)[0] for ear in (0, 1))
    torch.testing.assert_close((left - right).nanmedian(1)[0], ears, atol=0.6, rtol=0)
    quarter = change.shape[-1] // 4
    first, last = (
        change[..., part].masked_fill(~audible[..., part], torch.nan).flatten(1).nanmedian(-1)[0]
        for part in (slice(quarter), slice(-quarter, None))
    )
    torch.testing.assert_close(last - first, 0.75 * level, atol=0.6, rtol=0)


def test_speakers_pause_in_their_share_of_mixtures(disturbed: DynamicMixing, bank: Path) -> None:
    undisturbed = mixing(bank)

    def silences(examples: DynamicMixing, index: int) -> list[int]:
        return [int((voice == 0).sum()) for voice in examples.example((3, index))["speech"]]

    paused = [index for index in range(40) if max(silences(disturbed, index)) > RATE // 20]
    assert 10 <= len(paused) <= 30
    assert not [index for index in range(40) if max(silences(undisturbed, index)) > RATE // 20]
    # No speaker is silent for the whole mixture.
    assert all(max(silences(disturbed, index)) <= 0.75 * RATE * SECONDS for index in paused)


def test_speakers_kept_for_validation_are_not_drawn(bank: Path, tmp_path: Path) -> None:
    speakers = sorted(mixing(bank).speakers)
    kept = tmp_path / "kept.txt"
    kept.write_text(f"# for validation\n{speakers[0]}\n\n{speakers[1]} # both\n")
    assert mixing(bank, excluded_speakers=str(kept)).speakers == set(speakers[2:])
    # Neither are the voices that were derived from theirs.
    shutil.copytree(SPEECH, tmp_path / "voices")
    for path in SPEECH.glob("*.ogg"):
        derived = tmp_path / "voices" / f"{path.name.partition('-')[0]}~1"
        derived.mkdir(exist_ok=True)
        shutil.copy(path, derived / path.name)
    voices = {*speakers[2:], *(f"{name}~1" for name in speakers[2:])}
    assert mixing(bank, speech=tmp_path / "voices", excluded_speakers=str(kept)).speakers == voices
    kept.write_text("# nobody\n")
    with pytest.raises(InputError, match=r"kept\.txt: contains no name of a speaker"):
        mixing(bank, excluded_speakers=str(kept))
    with pytest.raises(InputError, match="no such file"):
        mixing(bank, excluded_speakers=str(tmp_path / "none.txt"))


def test_kept_speakers_who_are_not_found_are_reported(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder too many above the speakers makes one speaker of all of them, and then nobody is left out."""
    kept = tmp_path / "kept.txt"
    kept.write_text(f"{min(mixing(bank).speakers)}\n")
    mixing(bank, excluded_speakers=str(kept))
    assert capsys.readouterr().err == ""
    kept.write_text("anna\nbob\n")
    mixing(bank, excluded_speakers=str(kept))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{kept}: names 2 speakers, but {SPEECH} has none of them" in line


def test_noise_that_cannot_be_used(bank: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; give a folder of noise"):
        mixing(bank, noise=str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no recordings"):
        mixing(bank, noise=str(tmp_path))
    (tmp_path / "clip.wav").write_text("no audio")
    with pytest.raises(InputError, match=r"clip\.wav: not readable"):
        mixing(bank, noise=str(tmp_path))


def test_speech_is_a_stretch_of_the_utterance_that_is_named(drawn: Batch) -> None:
    for name, pair in zip(drawn["names"][:3], drawn["speech"][:3].numpy(), strict=True):
        for utterance, segment in zip(name.split(" + "), pair, strict=True):
            samples, rate = soundfile.read(SPEECH / utterance, dtype="float32")
            assert rate == RATE
            inner = segment[400:-400]  # without the fades
            energy = fftconvolve(samples**2, np.ones(len(inner)), mode="valid")
            place = int((energy - 2 * fftconvolve(samples, inner[::-1], mode="valid")).argmin())
            assert np.allclose(samples[place : place + len(inner)], inner, atol=1e-4)


def test_sources_differ_in_level_as_drawn(drawn: Batch) -> None:
    sources = render(drawn)["sources"]
    level = 10 * torch.log10(power(sources[:, 0]) / power(sources[:, 1]))
    assert torch.allclose(level, drawn["level_difference_db"].double(), atol=1e-3)
    assert (level.abs() <= 4).all()
    assert level.std() > 1


def test_the_mixture_is_the_sum_of_the_sources_at_the_level_drawn(drawn: Batch) -> None:
    rendered = render(drawn)
    assert rendered.keys() == {"names", "mixture", "sources"}
    assert torch.allclose(rendered["mixture"], rendered["sources"].sum(1), atol=1e-6)
    assert rendered["mixture"].abs().max() < 1
    level = 10 * torch.log10(power(rendered["mixture"]))
    assert torch.allclose(level, drawn["level_dbfs"].double(), atol=0.01)
    assert ((level > -35) & (level < -25)).all()
    assert level.std() > 1
    assert rendered["mixture"].dtype == rendered["sources"].dtype == torch.float32


def test_peaks_stay_below_full_scale(drawn: Batch) -> None:
    """Two clicks in half a second of silence cannot be amplified to the level of speech."""
    clicks = torch.zeros_like(drawn["speech"])
    clicks[:, 0, 100] = 1
    clicks[:, 1, 5000] = 1
    rendered = render(Batch({**drawn, "speech": clicks}))
    for signal in (rendered["mixture"], rendered["sources"]):
        peak = signal.abs().flatten(1).amax(1)
        assert (peak < 1).all()
        assert (peak > 0.5).all()
    assert torch.allclose(rendered["mixture"], rendered["sources"].sum(1), atol=1e-6)


def test_rendering_is_convolution_with_the_responses(drawn: Batch) -> None:
    """They are equal except for one gain for each speaker, which is the same for both ears."""
    sources = render(drawn)["sources"].double().numpy()
    speech, responses = drawn["speech"].double().numpy(), drawn["responses"].double().numpy()
    for item in range(len(sources)):
        for speaker in (0, 1):
            convolved = fftconvolve(speech[item, speaker][None], responses[item, speaker], axes=-1)[
                :, : sources.shape[-1]
            ]
            gain = (convolved * sources[item, speaker]).sum() / (convolved * convolved).sum()
            assert np.allclose(sources[item, speaker], gain * convolved, atol=1e-6)


def test_other_batches_are_left_as_they_are(root: Path) -> None:
    batch = next(iter(Loader(folder_of(root), EpochOrder(6, 2, seed=0, shuffle=False), 0)))
    assert render(batch) is batch


def test_a_draw_follows_from_seed_epoch_and_index_alone(bank: Path) -> None:
    examples = mixing(bank)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [examples.example(place) for place in places]
    again = mixing(bank)
    for place, example in reversed(list(zip(places, drawn, strict=True))):
        assert equal(again.example(place), example)
    other = mixing(bank, seed=1)
    drawn += [other.example(place) for place in places]
    assert len({float(example["level_difference_db"]) for example in drawn}) == len(drawn)


def test_mixing_is_the_same_in_worker_processes(bank: Path) -> None:
    def epoch(workers: int) -> list[Batch]:
        return list(Loader(mixing(bank), EpochOrder(8, 4, seed=0, shuffle=True), workers))

    alone, together = epoch(0), epoch(2)
    assert len(alone) == len(together) == 2
    assert all(equal(one, other) for one, other in zip(alone, together, strict=True))


def test_playback_speed_changes_the_speech_but_not_its_length(bank: Path) -> None:
    fast = mixing(bank, speed=0.2)
    for index in range(4):
        speech = fast.example((0, index))["speech"]
        assert speech.shape == (2, RATE * SECONDS)
        assert torch.isfinite(speech).all()
        assert (speech[:, -RATE // 10 :].abs().amax(1) > 0).all()  # without padding, because the segment is long enough


@pytest.fixture(scope="module")
def targeted(bank: Path) -> Batch:
    """Three examples for target speech extraction before rendering."""
    examples = mixing(bank, "tse")
    return collate([examples.example((0, index)) for index in range(3)])


def test_the_embeddings_are_of_the_speakers(targeted: Batch) -> None:
    """Each embedding is closer to the utterance of its speaker than to the other one, though its segment differs."""
    assert targeted["speaker_embedding"].shape == (3, 2, 256)
    for name, found in zip(targeted["names"], targeted["speaker_embedding"], strict=True):
        whole = torch.stack(
            [
                torch.from_numpy(speaker_embedding(soundfile.read(SPEECH / utterance, dtype="float32")[0]))
                for utterance in name.split(" + ")
            ]
        )
        likeness = found @ whole.T
        assert float(likeness[0, 0]) > float(likeness[0, 1]) + 0.05
        assert float(likeness[1, 1]) > float(likeness[1, 0]) + 0.05


def test_the_embeddings_are_of_voices_at_the_speed_they_play_at(bank: Path) -> None:
    """They are closer to the played speech, on average, than embeddings of the same speakers at normal speed."""
    own, fast = mixing(bank, "tse"), mixing(bank, "tse", speed=0.3, seconds=2.0)
    voices = dict(zip(sorted(own.speakers), own.speaker_embeddings(), strict=True))
    closer = []
    for index in range(8):
        example = fast.example((0, index))
        names = [utterance.partition("-")[0] for utterance in example["names"].split(" + ")]
        for name, speech, found in zip(names, example["speech"], example["speaker_embedding"], strict=True):
            plays = torch.from_numpy(speaker_embedding(speech.numpy()))
            closer.append(float(found @ plays - voices[name] @ plays))
    assert np.mean(closer) > 0.05


def test_extraction_uses_every_mixture_for_both_of_its_speakers(targeted: Batch) -> None:
    rendered = render(targeted)
    separated = render(cast("Batch", {key: value for key, value in targeted.items() if key != "speaker_embedding"}))
    assert rendered["names"] == [name for name in targeted["names"] for _ in range(2)]
    for item in range(3):
        for speaker in range(2):
            assert torch.equal(rendered["mixture"][2 * item + speaker], separated["mixture"][item])
            assert torch.equal(rendered["sources"][2 * item + speaker, 0], separated["sources"][item, speaker])
            embedding = rendered["speaker_embedding"][2 * item + speaker]
            assert torch.equal(embedding, targeted["speaker_embedding"][item, speaker])


def test_the_second_speaker_is_the_least_like_the_first_of_the_candidates(bank: Path) -> None:
    """If all others are candidates, it is the speaker least similar to the first."""
    examples = mixing(bank, "tse", candidates=5)
    voices = torch.nn.functional.normalize(examples.speaker_embeddings(), dim=1)
    likeness = voices @ voices.T
    names = sorted({path.name.partition("-")[0] for path in SPEECH.glob("*.ogg")}, key=str)
    for index in range(8):
        first, second = (
            names.index(name.partition("-")[0]) for name in examples.example((0, index))["names"].split(" + ")
        )
        others = [other for other in range(len(names)) if other != first]
        assert second == min(others, key=lambda other: float(likeness[first, other]))
    with pytest.raises(InputError, match="candidates: must be 1 for separation"):
        mixing(bank, candidates=5)
    with pytest.raises(InputError, match="has 6 speakers with enough speech; 7 are needed"):
        mixing(bank, "tse", candidates=6)


def test_the_speakers_of_a_mixture_come_from_one_folder(bank: Path, tmp_path: Path) -> None:
    """Each folder is drawn as often as it has speakers."""
    folders = [tmp_path / "a", tmp_path / "b"]
    speakers = sorted({path.name.partition("-")[0] for path in SPEECH.glob("*.ogg")})
    for folder, names in zip(folders, (speakers[:2], speakers[2:]), strict=True):
        for name in names:
            for path in SPEECH.glob(f"{name}-*.ogg"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)
    examples = mixing(bank, speech=folders)
    assert examples.speakers == frozenset(speakers)
    counts = [0, 0]
    for index in range(200):
        first, second = (
            speakers.index(name.partition("/")[0]) for name in examples.example((0, index))["names"].split(" + ")
        )
        assert first != second
        assert (first < 2) == (second < 2)
        counts[first >= 2] += 1
    assert 47 <= counts[0] <= 86  # a third of 200, within three standard deviations
    assert mixing(bank, "tse", speech=folders[1:], candidates=3).speakers == frozenset(speakers[2:])
    with pytest.raises(InputError, match="a: has 2 speakers with enough speech; 4 are needed"):
        mixing(bank, "tse", speech=folders, candidates=3)
    with pytest.raises(InputError, match="a speaker is in two of the folders"):
        mixing(bank, speech=[*folders, folders[0]])


def test_speech_of_one_speaker_or_without_a_bank_is_refused(bank: Path, tmp_path: Path) -> None:
    utterance = next(path for path in sorted(SPEECH.iterdir()) if path.suffix == ".ogg")
    shutil.copy(utterance, tmp_path)
    with pytest.raises(InputError, match="has 1 speakers with enough speech; 2 are needed"):
        mixing(bank, speech=tmp_path)
    with pytest.raises(InputError, match="none: no such folder"):
        mixing(bank, speech=tmp_path / "none")
    with pytest.raises(InputError, match=r"none\.safetensors: no such file"):
        mixing(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"no bank")
    with pytest.raises(InputError, match=r"text\.safetensors: not a bank"):
        mixing(tmp_path / "text.safetensors")


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[Path]:
    """Speech of two speakers, the second with a good file and a file with NaN."""
    random = np.random.default_rng(0)
    noise = 0.1 * random.standard_normal(RATE)
    soundfile.write(tmp_path / "1-noise.wav", noise, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "2-noise.wav", noise, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "2-broken.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    yield tmp_path


def test_broken_speech_is_an_error_or_drawn_again(spoilt: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict, skipping = mixing(bank, speech=spoilt), mixing(bank, speech=spoilt, skip_broken=True)
    with pytest.raises(InputError, match=r"2-broken\.wav"):
        for index in range(8):
            strict.example((0, index))
    for index in range(8):
        assert torch.isfinite(skipping.example((0, index))["speech"]).all()
    warnings = capsys.readouterr().err.splitlines()
    assert warnings
    assert all(line.startswith("warning: skipped: ") and "2-broken.wav" in line for line in warnings)


def test_silence_is_drawn_again_but_not_for_ever(bank: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    half = np.concatenate([np.zeros(2 * RATE), 0.1 * random.standard_normal(RATE)])
    for speaker in (1, 2):
        soundfile.write(tmp_path / f"{speaker}-half.wav", half, RATE)
    examples = mixing(bank, speech=tmp_path)
    for index in range(4):
        speech = examples.example((0, index))["speech"]
        assert (speech.square().mean(-1).sqrt() > 1e-3).all()
    soundfile.write(tmp_path / "2-half.wav", np.zeros(RATE), RATE)
    with pytest.raises(InputError, match="no usable speech in"):
        mixing(bank, speech=tmp_path).example((0, 0))
