"""Time of one training step on this CPU: ``python benchmarks/train_step.py``.

Forward, backward and optimiser, full published sizes, separation, batch of 4 x 3 s: the large network alone, and the
small network with fusion beside a frozen large one. Prints a table and writes it as JSON. Random signals cost the same
as speech.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.checkpoint import build
from models.config import Boosting, ModelConfig, NetworkSize
from models.framing import pad_to_frames
from models.pair import BoostedPair, SmallModel
from training.losses import negative_si_sdr
from training.memory import keep_freed_memory

SMALL = NetworkSize(channels=16, hidden=16)
LARGE = NetworkSize(channels=64, hidden=64, heads=8, self_attention=True)


def step_of(config: ModelConfig, mixture: torch.Tensor, sources: torch.Tensor) -> Callable[[], None]:
    """One optimiser step on a batch; a pair's large network is frozen."""
    model = build(config)
    if isinstance(model, BoostedPair):
        model.large.network.requires_grad_(False)
    optimiser = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)

    def step() -> None:
        if isinstance(model, BoostedPair):
            estimate = model(mixture).small
        else:
            alone = model.get_submodule("small")
            assert isinstance(alone, SmallModel)
            estimate, _ = alone(pad_to_frames(mixture, config.framing), alone.initial_state(len(mixture)))
        loss = negative_si_sdr(estimate[..., : mixture.shape[-1]], sources, "per_channel")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, default=Path("out/train_step.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    sources = torch.randn(arguments.batch, 2, 2, round(16000 * arguments.seconds))
    configs = {
        "large alone": ModelConfig(task="ss", small=LARGE),
        "small with fusion, large frozen": ModelConfig(task="ss", small=SMALL, large=LARGE, boosting=Boosting(delay=6)),
    }
    results = {}
    table = Table("step", "median s", "fastest s", "audio s per s", title="One training step, batch of mixtures")
    for name, config in configs.items():
        step = step_of(config, sources.sum(1), sources)
        step()  # the first one allocates
        times = []
        for _ in range(arguments.steps):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        median = float(np.median(times))
        audio = arguments.batch * arguments.seconds / median
        results[name] = {
            "median_s": round(median, 3),
            "fastest_s": round(min(times), 3),
            "audio_per_s": round(audio, 3),
        }
        table.add_row(name, *(f"{value:.2f}" for value in results[name].values()))
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    setting = {key: value for key, value in vars(arguments).items() if key != "json"}
    arguments.json.write_text(
        json.dumps({"torch": torch.__version__, **setting, "steps_taken": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
