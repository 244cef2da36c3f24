"""Tests for the public interface, which must give the same samples as the commands."""

import inspect
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import knowledge_boosting as kb
from knowledge_boosting.protos.codec import Samples
from tests.processes import Server, environment, free_port, run, running_server

ROOT = Path(__file__).parents[2]
SS, TSE = "ss_delay6_compression2", "tse_delay6"
ALONE = "ss-alone"
GetBundle = Callable[[str], Path]


def speech(seconds: float, rate: int = 16000) -> Samples:
    samples, _ = soundfile.read(ROOT / "samples" / "mixture.flac", dtype="float32")
    return np.ascontiguousarray(samples[: round(seconds * rate)].T)


def streamed(enhancer: kb.Enhancer, samples: Samples, pause: float = 0.0) -> Samples:
    """Process samples chunk by chunk, and return the output with the same length and alignment."""
    size, parts = enhancer.chunk, list[Samples]()
    padded = np.pad(samples, ((0, 0), (0, -samples.shape[1] % size)))
    for first in range(0, padded.shape[1], size):
        parts.append(enhancer.process(padded[:, first : first + size]))
        time.sleep(pause)
    parts.append(enhancer.finish())
    assert not parts[0].any()
    return np.concatenate(parts, axis=-1)[..., enhancer.latency :][..., : samples.shape[1]]


def replayed(samples: Samples, folder: Path, *flags: object, rate: int = 16000) -> Samples:
    """Return the output ``[S, M, N]`` of ``kb-client replay`` for samples."""
    soundfile.write(folder / "in.wav", samples.T, rate, subtype="FLOAT")
    result = run("kb-client", "replay", folder / "in.wav", "-o", folder / "out.wav", "--output-format", "float", *flags)
    assert result.returncode == 0, result.stderr
    outputs = sorted(folder.glob("out*.wav"))
    return np.stack([soundfile.read(path, dtype="float32", always_2d=True)[0].T for path in outputs])


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_whole_signal_gives_the_output_of_replay(rate: int, tmp_path: Path) -> None:
    samples = speech(1.003)
    np.testing.assert_array_equal(
        kb.enhance(samples, rate, ALONE), replayed(samples, tmp_path, "--bundle", ALONE, rate=rate)
    )


def test_chunks_give_the_output_of_a_whole_signal() -> None:
    samples = speech(1.003)
    with kb.Enhancer(ALONE) as enhancer:
        assert (enhancer.chunk, enhancer.latency, enhancer.sample_rate) == (128, 128, 16000)
        np.testing.assert_array_equal(streamed(enhancer, samples), kb.enhance(samples, 16000, ALONE))
        enhancer.reset()
        mono = np.concatenate([enhancer.process(samples[0, :128]), enhancer.process(samples[:1, 128:256])], axis=-1)
        assert enhancer.statistics == kb.Statistics(1, 0, 0, 0, 0, None)
    twice = kb.enhance(np.stack([samples[0], samples[0]]), 16000, ALONE)
    np.testing.assert_array_equal(mono[..., 128:], twice[..., :128])
    np.testing.assert_array_equal(kb.enhance(samples[0], 16000, ALONE), twice)


def test_with_all_hints_on_time_it_gives_the_output_of_replay(
    golden_bundle: GetBundle, ss_server: Server, tmp_path: Path
) -> None:
    bundle, samples = golden_bundle(SS), speech(0.6)
    expected = replayed(samples, tmp_path, "--bundle", bundle, "--server", ss_server.address)
    for pause in (0.008, 0.03, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3):  # slow down until every hint is on time
        with kb.Enhancer(bundle, server=ss_server.address) as enhancer:
            output = streamed(enhancer, samples, pause)
            statistics = enhancer.statistics
        if statistics.hints_used == statistics.hints_due:
            break
    assert statistics.server == ss_server.address
    assert (statistics.hints_used, statistics.hints_due) == (statistics.frames - 6, statistics.frames - 6)
    assert np.abs(output - expected).max() < 1e-6
    assert np.abs(output - kb.enhance(samples, 16000, bundle)).max() > 1e-3


@pytest.mark.parametrize(("length", "rate"), [(1, 48000), (5, 384_000), (700, 768_000)])
def test_signals_of_any_length_and_rate_are_enhanced(length: int, rate: int) -> None:
    """As by replay, which pads a signal that has no sample at the rate of the bundle."""
    output = kb.enhance(np.full(length, 0.1, np.float32), rate, ALONE)
    assert output.shape == (2, 2, length)
    assert np.isfinite(output).all()


def test_servers_can_be_changed_without_a_wait(golden_bundle: GetBundle, ss_server: Server) -> None:
    bundle, chunk = golden_bundle(SS), speech(0.008)
    with kb.Enhancer(bundle) as enhancer:
        for _ in range(100):
            enhancer.process(chunk)
        enhancer.set_server(ss_server.address)
        deadline = time.monotonic() + 60
        while enhancer.statistics.hints_used < 20:
            assert time.monotonic() < deadline, enhancer.statistics
            enhancer.process(chunk)
            time.sleep(0.02)
        assert enhancer.statistics.server == ss_server.address
        enhancer.set_server(None)
        used, due = enhancer.statistics.hints_used, enhancer.statistics.hints_due
        for _ in range(20):
            enhancer.process(chunk)
        assert (enhancer.statistics.hints_used, enhancer.statistics.hints_due) == (used, due)
        assert enhancer.statistics.server is None
        # No server answers at these addresses, and the stream continues.
        enhancer.set_server(["127.0.0.1:1", "192.0.2.1:50051"])
        for _ in range(20):
            assert np.isfinite(enhancer.process(chunk)).all()
        assert enhancer.statistics.hints_due == due + 20


def test_invalid_arguments_are_refused(golden_bundle: GetBundle) -> None:
    chunk = speech(0.008)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: kb.Enhancer("nobody"), "no bundle of that name"),
        (lambda: kb.Bundle(""), "the name of the bundle is empty"),
        (lambda: kb.Bundle("a" * 5000), r"no bundle of that name or path \(File name too long\)"),
        (lambda: kb.Enhancer(golden_bundle(TSE), speaker="a" * 5000), "60 at most"),
        (lambda: kb.read_credentials(["127.0.0.1:1"], token_file="a" * 300), "File name too long"),
        (lambda: kb.Enhancer(ALONE, server="127.0.0.1:1"), "one network alone"),
        (lambda: kb.Enhancer(golden_bundle(SS), server="nowhere"), "nowhere"),
        (lambda: kb.Enhancer(ALONE, speaker=np.ones(256)), "leave out the speaker"),
        (lambda: kb.Enhancer(golden_bundle(TSE)), "give the speaker as"),
        (lambda: kb.Enhancer(golden_bundle(TSE), speaker=np.zeros(256)), "not all of them zero"),
        (lambda: kb.Enhancer(golden_bundle(TSE), speaker=np.ones(10)), "256 finite numbers"),
        (lambda: kb.Enhancer(golden_bundle(TSE), speaker="nobody-at-all"), "not enrolled"),
        (lambda: kb.Enhancer(ALONE).process(chunk[:, :100]), r"got samples of shape \[2, 100\]"),
        (lambda: kb.Enhancer(ALONE).process(chunk[None]), r"got samples of shape \[1, 2, 128\]"),
        (lambda: kb.Enhancer(ALONE).process(np.zeros((2, 128), np.int16)), "the samples are of type int16"),
        (lambda: kb.enhance(["a", "b"], 16000, ALONE), "the samples are of type <U1"),  # type: ignore[arg-type,unused-ignore]
        (lambda: kb.enhance([[0.0, 1.0], [0.0]], 16000, ALONE), "cannot be converted to an array"),
        (lambda: kb.Enhancer(golden_bundle(TSE), speaker=["a"] * 256), "256 finite numbers"),
        (lambda: kb.Enhancer(ALONE, engine="other"), "must be one of auto, compiled, onnx, torch"),  # type: ignore[arg-type]
        (lambda: kb.enhance(np.zeros((3, 1000)), 16000, ALONE), r"got samples of shape \[3, 1000\]"),
        (lambda: kb.enhance(np.zeros((2, 0)), 16000, ALONE), "N at least 1"),
        (lambda: kb.enhance(np.zeros(1000), 0, ALONE), "the rate is 0 Hz"),
        (lambda: kb.enhance(np.full(1000, np.nan), 16000, ALONE), "not finite"),
    ]
    for call, message in cases:
        with pytest.raises(kb.InputError, match=message):
            call()


def test_one_speaker_is_extracted(golden_bundle: GetBundle, tse_server: Server) -> None:
    speaker = np.load(ROOT / "samples" / "enrollment.npy")
    samples = speech(0.3)
    with kb.Enhancer(golden_bundle(TSE), server=tse_server.address, speaker=speaker) as enhancer:
        assert enhancer.speakers == 1
        assert streamed(enhancer, samples, 0.02).shape == (1, 2, samples.shape[1])
        assert enhancer.statistics.hints_used > 0
    alone = kb.enhance(samples, 16000, golden_bundle(TSE), speaker=ROOT / "samples" / "enrollment.npy")
    assert alone.shape == (1, 2, samples.shape[1])


@pytest.mark.slow  # ten minutes of audio
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_memory_does_not_grow_in_ten_minutes() -> None:
    script = (
        "import os, numpy as np, knowledge_boosting as kb\n"
        "def memory(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20\n"
        "chunk = np.random.default_rng(0).normal(0, 0.1, (2, 128)).astype(np.float32)\n"
        f"with kb.Enhancer('ss-compact', server='127.0.0.1:{free_port()}') as enhancer:\n"
        "    for frame in range(75_000):\n"
        "        if frame == 7500: before = memory()\n"
        "        enhancer.process(chunk)\n"
        "    print(memory() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 2


@pytest.mark.parametrize("served", [True, False])
def test_the_documented_example_runs(served: bool, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 20
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "out").mkdir()

    def print_of(address: str) -> str:
        script = code.replace("127.0.0.1:50051", address)
        pace = ""
        if served:  # hints need time to arrive
            script = script.replace("enhancer.process(chunk)", "paced(enhancer, chunk)")
            pace = (
                "import time\ndef paced(enhancer, chunk):\n    time.sleep(0.008)\n    return enhancer.process(chunk)\n"
            )
        result = subprocess.run(
            [sys.executable, "-c", pace + script],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    if served:
        with running_server(ROOT / "models" / "pretrained" / "ss-compact") as server:
            assert f"server='{server.address}'" in print_of(server.address)
    else:
        assert "hints_used=0" in print_of(f"127.0.0.1:{free_port()}")
    assert soundfile.info(tmp_path / "out" / "voice1.wav").frames == 128000


def test_the_interface_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in kb.__all__:
        item = getattr(kb, name)
        assert inspect.getdoc(item)
        assert name in page, name
