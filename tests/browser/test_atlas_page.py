"""The map in a real browser: what is drawn, found, selected and saved, against numpy."""

import json
import os
import statistics
import time

import numpy as np
import pytest
from selenium.webdriver.common.by import By

from ssl_xcit.eval.viz.atlas import Atlas, atlas_fragment, atlas_page, sprites
from ssl_xcit.eval.viz.markup import asset
from ssl_xcit.utils.terminal import printable

pytestmark = pytest.mark.browser

ATLAS = "const atlas = document.querySelector('.atlas').atlas;"
NAMES = ["cat", "</script><b>dog</b>", "<img src=x onerror=alert(1)>", 'a "fish" & chips']
COUNT = 240


def shade(i):
    """Its own colour, far from its neighbours' in the sheet."""
    return np.array([40 + i % 6 * 35, 40 + i // 6 % 6 * 35, 60 + i // 36 * 25], np.uint8)


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    classes = np.arange(COUNT) % len(NAMES)
    places = (rng.normal(size=(4, 2)) * 6)[classes] + rng.normal(size=(COUNT, 2))
    names = [f"/data/set/{'ab'[i % 2]}/img {i:03d}.JPG" for i in range(COUNT)]
    names[3], names[5] = "/data/set/a/</script><i>.png", "/data/set/a/odd\udcff ü.png"
    sheets = sprites((np.broadcast_to(shade(i), (64, 64, 3)) for i in range(COUNT)), 64)
    return Atlas(places.astype(np.float32), names, classes, NAMES, sheets, 64)


def test_what_is_not_seen_in_a_name_is_shown_and_copied_as_it_is(browser, tmp_path):
    names = [
        "\u202egpj.exe",
        "two\nlines",
        "\x1b[2J",
        "zero\u200b",
        "no\xa0break",
        "odd\udcff",
        "a b",
    ]
    shown = [printable(name) for name in names]
    rng = np.random.default_rng(0)
    open_page(browser, Atlas(rng.normal(size=(7, 2)), names, range(7), names), tmp_path)
    labels = browser.find_elements(By.CSS_SELECTOR, ".atlas-label")
    assert sorted(label.get_attribute("textContent") for label in labels) == sorted(shown)
    listed = ask(
        browser,
        "atlas.select([...Array(7).keys()]);"
        "return [...document.querySelectorAll('.atlas-panel li span')].map(s => s.textContent)",
    )
    assert listed == shown
    assert ask(browser, "return atlas.files()[1]") == names[1]


@pytest.fixture
def opened(browser, made, tmp_path):
    """The page, with its thumbnails loaded."""
    open_page(browser, made, tmp_path)
    return browser


def open_page(browser, atlas, folder):
    file = folder / "atlas.html"
    file.write_text(atlas_page("A map", ["Some words."], atlas), encoding="utf-8")
    browser.get(file.as_uri())
    until(browser, "return atlas.sheets.every((sheet) => sheet)")


def ask(browser, words, *arguments):
    return browser.execute_script(ATLAS + words, *arguments)


def until(browser, words, seconds=10):
    end = time.monotonic() + seconds
    while not (found := ask(browser, words)):
        assert time.monotonic() < end, words
        time.sleep(0.02)
    return found


def mouse(browser):
    from selenium.webdriver import ActionChains

    return ActionChains(browser, duration=10)


def canvas(browser):
    return browser.find_element("css selector", ".atlas-top")


def moved_to(actions, browser, x, y):
    """To pixels of the map; selenium counts from the middle in whole pixels."""
    wide, high = ask(browser, "return [atlas.wide, atlas.high]")
    return actions.move_to_element_with_offset(
        canvas(browser), round(x - wide / 2), round(y - high / 2)
    )


def test_the_wheel_zooms_and_what_is_under_the_pointer_stays(opened):
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    before = ask(opened, "return [atlas.stats.scale, atlas.at(...atlas.where(9))]")
    x, y = ask(opened, "return atlas.where(9)")
    wide, high = ask(opened, "return [atlas.wide, atlas.high]")
    origin = ScrollOrigin.from_element(canvas(opened), round(x - wide / 2), round(y - high / 2))
    mouse(opened).scroll_from_origin(origin, 0, -300).perform()
    until(opened, f"return atlas.stats.scale > {1.3 * before[0]}")
    after = ask(opened, "return atlas.where(9)")
    assert np.hypot(after[0] - x, after[1] - y) < 3
    mouse(opened).scroll_from_origin(origin, 0, 300).perform()
    until(opened, f"return atlas.stats.scale < {1.1 * before[0]}")


def test_places_are_those_of_the_data(opened, made):
    found = ask(
        opened, "return Array.from({length: atlas.count}, (_, i) => atlas.at(...atlas.where(i)))"
    )
    assert np.allclose(found, made.places, atol=1e-4)
    upper, lower = np.argmax(made.places[:, 1]), np.argmin(made.places[:, 1])
    assert ask(opened, "return atlas.where(arguments[0])[1]", int(upper)) < ask(
        opened, "return atlas.where(arguments[0])[1]", int(lower)
    )


PIXEL = """
  const [x, y] = atlas.where(arguments[0]).map((v) => Math.floor(v * atlas.ratio));
  return [...atlas[arguments[1]].getImageData(x, y, 1, 1).data].slice(0, 3);"""


def loneliest(places):
    """The point whose nearest neighbour is furthest."""
    away = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(len(places)) * 99
    return int(away.min(axis=1).argmax())


@pytest.mark.parametrize("classes", [4, 40])
def test_dots_have_the_colours_of_their_classes(browser, made, tmp_path, classes):
    labels = np.arange(COUNT) % classes
    open_page(browser, Atlas(made.places, made.names, labels), tmp_path)
    assert ask(browser, "atlas.draw(); return atlas.stats.dots") == COUNT
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        i = int(members[0])
        ask(browser, "atlas.only(arguments[0]); atlas.look(atlas.x[arguments[1]], "
            "atlas.y[arguments[1]], atlas.fitted() * 4); atlas.draw()", label, i)  # fmt: skip
        swatch = browser.find_elements("css selector", ".atlas-swatch svg")[label]
        shown = swatch.value_of_css_property("fill")
        assert str(tuple(ask(browser, PIXEL, i, "ground"))) == shown.removeprefix("rgb")


def test_thumbnails_take_the_place_of_dots(opened, made):
    lone = loneliest(made.places.astype(float))
    assert ask(opened, "atlas.draw(); return atlas.stats.dots + atlas.stats.thumbs") == COUNT
    ask(opened, "atlas.zoom(30, ...atlas.where(arguments[0])); atlas.draw()", lone)
    told = ask(opened, "return {...atlas.stats, which: atlas.thumbs}")
    assert told["thumbs"] == len(told["which"]) > 0
    assert lone in told["which"]
    wide, high = ask(opened, "return [atlas.wide, atlas.high]")
    for i in told["which"]:
        x, y = ask(opened, "return atlas.where(arguments[0])", i)
        if 0 <= x < wide and 0 <= y < high:
            seen = np.array(ask(opened, PIXEL, i, "over"))
            assert np.abs(seen - shade(i).astype(int)).max() <= 16, i


def test_thumbnails_do_not_cover_each_other(opened):
    for zoom in (2, 4, 8, 16):
        spots, size = ask(
            opened,
            "atlas.reset(); atlas.zoom(arguments[0]); atlas.draw();"
            "return [atlas.thumbs.map((i) => atlas.where(i)), atlas.stats.size]",
            zoom,
        )
        if len(spots) < 2:
            continue
        spots = np.array(spots)
        apart = np.abs(spots[:, None] - spots).max(-1) + np.eye(len(spots)) * 1e9
        assert apart.min() >= 0.8 * size


def test_search_counts_and_lists(opened, made):
    field = opened.find_element("css selector", ".atlas-search input")
    for words in ("IMG 01", "fish", "b/", "</script>", "set", "ü", "nothing"):
        field.clear()
        field.send_keys(words)
        low = words.lower()
        kinds = [NAMES[c] for c in made.classes]
        seen = zip((n.removeprefix("/data/set/") for n in made.names), kinds, strict=True)
        hits = [name for name, kind in seen if low in name.lower() or low in kind.lower()]
        assert ask(opened, "return atlas.stats.found") == len(hits), words
        assert opened.find_element("css selector", ".atlas-found").text == f"{len(hits)} found"
    field.clear()
    field.send_keys("img 01")
    opened.find_element("xpath", "//button[text()='list them']").click()
    hits = [name for name in made.names if "img 01" in name.lower()]
    assert ask(opened, "return atlas.files()") == hits
    rows = opened.find_elements("css selector", ".atlas-panel li span")
    assert [row.text for row in rows] == [name.removeprefix("/data/set/") for name in hits]


def inside(path, places):
    from matplotlib.path import Path

    return np.flatnonzero(Path(path).contains_points(places))


def watch(browser):
    """Have the page note where the pointer is pressed, moved and let go."""
    ask(browser, """
      window.spots = []; let on = false;
      for (const kind of ['pointerdown', 'pointermove', 'pointerup'])
        atlas.top.addEventListener(kind, (event) => {
          on ||= kind === 'pointerdown';
          const corner = atlas.top.getBoundingClientRect();
          if (on) spots.push(atlas.at(event.clientX - corner.left, event.clientY - corner.top));
        }, true);""")  # fmt: skip


@pytest.mark.parametrize("gesture", ["button", "shift"])
def test_a_box_selects_what_is_inside(opened, made, gesture):
    from selenium.webdriver.common.keys import Keys

    wide, high = ask(opened, "return [atlas.wide, atlas.high]")
    start, end = (round(0.3 * wide), round(0.2 * high)), (round(0.8 * wide), round(0.7 * high))
    watch(opened)
    actions = mouse(opened)
    if gesture == "button":
        opened.find_element("css selector", "[aria-label^='drag a box']").click()
    else:
        actions.key_down(Keys.SHIFT)
    moved_to(actions, opened, *start).click_and_hold()
    moved_to(actions, opened, *end).release().key_up(Keys.SHIFT).perform()
    spots = ask(opened, "return spots")
    (left, top), (right, bottom) = spots[0], spots[-1]
    x, y = made.places.T
    expected = np.flatnonzero((x > left) & (x < right) & (y < top) & (y > bottom))
    assert 20 < len(expected) < COUNT - 20
    assert ask(opened, "return atlas.selection()") == expected.tolist()
    files = json.loads(ask(opened, "return JSON.stringify(atlas.files())"))  # one is no text
    assert files == [made.names[i] for i in expected]
    title = opened.find_element("css selector", ".atlas-panel .atlas-title").text
    assert title == f"{len(expected)} selected"
    actions = mouse(opened).send_keys(Keys.ESCAPE)
    canvas(opened).click()
    actions.perform()
    assert ask(opened, "return atlas.selection()") == []
    assert not opened.find_element("css selector", ".atlas-panel").is_displayed()


def test_a_lasso_selects_what_is_inside(opened, made):
    wide, high = ask(opened, "return [atlas.wide, atlas.high]")
    shares = [(0.2, 0.3), (0.6, 0.1), (0.5, 0.45), (0.9, 0.6), (0.4, 0.9), (0.35, 0.5)]
    spots = [(round(a * wide), round(b * high)) for a, b in shares]
    watch(opened)
    opened.find_element("css selector", "[aria-label^='draw around']").click()
    actions = mouse(opened)
    moved_to(actions, opened, *spots[0]).click_and_hold()
    for spot in spots[1:]:
        moved_to(actions, opened, *spot)
    actions.release().perform()
    expected = inside(ask(opened, "return spots"), made.places)
    assert 20 < len(expected) < COUNT - 20
    assert ask(opened, "return atlas.selection()") == expected.tolist()


def test_the_list_is_saved_and_copied_as_the_disk_has_it(opened, made, tmp_path):
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    ask(opened, "atlas.select([0, 3, 5, 10])")
    opened.find_element("xpath", "//button[text()='Save .txt']").click()
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
    opened.find_element("xpath", "//button[text()='Copy']").click()
    until(opened, "return window.copied")
    assert ask(opened, "return window.copied") == f"{made.names[0]}\n{made.names[10]}\n"


def test_pointing_shows_the_image_its_name_and_class(opened, made):
    lone = int(np.argmax(made.places[:, 0]))  # the rightmost
    moved_to(
        mouse(opened), opened, *ask(opened, "return atlas.where(arguments[0])", lone)
    ).perform()
    card = opened.find_element("css selector", ".atlas-card")
    until(opened, "return !atlas.card.hidden")
    assert made.names[lone].removeprefix("/data/set/") in card.text
    assert NAMES[made.classes[lone]] in card.text
    middle = ask(opened, "const c = atlas.cardPicture; return [...c.getContext('2d')"
                 ".getImageData(c.width / 2, c.height / 2, 1, 1).data]")  # fmt: skip
    assert np.abs(np.array(middle[:3]) - shade(lone).astype(int)).max() <= 16
    moved_to(mouse(opened), opened, 3, 3).perform()
    until(opened, "return atlas.card.hidden")


def test_classes_are_counted_hidden_and_shown_alone(opened, made):
    rows = opened.find_elements("css selector", ".atlas-legend li button")
    assert [row.text.split("\n") for row in rows] == [[name, "60"] for name in NAMES]
    rows[1].click()
    assert ask(
        opened, "atlas.draw(); return [atlas.stats.shown, atlas.stats.dots + atlas.stats.thumbs]"
    ) == [180, 180]
    assert rows[1].get_attribute("aria-pressed") == "false"
    ask(opened, "atlas.select([...Array(atlas.count).keys()])")
    assert len(ask(opened, "return atlas.selection()")) == 180
    mouse(opened).double_click(rows[2]).perform()
    assert ask(opened, "return atlas.stats.shown") == 60
    opened.find_element("xpath", "//button[text()='Show all']").click()
    assert ask(opened, "return atlas.stats.shown") == COUNT


def test_keys_move_and_zoom(opened):
    from selenium.webdriver.common.keys import Keys

    canvas(opened).send_keys("+")
    until(opened, "return Math.abs(atlas.stats.zoom - 1.5) < 0.01")
    canvas(opened).send_keys(Keys.ARROW_RIGHT)
    assert ask(opened, "return atlas.view.x") > 0
    canvas(opened).send_keys("0")
    until(opened, "return atlas.stats.zoom === 1 && atlas.view.x === 0")


def test_fingers_pinch_pan_and_tap(opened, made):
    touch = """
      const send = (kind, id, x, y) => { const c = atlas.top.getBoundingClientRect();
        atlas.top.dispatchEvent(new PointerEvent(kind, {pointerId: id, pointerType: 'touch',
          bubbles: true, clientX: c.left + x, clientY: c.top + y})); };"""
    told = ask(opened, touch + """
      const [x, y] = [atlas.wide / 2, atlas.high / 2], before = atlas.at(x, y);
      send('pointerdown', 1, x - 50, y); send('pointerdown', 2, x + 50, y);
      send('pointermove', 1, x - 100, y); send('pointermove', 2, x + 100, y);
      send('pointerup', 1, x - 100, y); send('pointerup', 2, x + 100, y);
      return [atlas.stats.zoom, before, atlas.at(x, y)];""")  # fmt: skip
    assert told[0] == pytest.approx(2, rel=0.01)
    assert np.allclose(told[1], told[2], atol=1e-3)
    i = int(np.argmax(made.places[:, 0]))
    ask(opened, touch + """
      atlas.reset(); const [x, y] = atlas.where(arguments[0]);
      send('pointerdown', 1, x, y); send('pointerup', 1, x, y);""", i)  # fmt: skip
    card = opened.find_element("css selector", ".atlas-card")
    assert made.names[i].removeprefix("/data/set/") in card.text


def test_two_on_a_page_and_a_style_that_follows_the_system(browser, made, tmp_path):
    few = Atlas(np.zeros((1, 2)), ["one.png"])
    none = Atlas(np.zeros((0, 2)), [])
    file = tmp_path / "two.html"
    body = "".join(atlas_fragment(each, f"a{n}") for n, each in enumerate((made, few, none)))
    style, script = asset("atlas.css"), asset("atlas.js")
    html = f"<!doctype html><style>{style}</style><script>{script}</script>{body}"
    file.write_text(html, encoding="utf-8")
    browser.get(file.as_uri())
    counts = "return [...document.querySelectorAll('.atlas')].map((box) => box.atlas.stats.points)"
    assert browser.execute_script(counts) == [COUNT, 1, 0]
    assert browser.execute_script("return document.querySelectorAll('b, i, img').length") == 0
    colour = "return [atlas.paper, atlas.tone(0)]"
    light = ask(browser, colour)
    for theme in ("dark", "light"):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        if theme == "dark":
            until(browser, f"return atlas.paper !== {json.dumps(light[0])}")
            assert ask(browser, colour)[1] != light[1]
            time.sleep(0.1)
            ground = ask(browser, "return [...atlas.ground.getImageData(1, 1, 1, 1).data]")
            assert max(ground[:3]) < 64
    until(browser, f"return atlas.paper === {json.dumps(light[0])}")


def test_a_phone_has_room_for_it(opened):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        until(opened, "return atlas.ratio === 2")
        ask(opened, "atlas.find('img'); atlas.selectFound()")
        wide = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == 390
        assert ask(opened, "return atlas.wide") > 340
        for element in opened.find_elements("css selector", ".atlas button, .atlas input"):
            box = element.rect
            assert not element.is_displayed() or 0 <= box["x"] <= box["x"] + box["width"] <= 390
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_twenty_thousand_stay_smooth(browser, tmp_path):
    count, rng = 20_000, np.random.default_rng(0)
    classes = rng.integers(0, 20, count)
    places = (rng.normal(size=(20, 2)) * 4)[classes] + rng.normal(size=(count, 2))
    sheets = sprites((np.broadcast_to(shade(i % 200), (32, 32, 3)) for i in range(count)), 32)
    names = [f"/d/{i}.jpg" for i in range(count)]
    open_page(browser, Atlas(places, names, classes, [], sheets, 32), tmp_path)
    assert ask(browser, "atlas.draw(); return atlas.stats.dots") == count
    for zoom in (1, 12):
        times = ask(
            browser,
            """atlas.reset(); atlas.zoom(arguments[0]); atlas.draw(); const times = [];
            for (let n = 0; n < 50; n++) {
              const started = performance.now();
              atlas.look(atlas.view.x + 1e-5, atlas.view.y, atlas.view.k);
              atlas.draw();
              atlas.over.getImageData(0, 0, 1, 1);
              times.push(performance.now() - started);
            }
            return times;""",
            zoom,
        )
        assert statistics.median(times) < 33
    assert ask(browser, "return atlas.stats.thumbs") > 50
