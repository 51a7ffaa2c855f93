"""Draw the README's pictures from the demo's run: sections of its report and a `visualize` sheet.

    make demo && .venv/bin/python tools/make_pictures.py runs/demo

Needs Debian's chromium and chromium-driver.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from ssl_xcit.data.photos import photographs

DOCS = Path(__file__).resolve().parent.parent / "docs"
PARTS = {
    "report.png": ("header", "#results"),
    "over_time.png": ("#pictures",),
    "map.png": ("#atlas",),
}
WIDTH, MARGIN = 1140, 24  # pixels


def shots(page: Path) -> None:
    """Save sections of the report as pictures, one below the other."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("headless=new", "no-sandbox", "hide-scrollbars", f"window-size={WIDTH},9000"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        driver.get(page.resolve().as_uri())
        time.sleep(3)  # figures are drawn when they come into view
        for name, parts in PARTS.items():
            pictures = []
            for part in parts:
                file = Path(tempfile.mkdtemp()) / name
                driver.find_element(By.CSS_SELECTOR, part).screenshot(str(file))
                pictures.append(Image.open(file).convert("RGB"))
            sides = pictures[0].width + 2 * MARGIN, sum(p.height for p in pictures) + 2 * MARGIN
            whole = Image.new("RGB", sides, pictures[0].getpixel((0, 0)))
            top = MARGIN
            for picture in pictures:
                whole.paste(picture, (MARGIN, top))
                top += picture.height
            whole.quantize(192, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
            print(DOCS / name, whole.size)
    finally:
        driver.quit()


def sheet(run: Path) -> None:
    """Save everything that `visualize` draws of one photograph."""
    file = dict(photographs())["chelsea"]
    out = Path(tempfile.mkdtemp())
    words = [f"ckpt={run}", f"images={file}", "kinds=[attention,pca]", f"out={out}"]
    subprocess.run([Path(sys.executable).with_name("ssl-xcit"), "visualize", *words], check=True)
    whole = Image.open(next(out.glob("*/sheet.png"))).convert("RGB")
    whole.quantize(256, dither=Image.Dither.NONE).save(DOCS / "attention.png", optimize=True)


if __name__ == "__main__":
    shots(Path(sys.argv[1]) / "report.html")
    sheet(Path(sys.argv[1]))
