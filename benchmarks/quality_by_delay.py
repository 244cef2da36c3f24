"""Draws what hints gain by their age: ``python -m benchmarks.quality_by_delay out/results/listeners-ss ...``.

Reads the results.json of one or more runs of ``kb-evaluate --delays`` with a network alone, and draws one panel for
each. A panel shows how much better every pair is than the network alone, by the age at which hints arrive, with 95 %
bootstrap intervals over the mixtures; and the same for the large network and with all hints withheld.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00")  # of Okabe and Ito, which color-blind people can distinguish


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="output folders of kb-evaluate")
    parser.add_argument("--titles", nargs="+", help="a title for each panel; by default the names of the folders")
    parser.add_argument("--output", type=Path, default=Path("out/results/quality-by-delay.png"))
    options = parser.parse_args()
    titles = options.titles or [folder.name for folder in options.results]
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, len(titles), figsize=(5.2 * len(titles), 4.2), sharey=True, layout="constrained")
    panels = [panels] if len(titles) == 1 else panels
    for panel, folder, title in zip(panels, options.results, titles, strict=True):
        results = json.loads((folder / "results.json").read_text())
        gains = [gain for gain in results["comparisons"] if gain["network"] is None]
        for model, colour in zip([model for model in results["models"] if model["delay_ms"]], _COLOURS, strict=False):
            chunk_ms = model["delay_ms"] / model["delay_frames"]
            own = [gain for gain in gains if gain["model"] == model["name"]]
            boosted = {
                (gain["delay_frames"] or model["delay_frames"]) * chunk_ms: gain["si_sdri"]
                for gain in own
                if gain["system"] == "boosted"
            }
            ages = sorted(boosted)
            means = [boosted[age]["mean"] for age in ages]
            spans = [
                [boosted[age]["mean"] - boosted[age]["low"], boosted[age]["high"] - boosted[age]["mean"]]
                for age in ages
            ]
            panel.errorbar(
                ages,
                means,
                yerr=list(zip(*spans, strict=True)),
                marker="o",
                color=colour,
                capsize=2.5,
                label=model["name"],
            )
            for system, style, label in (
                ("large", "--", "large network"),
                ("small_without_hints", ":", "hints withheld"),
            ):
                for gain in own:
                    if gain["system"] == system and gain["delay_frames"] in (None, model["delay_frames"]):
                        text = f"{model['name']}, {label}"
                        panel.axhline(gain["si_sdri"]["mean"], color=colour, linestyle=style, linewidth=1, label=text)
                        break
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.set_title(title, fontsize=11)
        panel.set_xscale("log")
        panel.set_xticks(ages, [f"{age:g}" for age in ages])
        panel.minorticks_off()
        panel.set_xlabel("age of hints on arrival, ms")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    over = next(gain["over"] for gain in gains)
    panels[0].set_ylabel(f"SI-SDRi over {over}, dB")
    panels[-1].legend(fontsize=8.5, frameon=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
