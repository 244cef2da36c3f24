"""Draws learning curves: ``python benchmarks/learning_curves.py runs/compact/ss-alone runs/compact/ss-48ms …``.

Reads the TensorBoard logs of ``kb-train``, and writes validation SI-SDRi and smoothed training loss by step, as JSON
and as a picture. ``--with FILE`` copies the curves of such a JSON file into the new one. They are also drawn for those
given runs whose folders do not exist any more.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knowledge_boosting.training.learning.module import MONITOR

matplotlib.use("Agg")

from matplotlib import pyplot as plt

LOSS = "train/loss"
_SMOOTHING_STEPS = 10  # logged steps


def read_curves(run: Path) -> dict[str, list[list[float]]]:
    """Return the curves of a run by name, as lists of (step, value). The loss is averaged over ten logged steps."""
    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    tags = log.Tags()["scalars"]
    curves = {
        tag: [[event.step + 1, round(event.value, 3)] for event in log.Scalars(tag)]
        for tag in (MONITOR, f"{MONITOR}_large")
        if tag in tags
    }
    events = log.Scalars(LOSS) if LOSS in tags else []
    curves[LOSS] = [
        [
            events[first + _SMOOTHING_STEPS - 1].step + 1,
            round(float(np.mean([e.value for e in events[first : first + _SMOOTHING_STEPS]])), 3),
        ]
        for first in range(0, len(events) - _SMOOTHING_STEPS + 1, _SMOOTHING_STEPS)
    ]
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--with", dest="before", type=Path, help="JSON file of an earlier call")
    parser.add_argument("--json", type=Path, default=Path("out/learning_curves.json"))
    parser.add_argument("--plot", type=Path, default=Path("out/learning_curves.png"))
    arguments = parser.parse_args()
    before = json.loads(arguments.before.read_text()) if arguments.before is not None else {}
    selected = {
        run.name: read_curves(run) if run.is_dir() or run.name not in before else before[run.name]
        for run in arguments.runs
    }
    figure, (loss, validation) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (name, curves) in enumerate(selected.items()):
        colour = plt.colormaps["tab20"](number % 20)
        if curves[LOSS]:
            steps, values = np.array(curves[LOSS]).T
            loss.plot(steps, -values, color=colour, label=name)
        if curves.get(MONITOR):
            validation.plot(*np.array(curves[MONITOR]).T, "o-", markersize=3, color=colour, label=name)
    for axis, title in ((loss, "training mixtures: SI-SDR, dB"), (validation, "validation items: SI-SDRi, dB")):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("updates")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*validation.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    for path in (arguments.json, arguments.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.plot, dpi=110)
    arguments.json.write_text(json.dumps(before | selected) + "\n")


if __name__ == "__main__":
    main()
