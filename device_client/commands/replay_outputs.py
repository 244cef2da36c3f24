"""What ``kb-client replay`` writes for people: the comparison, the page and the plot."""

from typing import TYPE_CHECKING

from knowledge_boosting.common.errors import printable
from knowledge_boosting.device_client.commands.replay_call import ReplayOptions
from knowledge_boosting.device_client.replay import report as reporting
from knowledge_boosting.device_client.replay.loop import Run
from knowledge_boosting.device_client.replay.quality import Measured, match_sources
from knowledge_boosting.models.config import Pair
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import Samples

if TYPE_CHECKING:
    from pathlib import Path

    from knowledge_boosting.device_client.replay.plot import Spectrogram


def compare(
    options: ReplayOptions,
    manifest: Manifest,
    rate: int,
    measured: Measured,
    estimates: dict[str, Samples],
    quality: dict[str, reporting.Quality],
) -> None:
    """Write the comparison of all systems, for ``--compare``."""
    from knowledge_boosting.device_client.replay.comparison import Comparison, System, write_comparison

    assert options.compare is not None
    systems: dict[System, Samples] = {}
    for name in ("alone", "boosted", "large"):
        if name in estimates:
            # The order of separated speakers is arbitrary. The comparison uses the order of the references.
            systems[name] = estimates[name][list(match_sources(estimates[name], measured.references))]
    gains = {name: quality[name].si_sdri for name in systems}
    systems["reference"] = measured.references
    title = f"{printable(options.input_file.name)}, bundle {manifest.label}"
    comparison = Comparison(measured.mixture, systems, gains, rate, title)
    write_comparison(options.compare, comparison)


def write_page(
    options: ReplayOptions,
    manifest: Manifest,
    rate: int,
    mixture: Samples,
    measured: Measured | None,
    estimates: dict[str, Samples],
    report: reporting.Report,
    run: Run,
) -> None:
    """Write the page, for ``--page``."""
    from knowledge_boosting.device_client.replay.page import DelayCurve, HintFigures, Page, Track
    from knowledge_boosting.device_client.replay.page import write_page as write

    names = {
        "alone": "Small network alone",
        "small_without_hints": "Small network",
        "boosted": "Small network with hints",
        "large": "Large network",
    }
    # The order of separated speakers is arbitrary. The page uses that of the references, or else of the output.
    order = measured.references if measured is not None else estimates.get("boosted", next(iter(estimates.values())))
    tracks = [Track("Mixture", [mixture])]
    for system, name in names.items():
        if system in estimates and not (system == "small_without_hints" and "boosted" in estimates):
            voices = [estimates[system][index] for index in match_sources(estimates[system], order)]
            tracks.append(Track(name, voices, report.quality[system].si_sdri if measured is not None else None))
    if measured is not None:
        tracks.append(Track("Reference: the true voices", list(measured.references)))
    model, curve = manifest.model, None
    if report.si_sdri_by_delay_ms is not None:
        gains = {float(delay): gain for delay, gain in report.si_sdri_by_delay_ms.items()}
        without = "alone" if "alone" in estimates else "small_without_hints"
        levels = {without: "Without hints", "large": "Large network"}
        curve = DelayCurve(gains, {levels[name]: report.quality[name].si_sdri for name in levels if name in estimates})
    page = Page(
        title=f"{printable(options.input_file.name)}, bundle {manifest.label}",
        tracks=tracks,
        rate=rate,
        hints=HintFigures(run.log, run.ended_at, model) if isinstance(model, Pair) else None,
        settings=reporting.settings(report),
        notice=report.bundle.notice,
        curve=curve,
    )
    assert options.page is not None
    write(options.page, page)


def plot(path: "Path", input_file: "Path", manifest: Manifest, pictures: "list[Spectrogram]", run: Run) -> None:
    """Draw the figure, for ``--plot``."""
    from knowledge_boosting.device_client.replay.plot import plot_replay

    names = [f"output, speaker {number}" for number in range(1, len(pictures))] if len(pictures) > 2 else ["output"]
    shown = dict(zip(["mixture", *names], pictures, strict=True))
    notice = " - UNTRAINED, random weights" if manifest.untrained else ""
    title = f"{printable(input_file.name)}, bundle {manifest.name}{notice}"
    log = run.log if isinstance(manifest.model, Pair) else None
    model = manifest.model
    plot_replay(path, title, shown, log, run.ended_at, model.max_age_ms, on_arrival=model.on_arrival)
