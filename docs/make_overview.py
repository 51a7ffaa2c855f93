"""Draw docs/overview.png from the demo's run: what the README shows.

    make demo && .venv/bin/python docs/make_overview.py runs/demo

Left: test windows and their nearest training windows by the frozen features. Right: class attention
on whole photographs, and k-NN accuracy while training.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from ssl_xcit.eval.features import extract_pair
from ssl_xcit.eval.knn import nearest

from ssl_xcit import load_backbone
from ssl_xcit.data.decode import RGB, decode, read_image
from ssl_xcit.data.photos import labelled_photos, photographs
from ssl_xcit.data.preprocess import normalise

QUERIES, NEIGHBOURS = 8, 6
SHOWN = ("astronaut", "chelsea", "coffee", "rocket")


def main(run: Path) -> None:
    backbone = load_backbone(run)
    pair = labelled_photos()
    features = extract_pair(backbone, pair, RGB, num_workers=0)
    chosen = np.linspace(10, len(pair.test) - 10, QUERIES).astype(int)
    _, near = nearest(features.train, features.test[chosen], NEIGHBOURS)

    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left.suptitle("test window, then its nearest training windows", fontsize=10)
    for row, axes in enumerate(left.subplots(QUERIES, NEIGHBOURS + 1)):
        label = pair.test.labels[chosen[row]]
        for column, axis in enumerate(axes):
            index = near[row, column - 1]
            image = decode(pair.train.read(index) if column else pair.test.read(chosen[row]))
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            right_class = not column or pair.train.labels[index] == label
            for spine in axis.spines.values():
                spine.set(
                    color="black" if not column else "tab:green" if right_class else "tab:red"
                )
                spine.set_linewidth(2)

    top, bottom = right.subfigures(2, 1, height_ratios=(1.25, 1))
    top.suptitle("class attention on whole photographs (mean of the heads)", fontsize=10)
    files = dict(photographs())
    for column, axes in enumerate(top.subplots(2, len(SHOWN)).T):
        image = read_image(files[SHOWN[column]])
        side = min(image.shape[:2]) // 8 * 8
        image = image[:side, :side]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            weights = backbone.attention(normalise(pixels, RGB))[0].mean(0).numpy()
        axes[0].imshow(image)
        axes[1].imshow(weights, vmax=np.quantile(weights, 0.995), interpolation="bilinear")
        for axis in axes:
            axis.set_axis_off()

    axis = bottom.subplots()
    with (run / "metrics.csv").open(newline="") as file:
        points = [
            (int(r["step"]), float(r["knn_k20"])) for r in csv.DictReader(file) if r["knn_k20"]
        ]
    summary = json.loads((run / "summary.json").read_text())
    results = summary["results"]
    points = [(0, results["random weights"]["knn_k20"]), *points]
    points.append((summary["plan"]["total_steps"], results["pretrained"]["knn_k20"]))
    axis.plot(*zip(*points, strict=True), "o-", label="teacher while training")
    for name, style in (("random weights", ":"), ("colour histogram", "--")):
        axis.axhline(results[name]["knn_k20"], linestyle=style, color="grey", label=name)
    axis.set(xlabel="step", ylabel="k-NN top-1 in %, k 20")
    axis.legend(fontsize=8)
    figure.savefig(Path(__file__).parent / "overview.png", dpi=80)
    print("written: docs/overview.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
