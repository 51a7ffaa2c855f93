"""The report of a tiny real run in a browser: every part is there, figures answer to the mouse, the
map zooms and selects, dark and narrow windows are served, and nothing comes from outside.
"""

import base64
import json
import time
from pathlib import Path

import pytest
from commands import SMALL, run
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ssl_xcit.eval.report.page_layout import Part, report_page

pytestmark = pytest.mark.browser
PARTS = ["results", "curves", "pictures", "channels", "neighbours", "atlas", "settings",
         "commands", "environment", "bad"]  # fmt: skip
SHOT = Path(__file__).resolve().parents[2] / "benchmarks/results/report.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache):
    """Two runs, each with its report, and one of both."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [w for w in SMALL if w not in ("report=null", "callbacks.snapshots=null")]
        for name, seed in (("a", 0), ("b", 1)):
            assert run("pretrain", f"name={name}", f"seed={seed}", "epochs=0.15", *words) == 0
        assert run("report", "runs=[runs/a,runs/b]", "num_workers=0") == 0
    return folder / "runs"


def opened(browser, path):
    """Until all figures are drawn."""
    browser.get(path.as_uri())
    drawn = (
        "return document.querySelectorAll('.figure').length"
        " - document.querySelectorAll('.figure .main-svg').length / 3"
    )
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(drawn) <= 0)


def emulated(browser, scheme="light", width=None):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    if width is None:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    else:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def page(browser, folder):
    emulated(browser)
    opened(browser, folder / "a/report.html")
    yield browser
    emulated(browser)


def test_every_part_is_there_and_nothing_comes_from_outside(page):
    found = page.execute_script("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert found == PARTS
    assert page.find_elements(By.CSS_SELECTOR, ".trouble") == []
    links = page.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert links == [f"#{part}" for part in PARTS]
    broken = page.execute_script(
        "const images = [...document.querySelectorAll('img')];"
        "return Promise.all(images.map(i => i.decode().then(() => 0, () => i.alt || 'broken')))"
        ".then(all => [images.length, all.filter(Boolean)])"
    )
    assert broken[0] > 50
    assert broken[1] == []
    outside = page.execute_script(
        "return [...document.querySelectorAll('[src], [href]')].map(e => e.getAttribute('src') ||"
        " e.getAttribute('href')).filter(u => !/^(data:|#)/.test(u))"
    )
    assert outside == []
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []


def test_a_curve_shows_its_value_under_the_mouse(page):
    plot = page.find_element(By.CSS_SELECTOR, "[data-figure=curves] .plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(page).move_to_element(plot).pause(0.3).move_by_offset(3, 0).perform()
    shown = WebDriverWait(page, 5).until(
        lambda b: b.execute_script(
            "return [...document.querySelectorAll('.hoverlayer')].map(h => h.textContent).join('')"
        )
    )
    steps = [int(x) for x in data(page)["curves"][0]["plots"][0]["lines"][0]["x"]]
    assert any(shown.startswith(f"step {step}") for step in steps)
    assert "loss : " in shown


def data(page):
    return json.loads(page.execute_script("return document.getElementById('data').textContent"))


def test_a_stretch_is_enlarged_in_all_figures(page):
    page.execute_script(
        "const plot = document.querySelector('[data-figure=curves] .plot');"
        "return Plotly.relayout(plot, {'xaxis.range[0]': 4, 'xaxis.range[1]': 12})"
    )
    ranges = "return [...document.querySelectorAll('[data-figure=curves] .plot')]"
    ranges += ".map(p => p.layout.xaxis.range.map(Math.round))"
    WebDriverWait(page, 5).until(lambda b: all(r == [4, 12] for r in b.execute_script(ranges)))


def test_the_map_zooms_and_selects(page):
    box = page.find_element(By.ID, "atlas-0")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    time.sleep(0.5)  # a page that is being scrolled goes on scrolling
    rect = page.execute_script(
        "const r = arguments[0].querySelector('canvas').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]",
        box,
    )
    middle = {"x": rect[0] + rect[2] / 2, "y": rect[1] + rect[3] / 2}
    zoom = "return arguments[0].atlas.stats.zoom"
    before = page.execute_script(zoom, box)
    wheel = {"type": "mouseWheel", "deltaX": 0, "deltaY": -240, **middle}
    page.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
    WebDriverWait(page, 5).until(lambda b: b.execute_script(zoom, box) > 1.3 * before)
    page.execute_script("arguments[0].atlas.reset()", box)
    drag = ActionChains(page).key_down(Keys.SHIFT)
    drag.move_to_element_with_offset(box.find_element(By.TAG_NAME, "canvas"), -200, -150)
    drag.click_and_hold().move_by_offset(400, 300).release().key_up(Keys.SHIFT).perform()
    files = page.execute_script("return arguments[0].atlas.files()", box)
    assert 0 < len(files) <= 702
    assert all("/test/" in name for name in files)


def test_pictures_become_large(page):
    image = page.find_element(By.CSS_SELECTOR, ".strip img.attention")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    image.click()
    dialog = page.find_element(By.CSS_SELECTOR, "dialog[open]")
    shown = [i for i in dialog.find_elements(By.TAG_NAME, "img") if i.is_displayed()]
    assert len(shown) == 3
    assert all(i.rect["width"] > image.rect["width"] for i in shown)
    name = dialog.find_element(By.TAG_NAME, "b").text
    page.execute_script(
        "document.querySelector('dialog[open]').dispatchEvent(new KeyboardEvent('keydown',"
        "{key: 'ArrowDown', bubbles: true}))"
    )
    assert dialog.find_element(By.TAG_NAME, "b").text != name
    dialog.find_element(By.CSS_SELECTOR, ".bar button").click()
    assert page.find_elements(By.CSS_SELECTOR, "dialog[open]") == []


def test_settings_are_filtered(page):
    page.execute_script(
        "document.querySelectorAll('#settings details').forEach(d => d.open = true)"
    )
    field = page.find_element(By.CSS_SELECTOR, "[data-filter=settings]")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
    field.send_keys("optim weight")
    rows = page.find_elements(By.CSS_SELECTOR, "table.settings tbody tr")
    shown = [row.text.split()[0] for row in rows if row.is_displayed()]
    assert shown == ["optim.weight_decay", "optim.weight_decay_end"]


def test_dark_is_followed_while_the_page_is_open(page):
    look = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    font = "return document.querySelector('[data-figure=curves] .plot').layout.font.color"
    light, ink = page.execute_script(look), page.execute_script(font)
    emulated(page, "dark")
    WebDriverWait(page, 5).until(lambda b: b.execute_script(font) != ink)
    dark = page.execute_script(look)

    def brightness(colour):
        return sum(int(part) for part in colour.strip("rgba()").split(",")[:3])

    assert brightness(light[0]) > 700 > brightness(light[1])
    assert brightness(dark[0]) < 120 < 600 < brightness(dark[1])


@pytest.mark.parametrize("which", ["a/report.html", "report.html"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, folder, which):
    emulated(browser, width=390)
    try:
        opened(browser, folder / which)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        time.sleep(0.3)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        wide = browser.execute_script(
            "return [...document.querySelectorAll('section *')].filter(e =>"
            " !e.closest('.wide') && e.getBoundingClientRect().right > 391).map(e => e.className)"
        )
        assert wide == []
    finally:
        emulated(browser)


def test_several_runs_share_their_figures(browser, folder):
    emulated(browser)
    opened(browser, folder / "report.html")
    assert browser.find_elements(By.CSS_SELECTOR, ".trouble") == []
    names = browser.execute_script(
        "return document.querySelector('[data-figure=curves] .plot').data.map(t => t.name)"
    )
    assert set(names) == {"a", "b"}


def test_a_picture_of_it_is_kept(page):
    """As a person sees it on a desktop; what failed in CI can be looked at."""
    page.execute_script("window.scrollTo(0, 0)")
    height = page.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 0.75}
    shot = page.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    SHOT.parent.mkdir(exist_ok=True)
    SHOT.write_bytes(base64.b64decode(shot["data"]))
    assert SHOT.stat().st_size > 100_000


def test_names_that_look_like_markup_are_text(browser, tmp_path):
    """In what plotly draws as well, whose words are some HTML."""
    names = ["<b>x</b>", "a&lt;b<br>", "%{x} $1$", "q\"</script>'", "<a href='x'>y</a>"]
    shown = [*names, r"\u202egpj"]
    names = [*names, "\u202egpj"]
    each = list(range(6))
    numbers = {"main": True, "metrics": names, "values": [1.0] * 6, "low": [None] * 6}
    data = {
        "numbers": {"rows": [{**numbers, "name": n, "run": 0, "high": [None] * 6} for n in names]},
        "entropy": [{"run": 0, "name": n, "steps": [3], "values": [[0.5, 0.6]]} for n in names],
        "decides": [{"key": n, "share": 0.1} for n in names],
        "over": [{"name": n, "x": [1, 2], "y": [1.0, 2.0], "best": False} for n in names],
        "parallel": {
            "axes": [
                {"label": n, "values": each, "tickvals": each, "ticktext": names} for n in names
            ],
            "colour": each,
        },
    }
    boxes = "".join(f'<div class="figure" data-figure="{kind}"></div>' for kind in data)
    html = report_page(names[0], names[1], "", [Part("x", names[3], boxes, data=data)], "now")
    (tmp_path / "names.html").write_text(html, encoding="utf-8")
    browser.get((tmp_path / "names.html").as_uri())
    bare = "return document.querySelectorAll('.figure:not(:has(.main-svg))').length"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(bare) == 0)
    assert browser.title == shown[0]
    assert browser.find_element(By.TAG_NAME, "h2").text == shown[3]

    def words(kind, inner):
        return browser.execute_script(
            "return [...document.querySelectorAll(`[data-figure=${arguments[0]}] ${arguments[1]}`)]"
            ".map(e => e.textContent.trim())",
            kind,
            inner,
        )

    assert sorted(words("numbers", ".legendtext")) == sorted(shown)
    assert sorted(words("numbers", ".ytick text")) == sorted(shown)
    assert words("entropy", ".legendtext") == [f"{name}, step 3" for name in shown]
    assert sorted(words("decides", ".ytick text")) == sorted(shown)
    assert words("parallel", ".axis-title") == shown
    assert [w for w in words("parallel", ".axis .tick text") if w][:6] == shown
    for curve, name in enumerate(shown[::-1]):  # the best is drawn last
        time.sleep(0.06)  # plotly answers one hover in 50 ms
        hovered = browser.execute_script(
            "const plot = document.querySelector('[data-figure=over] .plot');"
            "Plotly.Fx.hover(plot, [{ curveNumber: arguments[0], pointNumber: 0 }]);"
            "return plot.querySelector('.hoverlayer .name').textContent",
            curve,
        )
        assert hovered == name
