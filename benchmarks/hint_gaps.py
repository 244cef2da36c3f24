"""Measures what is heard where hints stop and where they return: ``python -m benchmarks.hint_gaps BUNDLE DATA``.

Runs a pair that uses hints on arrival on the mixtures of a split, once with all hints and once without those of one
second. In windows of 20 ms around the frame at which hints stop, and around the one from which they are used again, it
compares both outputs: the difference of their levels, and the distance of their spectra. A *click* is a jump between
samples that is larger than every jump of both outputs in the 200 ms before and after it. Prints the median and the
95th percentile by distance from the transition, and writes them as JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from knowledge_boosting.common.links import NetworkConditions
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.networks import load_pair
from knowledge_boosting.training.config import FolderData
from knowledge_boosting.training.data.hint_arrivals import simulate_arrivals
from knowledge_boosting.training.data.mixture_folder import MixtureFolder

Signal = NDArray[np.float32]

USUAL = NetworkConditions(delay_ms=44)  # and 4 ms of the server
GAP = range(190, 315)  # frames without a hint
WINDOW = 320  # samples
OFFSETS = (-2, -1, 0, 1, 2, 4, 8)  # windows from a transition to a measured one
_AROUND = 3200  # samples in which a jump is compared with others
_QUIET_DB = -40.0  # windows of a lower level, relative to the whole output, are left out


def spectral_distance(one: Signal, other: Signal) -> float:
    """Return the distance of the spectra of two windows, dB: the RMS over the bins that the loudest do not mask."""
    hann = np.hanning(WINDOW)
    levels = [20 * np.log10(np.abs(np.fft.rfft(hann * window)) + 1e-7) for window in (one, other)]
    audible = np.maximum(*levels) > max(level.max() for level in levels) - 40
    return float(np.sqrt(np.mean(np.square(levels[0] - levels[1])[audible])))


def level(signal: Signal) -> float:
    return float(10 * np.log10(np.mean(np.square(signal)) + 1e-12))


def click(disturbed: Signal, undisturbed: Signal, at: int) -> float:
    """Return how much larger the largest jump near a sample is than all others of both outputs around it, dB."""
    jumps, usual = (np.abs(np.diff(signal[at - _AROUND : at + _AROUND], 2)) for signal in (disturbed, undisturbed))
    near = slice(_AROUND - WINDOW, _AROUND + WINDOW)
    others = np.concatenate([jumps[: near.start], jumps[near.stop :], usual])
    return float(20 * np.log10((jumps[near].max() + 1e-9) / (others.max() + 1e-9)))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name or path of a bundle that uses hints on arrival")
    parser.add_argument("data", type=Path, help="root of a dataset with the split val, of items of at least 4 s")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--json", type=Path, default=Path("out/hint_gaps.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(Bundle(options.bundle)).eval()
    config = pair.config
    if not config.on_arrival:
        parser.error(f"{options.bundle}: does not use hints on arrival")
    data = FolderData(root=str(options.data), split="val", items=options.items)
    items = MixtureFolder(data, config, seed=0, training=False, skip_broken=False)
    figures: dict[str, dict[int, list[tuple[float, float]]]] = {"stop": {}, "return": {}}
    clicks: dict[str, list[float]] = {"stop": [], "return": []}
    for index in range(len(items)):
        example = items.example((0, index))
        mixture, speaker = example["mixture"][None], example.get("speaker_embedding")
        speaker = None if speaker is None else speaker[None]
        whole = pair(mixture, speaker)
        frames = whole.hints.shape[1]
        ready_at = simulate_arrivals(USUAL, 0, frames, config, unheard=GAP)
        arrivals = ready_at - torch.arange(frames)
        usual = int(arrivals[0])
        outputs = [
            pair.estimate_small(mixture, whole.hints, speaker, times)[0].flatten(0, 1).numpy()
            for times in (torch.arange(frames) + usual, ready_at)
        ]
        for undisturbed, disturbed in zip(*outputs, strict=True):
            for name, frame in (("stop", GAP.start + usual), ("return", GAP.stop + usual)):
                at = frame * config.framing.chunk
                clicks[name].append(click(disturbed, undisturbed, at))
                for offset in OFFSETS:
                    window = slice(at + offset * WINDOW, at + (offset + 1) * WINDOW)
                    one, other = undisturbed[window], disturbed[window]
                    if level(one) > level(undisturbed) + _QUIET_DB:
                        row = level(other) - level(one), spectral_distance(one, other)
                        figures[name].setdefault(offset, []).append(row)
    results = {
        name: {
            f"{20 * offset} ms": {
                "level_db": np.round(np.percentile(np.abs(rows), (50, 95), axis=0)[:, 0], 2).tolist(),
                "spectrum_db": np.round(np.percentile(np.abs(rows), (50, 95), axis=0)[:, 1], 2).tolist(),
            }
            for offset, rows in sorted(of.items())
        }
        for name, of in figures.items()
    }
    jumps = {name: np.round(np.percentile(of, (50, 95, 100)), 2).tolist() for name, of in clicks.items()}
    title = f"{options.bundle}, {len(items)} mixtures; median and 95th percentile"
    table = Table("transition", "window from", "level, dB", "spectrum, dB", title=title)
    for name, by_offset in results.items():
        for window_name, figures_of in by_offset.items():
            table.add_row(name, window_name, *("{:.2f} {:.2f}".format(*pair_of) for pair_of in figures_of.values()))
    console = Console(width=100)
    console.print(table)
    for name, values in jumps.items():
        console.print(
            f"largest jump at the {name}, over all others: median {values[0]} dB, 95 % {values[1]} dB, "
            f"maximum {values[2]} dB"
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"windows": results, "jumps_db": jumps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
