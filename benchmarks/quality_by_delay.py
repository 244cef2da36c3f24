"""Draws what hints gain by their age: ``python -m benchmarks.quality_by_delay out/results/listeners-ss ...``.

Reads the results.json of one or more runs of ``kb-evaluate --delays`` with a network alone, and draws one panel for
each. A panel shows how much better every pair is than the network alone, by the age at which hints arrive, with 95 %
bootstrap intervals over the mixtures; and the same for the large network and with all hints withheld. The picture of
``kb-evaluate`` has the figures of each system instead, whose intervals are wider than those of the differences.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00")  # of Okabe and Ito, which color-blind people can distinguish


def draw_pair(panel: Any, pair: dict[str, Any], gains: list[dict[str, Any]], colour: str) -> None:
    """Draw a pair from its record and its comparisons with the network alone."""
    usual = pair["delay_frames"]
    by_age = {
        gain["delay_frames"] * pair["delay_ms"] / usual: gain["si_sdri"]
        for gain in gains
        if gain["system"] == "boosted"
    }
    ages = sorted(by_age)
    means = [by_age[age]["mean"] for age in ages]
    below, above = ([abs(by_age[age][end] - by_age[age]["mean"]) for age in ages] for end in ("low", "high"))
    panel.errorbar(ages, means, yerr=(below, above), marker="o", color=colour, capsize=2.5, label=pair["name"])
    panel.set_xticks(ages, [f"{age:g}" for age in ages])
    for system, style, label in (("large", "--", "large network"), ("small_without_hints", ":", "hints withheld")):
        mean = next(gain["si_sdri"]["mean"] for gain in gains if gain["system"] == system)
        panel.axhline(mean, color=colour, linestyle=style, linewidth=1, label=f"{pair['name']}, {label}")


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="output folders of kb-evaluate")
    parser.add_argument("--titles", nargs="+", help="a title for each panel; by default the names of the folders")
    parser.add_argument("--output", type=Path, default=Path("out/results/quality-by-delay.png"))
    options = parser.parse_args()
    titles = options.titles or [folder.name for folder in options.results]
    if len(titles) != len(options.results):
        parser.error(f"--titles: got {len(titles)} for {len(options.results)} folders; give one for each")
    matplotlib.use("Agg")
    size = (5.2 * len(titles), 4.2)
    figure, grid = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, folder, title in zip(grid[0], options.results, titles, strict=True):
        try:
            results = json.loads((folder / "results.json").read_text())
        except FileNotFoundError:
            parser.error(f"{folder}: has no results.json; give the output folder of kb-evaluate")
        gains = [gain for gain in results["comparisons"] if gain["network"] is None]
        if not gains:
            parser.error(f"{folder}: has no network alone to compare with; give one to kb-evaluate beside the pairs")
        panel.set_xscale("log")
        pairs = [model for model in results["models"] if model["delay_frames"] is not None]
        for pair, colour in zip(pairs, _COLOURS, strict=False):
            draw_pair(panel, pair, [gain for gain in gains if gain["model"] == pair["name"]], colour)
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.set_title(title, fontsize=11)
        panel.minorticks_off()
        panel.set_xlabel("age of hints on arrival, ms")
        panel.set_ylabel(f"SI-SDRi over {gains[0]['over']}, dB")
        panel.label_outer()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    grid[0, -1].legend(fontsize=8.5, frameon=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
