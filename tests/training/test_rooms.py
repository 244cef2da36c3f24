"""Rooms, and the responses at two ears in them."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.training.data.responses import (
    RESPONSE_LENGTH,
    Renderer,
    check_sofa,
    level_gains,
    read_bank,
    render,
)
from knowledge_boosting.training.data.rooms import (
    MICROPHONES,
    MONO,
    Listener,
    Room,
    RoomRanges,
    SpeakerPosition,
    draw_room,
)

SOFA = Path(__file__).parents[2] / "samples" / "hrtf" / "mit_kemar_normal_pinna.sofa"
HEADS = [SOFA.stem]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer([SOFA])


def room(
    *azimuths: float,
    facing: float = 0,
    distance: float = 1,
    absorption: float = 1,
    listener: Listener = Listener(SOFA.stem),  # noqa: B008
) -> Room:
    head = (3.0, 2.5, 1.5)
    places = []
    for azimuth in azimuths:
        turn = np.radians(azimuth + facing)
        position = (head[0] + distance * float(np.cos(turn)), head[1] + distance * float(np.sin(turn)), head[2])
        places.append(SpeakerPosition(azimuth, 0, distance, position))
    return Room((6.0, 5.0, 3.0), absorption, head, facing, (places[0], places[1]), listener)


def test_rooms_keep_to_their_ranges() -> None:
    ranges = RoomRanges(side=(3, 4), azimuth=(-90, 90), elevation=(-10, 20), separation=40, anechoic=0.3)
    rooms = [draw_room(np.random.default_rng(seed), ranges, HEADS) for seed in range(300)]
    assert 50 < sum(drawn.absorption == 1 for drawn in rooms) < 130
    for drawn in rooms:
        assert all(3 <= side <= 4 for side in drawn.size[:2])
        assert 2.4 <= drawn.size[2] <= 3.5
        assert drawn.absorption == 1 or 0.2 <= drawn.absorption <= 0.7
        assert (drawn.order == 0) == (drawn.rt60 == 0) == (drawn.absorption == 1)
        assert drawn.order <= 15
        first, second = drawn.speakers
        assert 40 <= abs(first.azimuth - second.azimuth) <= 180
        for place in drawn.speakers:
            assert 0.5 <= place.distance <= 2
            assert -10 <= place.elevation <= 20
            assert all(0.3 <= x <= side - 0.3 for x, side in zip(place.position, drawn.size, strict=True))
            seen = np.subtract(place.position, drawn.head)
            assert np.linalg.norm(seen) == pytest.approx(place.distance)
            turn = np.degrees(np.arctan2(seen[1], seen[0])) - drawn.facing - place.azimuth
            assert (turn + 180) % 360 - 180 == pytest.approx(0, abs=1e-6)


def test_separation_is_measured_across_180_degrees() -> None:
    ranges = RoomRanges(separation=60)
    for seed in range(100):
        first, second = draw_room(np.random.default_rng(seed), ranges, HEADS).speakers
        assert np.cos(np.radians(first.azimuth - second.azimuth)) <= 0.5 + 1e-9


def test_no_place_for_two_speakers() -> None:
    with pytest.raises(InputError, match="no place for two speakers"):
        draw_room(np.random.default_rng(0), RoomRanges(elevation=(60, 60), distance=(1.2, 2)), HEADS)


def test_reverberation_time_of_a_known_room() -> None:
    # Volume 90 m3, surface 126 m2: 0.161 * 90 / (126 * ln 2).
    assert room(0, 30, absorption=0.5).rt60 == pytest.approx(0.1659, abs=1e-4)


@pytest.mark.parametrize("facing", [0, 130])
def test_the_sound_is_earlier_and_louder_at_the_nearer_ear(renderer: Renderer, facing: float) -> None:
    left, right = renderer.responses(room(90, -90, facing=facing))
    assert left.shape == (2, RESPONSE_LENGTH)
    for near, far in (left, right[::-1]):
        assert np.square(near).sum() > 4 * np.square(far).sum()
        assert 5 < np.abs(far).argmax() - np.abs(near).argmax() < 15  # 0.3 to 0.9 ms
    np.testing.assert_allclose(
        np.square(left).sum(-1), np.square(right[::-1]).sum(-1), rtol=0.2, err_msg="a head is about symmetric"
    )


def test_farther_is_later_and_weaker(renderer: Renderer) -> None:
    near = renderer.responses(room(40, -40, distance=0.5))[0, 0]
    far = renderer.responses(room(40, -40, distance=2))[0, 0]
    assert np.abs(far).argmax() - np.abs(near).argmax() == pytest.approx(1.5 / 343 * 16000, abs=3)
    assert np.abs(near).max() / np.abs(far).max() == pytest.approx(4, rel=0.1)


def test_reflections_follow_and_fade(renderer: Renderer) -> None:
    dry, wet = renderer.responses(room(40, -40)), renderer.responses(room(40, -40, absorption=0.2))
    assert not dry[..., 500:].any()
    assert np.square(wet[..., 1000:]).sum() > 1e-3 * np.square(wet).sum()
    assert np.abs(wet[..., -1]).max() < 1e-6 * np.abs(wet).max()
    np.testing.assert_allclose(wet[..., :100], dry[..., :100], atol=0.02 * np.abs(dry).max())


def test_a_renderer_can_be_pickled(renderer: Renderer) -> None:
    drawn = draw_room(np.random.default_rng(1), RoomRanges(), HEADS)
    again = pickle.loads(pickle.dumps(renderer))
    np.testing.assert_array_equal(again.responses(drawn), renderer.responses(drawn))
    # The renderer also has no state from the room before.
    renderer.responses(room(0, 90))
    np.testing.assert_array_equal(again.responses(drawn), renderer.responses(drawn))


def test_rendering_is_convolution_with_the_length_kept() -> None:
    rng = np.random.default_rng(0)
    speech, responses = rng.standard_normal(1000).astype(np.float32), rng.standard_normal((2, 50)).astype(np.float32)
    expected = [np.convolve(speech, ear)[:1000] for ear in responses]
    np.testing.assert_allclose(render(speech, responses), expected, atol=1e-4)


@pytest.mark.parametrize(("level", "clips"), [(-30.0, False), (0.0, True)])
def test_levels(level: float, clips: bool) -> None:
    rng = np.random.default_rng(0)
    sources = [scale * rng.standard_normal((2, 4000)).astype(np.float32) for scale in (0.01, 3)]
    gains = level_gains(sources, 3, level)
    scaled = [gain * source for gain, source in zip(gains, sources, strict=True)]
    decibels = [10 * np.log10(np.mean(np.square(signal))) for signal in (*scaled, scaled[0] + scaled[1])]
    assert decibels[0] - decibels[1] == pytest.approx(3, abs=1e-4)
    peak = max(np.abs(signal).max() for signal in (*scaled, scaled[0] + scaled[1]))
    assert (decibels[2] == pytest.approx(level, abs=1e-4)) == (not clips)
    assert peak == pytest.approx(0.99) if clips else peak < 0.99


def copy_sofa(path: Path, *, without: str = "", receivers: int = 2, delay: float = 0, lowest: float = -40) -> Path:
    """Write a small copy of the KEMAR file with a fault."""
    with netCDF4.Dataset(SOFA) as source, netCDF4.Dataset(path, "w") as copy:
        copy.setncatts({name: source.getncattr(name) for name in source.ncattrs()})
        kept = np.flatnonzero(source["SourcePosition"][:, 1] >= lowest)[::7]
        chosen = {"M": kept, "R": np.arange(receivers)}
        sizes = {letter: len(indices) for letter, indices in chosen.items()}
        for name, size in {**{name: len(own) for name, own in source.dimensions.items()}, **sizes}.items():
            copy.createDimension(name, size)
        for name, variable in source.variables.items():
            if name == without:
                continue
            made = copy.createVariable(name, "f8", variable.dimensions)
            made.setncatts({key: variable.getncattr(key) for key in variable.ncattrs()})
            values = variable[:]
            for axis, letter in enumerate(map(str, variable.dimensions)):
                if letter in chosen:
                    values = np.take(values, chosen[letter], axis)
            made[:] = values + delay if name == "Data.Delay" else values
    return path


def test_ears_are_identified_by_their_positions(tmp_path: Path) -> None:
    straight = Renderer([copy_sofa(tmp_path / "straight.sofa")])
    path = copy_sofa(tmp_path / "swapped.sofa")
    with netCDF4.Dataset(path, "a") as file:
        for name in ("ReceiverPosition", "Data.IR"):
            axis = file[name].dimensions.index("R")
            file[name][:] = np.flip(file[name][:], axis)
    swapped, ordered = (room(50, -20, listener=Listener(name)) for name in ("swapped", "straight"))
    np.testing.assert_array_equal(Renderer([path]).responses(swapped), straight.responses(ordered))


def test_two_microphones_differ_by_the_propagation_time(renderer: Renderer) -> None:
    # The microphones are 20 cm apart, and the sound comes from the left: 20 cm / 343 m/s = 9.3 samples.
    pair = renderer.responses(room(90, 0, distance=1.5, listener=Listener(MICROPHONES, spacing=0.2)))
    left, right = np.abs(pair[0]).argmax(-1)
    assert right - left == pytest.approx(0.2 / 343 * 16000, abs=1)
    np.testing.assert_allclose(pair[1, 0], pair[1, 1], atol=1e-6)  # sound from the front is the same at both
    louder = renderer.responses(room(90, 0, distance=1.5, listener=Listener(MICROPHONES, spacing=0.2, difference=6)))
    np.testing.assert_allclose(louder[0, 0], pair[0, 0] * 10 ** (3 / 20), rtol=1e-5)
    np.testing.assert_allclose(louder[0, 1], pair[0, 1] / 10 ** (3 / 20), rtol=1e-5)


def test_one_microphone_gives_its_signal_twice(renderer: Renderer) -> None:
    for left, right in renderer.responses(room(90, -30, absorption=0.4, listener=Listener(MONO))):
        np.testing.assert_array_equal(left, right)


def test_listeners_are_drawn_in_their_shares() -> None:
    ranges = RoomRanges(microphones=0.3, mono=0.2)
    drawn = [draw_room(np.random.default_rng(seed), ranges, ["ann", "bob"]).listener for seed in range(400)]
    kinds = Counter(listener.kind for listener in drawn)
    assert {kind: count / 400 for kind, count in kinds.items()} == pytest.approx(
        {"ann": 0.25, "bob": 0.25, MICROPHONES: 0.3, MONO: 0.2}, abs=0.07
    )
    for listener in drawn:
        pair = listener.kind == MICROPHONES
        assert 0.03 <= listener.spacing <= 0.2 if pair else listener.spacing == 0
        assert abs(listener.difference) <= 6 if pair else listener.difference == 0
    weak = [draw_room(np.random.default_rng(seed), replace(ranges, unequal=0.4), ["ann", "bob"]) for seed in range(400)]
    assert [room.listener.kind for room in weak] == [listener.kind for listener in drawn]
    sides = Counter(room.listener.difference for room in weak if abs(room.listener.difference) > 6)
    assert {side: count / 400 for side, count in sides.items()} == pytest.approx({-20: 0.16, 20: 0.16}, abs=0.05)
    assert all(room.listener.difference == 0 for room in weak if room.listener.kind == MONO)
    with pytest.raises(InputError, match="shares of the rooms"):
        RoomRanges(microphones=0.7, mono=0.4)


def test_sofa_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.sofa").write_text("no SOFA at all")
    cases = {
        tmp_path / "none.sofa": "no such file",
        tmp_path: "is a folder",
        tmp_path / "text.sofa": "not usable as head-related responses",
        copy_sofa(tmp_path / "a.sofa", without="Data.IR"): r"lacks Data\.IR",
        copy_sofa(tmp_path / "b.sofa", without="SourcePosition"): "lacks SourcePosition",
        copy_sofa(tmp_path / "c.sofa", without="Data.SamplingRate"): r"lacks Data\.SamplingRate",
        copy_sofa(tmp_path / "d.sofa", receivers=1): "1, 512.*2 ears",
        copy_sofa(tmp_path / "e.sofa", delay=3): r"Data\.Delay",
        copy_sofa(tmp_path / "f.sofa", lowest=0): "below the horizon",
    }
    for path, expected in cases.items():
        with pytest.raises(InputError, match=expected) as refused:
            Renderer([path])
        assert str(refused.value).startswith(f"{path}: ")
    with netCDF4.Dataset(tmp_path / "g.sofa", "w") as file:
        file.createDimension("I", 1)
    with pytest.raises(InputError, match=r"lacks Data\.IR"):
        Renderer([tmp_path / "g.sofa"])
    path = copy_sofa(tmp_path / "h.sofa")
    with netCDF4.Dataset(path, "a") as file:
        file["ReceiverPosition"].Units = "inch"
    with pytest.raises(InputError, match=r"h\.sofa: not usable .*inch"):
        Renderer([path])


def test_banks_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_bank(tmp_path / "responses.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(InputError, match="not a bank of room responses"):
        read_bank(tmp_path / "text.safetensors")
    save_file({"other": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a bank of room responses"):
        read_bank(tmp_path / "other.safetensors")
    save_file({"responses": np.zeros((1, 2, 3, 4), np.float32)}, tmp_path / "shape.safetensors")
    with pytest.raises(InputError, match=r"\[1, 2, 3, 4\]"):
        read_bank(tmp_path / "shape.safetensors")
    rooms: dict[str, NDArray[Any]] = {"responses": np.zeros((3, 2, 2, 4), np.float32), "listeners": np.zeros(2)}
    save_file(rooms, tmp_path / "listeners.safetensors")
    with pytest.raises(InputError, match="does not name the listener of every room"):
        read_bank(tmp_path / "listeners.safetensors")


def test_a_file_that_hangs_or_crashes_its_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 does this with some damaged files, so a separate process with a time limit checks the file."""
    readers = {"for ever": "while True: pass", "crash": "import os; os.abort()"}
    for name, does in readers.items():
        # The process that checks the file imports this module in place of netCDF4.
        folder = tmp_path / name
        folder.mkdir()
        (folder / "netCDF4.py").write_text(f"def Dataset(path):\n    {does}\n")
        (folder / "sitecustomize.py").write_text(
            "import resource\nlimit = resource.setrlimit\nresource.setrlimit = lambda kind, _: limit(kind, (2, 2))\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(folder))
        with pytest.raises(InputError, match="it is damaged: reading it crashes, or does not end"):
            check_sofa(SOFA)
