"""The page of a trace in a browser: what it shows is what the books had, at every step, by keyboard, in any window."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from headless_browser import Browser, needs_browser
from trace_support import SCOPE, TENANT, make, serve

from engine.memory.page_map import PageMap
from engine.trace.page_history import PageHistory
from engine.trace.page_html import trace_page
from engine.trace.trace_file import Trace, parse_events

pytestmark = needs_browser
WINDOWS = [(1360, 900), (820, 700), (360, 740)]


@pytest.fixture(scope="module")
def browser():
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The page of a small trace, and the map of its books after each step."""
    recorder, cache = make(pages=24)
    maps, begin = [], recorder.begin_step

    def begin_step(waiting=0):
        maps.append(PageMap.of(cache))
        begin(waiting)

    recorder.begin_step = begin_step
    rng = np.random.default_rng(1)
    trunk = rng.integers(0, 2**31, 12).tolist()
    for scope in (SCOPE, TENANT):
        serve(recorder, cache, [[*trunk, *rng.integers(0, 99, 5).tolist()] for _ in range(8)], scope=scope)
    maps.append(PageMap.of(cache))
    lines = recorder.take_lines()
    return write(tmp_path_factory.mktemp("small"), Trace({}, parse_events(lines[1:], first_line=2))), maps


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of 64,000 pages, as docs/make_pages.py makes it, but shorter."""
    path = Path(__file__).parents[2] / "docs" / "make_pages.py"
    spec = importlib.util.spec_from_file_location("make_pages", path)
    pictures = importlib.util.module_from_spec(spec)
    sys.modules["make_pages"] = pictures
    spec.loader.exec_module(pictures)
    run = dataclasses.replace(pictures.LARGE, rate=4.0, steps=60, budget=16384)
    return write(tmp_path_factory.mktemp("large"), pictures.record(run))


def write(folder, trace):
    path = folder / "page.html"
    path.write_text(trace_page(PageHistory.of(trace), "today"))
    return path.as_uri()


def shown(browser):
    """The pages that are shown: codes, owners, pages before."""
    names = ("code", "owner", "before")
    return [np.array(browser.value(f"Array.from(pagesNow().{name})"), np.int32) for name in names]


def agrees(browser, pages):
    code, owner, before = shown(browser)
    same = np.array_equal(code & 3, pages.state) and np.array_equal(before, pages.before)
    return same and np.array_equal(owner > 0, pages.row >= 0)


def test_every_moment_is_shown_as_the_books_had_it_forwards_and_back(browser, small):
    url, maps = small
    browser.show(url)
    assert browser.value("view.film.length") == len(maps)
    moments = [*range(len(maps)), *reversed(range(len(maps))), *random.choices(range(len(maps)), k=30)]
    for moment in moments[:: max(1, len(moments) // 120)]:
        browser.value(f"go({moment})")
        assert agrees(browser, maps[moment]), moment
    assert not browser.errors


def test_it_is_moved_by_keyboard_alone(browser, small):
    url, maps = small
    browser.show(url)
    at, last = (lambda: browser.value("view.film.at")), len(maps) - 1
    assert at() == last
    browser.press("Home")
    assert at() == 0
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert at() == 1
    browser.press("PageDown")
    assert at() == 1 + browser.value("jump()")
    browser.press("End")
    assert at() == last
    for key, mode in zip("1234", ("state", "group", "request", "tenant"), strict=True):
        browser.press(key)
        assert browser.value("view.mode") == mode
        assert browser.value("document.querySelector('input[name=mode]:checked').value") == mode
    cell = browser.value("map.cell")
    browser.press("-")
    assert browser.value("map.cell") < cell
    browser.press("0")
    assert browser.value("map.cell") == cell
    browser.press("Home", " ")
    browser.wait_for("view.film.at > 2")
    browser.press(" ")
    assert browser.value("byId('play').getAttribute('aria-pressed')") == "false"


def test_the_map_and_the_tree_are_walked_by_arrow_keys(browser, small):
    url, maps = small
    browser.show(url)
    browser.value("byId('map').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowDown")
    assert browser.value("view.page") == 2 + browser.value("map.columns")
    assert f"Page {browser.value('view.page')}:" in browser.value("byId('detail').textContent")
    assert browser.value("view.film.at") == len(maps) - 1, "the slider moved too"
    browser.press("End")
    assert browser.value("view.page") == 24
    browser.press("Escape")
    assert browser.value("view.page") == 0
    browser.value("byId('tree').focus()")
    browser.press("ArrowRight")
    first = browser.value("view.page")
    browser.press("ArrowRight")
    assert maps[-1].before[browser.value("view.page")] == first
    browser.press("ArrowLeft")
    assert browser.value("view.page") == first


def test_everything_that_takes_the_focus_has_a_name_and_can_be_reached(browser, small):
    browser.show(small[0])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        properties = {each["name"]: each["value"].get("value") for each in node.get("properties", ())}
        if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            named[node["role"]["value"], node.get("name", {}).get("value", "")] = node
    assert len(named) >= 15
    assert not [role for role, name in named if not name.strip()]
    seen = set()
    browser.value("document.activeElement.blur()")
    for _ in range(40):
        browser.press("Tab")
        seen.add(browser.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"map", "tree", "slider", "first", "back", "next", "last", "play", "smaller", "larger"} <= seen
    assert browser.value("byId('slider').getAttribute('aria-valuetext')").startswith("step ")


def test_a_click_chooses_a_page_and_a_legend_shows_its_kind_alone(browser, small):
    browser.show(small[0])
    x, y, cell = browser.value(
        "(() => { const box = byId('map').getBoundingClientRect(), [x, y] = map.place(7);"
        " return [box.left + x, box.top + y, map.cell]; })()"
    )
    browser.click(x + cell / 2, y + cell / 2)
    assert browser.value("view.page") == 7
    counts = browser.value("Array.from(document.querySelectorAll('#legend b'), (each) => Number(each.textContent))")
    assert sum(counts) == 24
    browser.value("document.querySelectorAll('#legend button')[3].click()")
    assert browser.value("view.only") == 3
    browser.settle()
    assert browser.value("document.querySelectorAll('#legend [aria-pressed=true]').length") == 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), WINDOWS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_it_fits_every_window_dark_and_light(browser, request, size, width, height, dark):
    url = request.getfixturevalue(size)
    browser.show(url[0] if isinstance(url, tuple) else url, width, height, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    ground, text = browser.value("[theme.ground, theme.text].map((each) => rgbOf(each).reduce((a, b) => a + b))")
    assert (ground < text) == dark
    drawn = browser.value(
        "['map', 'tree', 'curves'].map((id) => { const canvas = byId(id), data = canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();"
        " for (let i = 0; i < data.length; i += 4) seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);"
        " return seen.size; })"
    )
    assert min(drawn) >= 3
    assert browser.value("map.columns * map.cell") <= width
    assert not browser.errors
    assert [each for each in browser.requested if not each.startswith(("file:", "data:"))] == []


def test_sixty_four_thousand_pages_are_drawn_in_a_moment(browser, large):
    browser.show(large)
    assert browser.value("pagesNow().about.pages") == 64_000
    assert browser.value("map.cell") >= 2
    milliseconds = browser.value(
        "(() => { const times = []; for (const moment of [0, view.film.length - 1, 5, 40]) { const begun ="
        " performance.now(); view.film.seek(moment); drawNow(); times.push(performance.now() - begun); }"
        " return times.sort((a, b) => a - b)[1]; })()"
    )
    assert milliseconds < 2000  # on two busy cores without a GPU; else some tens


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_states_can_be_told_apart(browser, small, dark):
    """By WCAG's contrast: text 4.5 on its ground; states differ in lightness or in pattern, whatever the colours."""
    browser.show(small[0], dark=dark)
    lights = browser.value(
        "(() => { const light = (colour) => { const [r, g, b] = rgbOf(colour).map((v) => (v /= 255) <= .04045 ?"
        " v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };"
        " return Object.fromEntries(Object.entries(theme).map(([name, colour]) => [name, light(colour)])); })()"
    )

    def contrast(one, other):
        low, high = sorted((lights[one], lights[other]))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "quiet"):
        for ground in ("ground", "panel"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    looks = browser.value("[0, 1, 2, 3].map((state) => lookOfState(state)[1])")
    states = ("free", "held", "locked", "cached")
    for one in range(4):
        for other in range(one):
            assert looks[one] != looks[other] or contrast(states[one], states[other]) >= 1.5
            assert contrast(states[one], states[other]) >= 1.2, (states[one], states[other])
