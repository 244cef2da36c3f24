"""Measures what less traffic costs in quality: ``python -m benchmarks.hint_traffic BUNDLE DATA``.

Runs a pair on the mixtures of a split, with hints in every encoding and, if they are used on arrival, of every second
frame only; and with the audio in every encoding. Prints the traffic, and the difference in SI-SDRi from the full
precision with its 95 % interval over items. FLAC and Opus are measured by their size only: see the last lines.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import Pair
from knowledge_boosting.models.networks import load_pair
from knowledge_boosting.models.pair import USUAL_DELAY
from knowledge_boosting.protos.codec import (
    HINT_ENCODINGS,
    PCM_ENCODINGS,
    Samples,
    decode_pcm,
    encode_hints,
    encode_pcm,
    hint_type,
)
from knowledge_boosting.training.config import FolderData
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.evaluation.metrics import si_sdr_improvement
from knowledge_boosting.training.evaluation.results import bootstrap


def through_hint_encoding(hints: Tensor, encoding: str) -> Tensor:
    """Return hints ``[B, T, channels, F]`` as a device decodes them."""
    values, scales = encode_hints(hints.numpy(), HINT_ENCODINGS[encoding])
    decoded = values.astype(np.float32)
    if encoding == "int8":
        decoded = decoded * scales[..., None, None]
    return torch.from_numpy(decoded)


def through_pcm_encoding(mixture: Tensor, encoding: str) -> Tensor:
    """Return a mixture ``[1, M, N]`` as a server decodes it."""
    code = PCM_ENCODINGS[encoding]
    return torch.from_numpy(decode_pcm(encode_pcm(mixture[0].numpy(), code), code, mixture.shape[1]))[None]


def compressed_kbit(mixture: Samples, config: Pair, kind: str, subtype: str) -> float:
    """Return the traffic of a mixture ``[M, N]`` whose chunks are separate files, kbit/s."""
    rate, chunk = config.framing.sample_rate, config.framing.chunk
    total = 0
    for start in range(0, 100 * chunk, chunk):
        file = io.BytesIO()
        soundfile.write(file, mixture[:, start : start + chunk].T, rate, format=kind, subtype=subtype)
        total += len(file.getvalue())
    return total * 8e-3 / (100 * config.framing.chunk_seconds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name or path of a pair")
    parser.add_argument("data", type=Path, help="root of a dataset with the split val")
    parser.add_argument("--items", type=int, default=120)
    parser.add_argument("--json", type=Path, default=Path("out/hint_traffic.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(Bundle(options.bundle)).eval()
    config = pair.config
    data = FolderData(root=str(options.data), split="val", items=options.items)
    items = MixtureFolder(data, config, seed=0, training=False, skip_broken=False)
    cases = [("f32", encoding, step) for step in ((1, 2) if config.on_arrival else (1,)) for encoding in HINT_ENCODINGS]
    cases += [("s16", "f32", 1), ("s16", "int8", 1)]
    gains: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    for index in range(len(items)):
        example = items.example((0, index))
        mixture, sources, speaker = example["mixture"][None], example["sources"][None], example.get("speaker_embedding")
        speaker = None if speaker is None else speaker[None]
        heard = {pcm: pair.large.embed(through_pcm_encoding(mixture, pcm), speaker) for pcm in PCM_ENCODINGS}
        frames = torch.arange(heard["f32"].shape[1])
        for pcm, encoding, step in cases:
            hints = through_hint_encoding(pair.large.encode(heard[pcm]), encoding)
            ready_at = torch.where(frames % step == 0, frames + USUAL_DELAY, NEVER)
            estimate = pair.estimate_small(mixture, hints, speaker, ready_at if config.on_arrival else None)
            gains[pcm, encoding, step].append(float(si_sdr_improvement(estimate, sources, mixture).mean()))

    chunks = 1 / config.framing.chunk_seconds
    base = np.array(gains["f32", "f32", 1])
    rows = []
    for (pcm, encoding, step), values in gains.items():
        up = config.microphones * config.framing.sample_rate * (2 if pcm == "s16" else 4)
        down = config.hint_channels * config.framing.bins * hint_type(HINT_ENCODINGS[encoding]).itemsize * chunks / step
        difference = bootstrap(np.array(values) - base, seed=0)
        traffic = {"kbit_up": round(up * 8e-3, 1), "kbit_down": round(down * 8e-3, 1)}
        rows.append(
            {"audio": pcm, "hints": encoding, "every": step, **traffic}
            | {"difference_db": difference.mean, "interval_db": [difference.low, difference.high]}
        )
    table = Table("audio", "hints", "of every", "kbit/s up", "kbit/s down", "difference, dB", "interval, dB")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = Console(width=110)
    console.print(table)
    mixture = items.example((0, 0))["mixture"].numpy()
    sizes = {"FLAC": compressed_kbit(mixture, config, "FLAC", "PCM_16")}
    sizes["Opus"] = compressed_kbit(mixture, config, "OGG", "OPUS")
    for name, kbit in sizes.items():
        console.print(f"{name}, each chunk of {1e3 / chunks:g} ms by itself: {kbit:.0f} kbit/s up")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = {"bundle": options.bundle, "items": len(items), "rows": rows, "compressed_kbit_up": sizes}
    options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
