"""``/pages``: the pages of a running server, for whoever may see its metrics."""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import pytest
from headless_browser import Browser, needs_browser
from server_support import client_of, exchange, over

from engine.memory.page_map import CACHED, FREE, PageMap
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.live_pages import LivePages


def state_of(server, headers=()):
    status, got, body = exchange(server, "GET", "/pages/state", headers=headers)
    assert status == 200
    return json.loads(body), got


def codes_of(state):
    (replica,) = state["replicas"]
    return np.frombuffer(base64.b64decode(replica["pages"]), "<i4").reshape(3, -1)


def test_the_state_is_that_of_the_books(llm):
    llm.generate(["Alice was beginning to get very tired of sitting by her sister on the bank"])
    with over(llm) as server:
        state, headers = state_of(server)
    code, owner, before = codes_of(state)
    pages = PageMap.of(llm.cache)
    np.testing.assert_array_equal(code & 3, pages.state)
    np.testing.assert_array_equal(before, pages.before)
    assert set((code & 3).tolist()) == {FREE, CACHED}
    assert not owner.any()
    assert state["replicas"][0]["counts"] == list(pages.counts())
    assert headers["content-type"].startswith("application/json")
    assert headers["cache-control"] == "no-store"


def test_the_running_requests_are_named_and_tenants_are_not_told(llm):
    params = [sampling(40), sampling(40, "hush"), sampling(40, "hush")]
    requests = [llm.make_request([3, 5, 7, 9], each) for each in params]
    try:
        for request in requests:
            llm.add_made(request)
        while len(llm.scheduler.running) < 3:
            llm.step()
        state = LivePages(llm.scheduler).state(llm.stats.steps)
    finally:
        for request in requests:
            llm.abort(request.request_id)
    public, first, second = state["requests"]
    assert [each["id"] for each in state["requests"]] == [request.request_id for request in requests]
    assert public["tenant"] is None
    assert first["tenant"] == second["tenant"] is not None
    assert "hush" not in json.dumps(state)
    assert set(codes_of(state)[1].tolist()) >= {0, 1, 2}


def sampling(tokens, salt=""):
    return SamplingParams(max_new_tokens=tokens, tenant_salt=salt, ignore_eos=True)


def test_many_readers_cost_one_look(llm, monkeypatch):
    looks = []
    look = LivePages.state
    monkeypatch.setattr(LivePages, "state", lambda self, steps: looks.append(steps) or look(self, steps))
    with over(llm) as server:
        threads = [threading.Thread(target=state_of, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 <= len(looks) <= 2


def test_a_browser_without_a_key_is_asked_for_one_and_a_program_is_refused(llm):
    with over(llm, api_keys=("first",)) as server:
        for path in ("/pages", "/pages/state"):
            status, _, body = exchange(server, "GET", path)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
        status, headers, body = exchange(server, "GET", "/pages", headers=["Accept: text/html"])
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert b"<form" in body
        assert b"/pages/state" not in body
        status, _, body = exchange(server, "GET", "/pages", headers=["Authorization: Bearer first"])
        assert status == 200
        assert b"/pages/state" in body
        assert state_of(server, ["Authorization: Bearer first"])[0]["replicas"]


def test_it_is_compressed_for_who_can_read_that(llm):
    with over(llm) as server:
        plain = exchange(server, "GET", "/pages/state")[2]
        _, headers, packed = exchange(server, "GET", "/pages/state", headers=["Accept-Encoding: gzip"])
    assert headers["content-encoding"] == "gzip"
    assert len(packed) < len(plain) / 4


@pytest.fixture(scope="module")
def browser():
    one = Browser()
    yield one
    one.close()


@needs_browser
def test_the_page_follows_the_server_and_goes_back(llm, browser):
    llm.reset_prefix_cache()
    with over(llm) as server, client_of(server) as client:
        browser.show(f"{server.url}/pages")
        assert browser.value("pagesNow().counts[view.film.at][3]") == 0
        client.completions.create(model="default", prompt="Alice was beginning to get very tired", max_tokens=24)
        browser.wait_for("pagesNow().counts[view.film.at][3] > 0")
        shown = browser.value("Array.from(pagesNow().code, (code) => code & 3)")
        assert shown == PageMap.of(llm.cache).state.tolist()
        browser.press("Home")
        assert browser.value("view.film.at") == 0
        assert browser.value("byId('follow').checked") is False
        moments = browser.value("view.film.length")
        browser.wait_for(f"view.film.length > {moments}")
        assert browser.value("view.film.at") == 0, "it ran away from who looks back"
        browser.value("byId('follow').click()")
        assert browser.value("view.film.at === view.film.length - 1")
        assert not browser.errors
        assert {each.split("/", 3)[2] for each in browser.requested} <= {f"127.0.0.1:{server.port}"}
    browser.wait_for("byId('status').classList.contains('wrong')")


@needs_browser
def test_what_is_too_old_is_forgotten_and_the_rest_stays_right(llm, browser):
    with over(llm) as server:
        browser.show(f"{server.url}/pages")
        browser.value(
            "(() => { const film = view.film, pages = film.replicas[0], n = pages.code.length;"
            " film.seek(film.length - 1);"
            " window.truth = []; for (let i = 0; i < 4000; i++) { const page = Int32Array.of(1 + i % (n - 1));"
            " pages.add(page, Int32Array.of(i % 4), Int32Array.of(0), Int32Array.of(0), [0, 0, 0, 0]);"
            " film.note(i, i, 0, 0, []); film.changes++; window.truth.push(Array.from(pages.code)); }"
            " film.trim(); })()"
        )
        length = browser.value("view.film.length")
        assert length <= browser.value("MOST_LIVE_MOMENTS")
        for back in (0, 1, length // 2, length - 1):
            browser.value(f"view.film.seek({length - 1 - back})")
            agrees = f"String(Array.from(view.film.replicas[0].code)) === String(window.truth[3999 - {back}])"
            assert browser.value(agrees)


@needs_browser
def test_a_browser_shows_the_pages_once_it_is_given_a_key(llm, browser):
    with over(llm, api_keys=("first",)) as server:
        browser.call("Page.navigate", url=f"{server.url}/pages")
        browser.wait_for("document.querySelector('input[type=password]') !== null")
        for key, then in (("wrong", "p[role=alert]:not(:empty)"), ("first", "#map")):
            browser.value(f"document.querySelector('input').value = '{key}'")
            browser.value("document.querySelector('button').click()")
            browser.wait_for(f"document.querySelector('{then}') !== null")
        browser.wait_for("typeof view !== 'undefined' && view.film !== null && view.film.length > 0")
