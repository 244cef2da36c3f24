"""Draws what hints gain by their age: ``python -m benchmarks.quality_by_delay out/results/listeners-ss ...``.

Reads the results.json of one or more runs of ``kb-evaluate --delays`` with a network alone, and draws one panel for
each. A panel shows how much better every pair is than the network alone, by the age at which hints arrive, with 95 %
bootstrap intervals over the mixtures. A pair for one delay gains as much from hints that arrive earlier, and loses
those that arrive later. The panel also shows the large network, and pairs with all hints withheld. The picture of
``kb-evaluate`` has the figures of each system instead, whose intervals are wider than those of the differences.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00")  # of Okabe and Ito, which color-blind people can distinguish


def draw_pair(panel: Any, pair: dict[str, Any], results: dict[str, Any], colour: str) -> None:
    """Draw the gains of a pair from the results of its evaluation."""
    gains = [gain for gain in results["comparisons"] if gain["model"] == pair["name"] and gain["network"] is None]
    rows = [row for row in results["rows"] if row["model"] == pair["name"] and row["system"] == "boosted"]
    ages = sorted(row["delay_ms"] for row in rows if row["delay_ms"] is not None)
    one_delay = any(row["trained_delay"] is False for row in rows)
    frame = pair["delay_ms"] / pair["delay_frames"]
    by_age = {gain["delay_frames"] * frame: gain["si_sdri"] for gain in gains if gain["system"] == "boosted"}
    withheld = next(gain["si_sdri"]["mean"] for gain in gains if gain["system"] == "small_without_hints")
    if one_delay:
        own = by_age[pair["delay_ms"]]["mean"]
        in_time = [age for age in ages if age <= pair["delay_ms"]]
        late = [age for age in ages if age > pair["delay_ms"]]
        xs = [*in_time, *in_time[-1:], *late]
        panel.plot(xs, [own] * len(in_time) + [withheld] * (len(late) + 1), color=colour)
    else:
        panel.axhline(withheld, color=colour, linestyle=":", linewidth=1, label=f"{pair['name']}, hints withheld")
    measured = sorted(by_age)
    means = [by_age[age]["mean"] for age in measured]
    below, above = ([abs(by_age[age][end] - by_age[age]["mean"]) for age in measured] for end in ("low", "high"))
    label = f"{pair['name']}, for {pair['delay_ms']:g} ms" if one_delay else pair["name"]
    panel.errorbar(measured, means, yerr=(below, above), marker="o", color=colour, capsize=2.5, label=label)
    panel.set_xticks(ages, [f"{age:g}" for age in ages])


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
        gains = results["comparisons"]
        if not gains:
            parser.error(f"{folder}: has no network alone to compare with; give one to kb-evaluate beside the pairs")
        panel.set_xscale("symlog", linthresh=8, linscale=0.4)
        pairs = [model for model in results["models"] if model["delay_frames"] is not None]
        for pair, colour in zip(pairs, _COLOURS, strict=False):
            draw_pair(panel, pair, results, colour)
        # Pairs can share a large network.
        for mean in {gain["si_sdri"]["mean"] for gain in gains if gain["system"] == "large"}:
            panel.axhline(mean, color="0.3", linestyle="--", linewidth=1, label="large network")
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
