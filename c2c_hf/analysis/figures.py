"""Figures of the analysis of a fuser."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('the analysis needs matplotlib: run `pip install "c2c_hf[analysis]"`.') from error

#: Sections of `similarity` and what they are called.
MEASURES = {"cka": "linear CKA", "neighbours": "shared neighbours"}
_KINDS = ("keys", "values")
_COLORS = {"sharer": "C1", "receiver": "C0", "projected": "C2", "fused": "C3"}
#: Tokens of the heat map: more cannot be told apart.
_MAX_WORDS = 60


def draw(sharer: dict[str, Any], layer: int) -> dict[str, Figure]:
    """Draw the figures of one sharer's fuser.

    Args:
        sharer: Its part of the report.
        layer: The receiver layer of the plots of states.

    Returns:
        Figures by name, those that the fuser's mode has.
    """
    drawn: dict[str, Callable[[], Figure]] = {
        "gates": lambda: _gates(sharer),
        "fit": lambda: _lines({"slots": sharer["fit"]}, "R2 of the receiver's own states", (None, 1)),
        "attention": lambda: _attention(sharer["attention"]),
        "effective_rank": lambda: _lines(sharer["effective_rank"], "effective rank", (0, None)),
        "similarity": lambda: _similarity(sharer),
        "states": lambda: _states(sharer["projections"], layer),
        "change": lambda: _change(sharer["change"]),
    }
    return {
        name: make() for name, make in drawn.items() if name not in ("gates", "fit", "attention") or name in sharer
    }


def _new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    # Not pyplot, which needs a display and changes the caller's settings.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _plot(axes: Axes, values: Sequence[float | None], label: str, color: str | None, style: str = "-") -> None:
    # Entries without a value (closed gates) leave a gap.
    axes.plot(np.array(values, dtype=float), style, marker=".", color=color, label=label)


def _lines(sets: dict[str, Any], label: str, limits: tuple[float | None, float | None]) -> Figure:
    figure, (panels,) = _new_figure(9, 3, columns=2)
    for kind, axes in zip(_KINDS, panels, strict=True):
        for name, own in sets.items():
            _plot(axes, own[kind], name, _COLORS.get(name))
        axes.set(title=kind, xlabel="receiver layer", ylim=limits)
    panels[0].set_ylabel(label)
    panels[1].legend(fontsize="small")
    return figure


def _gates(sharer: dict[str, Any]) -> Figure:
    figure, (panels,) = _new_figure(9, 2.6, columns=2)
    for kind, axes in zip(_KINDS, panels, strict=True):
        weights, gates = (np.array(sharer[name][kind], dtype=float) for name in ("weights", "gates"))
        layers = np.arange(len(gates))
        axes.bar(layers, weights, color="C2", label="mean dynamic weight")
        axes.plot(layers[gates == 0], np.zeros(int((gates == 0).sum())), "x", color="C3", label="gate closed")
        axes.set(title=f"{kind}: {int(gates.sum())} of {len(gates)} gates open", xlabel="receiver layer", ylim=(0, 1))
    panels[1].legend(fontsize="small")
    return figure


def _similarity(sharer: dict[str, Any]) -> Figure:
    figure, rows = _new_figure(9, 5, rows=2, columns=2)
    for (measure, label), panels in zip(MEASURES.items(), rows, strict=True):
        for kind, axes in zip(_KINDS, panels, strict=True):
            for name, own in sharer["similarity"][measure].items():
                _plot(axes, own[kind], f"{name} and receiver", _COLORS[name], "-" if name == "projected" else "--")
            axes.set(title=kind, ylim=(0, 1))
        panels[0].set_ylabel(label)
    for axes in rows[1]:
        axes.axhline(sharer["chance_of_neighbours"], color="0.5", linestyle=":", label="unrelated sets")
        axes.set_xlabel("receiver layer")
    rows[1][1].legend(fontsize="small")
    return figure


def _states(projections: dict[str, Any], layer: int) -> Figure:
    figure, rows = _new_figure(9, 7.5, rows=2, columns=2)
    for (method, title), panels in zip((("pca", "PCA"), ("tsne", "t-SNE")), rows, strict=True):
        for kind, axes in zip(_KINDS, panels, strict=True):
            for name, points in projections[method][kind].items():
                axes.plot(*zip(*points, strict=True), ".", markersize=4, alpha=0.6, color=_COLORS[name], label=name)
            axes.set(title=f"{title}, {kind} of layer {layer}", xticks=[], yticks=[])
    rows[0][1].legend(fontsize="small", markerscale=2)
    return figure


def _attention(attention: dict[str, Any]) -> Figure:
    figure, ((axes,),) = _new_figure(9, 3)
    for name, color in (("slots", "C2"), ("sink", "0.6"), ("prompt", "C0")):
        _plot(axes, attention[name], {"sink": "first tokens", "slots": "memory slots"}.get(name, name), color)
    if attention["prefilled"] is not None:
        _plot(axes, attention["prefilled"], "the context, prefilled by the receiver", "C2", "--")
    axes.set(xlabel="receiver layer", ylabel="share of the attention", ylim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def _change(change: dict[str, Any]) -> Figure:
    tokens = [_printable(token) for token in change["tokens"][:_MAX_WORDS]]
    figure, rows = _new_figure(3 + 0.17 * len(tokens), 5.5, rows=2)
    for kind, (axes,) in zip(_KINDS, rows, strict=True):
        image = axes.imshow(np.array(change[kind])[:, : len(tokens)], aspect="auto", origin="lower", vmin=0)
        axes.set(ylabel=f"{kind}, receiver layer")
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
        figure.colorbar(image, label="relative change")
    return figure


def _printable(token: str) -> str:
    """Make a token a label: matplotlib's own font has neither Chinese characters nor emoji."""
    token = token.replace("\n", "\\n")
    return token if token.isascii() else token.encode("ascii", "backslashreplace").decode()
