"""Draw docs/performance.png, the curves of docs/performance.md, from the benchmarks' results.

python benchmarks/resolution.py && python benchmarks/step.py && python tools/make_performance.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"ours": "#c2410c", "timm": "#4b5563", "vit": "#2563eb"}
NAMES = {"ours": "ssl_xcit", "timm": "timm's XCiT", "vit": "ViT of the same width"}


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def curves(axes: plt.Axes, curve: dict[str, Any], key: str, title: str, unit: str) -> None:
    """Draw one line per implementation over the number of tokens, on logarithmic axes."""
    tokens = np.array(curve["tokens"])
    for side, values in curve[key].items():
        known = np.array(values, float)
        drawn = np.isfinite(known)
        power = curve.get("exponent", {}).get(side)
        label = NAMES[side] + (f", exponent {power:.2f}" if power and key == "seconds" else "")
        axes.plot(tokens[drawn], known[drawn], "o-", color=COLOURS[side], label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of one image", ylabel=unit, title=title)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def steps(axes: plt.Axes) -> None:
    """Draw a bar per training step: times as fast as timm."""
    rows = {
        title: row
        for title, row in results("step").items()
        if "ratio" in row and "compiled" not in title
    }
    names = [title.split(", ours")[0].replace(", ", "\n") for title in rows]
    ratios = [row["ratio"] for row in rows.values()]
    spread = np.array([row["ratio_range"] for row in rows.values()]).T
    error = np.abs(spread - ratios)
    axes.bar(range(len(names)), ratios, color=COLOURS["ours"], yerr=error, capsize=4)
    axes.axhline(1.0, color=COLOURS["timm"])
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(title="a DINO step: times as fast as timm and the usual loop", ylim=(0, None))


def main() -> None:
    resolution = results("resolution")
    curve = next(
        row
        for title, row in resolution.items()
        if "curve" in title and title.endswith("forward and backward")
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    curves(left, curve, "seconds", "forward and backward, tiny_12_p16", "seconds")
    curves(middle, curve, "memory_mb", "memory of forward and backward", "MB")
    steps(right)
    out = ROOT / "docs" / "performance.png"
    figure.savefig(out, dpi=80)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
