"""Reports of tiny real runs and of a sweep in a browser: every part is there, figures answer to the
mouse, dark and narrow windows are served, and nothing comes from outside.
"""

import base64
import time
from pathlib import Path

import pytest
from commands import SMALL, run
from markupsafe import Markup
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ssl_xcit.eval.report import figures
from ssl_xcit.eval.report.page import Part, write_page
from ssl_xcit.eval.report.run_reader import RunResults
from ssl_xcit.eval.report.sweep import RankedTrial, SweepResults, read_sweep
from ssl_xcit.eval.report.sweep_page import write_sweep_page
from ssl_xcit.eval.viz.markup import render_macro
from ssl_xcit.utils.terminal import printable
from tests.eval.report.test_sweep import swept

pytestmark = pytest.mark.browser
__all__ = ["swept"]
PARTS = ["results", "curves", "pictures", "channels", "neighbours", "atlas", "settings",
         "commands", "environment", "bad"]  # fmt: skip
SHOTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache):
    """Two runs, the first with its report, and one of both."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [w for w in SMALL if w not in ("report=null", "callbacks.snapshots=null")]
        for words_of in (["name=a"], ["name=b", "seed=1", "report=null"]):
            assert run("pretrain", "epochs=0.15", *words, *words_of) == 0
        assert run("report", "runs=[runs/a,runs/b]", "num_workers=0") == 0
    return folder / "runs"


def ask(browser, script, *given):
    """The value of an expression, in which `all` finds elements by a selector."""
    return browser.execute_script(
        f"const all = (s) => [...document.querySelectorAll(s)]; return {script}", *given
    )


def until(browser, script, *given):
    return WebDriverWait(browser, 30).until(lambda b: ask(b, script, *given))


def opened(browser, path):
    """Until all figures are drawn; there are no parts missing."""
    browser.get(path.as_uri())
    until(browser, "all('.figure').every(f => f.querySelector('.main-svg'))")
    assert browser.find_elements(By.CSS_SELECTOR, ".trouble") == []
    return browser


@pytest.fixture
def page(browser, folder):
    return opened(browser, folder / "a/report.html")


def into_view(page, selector):
    element = page.find_element(By.CSS_SELECTOR, selector)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    time.sleep(0.5)  # a page that is being scrolled goes on scrolling
    return element


def kept_shot(page, name):
    """A picture as a person sees it; what failed in CI can be looked at."""
    height = ask(page, "document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 0.75}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = page.execute_cdp_cmd("Page.captureScreenshot", options)
    SHOTS.mkdir(exist_ok=True)
    (SHOTS / name).write_bytes(base64.b64decode(shot["data"]))


def test_every_part_is_there_and_nothing_comes_from_outside(page):
    assert ask(page, "all('main > section').map(s => s.id)") == PARTS
    assert ask(page, "all('nav a').map(a => a.hash)") == [f"#{part}" for part in PARTS]
    broken = (
        "Promise.all(all('main img').map(i => i.decode().then(() => 0, () => i.alt || 'broken')))"
    )
    images = ask(page, broken)
    assert len(images) > 50
    assert not any(images)
    links = ask(page, "all('[src], [href]').map(e => e.getAttribute('src') ?? e.hash ?? e.href)")
    assert all(link.startswith(("data:", "#")) for link in links)
    loaded = ask(page, "performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    kept_shot(page, "report.png")


def test_a_curve_shows_its_value_under_the_mouse(page):
    plot = into_view(page, "[data-figure=curves]")
    ActionChains(page).move_to_element(plot).pause(0.3).move_by_offset(3, 0).perform()
    shown = until(page, "all('.hoverlayer').map(h => h.textContent).join('')")
    steps = ask(page, "arguments[0].data[0].x", plot)
    assert shown.startswith(tuple(f"step {step}" for step in steps))
    assert "loss : " in shown


def test_a_stretch_is_enlarged_in_all_figures(page):
    first = "all('[data-figure=curves]')[0], {'xaxis.range[0]': 4, 'xaxis.range[1]': 12}"
    ask(page, f"Plotly.relayout({first})")
    ranges = "all('[data-figure=curves]').map(p => p.layout.xaxis.range.map(Math.round))"
    until(page, f"{ranges}.every(r => String(r) === '4,12')")


def test_the_map_has_all_images(page):
    into_view(page, "#atlas-0")
    until(page, "all('#atlas-0 .main-svg').length")
    assert ask(page, "all('#atlas-0 .js-plotly-plot')[0].data.flatMap(t => [...t.x]).length") == 702


def test_pictures_of_one_kind_are_seen_and_become_large(page):
    image = into_view(page, ".strip img.attention")
    seen = "new Set(all('.strip td img').filter(i => i.offsetWidth).map(i => i.className))"
    assert ask(page, f"[...{seen}]") == ["attention"]
    image.click()
    dialog = page.find_element(By.CSS_SELECTOR, "dialog[open]")
    shown = [i for i in dialog.find_elements(By.TAG_NAME, "img") if i.is_displayed()]
    assert len(shown) == 3
    assert all(i.rect["width"] > image.rect["width"] for i in shown)

    def words():
        return [dialog.find_element(By.TAG_NAME, tag).text for tag in ("b", "output")]

    first = words()
    assert first[1] == "step 0"
    for key, moved in ((Keys.ARROW_DOWN, [True, False]), (Keys.ARROW_RIGHT, [True, True])):
        ActionChains(page).send_keys(key).perform()
        assert [one != two for one, two in zip(words(), first, strict=True)] == moved
    dialog.find_element(By.TAG_NAME, "button").click()
    assert page.find_elements(By.CSS_SELECTOR, "dialog[open]") == []
    into_view(page, ".switch label + label").click()
    assert ask(page, f"[...{seen}]") == ["pca"]


def test_settings_are_filtered(page):
    ask(page, "all('#settings details').forEach(d => d.open = true)")
    into_view(page, "[data-filter]").send_keys("optim weight")
    rows = page.find_elements(By.CSS_SELECTOR, "table.settings tbody tr")
    shown = [row.text.split()[0] for row in rows if row.is_displayed()]
    assert shown == ["optim.weight_decay", "optim.weight_decay_end"]


def test_dark_is_followed_while_the_page_is_open(page):
    def brightness():
        """Of the page, its words, and the words and grids of a figure."""
        return [
            sum(int(part) for part in colour.strip("rgba()").split(",")[:3])
            for colour in ask(
                page,
                "[['body', 'backgroundColor'], ['body', 'color'], ['.xtick text', 'fill'],"
                "['.ygrid', 'stroke']].map(([s, name]) => getComputedStyle(all(s)[0])[name])",
            )
        ]

    ground, ink, words, grid = brightness()
    assert ground > grid > 650 > 400 > words > ink
    page.emulate("dark")
    ground, ink, words, grid = brightness()
    assert ground < 120 < grid < 200 < 400 < words < ink


@pytest.mark.parametrize("which", ["a/report.html", "report.html"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, folder, which):
    browser.emulate(width=390)
    opened(browser, folder / which)
    ask(browser, "all('details').forEach(d => d.open = true)")
    until(browser, "document.documentElement.scrollWidth === 390")
    wide = (
        "all('section *:not(svg *)').filter(e => !e.closest('.wide') &&"
        " e.getBoundingClientRect().right > 391).map(e => e.className)"
    )
    assert ask(browser, wide) == []


def test_several_runs_share_their_figures(browser, folder):
    opened(browser, folder / "report.html")
    lines = ask(browser, "all('[data-figure=curves]')[0].data.map(t => [t.name, t.line.color])")
    heads = "all('.run').map(e => [e.textContent, e.style.getPropertyValue('--of-run')])"
    assert lines == ask(browser, heads)
    assert [name for name, _ in lines] == ["a", "b"]


def test_the_page_of_a_sweep(browser, swept):
    write_sweep_page(read_sweep(swept), swept / "sweep.html")
    opened(browser, swept / "sweep.html")
    kinds = ["parallel", "importance", "progress"]
    assert ask(browser, "all('.figure').map(f => f.dataset.figure)") == kinds
    counts = ask(browser, "all('.figure')[0].data[0].dimensions.map(d => d.values.length)")
    assert counts == [8, 8, 8, 8]  # two settings, steps, k-NN
    labels = ask(browser, "all('.figure').map(f => f.textContent)")
    assert "objective.teacher_temp" in labels[0]
    assert "k-NN 20" in labels[0]
    assert "optim.lr" in labels[1]
    kept_shot(browser, "sweep.png")
    browser.emulate("dark", 390)  # figures follow the window when the browser has time
    until(browser, "document.documentElement.scrollWidth <= 390")


def test_names_that_look_like_markup_are_text(browser, tmp_path):
    """In what plotly draws as well, whose words are some HTML."""
    names = ["<b>x</b>", "a&lt;b<br>", "%{x} $1$", "q\"</script>'", "<a href='x'>y</a>", "\u202ex"]
    shown = sorted(printable(name) for name in names)
    values = {name: float(i) for i, name in enumerate(names)}
    trials = [
        RankedTrial("t", dict.fromkeys(names, n), "finished", v, None, 9, 9, 1.0, "", [(1, v)])
        for n, v in values.items()
    ]
    sweep = SweepResults(tmp_path, {"metric": names[0]}, trials)
    results = [(name, RunResults("", {"x": values}, {}, {})) for name in names]
    entropy = [figures.Entropy(name, 0, [3], [[0.5, 0.6]]) for name in names]
    parts = {
        "numbers": figures.numbers_figure(results),
        "entropy": figures.entropy_figure(entropy),
        "importance": figures.importance_figure(values),
        "parallel": figures.parallel_figure(sweep),
        "progress": figures.progress_figure(sweep),
    }
    drawn = [
        Part(kind, names[3], render_macro("macros.html", "plot", content=content, name=kind))
        for kind, content in parts.items()
    ]
    write_page(tmp_path / "names.html", names[0], names[1], Markup(), drawn)
    opened(browser, tmp_path / "names.html")
    assert browser.title == names[0]
    assert browser.find_element(By.TAG_NAME, "h2").text == names[3]

    def words(kind, inner):
        found = ask(browser, f"all('#{kind} {inner}').map(e => e.textContent.trim())")
        return sorted(word for word in found if word)

    assert words("numbers", ".legendtext") == shown
    assert words("numbers", ".ytick text") == shown
    assert words("entropy", ".legendtext") == sorted(f"{name}, step 3" for name in shown)
    assert words("importance", ".ytick text") == shown
    assert words("parallel", ".axis-title") == sorted([*shown, names[0]])
    assert set(words("parallel", ".axis .tick text")) > set(shown)
    for place, name in enumerate(names[::-1]):  # the best is drawn last
        time.sleep(0.06)  # plotly answers one hover in 50 ms
        hovered = browser.execute_script(
            "const plot = document.querySelector('[data-figure=progress]');"
            "Plotly.Fx.hover(plot, [{ curveNumber: arguments[0], pointNumber: 0 }]);"
            "return plot.querySelector('.hoverlayer .name').textContent",
            place,
        )
        assert hovered.startswith(printable(names[0]) + "=" + printable(name))
