"""With a running level, the level of the output follows that of the input, and nothing else changes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import MODEL, FixedDelay, Framing, NetworkSize, Pair
from knowledge_boosting.models.framing import Stft, pad_to_frames
from knowledge_boosting.models.level import RunningLevel
from knowledge_boosting.models.manifest import Part, bundle_id
from knowledge_boosting.models.onnx_graph import frame_graph
from knowledge_boosting.models.onnx_stream import OnnxStream, load_graph
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.models.slots import StateSlots

CONFIG = Pair(
    task="ss",
    small=NetworkSize(channels=8, hidden=8),
    large=NetworkSize(channels=8, hidden=8, heads=2, self_attention=True),
    boosting=FixedDelay(delay=3),
    running_level=True,
)
SECOND = CONFIG.framing.sample_rate
PAUSE = slice(62 * 128 + 64, 94 * 128 + 64)


@pytest.fixture(scope="module")
def pair() -> BoostedPair:
    torch.manual_seed(0)
    model = build(CONFIG)
    assert isinstance(model, BoostedPair)
    bias = model.small.network.output_conv.conv.bias
    assert bias is not None
    torch.nn.init.normal_(bias, std=0.5)  # an untrained network has no bias
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def signal() -> Tensor:
    """A signal of one second at -26 dBFS, with silence at the start, a pause, and a level that varies like speech."""
    time = torch.arange(SECOND) / SECOND
    samples = torch.randn(1, 2, SECOND, generator=torch.Generator().manual_seed(1))
    samples *= (2 * torch.pi * 3 * time).sin().clamp_min(0) + 0.2
    # The signal begins in the middle of a window. A window with only its first samples would be below the floor.
    samples[..., : 32 * 128 + 64] = 0
    samples[..., PAUSE] = 0
    return 0.05 * samples / samples.square().mean().sqrt()


def by_frames(pair: BoostedPair, samples: Tensor) -> Tensor:
    """Compute the output of the small network frame by frame, with the hints of the large one."""
    framing, delay = CONFIG.framing, CONFIG.delay
    padded = pad_to_frames(samples, framing)
    small, large = pair.small.initial_state(1), pair.large.initial_state(1)
    hints: list[Tensor] = []
    output = []
    for frame in range(framing.frames(samples.shape[-1])):
        window = padded[..., frame * framing.chunk : frame * framing.chunk + framing.n_fft]
        hint, _, large = pair.large(window, large)
        hints.append(hint)
        given = hints[frame - delay] if frame >= delay else torch.zeros_like(hint)
        estimate, small = pair.small(window, small, given)
        output.append(estimate)
    return torch.cat(output, dim=-1)[..., : samples.shape[-1]]


def by_graph(pair: BoostedPair, samples: Tensor) -> Tensor:
    """Compute the same with ONNX Runtime, with the hints for the whole signal."""
    framing, delay = CONFIG.framing, CONFIG.delay
    padded = pad_to_frames(samples, framing)[0].numpy()
    hints = pair(samples).hints[0].numpy()
    stream = OnnxStream(load_graph(frame_graph(pair.small)), CONFIG)
    output = []
    for frame in range(framing.frames(samples.shape[-1])):
        window = padded[:, frame * framing.chunk : frame * framing.chunk + framing.n_fft]
        output.append(
            stream.step(np.ascontiguousarray(window), [Hint(delay, hints[frame - delay])] if frame >= delay else [])
        )
    return torch.from_numpy(np.concatenate(output, axis=-1))[None, ..., : samples.shape[-1]]


WAYS: dict[str, Callable[[BoostedPair, Tensor], Tensor]] = {
    "whole": lambda pair, samples: pair(samples).small,
    "by frames": by_frames,
    "graph": by_graph,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", [-60, -6])
def test_the_output_follows_the_input_level(pair: BoostedPair, signal: Tensor, way: str, level: float) -> None:
    gain = 10 ** ((level + 26) / 20)
    expected = pair(signal).small * gain
    torch.testing.assert_close(
        WAYS[way](pair, signal * gain), expected, rtol=0, atol=2e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("way", WAYS)
def test_silence_gives_silence(pair: BoostedPair, signal: Tensor, way: str) -> None:
    assert not WAYS[way](pair, torch.zeros_like(signal)).any()
    # A pause is silent too, after the last window that overlaps the signal before it.
    framing = CONFIG.framing
    pause = WAYS[way](pair, signal)[..., PAUSE.start + framing.n_fft : PAUSE.stop - framing.n_fft]
    assert not pause.any()


@pytest.mark.parametrize("way", WAYS)
def test_a_dc_offset_has_no_effect(pair: BoostedPair, signal: Tensor, way: str) -> None:
    expected = pair(signal).small
    shifted = WAYS[way](pair, signal + 0.3)
    # The windows of the last frames extend past the end of the signal, where the offset ends.
    whole = slice(None, -CONFIG.framing.n_fft)
    # The offset costs the last bits of single precision, which matters most where the signal is silent.
    torch.testing.assert_close(
        shifted[..., whole], expected[..., whole], rtol=0, atol=1e-2 * float(expected.abs().max())
    )


def test_the_level_is_that_of_the_loudest_frame_and_fades() -> None:
    framing = Framing()
    level = RunningLevel(framing, 2)
    # 50 frames of white noise have an RMS of 0.1, the next 100 frames are 40 dB weaker, and the last one has 0.2.
    rms = torch.tensor([0.1] * 50 + [0.001] * 100 + [0.2])
    samples = torch.randn(1, 2, 151 * 192, generator=torch.Generator().manual_seed(2)) * rms.repeat_interleave(192)
    frames = samples.unfold(-1, 192, 192)
    basis = Stft(framing).analyse(frames.transpose(1, 2).reshape(151, 2, 192)).transpose(0, 1)
    scale = level(basis, torch.zeros(1)).scale[0, :, 0, 0] * 0.1
    # The level fades by 8 dB in 100 frames of 8 ms. The loudest of 50 frames is a little louder than their mean.
    assert 0.1 < scale[49] < 0.13
    assert 20 * torch.log10(scale[149] / scale[49]) == pytest.approx(-8, abs=0.2)
    assert scale[150] == pytest.approx(0.2, rel=0.15)
    assert (scale[1:50] >= scale[:49] * 10 ** (-0.08 / 20) * 0.9999).all()


def test_slots_keep_every_stream_at_its_own_level(pair: BoostedPair, signal: Tensor) -> None:
    gains = (1.0, 0.01, 3.0)
    slots = StateSlots(pair.large, 4)
    slots.prepare([4])
    for slot in range(3):
        slots.put(slot, pair.large.initial_state(1))
    padded = pad_to_frames(signal, CONFIG.framing)
    expected = pair.large(padded, pair.large.initial_state(1))[0]
    for start in range(0, 64, 4):
        window = padded[0, :, start * 128 : (start + 4) * 128 + 64]
        hints = slots.step(torch.stack([window * gain for gain in gains]), torch.arange(3))
        for own in hints:
            torch.testing.assert_close(own, expected[0, start : start + 4], rtol=0, atol=2e-4)


def test_without_a_running_level_configurations_and_ids_do_not_change() -> None:
    plain = CONFIG.model_copy(update={"running_level": False})
    assert "running_level" not in plain.model_dump()
    assert CONFIG.model_dump()["running_level"] is True
    assert MODEL.validate_python(plain.model_dump()) == plain
    # The id of ``tse-48ms-compact`` as it was first shipped, before networks could have a running level.
    first = Pair(
        task="tse",
        small=NetworkSize(channels=16, hidden=16),
        large=NetworkSize(channels=32, hidden=32, heads=4, self_attention=True),
        boosting=FixedDelay(delay=6),
    )
    digests: dict[Part, str] = {
        "small": "sha256:8af88612fefdeebe4300c2f47a98e719d489c5500446877795e8bffe72951640",
        "large": "sha256:92e32404c255b9ffad551f7301b283d09b3d78b3d379297e054ed2677a31caa5",
    }
    assert bundle_id(first, digests) == "69346d21f9e892a7"
    assert bundle_id(first.model_copy(update={"running_level": True}), digests) != "69346d21f9e892a7"
