"""The map of images: seconds of t-SNE, size of the page, milliseconds of a move in the browser.

    python benchmarks/atlas.py [--parts places,page] [--points 1000,5000,20000]

Places: clustered Gaussians in 192 dimensions, by `tsne` (openTSNE) and by scikit-learn's TSNE with
as many iterations, in turns. Page: windows of the built-in photographs as often as needed, places
at random around centres; opened in headless Chromium (Debian: chromium, chromium-driver) without a
GPU: seconds until all is drawn, and until a move of the mouse that drags the map is answered.
Writes benchmarks/results/atlas.json, atlas.png and atlas-dark.png.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import RESULTS, compared, interleaved, line, save
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.eval.features.neighbors import unit
from ssl_xcit.eval.viz.atlas import Atlas, atlas_page, sprites
from ssl_xcit.eval.viz.atlas_data import side_of
from ssl_xcit.eval.viz.embedding import COMPONENTS, components, tsne

READY = """const atlas = document.querySelector('.atlas')?.atlas;
  return Boolean(atlas?.sheets.every((_, n) => atlas.bitmaps[n]));"""
SECONDS = 3  # of dragging


def clustered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 192) and class ids of 20 classes."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 20, count)
    return rng.normal(size=(20, 192))[classes] + rng.normal(size=(count, 192)), classes


def purity(rows: np.ndarray, classes: np.ndarray) -> float:
    """Share of the 10 nearest that are of the same class."""
    near = NearestNeighbors(n_neighbors=11).fit(rows).kneighbors(rows)[1][:, 1:]
    return float((classes[near] == classes[:, None]).mean())


def places(count: int, rounds: int) -> dict[str, object]:
    features, classes = clustered(count)

    def theirs() -> np.ndarray:
        points = components(unit(features).astype(np.float64), COMPONENTS)
        return TSNE(init="pca", random_state=0, max_iter=750).fit_transform(points)

    sides = {"openTSNE": lambda: tsne(features), "scikit-learn": theirs}
    found = compared(interleaved(sides, rounds, warm_up=0), "openTSNE", "scikit-learn")
    found["purity"] = round(purity(tsne(features), classes), 4)
    print(f"{count:,} points: {line(found)}; {found['purity']:.1%} of neighbours of the same class")
    return found


def windows(count: int) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """Windows of 96 pixels, class ids and names."""
    rng = np.random.default_rng(0)
    names, pixels = zip(*((name, read_image(file)) for name, file in photographs()), strict=True)
    classes = rng.integers(0, len(names), count)
    cut = []
    for number in classes:
        height, width, _ = pixels[number].shape
        top, left = rng.integers(0, height - 96), rng.integers(0, width - 96)
        cut.append(pixels[number][top : top + 96, left : left + 96])
    return cut, classes, list(names)


def opened_page(count: int) -> dict[str, object]:
    pictures, classes, names = windows(count)
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(len(names), 2)) * 3
    where = centres[classes] + rng.normal(size=(count, 2))
    side = side_of(count)
    start = time.perf_counter()
    sheets = sprites(pictures, side)
    seconds = time.perf_counter() - start
    files = [f"/data/{names[c]}/{i:05d}.jpg" for i, c in enumerate(classes)]
    html = atlas_page("A map", [], Atlas(where, files, classes, names, sheets, side))
    found = {
        "thumbnail": side,
        "sheets_seconds": round(seconds, 2),
        "megabytes": round(len(html.encode()) / 1e6, 2),
    }
    print(f"{count:,} points, {side} px each: {found['megabytes']} MB, sheets {seconds:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "atlas.html"
        file.write_text(html, encoding="utf-8")
        browser = driver()
        try:
            start = time.perf_counter()
            browser.get(file.as_uri())
            while not browser.execute_script(READY):
                time.sleep(0.05)
            found["opening_seconds"] = round(time.perf_counter() - start, 2)
            time.sleep(2)
            for name, zoom in (("all", 1), ("near", 4), ("nearer", 12)):
                browser.execute_script(
                    "const { atlas } = document.querySelector('.atlas');"
                    "atlas.look(atlas.layout.xaxis.range, atlas.layout.yaxis.range)"
                    ".then(() => atlas.zoom(arguments[0]))",
                    zoom,
                )
                time.sleep(1)
                found[name] = dragged(browser)
                print(f"  {name}: {found[name]}")
            pictures_of(browser)
        finally:
            browser.quit()
    return found


def dragged(browser) -> dict[str, object]:
    """Milliseconds until a move of the mouse that drags the map is answered."""

    def mouse(kind: str, x: float) -> None:
        at = {"type": kind, "x": x, "y": 450, "button": "left", "buttons": 1, "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", at)

    mouse("mouseMoved", 500)
    mouse("mousePressed", 500)
    times: list[float] = []
    while sum(times) < SECONDS:
        start = time.perf_counter()
        mouse("mouseMoved", 500 + abs(len(times) % 80 - 40) * 3)
        times.append(time.perf_counter() - start)
    mouse("mouseReleased", 500)
    thumbs = browser.execute_script("return document.querySelector('.atlas').atlas.pictured.length")
    return {
        "median_ms": round(1000 * statistics.median(times), 1),
        "p95_ms": round(1000 * sorted(times)[int(0.95 * len(times))], 1),
        "thumbs": thumbs,
    }


def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage",
                 "enable-unsafe-swiftshader"):  # fmt: skip
        options.add_argument(f"--{word}")
    made = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    made.set_window_size(1280, 900)
    return made


def pictures_of(browser) -> None:
    """One light, of all; one dark, from near."""
    RESULTS.mkdir(exist_ok=True)
    for name, theme, zoom in (("atlas", "light", 1), ("atlas-dark", "dark", 6)):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.execute_script(
            "const { atlas } = document.querySelector('.atlas');"
            "atlas.look(atlas.layout.xaxis.range, atlas.layout.yaxis.range)"
            ".then(() => atlas.zoom(arguments[0]))",
            zoom,
        )
        time.sleep(1.5)
        browser.save_screenshot(str(RESULTS / f"{name}.png"))


def main() -> None:
    counts = [int(each) for each in ARGS.points.split(",")]
    results = {}
    if "places" in ARGS.parts:
        results |= {f"places, {n} points": places(n, 3 if n < 10_000 else 1) for n in counts}
    if "page" in ARGS.parts:
        results |= {f"page, {n} points": opened_page(n) for n in counts}
    save("atlas", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="places,page")
    parser.add_argument("--points", default="1000,5000,20000")
    ARGS = parser.parse_args()
    main()
