"""The report of a run: `report.md` with its tables, and the plots."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .methods.registry import METHODS, describe_method
from .reading import headline, tables
from .run_records import Json, Record, group_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

#: How each signal of selective fusion decides.
_SIGNALS = {"confidence": "where the receiver is unsure", "gate_weight": "where the gate weights say so"}
#: Columns of a table beside the accuracy, where a task has them.
_FURTHER_METRICS = {
    "strict": "accuracy_strict",
    "exact match": "exact_match",
    "F1": "f1",
    "answer of the mismatched question": "mismatched_answer",
}


def write_report(folder: Path, metrics: Json, records: Sequence[Record]) -> None:
    """Write `report.md` with its tables and plots; plots without data are left out.

    Args:
        folder: The run's folder.
        metrics: From [`~results.compute_results`], with `versions`, `seed` and `config`.
        records: All predictions.
    """
    plots: list[str | None] = []
    if find_spec("matplotlib") is None:
        logger.warning('The report has no plots, since matplotlib is missing: run `pip install "c2c_hf[eval]"`.')
    elif metrics["results"]:
        plots = [_plot_accuracy(folder, metrics), _plot_latency(folder, metrics), _plot_subjects(folder, records)]
        plots.append(_plot_selective_fusion(folder, metrics))
    lines = ["# Evaluation", ""]
    if metrics["reading"]:
        lines += [f"{line}\n" for line in headline(metrics["reading"])]
        lines += tables(metrics["reading"], METHODS)
    if metrics["results"]:
        lines += [*_headline(metrics), *_tables(metrics), *_failures(records)]
    lines += [f"![{name}]({name})" for name in plots if name]
    lines += ["", "## How it was run", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in {**metrics["config"], **metrics["versions"]}.items()]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _headline(metrics: Json) -> list[str]:
    """Return the lines above the tables; the pairing gain comes first."""
    lines = []
    for gain in metrics["pairing_gain"]:
        low, high = gain["interval"]
        verdict = (
            "the right cache helps" if low > 0 else "the right cache hurts" if high < 0 else "no significant gain"
        )
        lines.append(
            f"**Pairing gain, {gain['task']}: {100 * gain['value']:+.1f} points** "
            f"[{100 * low:+.1f}, {100 * high:+.1f}], {gain['num_items']} items: {verdict}.\n"
        )
    for result in metrics["results"]:
        if result["metric"] == "accuracy" and "gain_over_fusion_off" in result:
            lines.append(
                f"C2C over itself with fusion off, {result['task']}: {_gain(result['gain_over_fusion_off'])}.\n"
            )
    for gap in metrics["performance_gap_recovered"]:
        value = (
            "no sharer is more accurate than the receiver" if gap["value"] is None else f"{100 * gap['value']:.0f} %"
        )
        lines.append(f"Performance gap recovered, {gap['task']}: {value}.\n")
    for found in metrics["selective_fusion"]:
        calibrated = found["calibrated"]
        lines.append(
            f"Fusing only {_SIGNALS[found['signal']]}, {found['task']}: "
            f"{_percent(calibrated['value'], calibrated['interval'])} with {calibrated['share_fused']:.0%} fused; the "
            f"better of both, item by item, gives {100 * found['oracle']:.1f}.\n"
        )
    explained = "Pairing gain is C2C less C2C with mismatched sharers, item by item."
    return [*lines, f"{explained} Intervals are 95 %.", ""]


def _tables(metrics: Json) -> list[str]:
    """Return a table per task, a row per method."""
    lines = []
    for task in dict.fromkeys(result["task"] for result in metrics["results"]):
        rows = [result for result in metrics["results"] if result["task"] == task]
        values = {(row["metric"], row["method"]): f"{100 * row['value']:.1f}" for row in rows}
        further = {name: metric for name, metric in _FURTHER_METRICS.items() if any(m == metric for m, _ in values)}
        columns = ["method", "accuracy", *further, "over the receiver", "items", "failed", "no answer found"]
        columns += ["seconds (sharer, fusion, prefill, decode)", "tokens, prompt + generated"]
        lines += [f"## {task}", "", _row(columns), _row(["---"] * len(columns))]
        for row in (row for row in rows if row["metric"] == "accuracy"):
            seconds, tokens = row["seconds"], row["tokens"]
            stages = ", ".join(f"{seconds[name]:.3f}" for name in ("sharer", "fusion", "prefill", "decode"))
            cells = [row["method"], _percent(row["value"], row["interval"])]
            cells += [values.get((metric, row["method"]), "") for metric in further.values()]
            cells += [_gain(row.get("gain_over_receiver")), str(row["num_items"]), str(row["num_failed"])]
            cells += [str(row["num_without_answer"]), f"{seconds['total']:.3f} ({stages})"]
            cells.append(f"{tokens['prompt']:.0f} + {tokens['generated']:.0f}" if tokens else "")
            lines.append(_row(cells))
        lines.append("")
    used = dict.fromkeys(result["method"] for result in metrics["results"])
    lines += [f"- **{name}**: {describe_method(name)}" for name in used]
    explained = "Seconds and tokens are medians per item; the p-value is McNemar's."
    if any(row["method"] == "c2c" and not row["seconds"]["sharer"] for row in _accuracies(metrics)):
        explained += " C2C's prefill includes the sharers', which run beside the receiver where that is faster."
    return [*lines, "", explained, ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _gain(gain: Json | None) -> str:
    if gain is None:
        return ""
    low, high = gain["interval"]
    p_value = "p<1e-16" if gain["p_value"] < 1e-16 else f"p={gain['p_value']:.3g}"
    return f"{100 * gain['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {p_value}"


def _failures(records: Sequence[Record]) -> list[str]:
    failed = [record for record in records if "error" in record]
    if not failed:
        return []
    listed = [f"- {record['task']}, {record['method']}, {record['id']}: {record['error']}" for record in failed]
    return ["## Failed items, counted as wrong", "", *listed, ""]


def _new_figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, Sequence[Axes]]":
    """Return a figure and the axes of each column."""
    # Not pyplot, which needs a display and changes the caller's settings.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _accuracies(metrics: Json) -> list[Json]:
    return [result for result in metrics["results"] if result["metric"] == "accuracy"]


def _plot_accuracy(folder: Path, metrics: Json) -> str:
    """Plot a panel for each task, a line for each method; a dashed line is the receiver's accuracy."""
    results = _accuracies(metrics)
    tasks = list(dict.fromkeys(result["task"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure, panels = _new_figure(1.5 + 2.5 * len(tasks), 1.2 + 0.25 * len(methods), len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for result in results:
            if result["task"] != task:
                continue
            place, value, interval = methods.index(result["method"]), 100 * result["value"], result["interval"]
            color = "C1" if result["method"] == "c2c" else "C0"
            axes.plot([100 * end for end in interval], [place, place], color=color)
            axes.plot(value, place, "o", color=color)
            if result["method"] == "receiver":
                axes.axvline(value, color="0.5", linestyle="--", linewidth=1)
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("accuracy, %, 95 % interval")
    # All panels have the same methods, the first one on top.
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.savefig(folder / "accuracy.png", dpi=120)
    return "accuracy.png"


def _plot_latency(folder: Path, metrics: Json) -> str:
    figure, (axes,) = _new_figure(6, 4)
    markers = "osD^vPX*"
    tasks = list(dict.fromkeys(result["task"] for result in _accuracies(metrics)))
    for result in _accuracies(metrics):
        x, y = result["seconds"]["total"], 100 * result["value"]
        marker = markers[tasks.index(result["task"]) % len(markers)]
        axes.plot(x, y, marker, color=f"C{tasks.index(result['task'])}")
        axes.annotate(result["method"], (x, y), fontsize="x-small", xytext=(4, 4), textcoords="offset points")
    for index, task in enumerate(tasks):
        axes.plot([], [], markers[index % len(markers)], color=f"C{index}", label=task)
    axes.set_xscale("log")
    # Space for the names.
    axes.margins(x=0.2)
    axes.set_xlabel("median seconds per item")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize="small")
    figure.savefig(folder / "latency.png", dpi=120)
    return "latency.png"


def _plot_selective_fusion(folder: Path, metrics: Json) -> str | None:
    if not metrics["selective_fusion"]:
        return None
    figure, (axes,) = _new_figure(6, 4)
    for index, found in enumerate(metrics["selective_fusion"]):
        shares, values = zip(*found["curve"], strict=True)
        color, calibrated = f"C{index}", found["calibrated"]
        label = f"{found['task']}, {_SIGNALS[found['signal']]}"
        axes.plot(100 * np.array(shares), 100 * np.array(values), "-", color=color, label=label)
        axes.plot(100 * calibrated["share_fused"], 100 * calibrated["value"], "o", color=color)
        axes.axhline(100 * found["oracle"], color=color, linestyle=":", linewidth=1)
    axes.set_xlabel("share of the questions that are fused, % (dot: calibrated)")
    axes.set_ylabel("accuracy, % (dotted: the better of both, item by item)")
    axes.legend(fontsize="small")
    figure.savefig(folder / "selective_fusion.png", dpi=120)
    return "selective_fusion.png"


def _plot_subjects(folder: Path, records: Sequence[Record]) -> str | None:
    cells: dict[str, dict[str, list[int]]] = {}
    for by_method in group_records([record for record in records if record.get("subject")]).values():
        for method, answered in by_method.items():
            for record in answered.values():
                cells.setdefault(record["subject"], {}).setdefault(method, []).append(record["correct"])
    if not cells:
        return None
    subjects = sorted(cells)
    methods = list(dict.fromkeys(method for row in cells.values() for method in row))
    values = [
        [100 * sum(row[m]) / len(row[m]) if m in row else float("nan") for m in methods]
        for row in (cells[subject] for subject in subjects)
    ]
    figure, (axes,) = _new_figure(3 + 0.6 * len(methods), 1.5 + 0.2 * len(subjects))
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=100)
    axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
    axes.set_yticks(range(len(subjects)), subjects, fontsize="x-small")
    figure.colorbar(image, label="accuracy, %")
    figure.savefig(folder / "subjects.png", dpi=120)
    return "subjects.png"
