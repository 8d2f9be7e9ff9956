"""Pictures of results: each function takes stored numbers and returns a matplotlib figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

mpl.use("Agg")

WIDTH = 9.0  # inches
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
NAMES = {
    "rotatek": "RotateK",
    "tempered": "RotateK, weights^0.5",
    "pca": "PCA",
    "pca_uncentred": "PCA, not centred",
    "oblique": "oblique",
    "think": "ThinK",
}


def new(rows: int = 1, columns: int = 1, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes ``[rows, columns]``."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with its floats rounded to significant digits, for files that people read."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: rounded(part, digits) for name, part in value.items()}
    return [rounded(part, digits) for part in value] if isinstance(value, list | tuple) else value


def heat_maps(layers: Mapping[int, tuple[Tensor, Tensor]]) -> Figure:
    """Absolute Keys before and after the rotation, tokens down, channels across; a column for each layer."""
    figure, axes = new(2, len(layers), 2.6, sharex=True, sharey=True)
    for column, (layer, states) in enumerate(layers.items()):
        for row, (part, label) in enumerate(zip(states, ("Keys", "rotated"), strict=True)):
            size = part.abs().cpu().numpy()
            axis = axes[row, column]
            axis.imshow(size, aspect="auto", cmap="magma", vmax=np.quantile(size, 0.995), interpolation="nearest")
            axis.set_title(f"layer {layer}, {label}")
            axis.grid(visible=False)
        axes[1, column].set_xlabel("channel")
    for row in range(2):
        axes[row, 0].set_ylabel("visual token")
    return figure


def diagnostics(result: Mapping[str, Any]) -> dict[str, Figure]:
    """The pictures of `evals/diagnostics.py` by name."""
    drawn = {
        "variance": _variance(result),
        "angles": _angles(result),
        "errors": _errors(result),
    }
    if "ablations" in result:
        drawn["ablations"] = _ablations(result["ablations"])
    return drawn


def _variance(result: Mapping[str, Any]) -> Figure:
    layers = result["geometry"]["layers"]
    figure, axes = new(1, 2, 3.2, sharey=True)
    for axis, name, title in zip(
        axes[0], ("explained_variance", "logit_energy"), ("variance of the Keys", "logit energy"), strict=True
    ):
        for index, layer in enumerate(layers):
            for head, curve in enumerate(layer[name]):
                axis.plot(
                    range(1, len(curve) + 1), curve, color=f"C{index}", lw=1, label=None if head else f"layer {index}"
                )
        axis.axhline(0.99, color="grey", lw=0.8, ls=":")
        axis.set(title=f"cumulative {title}", xlabel="rank", xscale="log")
    axes[0, 0].set_ylabel("share kept")
    axes[0, 0].legend(frameon=False)
    return figure


def _angles(result: Mapping[str, Any]) -> Figure:
    layers = result["geometry"]["layers"]
    pairs = list(layers[0]["angles"])
    figure, axes = new(1, len(pairs), 3.0, sharey=True)
    for axis, pair in zip(axes[0], pairs, strict=True):
        ranks = list(layers[0]["angles"][pair])
        for index, layer in enumerate(layers):
            shared = [np.mean(layer["angles"][pair][rank]["shared"]) for rank in ranks]
            axis.plot([int(rank) for rank in ranks], shared, "o-", color=f"C{index}", ms=3, label=f"layer {index}")
        axis.plot(
            [int(rank) for rank in ranks], [int(rank) / result["head_width"] for rank in ranks], "k:", label="by chance"
        )
        axis.set(title=pair, xlabel="dimensions compared", ylim=(0, 1))
    axes[0, 0].set_ylabel("mean squared cosine")
    axes[0, 0].legend(frameon=False)
    return figure


def _errors(result: Mapping[str, Any]) -> Figure:
    layers = result["geometry"]["layers"]
    figure, axes = new(1, 2, 3.2)
    titled = (("keys", "Keys"), ("logits", "the answers' logits"))
    for axis, (what, title) in zip(axes[0], titled, strict=True):
        for basis in layers[0]["errors"]:
            ranks = [int(rank) for rank in layers[0]["errors"][basis]]
            error = [
                np.sqrt(np.mean([layer["errors"][basis][str(rank)][what] ** 2 for layer in layers])) for rank in ranks
            ]
            axis.plot(ranks, error, "o-", ms=3, label=NAMES.get(basis, basis))
        axis.set(title=f"relative error of {title}", xlabel="rank", xscale="log", yscale="log")
    axes[0, 0].legend(frameon=False)
    return figure


def _ablations(table: Mapping[str, Any]) -> Figure:
    names = [name for name in table if name != "dense"]
    figure, axes = new(1, 2, 0.22 * len(names) + 1, sharey=True)
    places = np.arange(len(names))[::-1]
    loss = np.array([100 * table[name]["second"]["loss"] for name in names])
    bounds = np.array([[100 * bound for bound in table[name]["second"]["loss_95"]] for name in names])
    axes[0, 0].errorbar(loss, places, xerr=np.abs(bounds.T - loss), fmt="o", ms=4, capsize=2)
    axes[0, 0].set(title="points of exact match lost", yticks=places, yticklabels=names)
    axes[0, 1].plot([table[name]["second"]["kl"] for name in names], places, "o", ms=4)
    axes[0, 1].set(title="KL against the dense cache", xscale="log")
    return figure
