"""Draws the learning curves of a recipe.

``python benchmarks/learning_curves.py configs/compact/recipe.toml runs/compact``

Reads the TensorBoard logs of ``kb-train``, and writes validation SI-SDRi and smoothed training loss of every stage by
step, as JSON. The picture shows the validation figure of each network from its first stage to its last. ``--with FILE``
reads the curves of stages whose run folders do not exist any more from such a JSON file.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knowledge_boosting.models.tasks import TASKS
from knowledge_boosting.training.learning.module import MONITOR
from knowledge_boosting.training.recipes import Recipe

matplotlib.use("Agg")

from matplotlib import pyplot as plt

LOSS = "train/loss"
_SMOOTHING_STEPS = 10  # logged steps
Curves = dict[str, list[list[float]]]
# The last stage of each network, after the name of its task, and its colour (Okabe and Ito).
_LAST = {"large network": ("large", "large-voices"), "boosted": ("48ms",), "small network alone": ("alone",)}
_COLOURS = {"large network": "#009E73", "boosted": "#0072B2", "small network alone": "#CC79A7"}


def read_curves(run: Path) -> Curves:
    """Return the curves of a run by name, as lists of [step, value]. The loss is averaged over ten logged steps."""
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


def chain(recipe: Recipe, stage: str) -> list[str]:
    """Return the stages that the weights of a stage come from, in their order, and the stage itself."""
    config = recipe.stage(stage, Path())
    source = config.initial_checkpoint or config.warm_start
    return [*(chain(recipe, Path(source).parent.name) if source else []), stage]


def curve(stages: list[str], curves: dict[str, Curves], task: str) -> list[tuple[float, float]]:
    """Return validation SI-SDRi of one task by the thousands of updates of all stages so far."""
    points: list[tuple[float, float]] = []
    before = 0.0
    for stage in stages:
        found = curves.get(stage, {})
        if stage.startswith(f"{task}-"):
            points += [((before + step) / 1000, value) for step, value in found.get(MONITOR, [])]
        before += max((values[-1][0] for values in found.values() if values), default=0)
    return points


def draw(recipe: Recipe, curves: dict[str, Curves], path: Path) -> None:
    """Draw one panel a task."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, task) in zip(axes, reversed(TASKS.items()), strict=True):
        for network, endings in _LAST.items():
            last = [f"{name}-{ending}" for ending in endings if f"{name}-{ending}" in recipe.stages][-1]
            points = curve(chain(recipe, last), curves, name)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=_COLOURS[network], label=network)
        axis.set_title(task.label, loc="left", fontsize=10)
        axis.set_xlabel("thousands of updates, all stages")
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation SI-SDRi, dB")
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("Would more training still help?", fontsize=12)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", type=Path, help="folder with a run for every stage")
    parser.add_argument("--with", dest="before", type=Path, help="JSON that was written before")
    parser.add_argument("--json", type=Path, default=Path("out/learning_curves.json"))
    parser.add_argument("--plot", type=Path, default=Path("out/learning_curves.png"))
    arguments = parser.parse_args()
    recipe = Recipe(arguments.recipe)
    curves: dict[str, Curves] = json.loads(arguments.before.read_text()) if arguments.before is not None else {}
    curves |= {
        stage: read_curves(arguments.runs / stage) for stage in recipe.stages if (arguments.runs / stage).is_dir()
    }
    for path in (arguments.json, arguments.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    draw(recipe, curves, arguments.plot)
    arguments.json.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
