"""The Grafana dashboard asks for nothing that an engine does not export, and each panel says what it shows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scheduler_support import CONTEXT, PAGE, Clock

from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.watch.exporter import PREFIX, EngineCollector
from engine.serving.watch.metrics import collect_metrics
from engine.serving.watch.stats import EngineStats

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
SUFFIXES = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of a dashboard


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def families():
    """What an engine with replicas, a prefix cache and a host tier exports."""
    layout = {"page_size": PAGE, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
    page_format = PageFormat(1, np.dtype(np.float32), layout)
    tier, queue = HostTier(8 * page_format.page_bytes, page_format), RequestQueue()
    caches = [CacheManager(64, PAGE, 3, CONTEXT, policy="lru") for _ in range(2)]
    for cache in caches:
        cache.attach_host_tier(tier)
    options = {"max_running_requests": 3, "max_step_tokens": 16}
    replicas = [Replica(cache, queue, index=index, **options) for index, cache in enumerate(caches)]
    metrics = collect_metrics(Scheduler(replicas, queue, Clock()), EngineStats())
    return list(EngineCollector(lambda: metrics).collect())


def expressions(dashboard, panels):
    variables = [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return [variable["query"]["query"] for variable in variables] + [
        target["expr"] for panel in panels for target in panel["targets"]
    ]


def names_in(expression):
    return set(re.findall(rf"\b{PREFIX}\w+", expression))


def test_every_metric_that_it_asks_for_is_exported(dashboard, panels, families):
    exported = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}
    for expression in expressions(dashboard, panels):
        assert names_in(expression), f"no metric of the engine in {expression}"
        assert names_in(expression) <= exported


def test_it_shows_every_histogram_and_every_counter(dashboard, panels, families):
    asked = set().union(*map(names_in, expressions(dashboard, panels)))
    for family in families:
        if family.type != "gauge":
            assert any(family.name + suffix in asked for suffix in SUFFIXES[family.type]), family.name


def test_counters_are_shown_as_rates_and_histograms_as_quantiles(dashboard, panels):
    for panel in panels:
        for target in panel["targets"]:
            for name in names_in(target["expr"]):
                is_rate = f"rate({name}{{" in target["expr"]
                assert is_rate == name.endswith(("_total", "_bucket")), target["expr"]
                assert ("histogram_quantile(" in target["expr"]) == name.endswith("_bucket")


def test_every_panel_has_a_title_a_unit_a_source_and_a_place_of_its_own(dashboard, panels):
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels)
    places = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < COLUMNS
        assert not cells & places, panel["title"]
        places |= cells
        assert panel["title"]
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == SOURCE
        labels = [target["refId"] for target in panel["targets"]]
        assert len(set(labels)) == len(labels) > 0
        assert all(target["legendFormat"] for target in panel["targets"])


def test_the_source_of_the_figures_is_chosen_in_the_dashboard(dashboard):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["instance"]["datasource"] == SOURCE
    assert dashboard["schemaVersion"] >= 39
    assert dashboard.keys() >= {"uid", "title", "time", "refresh"}
