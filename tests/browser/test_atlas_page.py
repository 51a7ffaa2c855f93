"""The map in a real browser: what is drawn, found, selected and saved, against numpy."""

import json
import os
import time

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from selenium.webdriver import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ssl_xcit.eval.viz.atlas import Atlas, atlas_fragment, atlas_page, sprites
from ssl_xcit.utils.terminal import printable

pytestmark = pytest.mark.browser

NAMES = ["cat", "</script><b>dog</b>", "<img src=x onerror=alert(1)>", 'a "fish" & chips']
COUNT = 240


def shade(i):
    """Its own colour, far from its neighbours' in the sheet."""
    return np.array([40 + i % 6 * 35, 40 + i // 6 % 6 * 35, 60 + i // 36 % 7 * 25], np.uint8)


def an_atlas(count, side=64):
    rng = np.random.default_rng(0)
    classes = np.arange(count) % len(NAMES)
    places = (rng.normal(size=(4, 2)) * 6)[classes] + rng.normal(size=(count, 2))
    names = [f"/data/set/{'ab'[i % 2]}/img {i:03d}.JPG" for i in range(count)]
    names[3], names[5] = "/data/set/a/</script><i>.png", "/data/set/a/odd\udcff ü.png"
    sheets = sprites((np.broadcast_to(shade(i), (side, side, 3)) for i in range(count)), side)
    return Atlas(places, names, classes, NAMES, sheets, side)


@pytest.fixture(scope="module")
def made():
    return an_atlas(COUNT)


@pytest.fixture
def opened(browser, made, tmp_path):
    """The page, with its thumbnails loaded."""
    open_page(browser, made, tmp_path)
    return browser


def open_page(browser, atlas, folder):
    file = folder / "atlas.html"
    file.write_text(atlas_page("A map", ["Some words."], atlas), encoding="utf-8")
    browser.get(file.as_uri())
    until(browser, "return atlas.sheets.every((_, n) => atlas.bitmaps[n])")


def ask(browser, words, *arguments):
    return browser.execute_script(
        f"const atlas = document.querySelector('.atlas').atlas;{words}", *arguments
    )


def until(browser, words, *arguments, seconds=20):
    end = time.monotonic() + seconds
    while not (found := ask(browser, words, *arguments)):
        assert time.monotonic() < end, words
        time.sleep(0.02)
    return found


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def moved_to(actions, browser, x, y):
    """To pixels of the map; selenium counts from the middle in whole pixels."""
    wide, high = ask(browser, "const { width, height } = atlas.view(); return [width, height]")
    shift = round(x - wide / 2), round(y - high / 2)
    return actions.move_to_element_with_offset(one(browser, ".atlas-map"), *shift)


def files(browser):
    text = json.loads(ask(browser, "return JSON.stringify(atlas.files())"))  # one is no text
    return text.splitlines()


def test_what_is_not_seen_in_a_name_is_shown_as_an_escape_and_saved_as_it_is(browser, tmp_path):
    names = ["\u202egpj.exe", "\x1b[2J", "zero\u200b", "no\xa0break", "odd\udcff", "a b"]
    shown = [printable(name) for name in names]
    places = np.random.default_rng(0).normal(size=(6, 2))
    open_page(browser, Atlas(places, names, range(6), names), tmp_path)
    labels = browser.find_elements(By.CSS_SELECTOR, ".atlas-label")
    assert sorted(label.get_attribute("textContent") for label in labels) == sorted(shown)
    ask(browser, "atlas.select([...Array(6).keys()])")
    rows = browser.find_elements(By.CSS_SELECTOR, ".atlas-panel li span")
    assert [row.get_attribute("textContent") for row in rows] == shown
    assert files(browser) == names


def test_places_are_those_of_the_data_and_the_wheel_zooms_where_it_points(opened, made):
    where = "return Array.from({length: atlas.count}, (_, i) => atlas.where(i))"
    seen = np.array(ask(opened, where))
    scale, shift = np.polynomial.polynomial.polyfit(made.places[:, 0], seen[:, 0], 1)[::-1]
    assert np.allclose(seen[:, 0], made.places[:, 0] * scale + shift, atol=0.1)
    shift = seen[0, 1] + made.places[0, 1] * scale
    assert np.allclose(seen[:, 1], shift - made.places[:, 1] * scale, atol=0.1)  # y is upwards
    wide, high = ask(opened, "const { width, height } = atlas.view(); return [width, height]")
    shift = (round(seen[9, 0] - wide / 2), round(seen[9, 1] - high / 2))
    origin = ScrollOrigin.from_element(one(opened, ".atlas-map"), *shift)
    before = ask(opened, "return atlas.view().scale")
    for _ in range(5):
        ActionChains(opened).scroll_from_origin(origin, 0, -100).perform()
    until(opened, "return atlas.view().scale > 1.2 * arguments[0]", before)
    time.sleep(0.3)
    assert np.hypot(*(np.array(ask(opened, "return atlas.where(9)")) - seen[9])) < 3


@pytest.mark.parametrize("classes", [4, 40])
def test_points_and_legend_have_the_same_colours_and_shapes(browser, made, tmp_path, classes):
    labels = np.arange(COUNT) % classes
    open_page(browser, Atlas(made.places, made.names, labels), tmp_path)
    order = ask(browser, "return atlas.order")
    looks = """return [...document.querySelectorAll('.points path')].map((path) =>
      [getComputedStyle(path).fill, path.getAttribute('d').replace(/[\\d.]+/g, '')])"""
    fills = ask(browser, looks)
    marks = browser.find_elements(By.CSS_SELECTOR, ".atlas-legend li button > :first-child")
    legend = [m.value_of_css_property("color").replace("rgba", "rgb") for m in marks]
    legend = [c.replace(", 1)", ")") for c in legend]
    assert [fill for fill, _ in fills] == [legend[labels[i]] for i in order]
    pairs = {labels[i]: tuple(look) for i, look in zip(order, fills, strict=True)}
    assert len(set(pairs.values())) == classes


PIXEL = """
  const [x, y] = atlas.where(arguments[0]).map((v) => Math.floor(v * devicePixelRatio));
  return [...atlas.thumbsBox.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);"""


def test_thumbnails_are_those_of_their_images_and_do_not_cover_each_other(opened, made):
    seen = set()
    for _ in range(4):
        ask(opened, "const v = atlas.view(), [x, y] = atlas.where(0);"
            "return atlas.zoom(2, x / v.width, y / v.height)")  # fmt: skip
        told, spots, size = ask(
            opened,
            "const { width, height } = atlas.view();"
            "return [atlas.pictured, atlas.order.map((_, i) => atlas.where(i)), [width, height]]",
        )
        spots = np.array(spots)
        gaps = np.abs(spots[told][:, None] - spots[told]).max(-1) + np.eye(len(told)) * 1e9
        assert gaps.min() > 0.8 * 28
        inside = set(np.flatnonzero(((spots > 0) & (spots < size)).all(axis=1)).tolist())
        assert seen & inside <= set(told)  # they come and do not go
        seen |= set(told)
        for i in inside & set(told):
            assert np.abs(np.array(ask(opened, PIXEL, i)) - shade(i).astype(int)).max() <= 16, i
    assert len(seen) > 20


def test_search_counts_and_selects(opened, made):
    field = one(opened, ".atlas input")
    for words in ("IMG 01", "fish", "b/", "</script>", "set", "ü", "nothing"):
        field.clear()
        field.send_keys(words)
        low = words.lower()
        kinds = [NAMES[c] for c in made.classes]
        seen = zip((n.removeprefix("/data/set/") for n in made.names), kinds, strict=True)
        hits = [name for name, kind in seen if low in name.lower() or low in kind.lower()]
        assert one(opened, ".atlas-found").text == f"{len(hits)} found"
        marked = ask(opened, "return atlas.plotBox.data[0].selectedpoints.length")
        assert marked == len(hits), words
    field.clear()
    field.send_keys("img 01")
    one(opened, ".atlas-list").click()
    hits = [name for name in made.names if "img 01" in name.lower()]
    assert files(opened) == hits
    rows = opened.find_elements(By.CSS_SELECTOR, ".atlas-panel li span")
    assert [row.text for row in rows] == [name.removeprefix("/data/set/") for name in hits]
    before = ask(opened, "return atlas.view().scale")
    rows[4].click()  # looks at it from near
    until(opened, "return atlas.view().scale > arguments[0] && !atlas.cardBox.hidden", before)
    assert one(opened, ".atlas-card b").text == rows[4].text


def drawn_round(browser, mode, shares, key=Keys.NULL):
    """Select with the mouse along corners in shares of the map, a key held down."""
    wide, high = ask(browser, "const { width, height } = atlas.view(); return [width, height]")
    spots = [(round(a * wide), round(b * high)) for a, b in shares]
    one(browser, f"[data-title='{mode}']").click()
    actions = ActionChains(browser, duration=60).key_down(key)
    moved_to(actions, browser, *spots[0]).click_and_hold()
    for spot in spots[1:]:
        moved_to(actions, browser, *spot)
    actions.release().key_up(key).perform()
    return spots


@pytest.mark.parametrize("mode", ["Box Select", "Lasso Select"])
def test_what_is_drawn_round_is_selected(opened, made, mode):
    box = mode == "Box Select"
    lasso = [(0.2, 0.3), (0.6, 0.1), (0.5, 0.45), (0.9, 0.6), (0.4, 0.9), (0.35, 0.5)]
    corners = drawn_round(opened, mode, [(0.3, 0.2), (0.8, 0.7)] if box else lasso)
    until(opened, "return atlas.selected.size")
    seen = np.array(
        ask(opened, "return Array.from({length: atlas.count}, (_, i) => atlas.where(i))")
    )
    if box:
        (left, top), (right, bottom) = corners
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    grown, shrunk = (Polygon(corners).contains_points(seen, radius=r) for r in (4, -4))
    outer, inner = (grown, shrunk) if grown.sum() >= shrunk.sum() else (shrunk, grown)
    chosen = np.isin(np.arange(COUNT), ask(opened, "return [...atlas.selected]"))
    assert 20 < chosen.sum() < COUNT - 20
    assert not (chosen & ~outer).any()
    assert not (inner & ~chosen).any()
    assert files(opened) == [made.names[i] for i in np.flatnonzero(chosen)]
    assert one(opened, ".atlas-panel b").text == f"{chosen.sum()} selected"
    drawn_round(opened, "Box Select", [(0.01, 0.01), (0.99, 0.99)], Keys.SHIFT)
    until(opened, f"return atlas.selected.size === {COUNT}")  # besides the others
    drawn_round(opened, "Box Select", [(0.3, 0.2), (0.8, 0.7)])
    until(opened, f"return atlas.selected.size < {COUNT}")  # in their place
    one(opened, ".atlas-map").send_keys(Keys.ESCAPE)
    assert ask(opened, "return atlas.selected.size") == 0
    assert not one(opened, ".atlas-panel").is_displayed()


def test_the_list_is_saved_and_copied_as_the_disk_has_it(opened, made, tmp_path):
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    ask(opened, "atlas.select([10, 0, 3, 5])")
    one(opened, ".atlas-save").click()
    file, end = tmp_path / "selection.txt", time.monotonic() + 10
    while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    expected = b"".join(os.fsencode(made.names[i]) + b"\n" for i in (0, 3, 5, 10))
    assert file.read_bytes() == expected
    ask(
        opened,
        "navigator.clipboard.writeText = async (text) => { window.copied = text };"
        "atlas.select([0, 10])",
    )
    one(opened, ".atlas-copy").click()
    assert until(opened, "return window.copied") == f"{made.names[0]}\n{made.names[10]}\n"


def test_pointing_shows_the_image_its_name_and_class(opened, made):
    lone = int(np.argmax(made.places[:, 0]))  # the rightmost
    spot = ask(opened, "return atlas.where(arguments[0])", lone)
    moved_to(ActionChains(opened, duration=50), opened, *spot).perform()
    until(opened, "return !atlas.cardBox.hidden")
    card = one(opened, ".atlas-card").text
    assert made.names[lone].removeprefix("/data/set/") in card
    assert NAMES[made.classes[lone]] in card
    middle = ask(
        opened,
        """const canvas = document.querySelector('.atlas-card canvas');
      return [...canvas.getContext('2d').getImageData(canvas.width / 2, 9, 1, 1).data]""",
    )
    assert np.abs(np.array(middle[:3]) - shade(lone).astype(int)).max() <= 16
    moved_to(ActionChains(opened, duration=50), opened, 3, 3).perform()
    until(opened, "return atlas.cardBox.hidden")


def test_classes_are_counted_hidden_and_shown_alone(opened):
    rows = opened.find_elements(By.CSS_SELECTOR, ".atlas-legend li button")
    texts = [[s.text for s in row.find_elements(By.TAG_NAME, "span")][1:] for row in rows]
    assert texts == [[name, "60"] for name in NAMES]
    points = "return atlas.plotBox.querySelectorAll('.points path').length"
    rows[1].click()
    assert ask(opened, points) == 180
    assert one(opened, ".atlas-status").text == f"180 of {COUNT} images"
    assert rows[1].get_attribute("aria-pressed") == "false"
    assert ask(opened, "atlas.select(atlas.order); return atlas.selected.size") == 180
    ActionChains(opened).double_click(rows[2]).perform()
    assert ask(opened, points) == 60
    one(opened, ".atlas-every").click()
    assert ask(opened, points) == COUNT


def test_keys_move_and_zoom(opened):
    board, before = one(opened, ".atlas-map"), ask(opened, "return atlas.view()")
    board.send_keys("+")
    until(opened, "return Math.abs(atlas.view().scale / arguments[0] - 1.5) < 0.01",
          before["scale"])  # fmt: skip
    left = ask(opened, "return atlas.view().left")
    board.send_keys(Keys.ARROW_RIGHT)
    until(opened, "return atlas.view().left > arguments[0]", left)
    board.send_keys("0")
    until(opened, "return Math.abs(atlas.view().scale / arguments[0] - 1) < 0.01", before["scale"])
    assert ask(opened, "return atlas.view().left") == pytest.approx(before["left"], abs=1e-3)


def test_a_phone_has_room_and_fingers(opened, made):
    opened.emulate(width=390)
    until(opened, "return atlas.plotBox._fullLayout.width < 390")
    field = one(opened, ".atlas input")
    field.send_keys("img")
    one(opened, ".atlas-list").click()
    wide = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] == 390
    assert ask(opened, "return atlas.view().width") > 340
    for element in opened.find_elements(By.CSS_SELECTOR, ".atlas button, .atlas input"):
        box = element.rect
        assert not element.is_displayed() or 0 <= box["x"] <= box["x"] + box["width"] <= 390
    ask(opened, "window.scrollTo(0, 0)")
    corner = ask(opened, "const r = atlas.mapBox.getBoundingClientRect(); return [r.x, r.y]")
    wide, high = ask(opened, "const { width, height } = atlas.view(); return [width, height]")

    def touch(kind, *spots):
        points = [{"x": corner[0] + x, "y": corner[1] + y} for x, y in spots]
        opened.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    place = """const v = atlas.view(), [x, y] = arguments;
      return [v.scale, v.left + x / v.scale, v.top - y / v.scale]"""
    x, y = wide / 2, high / 2
    before = np.array(ask(opened, place, x, y))
    touch("touchStart", (x - 40, y))
    touch("touchStart", (x - 40, y), (x + 40, y))
    for apart in (50, 60, 70, 80):
        touch("touchMove", (x - apart, y), (x + apart, y))
        time.sleep(0.1)
    touch("touchEnd")
    time.sleep(0.3)
    after = np.array(ask(opened, place, x, y))
    assert after[0] / before[0] == pytest.approx(2, rel=0.05)
    assert np.allclose(before[1:], after[1:], atol=0.02)
    ask(opened, "return atlas.look(atlas.layout.xaxis.range, atlas.layout.yaxis.range)")
    i = int(np.argmax(made.places[:, 0]))
    spot = ask(opened, "return atlas.where(arguments[0])", i)
    touch("touchStart", spot)
    touch("touchEnd")
    until(opened, "return !atlas.cardBox.hidden")
    assert made.names[i].removeprefix("/data/set/") in one(opened, ".atlas-card").text


def test_several_on_a_page_and_a_style_that_follows_the_system(browser, made, tmp_path):
    few = Atlas(np.zeros((1, 2)), ["one.png"])
    none = Atlas(np.zeros((0, 2)), [])
    page = str(atlas_page("A map", [], made))
    more = "".join(atlas_fragment(each, f"a{n}") for n, each in enumerate((few, none)))
    file = tmp_path / "three.html"
    at = page.index("<script>/**") if "<script>/**" in page else page.index("</h1>") + 5
    file.write_text(page[:at] + more + page[at:], encoding="utf-8")
    browser.get(file.as_uri())
    counts = "return [...document.querySelectorAll('.atlas')].map((box) => box.atlas.count)"
    assert sorted(browser.execute_script(counts)) == [0, 1, COUNT]
    assert browser.execute_script("return document.querySelectorAll('i, img').length") == 0
    look = """const style = getComputedStyle(atlas.mapBox).backgroundColor;
      return [style, atlas.plotBox.data[0].marker.color[0]]"""
    light = ask(browser, look)
    browser.emulate("dark")
    until(browser, f"return atlas.plotBox.data[0].marker.color[0] !== {json.dumps(light[1])}")
    assert max(json.loads(ask(browser, look)[0].replace("rgb(", "[").replace(")", "]"))) < 64


@pytest.mark.parametrize("webgl", [True, False])
def test_many_are_drawn_by_webgl_where_there_is_some(browser, tmp_path, webgl):
    count = 20_000 if webgl else 2_001
    stub = """const known = HTMLCanvasElement.prototype.getContext;
      HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
        return kind.includes("webgl") ? null : known.call(this, kind, ...rest); }"""
    command = "Page.addScriptToEvaluateOnNewDocument"
    made = None if webgl else browser.execute_cdp_cmd(command, {"source": stub})["identifier"]
    try:
        open_page(browser, an_atlas(count, 32), tmp_path)
        kind = ask(browser, "return atlas.plotBox.data[0].type")
        assert kind == ("scattergl" if webgl else "scatter")
        assert ("no WebGL" in one(browser, ".atlas-status").text) == (not webgl)
        drawn_round(browser, "Box Select", [(0.1, 0.1), (0.9, 0.9)])
        assert until(browser, "return atlas.selected.size") > count / 2
    finally:
        if made:
            remove = "Page.removeScriptToEvaluateOnNewDocument"
            browser.execute_cdp_cmd(remove, {"identifier": made})
