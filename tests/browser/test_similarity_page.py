"""Clicked patches in the page of `visualize`, against cosines of numpy."""

import numpy as np
import pytest
import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from ssl_xcit.eval.viz import album
from ssl_xcit.eval.viz.album import Section, Tile
from ssl_xcit.eval.viz.patch_similarity import packed_features, similarity_script, write_features

pytestmark = pytest.mark.browser


@pytest.fixture
def page(tmp_path):
    patches = torch.randn(24, 6, 9, generator=torch.Generator().manual_seed(0))
    tiles = []
    for name in ("one", "two's"):
        (tmp_path / name / "thumbs").mkdir(parents=True)
        features = f"{name}/image-features.js"
        tiles.append(Tile("Image", "72 x 48", f"{name}/image.png", features))
        picture = np.full((48, 72, 3), 128, np.uint8)
        album.write_tile(picture, tmp_path, tiles[-1], 40)
        write_features(patches, tmp_path / features)
    parts = [Section(tile.file, None, [("", [tile])]) for tile in tiles]
    html = album.album_page("What it sees", [], parts, similarity_script(0.65))
    (tmp_path / "index.html").write_text(html)
    return (tmp_path / "index.html").as_uri(), packed_features(patches)


def test_a_clicked_patch_colours_the_others(browser, page):
    address, rows = page
    browser.get(address)
    panels = browser.find_elements(By.CSS_SELECTOR, "details")
    assert len(panels) == 2
    for panel in panels:
        panel.find_element(By.TAG_NAME, "summary").click()
    ready = (
        "return [...document.querySelectorAll('details')]"
        ".every(d => d.panel.rows && d.panel.image.complete)"
    )
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(ready))
    canvas = panels[0].find_element(By.TAG_NAME, "canvas")
    box = canvas.size
    x, y = box["width"] * (7.5 / 9 - 0.5), box["height"] * (1.5 / 6 - 0.5)
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()
    assert "row 2 of 6, column 8 of 9" in panels[0].text
    found = browser.execute_script("return [...arguments[0].panel.similarity(1, 7)]", panels[0])
    flat = rows.reshape(54, -1).astype(np.float64) / 127
    assert np.allclose(found, flat @ flat[1 * 9 + 7], atol=1e-5)
    pixels = browser.execute_script(
        "const c = arguments[0]; return [...c.getContext('2d').getImageData(0, 0, 9, 6).data]",
        canvas,
    )
    colours = np.reshape(pixels, (54, 4))
    assert np.argmax(colours[:, :3].sum(axis=1)) == 1 * 9 + 7  # the palest is the patch itself
    assert len(np.unique(colours, axis=0)) > 20
    canvas.send_keys("\ue014")  # right
    assert "row 2 of 6, column 9 of 9" in panels[0].text
    canvas.send_keys("\ue014")
    assert "column 9 of 9" in panels[0].text


def test_features_that_are_gone_are_said(browser, page):
    address, _ = page
    browser.get(address)
    panel = browser.find_elements(By.CSS_SELECTOR, "details")[0]
    browser.execute_script("arguments[0].panel.file = 'nowhere.js'", panel)
    panel.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(browser, 10).until(lambda b: "nowhere.js is not there" in panel.text)
    browser.get_log("browser")  # the browser itself tells of the file
