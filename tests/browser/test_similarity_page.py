"""Clicked patches in the page of `visualize`, against cosines of numpy."""

import numpy as np
import pytest
import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ssl_xcit.eval.viz.album import Section, Tile, write_tile
from ssl_xcit.eval.viz.markup import render
from ssl_xcit.eval.viz.patch_similarity import packed_features, similarity_settings, write_features

pytestmark = pytest.mark.browser


def test_a_clicked_patch_colours_the_others(browser, tmp_path):
    patches = torch.randn(24, 6, 9, generator=torch.Generator().manual_seed(0))
    sections = []
    for name in ("one", "two's", "gone"):
        (tmp_path / name / "thumbs").mkdir(parents=True)
        tile = Tile("Image", "72 x 48", f"{name}/image.png", f"{name}/image-features.js")
        write_tile(np.full((48, 72, 3), 128, np.uint8), tmp_path, tile, 40)
        if name != "gone":
            write_features(patches, tmp_path / tile.features)
        sections.append(Section(name, None, [("", [tile])]))
    similar = similarity_settings(0.65)
    page = render("album.html", title="It", words=[], sections=sections, similar=similar)
    (tmp_path / "index.html").write_text(page)
    browser.get((tmp_path / "index.html").as_uri())
    panels = browser.find_elements(By.CSS_SELECTOR, "details")
    for panel in panels:
        panel.find_element(By.TAG_NAME, "summary").click()
    *there, gone = panels
    wait = WebDriverWait(browser, 10)
    for panel in there:
        wait.until(lambda b, panel=panel: "row 4 of 6, column 5 of 9" in panel.text)
    wait.until(lambda b: "gone/image-features.js is not there" in gone.text)
    browser.get_log("browser")  # the browser itself tells of the file

    panel, canvas = there[0], there[0].find_element(By.TAG_NAME, "canvas")
    x, y = canvas.size["width"] * (7.5 / 9 - 0.5), canvas.size["height"] * (1.5 / 6 - 0.5)
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()
    assert "row 2 of 6, column 8 of 9" in panel.text
    found = browser.execute_script("return [...arguments[0].similarity(1, 7)]", panel)
    flat = packed_features(patches).reshape(54, -1).astype(np.float64) / 127
    assert np.allclose(found, flat @ flat[1 * 9 + 7], atol=1e-5)
    pixels = browser.execute_script(
        "const c = arguments[0]; return [...c.getContext('2d').getImageData(0, 0, 9, 6).data]",
        canvas,
    )
    colours = np.reshape(pixels, (54, 4))
    assert np.argmax(colours[:, :3].sum(axis=1)) == 1 * 9 + 7  # the palest is the patch itself
    assert len(np.unique(colours, axis=0)) > 20
    for _ in range(2):
        canvas.send_keys(Keys.ARROW_RIGHT)
        assert "row 2 of 6, column 9 of 9" in panel.text
