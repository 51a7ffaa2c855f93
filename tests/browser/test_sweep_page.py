"""The page of a sweep in a browser: every figure is drawn, nothing goes wrong, dark is followed."""

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from test_report_page import emulated, opened

from ssl_xcit.eval.report.sweep import read_sweep
from ssl_xcit.eval.report.sweep_page import write_sweep_page
from tests.eval.report.test_sweep import swept

pytestmark = pytest.mark.browser
SHOT = Path(__file__).resolve().parents[2] / "benchmarks/results/sweep.png"
__all__ = ["swept"]


def test_the_page_of_a_sweep(browser, swept):
    write_sweep_page(read_sweep(swept), swept / "sweep.html")
    opened(browser, swept / "sweep.html")
    boxes = browser.find_elements(By.CSS_SELECTOR, ".figure")
    kinds = [box.get_attribute("data-figure") for box in boxes]
    assert kinds == ["parallel", "decides", "over"]
    lines = browser.execute_script(
        "return document.querySelector('[data-figure=parallel] .plot').data[0]"
        ".dimensions.map(d => d.values.length)"
    )
    assert lines == [8, 8, 8, 8]  # two settings, steps, k-NN
    labels = browser.find_element(By.CSS_SELECTOR, "[data-figure=parallel]").text
    assert "objective.teacher_temp" in labels
    assert "k-NN 20" in labels
    bars = browser.find_element(By.CSS_SELECTOR, "[data-figure=decides]").text
    assert "optim.lr" in bars
    SHOT.parent.mkdir(exist_ok=True)
    browser.set_window_size(1280, 2400)
    browser.save_screenshot(str(SHOT))
    try:
        emulated(browser, "dark", 390)
        width = "return document.documentElement.scrollWidth"
        # figures follow the window when the browser has time
        WebDriverWait(browser, 20).until(lambda b: b.execute_script(width) <= 390)
    finally:
        emulated(browser)
