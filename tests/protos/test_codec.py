"""Tests for the codec: values are decoded with the accuracy of their encoding, and invalid bytes are refused."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import (
    HINT_ENCODINGS,
    PCM_ENCODINGS,
    Samples,
    decode_hint,
    decode_pcm,
    encode_hints,
    encode_pcm,
    pcm_sample_size,
)

S16, F32 = PCM_ENCODINGS["s16"], PCM_ENCODINGS["f32"]
SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 40))


def floats(limit: float) -> st.SearchStrategy[float]:
    bound = float(np.float32(limit))
    return st.floats(-bound, bound, width=32)


def signals(limit: float) -> st.SearchStrategy[Samples]:
    return arrays.arrays(np.float32, SHAPES, elements=floats(limit))


def hints(limit: float) -> st.SearchStrategy[Samples]:
    shape = st.tuples(st.integers(1, 4), st.integers(1, 30))
    return arrays.arrays(np.float32, shape, elements=floats(limit))


def sent(hint: Samples, encoding: int) -> pb.Hint:
    # The hint is the second one of a batch, on which the first one must have no effect.
    payloads, scales = encode_hints(np.stack([1e3 * np.ones_like(hint), hint]), encoding)
    message = pb.Hint(frame=3, payload=payloads[1].tobytes(), scale=float(scales[1]))
    return pb.Hint.FromString(message.SerializeToString())


def received(hint: Samples, encoding: int) -> Samples:
    return decode_hint(sent(hint, encoding), encoding, *hint.shape)


@given(signals(float(np.finfo(np.float32).max)))
def test_float_samples_are_decoded_exactly(samples: Samples) -> None:
    decoded = decode_pcm(encode_pcm(samples, F32), F32, len(samples))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, samples)


@given(signals(1))
def test_sixteen_bit_samples_are_decoded_within_one_step(samples: Samples) -> None:
    pcm = encode_pcm(samples, S16)
    assert len(pcm) == 2 * samples.size
    decoded = decode_pcm(pcm, S16, len(samples))
    # Rounding gives up to half a step. Positive full scale, which 16 bits cannot represent, gives a whole one.
    step = np.where(samples > 1 - 2**-16, 2.0**-15, 2.0**-16)
    assert (np.abs(decoded - samples) <= step).all()
    np.testing.assert_array_equal(decode_pcm(encode_pcm(decoded, S16), S16, len(samples)), decoded)


@given(signals(1e30))
def test_sixteen_bit_samples_beyond_full_scale_are_clipped(samples: Samples) -> None:
    decoded = decode_pcm(encode_pcm(samples, S16), S16, len(samples))
    clipped = np.clip(samples, -1, 1 - 2**-15)
    assert (np.abs(decoded - clipped) <= 2.0**-16).all()


@given(st.lists(st.integers(-32768, 32767), max_size=30))
def test_every_sixteen_bit_value_is_decoded_exactly(values: list[int]) -> None:
    pcm = np.array(values, "<i2").tobytes()
    assert encode_pcm(decode_pcm(pcm, S16, 1), S16) == pcm


def test_samples_are_interleaved_and_little_endian() -> None:
    samples = np.array([[0.5, -1.0], [0.0, 1.0]], np.float32)
    assert encode_pcm(samples, S16) == b"\x00\x40\x00\x00\x00\x80\xff\x7f"
    assert encode_pcm(samples, F32) == b"\0\0\0\x3f\0\0\0\0\0\0\x80\xbf\0\0\x80\x3f"


def test_no_bytes_are_no_samples() -> None:
    assert decode_pcm(b"", F32, 2).shape == (2, 0)


@given(st.sampled_from([S16, F32]), st.integers(1, 4), st.integers(1, 100))
def test_a_length_that_is_not_a_whole_number_of_samples_is_refused(encoding: int, channels: int, length: int) -> None:
    size = pcm_sample_size(encoding) * channels
    if length % size:
        with pytest.raises(ValueError, match=rf"^pcm has {length} bytes, not a multiple of the {size}"):
            decode_pcm(bytes(length), encoding, channels)
    else:
        assert decode_pcm(bytes(length), encoding, channels).shape == (channels, length // size)


@given(signals(1), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_samples_that_are_not_finite_are_refused(samples: Samples, value: float, data: st.DataObject) -> None:
    if samples.size:
        samples.flat[data.draw(st.integers(0, samples.size - 1))] = value
        with pytest.raises(ValueError, match=r"^pcm has samples that are NaN or infinite"):
            decode_pcm(encode_pcm(samples, F32), F32, len(samples))


@given(st.integers(-(2**31), 2**31 - 1))
def test_unknown_encodings_are_refused(encoding: int) -> None:
    if encoding not in PCM_ENCODINGS.values():
        with pytest.raises(ValueError, match=r"^pcm_encoding"):
            decode_pcm(bytes(8), encoding, 1)
    if encoding not in HINT_ENCODINGS.values():
        with pytest.raises(ValueError, match=r"^hint_encoding"):
            encode_hints(np.zeros((1, 1), np.float32), encoding)


def test_the_tables_have_all_encodings_of_the_protocol() -> None:
    assert sorted(PCM_ENCODINGS.values()) == [number for number in pb.PcmEncoding.values() if number]
    assert sorted(HINT_ENCODINGS.values()) == [number for number in pb.HintEncoding.values() if number]


@given(hints(float(np.finfo(np.float32).max)))
def test_float_hints_are_decoded_exactly(hint: Samples) -> None:
    np.testing.assert_array_equal(received(hint, HINT_ENCODINGS["f32"]), hint)


@given(hints(65504))
def test_half_precision_hints_are_decoded_with_eleven_bits(hint: Samples) -> None:
    difference = np.abs(received(hint, HINT_ENCODINGS["f16"]) - hint)
    assert (difference <= np.maximum(np.abs(hint) * 2.0**-11, 2.0**-25)).all()


@given(hints(1e38))
def test_hints_beyond_the_range_of_half_precision_are_clipped(hint: Samples) -> None:
    decoded = received(hint, HINT_ENCODINGS["f16"])
    beyond = np.abs(hint) > 65504
    np.testing.assert_array_equal(decoded[beyond], np.sign(hint[beyond]) * np.float32(65504))


@pytest.mark.filterwarnings("error")
@given(hints(1e38))
@example(np.array([[1e-44, -3e-45, 0]], np.float32))
def test_byte_hints_are_decoded_within_half_a_step(hint: Samples) -> None:
    message = sent(hint, HINT_ENCODINGS["int8"])
    assert len(message.payload) == hint.size
    assert message.scale > 0
    difference = np.abs(decode_hint(message, HINT_ENCODINGS["int8"], *hint.shape).astype(np.float64) - hint)
    assert (difference <= 0.50001 * message.scale).all()


def test_byte_hints_of_zeros_are_zeros() -> None:
    zeros = np.zeros((4, 97), np.float32)
    np.testing.assert_array_equal(received(zeros, HINT_ENCODINGS["int8"]), zeros)


def test_byte_hints_use_the_whole_range() -> None:
    message = sent(np.array([[-2.54, 1.27, 0.0]], np.float32), HINT_ENCODINGS["int8"])
    assert message.scale == pytest.approx(0.02)
    assert np.frombuffer(message.payload, np.int8).tolist() in ([-127, 63, 0], [-127, 64, 0])


@settings(max_examples=50)
@given(st.sampled_from(sorted(HINT_ENCODINGS.values())), st.binary(max_size=200), st.floats(width=32))
def test_any_payload_gives_finite_values_of_the_right_shape_or_is_refused(
    encoding: int, payload: bytes, scale: float
) -> None:
    message = pb.Hint(frame=5, payload=payload, scale=scale)
    with np.errstate(all="ignore"):
        try:
            decoded = decode_hint(message, encoding, 2, 6)
        except ValueError:
            return
    assert decoded.shape == (2, 6)
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", sorted(HINT_ENCODINGS))
def test_a_payload_of_another_size_is_refused(name: str) -> None:
    encoding = HINT_ENCODINGS[name]
    message = sent(np.ones((2, 6), np.float32), encoding)
    for payload in (b"", message.payload + message.payload, message.payload[: len(message.payload) // 2]):
        with pytest.raises(ValueError, match="hint of frame 3 has"):
            decode_hint(pb.Hint(frame=3, payload=payload, scale=1), encoding, 2, 6)
    if name != "int8":
        with pytest.raises(ValueError):
            decode_hint(pb.Hint(frame=3, payload=message.payload[:-1], scale=1), encoding, 2, 6)


@pytest.mark.parametrize("name", ["f32", "f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_payload_with_values_that_are_not_finite_is_refused(name: str, value: float) -> None:
    payload = np.array([1, value], {"f32": "<f4", "f16": "<f2"}[name]).tobytes()
    with pytest.raises(ValueError, match="hint of frame 9 has values that are not finite"):
        decode_hint(pb.Hint(frame=9, payload=payload, scale=1), HINT_ENCODINGS[name], 1, 2)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="not finite"):
        decode_hint(pb.Hint(payload=bytes([1, 2]), scale=scale), HINT_ENCODINGS["int8"], 1, 2)
