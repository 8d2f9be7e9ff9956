"""Pictures of results: each function takes stored numbers and returns a matplotlib figure."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from rotatek_cache.token_pruning.registry import token_method

mpl.use("Agg")

WIDTH = 9.0  # inches
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
LINES = [*mpl.colormaps["tab10"].colors, *mpl.colormaps["Dark2"].colors]  # more methods than one map tells apart
NAMES = {
    "rotatek": "RotateK",
    "tempered": "RotateK, weights^0.5",
    "pca": "PCA",
    "pca_uncentred": "PCA, not centred",
    "oblique": "oblique",
    "think": "ThinK",
    "spark": "SparK",
    "spark_mean": "SparK, signed mean",
    "none": "no rotation",
    "hadamard": "Hadamard",
}


def new(rows: int = 1, columns: int = 1, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    """Make a figure and its axes ``[rows, columns]``."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.title.set_size(10)  # a size by name would follow the settings outside
    return figure, axes


def png(figure: Figure) -> bytes:
    """Encode the figure as a PNG file."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    # 128 colours show the same in a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128).save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def heat_maps(layers: Mapping[int, tuple[Tensor, Tensor]]) -> Figure:
    """Draw absolute Keys before and after the rotation, tokens down, channels across; a column for each layer."""
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


def spaced(count: int, most: int) -> list[int]:
    """Choose at most `most` of the numbers below `count`, evenly apart, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _layer_styles(count: int) -> list[dict[str, Any]]:
    """Choose colour and label of each layer's line: few are all named, of many along a colour map some."""
    if count <= 8:
        return [{"color": f"C{index}", "label": f"layer {index}"} for index in range(count)]
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, count))
    named = spaced(count, 6)
    return [{"color": colours[i], "label": f"layer {i}" if i in named else None} for i in range(count)]


def diagnostics(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the pictures of `evals/diagnostics.py`, by name."""
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
        for layer, style in zip(layers, _layer_styles(len(layers)), strict=True):
            for head, curve in enumerate(layer[name]):
                axis.plot(range(1, len(curve) + 1), curve, lw=1, **(style | ({"label": None} if head else {})))
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
        for layer, style in zip(layers, _layer_styles(len(layers)), strict=True):
            shared = [np.mean(layer["angles"][pair][rank]["shared"]) for rank in ranks]
            axis.plot([int(rank) for rank in ranks], shared, "o-", ms=3, **style)
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


def family(options: Mapping[str, Any]) -> str:
    """Name what a method's options of `RotateKCache` prune."""
    identity = options.get("sparsity") == 0 and not options.get("key_bits")
    if options.get("tokens") and token_method(options["tokens"]).drops:
        return "tokens only" if identity else "tokens and channels"
    return "coded" if options.get("key_bits") or options.get("value_bits") else "channels only"


def _label(options: Mapping[str, Any]) -> str:
    """Name the method without its budget."""
    basis = options.get("basis", "rotatek")
    name = NAMES.get(basis, f"calibrated, {Path(str(basis)).stem}")
    tokens = str(options.get("tokens") or "").split(":")[0]
    bits = options.get("key_bits")
    if family(options) == "tokens only":
        return tokens
    return name + (f", {bits} bit" if bits else "") + (f" + {tokens}" if tokens else "")


def _grid(tasks: Mapping[str, Any]) -> tuple[Figure, list[Any]]:
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = new(rows, columns, 2.6 + 1.2 / rows)  # the legend below takes its part once
    flat = list(axes.flat)
    for axis in flat[len(tasks) :]:
        axis.set_axis_off()
    return figure, flat


MARKERS = {"channels only": "o", "coded": "D", "tokens only": "s", "tokens and channels": "^"}


def trade_off(result: Mapping[str, Any]) -> Figure:
    """Score against the bytes of the cache, a panel for each task."""
    figure, axes = _grid(result["tasks"])
    colours: dict[str, tuple[float, ...]] = {}
    for axis, (task, found) in zip(axes, result["tasks"].items(), strict=False):
        dense = found["methods"]["dense"]
        if dense["mean"] is None:  # no sample of the task could be used
            continue
        axis.axhline(100 * dense["mean"], color="grey", lw=0.8, ls=":", label="dense")
        lines: dict[str, list[tuple[float, float, float, str]]] = {}
        for row in found["methods"].values():
            if row.get("options") is not None and row["mean"] is not None:
                share = 100 * row["cache_bytes"] / dense["cache_bytes"]
                entry = (share, 100 * row["mean"], 100 * (row["se"] or 0), family(row["options"]))
                lines.setdefault(_label(row["options"]), []).append(entry)
        for label, entries in lines.items():
            colour = colours.setdefault(label, LINES[len(colours) % len(LINES)])
            shares, means, errors, kinds = zip(*sorted(entries), strict=True)
            axis.errorbar(
                shares,
                means,
                yerr=errors,
                fmt=f"{MARKERS[kinds[0]]}-",
                ms=4,
                lw=1,
                color=colour,
                capsize=2,
                label=label,
            )
        axis.set(title=f"{task.removeprefix('reader-')}, n = {found['samples']}", xlabel="bytes of the dense cache, %")
    _legend_below(figure, axes[0])
    return figure


def _legend_below(figure: Figure, axis: Any) -> None:
    axis.set_ylabel("score")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def robustness(result: Mapping[str, Any]) -> Figure | None:
    """Score against sparsity, a curve for each basis that was swept; None if none was."""
    swept: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for task, found in result["tasks"].items():
        for row in found["methods"].values():
            options = row.get("options")
            usable = options is not None and row["mean"] is not None
            if usable and options.get("sparsity") and family(options) == "channels only":
                entry = (options["sparsity"], 100 * row["mean"], 100 * (row["se"] or 0))
                swept.setdefault(task, {}).setdefault(_label(options), []).append(entry)
    if not any(len(curve) > 1 for curves in swept.values() for curve in curves.values()):
        return None
    figure, axes = _grid(swept)
    for axis, (task, curves) in zip(axes, swept.items(), strict=False):
        axis.axhline(100 * result["tasks"][task]["methods"]["dense"]["mean"], color="grey", lw=0.8, ls=":")
        for label, curve in curves.items():
            shares, means, errors = zip(*sorted(curve), strict=True)
            axis.errorbar(shares, means, yerr=errors, fmt="o-", ms=4, lw=1, capsize=2, label=label)
        count = result["tasks"][task]["samples"]
        axis.set(title=f"{task.removeprefix('reader-')}, n = {count}", xlabel="share of Key channels removed")
    _legend_below(figure, axes[0])
    return figure


def fidelity(result: Mapping[str, Any]) -> Figure:
    """Draw the second question's loss against the bytes of the visual KV: a line a family, 95 % intervals."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in result["methods"].items():
        if name != "dense":
            families.setdefault(name.partition(":")[0], []).append(row)
    keys_only = {name: all(row["value_ratio"] < 1.05 for row in rows) for name, rows in families.items()}
    titles = {True: "visual Keys, times smaller", False: "visual Keys and Values, times smaller"}
    panels = [alone for alone in titles if alone in keys_only.values()]
    figure, axes = new(1, len(panels), 3.8 + 0.11 * len(families), sharey=True)  # with a legend in two columns
    highest = max(100 * row["second"]["loss_95"][1] for rows in families.values() for row in rows)
    points = [-0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    for axis, alone in zip(axes[0], panels, strict=True):
        ratio = "key_ratio" if alone else "kv_ratio"
        for number, (family, found) in enumerate(families.items()):
            if keys_only[family] != alone:
                continue
            rows = sorted(found, key=lambda row: row[ratio])
            loss = [100 * row["second"]["loss"] for row in rows]
            bounds = np.array([[100 * bound for bound in row["second"]["loss_95"]] for row in rows]).T
            axis.errorbar(
                [row[ratio] for row in rows],
                loss,
                np.abs(bounds - loss),
                fmt=f"{'osD^v'[number % 5]}-",
                ms=4,
                lw=1,
                capsize=2,
                color=LINES[number % len(LINES)],
                label=family,
            )
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks(points, [f"{point:g}" for point in points])
        axis.set_ylim(-0.6, max(1.0, 1.2 * highest))
        axis.set(xscale="log", xlabel=titles[alone])
        ticks = [1, 2, 4, 8, 16, 32, 64]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.axhline(0.5, color="grey", ls=":", lw=1)
    axes[0, 0].set_ylabel("points lost (dotted: a half)")
    handles = [handle for axis in axes[0] for handle in zip(*axis.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def latency(rows: list[Mapping[str, Any]]) -> Figure:
    """Decode step and cache bytes against prompt length, at batch 1."""
    single = [row for row in rows if row["batch"] == 1] or rows
    figure, axes = new(1, 2, 3.4)
    for method in dict.fromkeys(row["method"] for row in single):
        own = [row for row in single if row["method"] == method]
        lengths = [row["context"] for row in own]
        step = np.array([[row["token_ms"][name] for name in ("median", "least", "most")] for row in own])
        errors = np.abs(step[:, 1:].T - step[:, 0])
        axes[0, 0].errorbar(lengths, step[:, 0], yerr=errors, fmt="o-", ms=3, lw=1, capsize=2, label=method)
        axes[0, 1].plot(lengths, [row["cache_bytes"] / 2**20 for row in own], "o-", ms=3, lw=1)
    for axis, title in zip(axes[0], ("decode step, ms", "cache, MiB"), strict=True):
        axis.set(title=title, xlabel="tokens of the prompt", xscale="log", yscale="log")
        axis.set_xticks(sorted({row["context"] for row in single}))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.yaxis.set_major_formatter(ticker.LogFormatter())
        axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
