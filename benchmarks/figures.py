"""Draw the pictures of the README.

python -m benchmarks.figures                        what Lightning costs, from bench.json
python -m benchmarks.figures attention DIR 'TEXT'   writes attention.png: what a model looks at
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.lightning import ARMS, GROUPS
from data import InputError, require
from run import HELP
from seq2seq import cross_attention_weights, greedy_decode
from translate import load_model, split_text, write_file

HERE = Path(__file__).parent


def save(figure: Figure, path: Path) -> None:
    write_file(path, partial(figure.savefig, format="png", dpi=120))
    print(path)


def draw_bench(report: dict, path: Path) -> None:
    """Left: what each thing costs per step, with its interval. Right: the same for three sizes."""
    sizes = sorted(report["sizes"], key=lambda size: report["sizes"][size]["flops"])
    # The itemised size is the one with the most rows.
    middle = max(sizes, key=lambda size: sum(row["size"] == size for row in report["rows"]))
    rows = [
        row for row in report["rows"] if row["arm"] not in (row["beside"], "compiled", "phases")
    ]
    items = [row for row in rows if row["size"] == middle]
    items.sort(key=lambda row: list(ARMS).index(row["arm"]), reverse=True)
    # Of the group that has all sizes, which comes first.
    raw = {row["size"]: row["ms"] for row in reversed(report["rows"]) if row["arm"] == "raw"}
    figure = Figure(figsize=(12, 1.6 + 0.34 * max(len(items), 8)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {"raw": "tab:blue", "adapter": "tab:orange", "autolog": "tab:green"}
    for place, row in enumerate(items):
        value, low, high = row["more_loop_ms"]
        label = f"beside: {ARMS[row['beside']].label}"
        if label in left.get_legend_handles_labels()[1]:
            label = None
        left.barh(place, value, color=colours[row["beside"]], alpha=0.6, label=label)
        error = [[value - low], [high - value]]
        left.errorbar(value, place, xerr=error, color="black", capsize=3)
    left.set_yticks(range(len(items)), [row["label"] for row in items])
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("loop overhead: ms more per step")
    left.set_title(f"itemised: {middle} size, a step of the raw loop takes {raw[middle]:.1f} ms")
    share = (lambda ms: ms / raw[middle] * 100, lambda share: share * raw[middle] / 100)
    left.secondary_xaxis("top", functions=share).set_xlabel("% of a step")
    left.legend(loc="lower right", fontsize=8)
    for name in GROUPS[0][1:]:
        points = [r for size in sizes for r in rows if (r["arm"], r["size"]) == (name, size)]
        if points:
            values, lows, highs = zip(*(row["more_loop_ms"] for row in points))
            errors = [np.subtract(values, lows), np.subtract(highs, values)]
            times = [raw[row["size"]] for row in points]
            right.errorbar(times, values, errors, marker="o", capsize=3, label=ARMS[name].label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xscale("log")
    labels = [f"{size}\n{raw[size]:.0f} ms" for size in sizes]
    right.set_xticks([raw[size] for size in sizes], labels)
    right.minorticks_off()
    right.set_xlabel("a step of the raw loop")
    right.set_ylabel("ms more per step")
    right.set_title("by size of the model")
    right.legend(fontsize=8)
    found = report["versions"]
    figure.suptitle(
        f"What Lightning costs: {report['machine']}, {report['precision']}, torch "
        f"{found['torch']}, lightning {found['lightning']}, modlee {found['modlee'] or 'absent'}"
        "\nmedians with bootstrapped 95 % intervals of paired differences",
        fontsize=10,
    )
    save(figure, path)


def draw_attention(folder: str, text: str, path: Path) -> None:
    """Cross-attention of the last decoder layer while a sentence is translated: a panel for the
    mean over heads and one per head, source tokens across, output tokens down."""
    model, tokenizer, _ = load_model(folder, torch.device("cpu"))
    pieces = split_text(text, tokenizer, model.config.max_length)
    require(text.strip() != "" and len(pieces) == 1, "give one sentence that the model can hold")
    source = torch.tensor(pieces)  # [1, S]
    ids = source, greedy_decode(model, source)
    heads = cross_attention_weights(model, *ids)[-1, 0]  # [H, T, S]
    labels = [[tokenizer.decode([i]).strip() or "▁" for i in side[0].tolist()] for side in ids]
    panels = [("mean of heads", heads.mean(dim=0))]
    panels += [(f"head {i + 1}", head) for i, head in enumerate(heads)]
    columns = min(len(panels), 3 if len(heads) <= 5 else 5)
    lines = math.ceil(len(panels) / columns)
    width, height = (max(0.28 * len(side) + 1.0, 2.0) for side in labels)
    figure = Figure(figsize=(columns * width, lines * height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (title, weights) in zip(axes, panels):
        image = axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(labels[0])), labels[0], rotation=90, fontsize=8)
        axis.set_yticks(range(len(labels[1])), labels[1], fontsize=8)
        axis.tick_params(length=0)
    for axis in figure.axes[len(panels) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="attention")
    figure.suptitle("where each output token (row) looked, last decoder layer")
    save(figure, path)


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["attention"] and len(arguments) == 3:
            draw_attention(*arguments[1:], Path("attention.png"))
            return 0
        if HELP & set(arguments):
            print(__doc__)
            return 0
        require(not arguments, __doc__)
        report = json.loads((HERE / "bench.json").read_text(encoding="utf-8"))
        draw_bench(report, HERE / "bench.png")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
