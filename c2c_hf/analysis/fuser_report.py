"""`analyze_fuser`: measure what a fuser does on texts, and write it as one page with figures and their numbers."""

import json
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import torch
import transformers

from .._files import write_file
from ..alignment.token_table import decode_each
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from . import figures
from .measures import effective_rank, linear_cka, neighbour_overlap
from .states import QUESTION, FuserStates, collect_states, slot_attention

try:
    from PIL import Image
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import r2_score
except ImportError as error:
    raise ImportError(
        'the analysis needs scikit-learn and matplotlib: run `pip install "c2c_hf[analysis]"`.'
    ) from error

Json: TypeAlias = dict[str, Any]

#: Tokens of each set that are drawn for PCA and t-SNE.
MAX_POINTS = 250
#: Tokens of each set whose neighbours are compared: all pairs are.
MAX_NEIGHBOUR_TOKENS = 2000
#: Of the text whose words are shown, if there is such a text.
MIN_SHOWN_TOKENS = 16


def analyze_fuser(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Sequence[str],
    output: str | Path,
    name: str = "fuser",
    layer: int | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> Json:
    """Measure what a fuser does on texts, and write a page with its figures.

    Args:
        model: The pair.
        processor: Its processor.
        texts: Plain texts that both models prefill; in memory mode contexts. More tokens than the states are wide
            (some hundreds) make the ranks and similarities comparable. The words of the first text of 16 tokens are
            shown.
        output: Folder of `index.html`, which holds everything it shows, of the figures as PNG, and of `report.json`
            with their numbers.
        name: Of the fuser, for the title.
        layer: The receiver layer whose states are plotted. `None`: the middle one.
        max_length: Tokens after which a text is cut.
        seed: Of t-SNE and of the draw of its points.

    Returns:
        What is in `report.json`.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: No token is fused, or there is no such layer.
    """
    num_layers = len(model.config.receiver_layer_shapes or [])
    layer = num_layers // 2 if layer is None else layer
    if not 0 <= layer < num_layers:
        raise ValueError(f"`layer` must be from 0 to {num_layers - 1}, but got {layer}.")
    collected = collect_states(model, processor, texts, max_length)
    report: Json = {
        "fuser": name,
        "mode": model.config.mode,
        "receiver": Path(model.config.receiver_name_or_path or type(model.receiver).__name__).name,
        "num_texts": len(texts),
        "num_tokens": len(collected[0].token_ids),
        "dtype": str(model.receiver.dtype).removeprefix("torch."),
        "seed": seed,
        "layer": layer,
        "question": QUESTION,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sharers": [],
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for index, states in enumerate(collected):
        sharer: Json = {"name": Path(model.config.sharers[index].name_or_path or f"sharer {index}").name}
        sharer |= measure_states(states, layer, seed)
        text, place = _shown_text(states)
        sharer["change"]["tokens"] = decode_each(processor.tokenizer, states.token_ids[place].tolist())
        if model.config.mode == "memory" and index == 0:
            attention = slot_attention(model, processor, text)
            sharer["attention"] = {
                name: value.tolist() if isinstance(value, torch.Tensor) else value
                for name, value in vars(attention).items()
            }
        report["sharers"].append(sharer)
    report = _rounded(report)
    write_file(folder / "report.json", json.dumps(report, ensure_ascii=False).encode())
    write_file(folder / "index.html", _render(report, folder).encode())
    return report


def measure_states(states: FuserStates, layer: int, seed: int) -> Json:
    """Measure the states of one sharer's fuser.

    Args:
        states: From [`collect_states`].
        layer: The receiver layer for PCA and t-SNE.
        seed: Of t-SNE and of the draw of points.

    Returns:
        Sections of the report by their names, numbers of layers in lists for `"keys"` and `"values"`; `None` in these
        where a gate is closed.
    """
    sets = {name: getattr(states, name) for name in ("sharer", "receiver", "projected", "fused")}
    near = _draw(len(states.token_ids), MAX_NEIGHBOUR_TOKENS, seed)
    sections: Json = {
        "effective_rank": {
            name: _by_kind([None if own is None else effective_rank(own) for own in entries])
            for name, entries in sets.items()
            # In memory mode they are the projected ones.
            if name != "fused" or states.weights is not None
        },
        "similarity": {
            measure: {
                name: _by_kind(
                    [
                        None if own is None else compare(own[near], receiver[near])
                        for own, receiver in zip(sets[name], states.receiver, strict=True)
                    ]
                )
                for name in ("projected", "sharer")
            }
            for measure, compare in (("cka", linear_cka), ("neighbours", neighbour_overlap))
        },
        "chance_of_neighbours": min(1.0, 10 / max(1, len(near) - 1)),
        "projections": _project(states, layer, seed),
        "change": _changes(states),
    }
    if states.weights is None:
        scores = [r2_score(own, projected) for own, projected in zip(states.receiver, states.fused, strict=True)]
        sections["fit"] = _by_kind(scores)
    else:
        sections["gates"] = _by_kind([int(projected is not None) for projected in states.projected])
        sections["weights"] = _by_kind([float(own.mean()) for own in states.weights])
    return sections


def _by_kind(entries: Sequence[Any]) -> Json:
    """Split what is listed for all layers' keys, then all layers' values."""
    return {"keys": list(entries[: len(entries) // 2]), "values": list(entries[len(entries) // 2 :])}


def _draw(num_tokens: int, count: int, seed: int) -> torch.Tensor:
    """Draw at most `count` of the tokens, in order."""
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _shown_text(states: FuserStates) -> tuple[str, slice]:
    """Return the text whose words are shown, the first that is more than a title, and where its tokens are."""
    index = next((i for i, length in enumerate(states.lengths) if length >= MIN_SHOWN_TOKENS), 0)
    start = sum(states.lengths[:index])
    return states.texts[index], slice(start, start + states.lengths[index])


def _changes(states: FuserStates) -> Json:
    """Return per layer and token of the shown text how far what is attended to is from the receiver's own state.

    The norm of the difference, relative to that of the receiver's own state.
    """
    _, place = _shown_text(states)
    changes = [
        ((fused[place] - own[place]).norm(dim=-1) / own[place].norm(dim=-1)).tolist()
        for fused, own in zip(states.fused, states.receiver, strict=True)
    ]
    return _by_kind(changes)


def _project(states: FuserStates, layer: int, seed: int) -> Json:
    """Place states of one layer in a plane by PCA and t-SNE, all sets together (arXiv 2510.03215, figure 3)."""
    drawn = _draw(len(states.token_ids), MAX_POINTS, seed)
    planes: Json = {"pca": {}, "tsne": {}}
    for kind, entry in (("keys", layer), ("values", states.num_layers + layer)):
        sets = {"sharer": states.sharer[entry], "receiver": states.receiver[entry]}
        sets["projected"] = states.projected[entry]
        if states.weights is not None:
            sets["fused"] = states.fused[entry]
        given = {name: own[drawn] for name, own in sets.items() if own is not None}
        width = max(own.shape[1] for own in given.values())
        # Dimensions that only one model has are zero in the other's states.
        padded = [torch.nn.functional.pad(own, (0, width - own.shape[1])) for own in given.values()]
        points = torch.cat(padded).numpy()
        perplexity = min(30.0, (len(points) - 1) / 3)
        for method, reducer in (
            ("pca", PCA(2, random_state=seed)),
            ("tsne", TSNE(2, perplexity=perplexity, init="pca", random_state=seed)),
        ):
            places = reducer.fit_transform(points).reshape(len(given), len(drawn), 2)
            planes[method][kind] = {name: own.tolist() for name, own in zip(given, places, strict=True)}
    return planes


def _rounded(value: Any) -> Any:
    """Round the numbers of a report to four digits, so that it stays small."""
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _render(report: Json, folder: Path) -> str:
    """Draw the figures, write them into the folder and render the page that holds them."""
    pages = []
    for index, sharer in enumerate(report["sharers"]):
        prefix = "" if len(report["sharers"]) == 1 else f"sharer_{index}_"
        images = {}
        for name, figure in figures.draw(sharer, report["layer"]).items():
            image = _png(figure)
            write_file(folder / f"{prefix}{name}.png", image)
            images[name] = b64encode(image).decode()
        pages.append({**sharer, "images": images, "means": _means(sharer)})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("c2c_hf.analysis", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(report=report, sharers=pages)


def _png(figure: figures.Figure) -> bytes:
    """Return a figure as PNG of 64 colors, which is a third of the size."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, dpi=90, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="PNG", optimize=True)
    return small.getvalue()


def _means(sharer: Json) -> list[tuple[str, str, str]]:
    """Return the rows of the table: a label, and the means over layers for keys and for values."""
    rows = {f"effective rank, {name}": own for name, own in sharer["effective_rank"].items()}
    if "fit" in sharer:
        rows["share of the receiver's variance that the slots explain (R2)"] = sharer["fit"]
    else:
        rows["share of open gates"] = sharer["gates"]
        rows["dynamic weight"] = sharer["weights"]
    for measure, label in figures.MEASURES.items():
        for name, own in sharer["similarity"][measure].items():
            rows[f"{label}, {name} and receiver"] = own

    def mean(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.3g}" if known else "all gates closed"

    return [(label, mean(own["keys"]), mean(own["values"])) for label, own in rows.items()]
