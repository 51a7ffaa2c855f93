"""A real headless browser: Debian's chromium and chromium-driver."""

import shutil

import pytest


@pytest.fixture(scope="session")
def chrome():
    from selenium import webdriver

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(programs.values()):
        pytest.fail("apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for word in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic",
        "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
        "hide-scrollbars", "enable-unsafe-swiftshader",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chrome):
    """Light and at a desktop's size, or as `browser.emulate(scheme, width)` says; a test ends with
    no error on the console.
    """

    def emulate(scheme="light", width=None):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        name = "setDeviceMetricsOverride" if width else "clearDeviceMetricsOverride"
        chrome.execute_cdp_cmd(f"Emulation.{name}", size if width else {})

    chrome.emulate = emulate
    emulate()
    chrome.set_window_size(1280, 900)
    chrome.get("about:blank")
    chrome.get_log("browser")
    yield chrome
    severe = [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe, severe
