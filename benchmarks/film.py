"""How steady the colours of a film are: components of the whole film against those of each frame.

    python benchmarks/film.py runs/demo [--frames 40]

A pan over the built-in photograph coffee.jpg, 4 pixels a frame. Printed: how far neighbouring
frames of principal components differ, mean of all pixels and channels, of 255. Writes
benchmarks/results/film.json.
"""

import argparse
import itertools

import numpy as np
import torch
from measure import save

from ssl_xcit import load_backbone
from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.eval.viz import attention
from ssl_xcit.eval.viz.film import component_colours

HEIGHT, WIDTH, STEP = 256, 384, 4


def steadiness(films: list[np.ndarray]) -> dict[str, float]:
    gaps = [np.abs(b.astype(float) - a).mean() for a, b in itertools.pairwise(films)]
    return {"mean": round(float(np.mean(gaps)), 2), "most": round(float(np.max(gaps)), 2)}


def main() -> None:
    backbone = load_backbone(ARGS.run)
    whole = read_image(dict(photographs())["coffee"])
    most = (whole.shape[1] - WIDTH) // STEP
    frames = [
        whole[:HEIGHT, i * STEP : i * STEP + WIDTH].copy() for i in range(min(ARGS.frames, most))
    ]
    with torch.inference_mode():
        outputs = [
            attention.forward(backbone, normalise(torch.from_numpy(f).permute(2, 0, 1)[None], RGB))
            for f in frames
        ]
    together = component_colours(outputs, backbone.embed_dim)
    films = {"the whole film": [], "each frame": []}
    for frame, output in zip(frames, outputs, strict=True):
        alone = component_colours([output], backbone.embed_dim)
        films["the whole film"].append(together(frame, output, 0))
        films["each frame"].append(alone(frame, output, 0))
    results = {f"components of {name}": steadiness(found) for name, found in films.items()}
    for name, found in results.items():
        print(f"{name}: neighbours differ by {found['mean']} of 255, at most {found['most']}")
    save("film", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder or a checkpoint")
    parser.add_argument("--frames", type=int, default=40)
    ARGS = parser.parse_args()
    main()
