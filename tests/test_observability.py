"""Prometheus and Grafana in ``deploy/``: every name in an alert or on the dashboard is one that the line serves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.health import Condition, State
from pipeline.metrics import FAMILIES
from pipeline.parts import Reason, Verdict
from tests.support.promql import grouped, selectors, tokens

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OTHERS = {
    "up": {"job", "line", "instance"},
    "node_filesystem_avail_bytes": {"mountpoint", "line", "instance"},
    "node_filesystem_size_bytes": {"mountpoint", "line", "instance"},
}
"""Metrics of Prometheus itself and of node_exporter."""
TARGET = {"line", "instance", "job"}
"""Labels that a scrape gives to everything."""
VALUES = {
    "verdict": set(Verdict),
    "reason": set(Reason),
    "state": set(State),
    "condition": set(Condition),
    "job": {"dmdd", "node"},
}
SEVERITIES = {"page", "ticket"}


def loaded(name: str) -> Any:
    """A YAML file of ``deploy/prometheus``."""
    return yaml.safe_load((DEPLOY / "prometheus" / name).read_text())


RULES: list[dict[str, Any]] = [rule for group in loaded("alerts.yml")["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dmdd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression, with where it stands."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def labels_of(metric: str) -> set[str]:
    """The labels that a series of this name has; fails for a name that nobody serves."""
    if metric in OTHERS:
        return OTHERS[metric]
    name = metric if metric in FAMILIES else re.sub(r"_(bucket|sum|count)$", "", metric)
    assert name in FAMILIES, f"nobody serves {metric}"
    assert (FAMILIES[name].kind == "histogram") == (name != metric), metric
    bound = {"le"} if metric.endswith("_bucket") else set()
    return TARGET | set(FAMILIES[name].labels) | bound


def families(texts: Iterator[tuple[str, str]]) -> set[str]:
    """The families of the line that these expressions read."""
    read = {selector.metric for _, text in texts for selector in selectors(text)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in read - set(OTHERS)}


class TestExpressions:
    """Alerts and dashboard alike."""

    @pytest.mark.parametrize(("where", "text"), list(expressions()))
    def test_names(self, where: str, text: str) -> None:
        """Metrics, their labels, and values of closed sets exist; a counter is read as a rate, or as it stands."""
        found = list(selectors(text))
        assert found, where
        common = set.union(*(labels_of(selector.metric) for selector in found))
        assert grouped(text) <= common, where
        for metric, matchers in found:
            for label, operator, value in matchers:
                assert label in labels_of(metric), f"{where}: {metric} has no label {label}"
                if label in VALUES and "$" not in value:
                    assert set(value.split("|") if "~" in operator else [value]) <= VALUES[label], f"{where}: {value}"

    @pytest.mark.parametrize(
        "text", ["rate(up[5m]", "up)", 'up{job="x"', "up[5m)", "rat(up[5m])", "up @ 3", 'up{job~"x"}', 'up{="x"}']
    )
    def test_the_parser_finds_faults(self, text: str) -> None:
        """A missing bracket, an unknown function or character, a matcher that is none: refused."""
        with pytest.raises(ValueError, match="up"):
            list(selectors(text))

    def test_the_parser_reads_selectors(self) -> None:
        """Metrics with their matchers; neither functions nor labels that are grouped by."""
        text = 'sum by (line, le) (rate(a_total{x="1",y!~"2|3"}[5m])) / b > 0.5'
        assert [tuple(selector) for selector in selectors(text)] == [
            ("a_total", (("x", "=", "1"), ("y", "!~", "2|3"))),
            ("b", ()),
        ]
        assert grouped(text) == {"line", "le"}
        assert [token.text for token in tokens("a_total[5m] >= 1.5")] == ["a_total", "[", "5m", "]", ">=", "1.5"]


class TestAlerts:
    """What wakes somebody, and what waits for the morning."""

    @each_rule
    def test_rule(self, rule: dict[str, Any]) -> None:
        """It has a name, a threshold, a severity, and says what is wrong and what to do."""
        assert re.fullmatch(r"[A-Z]\w+", rule["alert"])
        assert {token.text for token in tokens(rule["expr"])} & {"==", ">", "<"}
        assert rule["labels"]["severity"] in SEVERITIES
        assert set(rule["annotations"]) == {"summary", "action"}
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s"))
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}

    @each_rule
    def test_labels_in_the_text_survive_the_expression(self, rule: dict[str, Any]) -> None:
        """An alert does not say "camera ''": what its text names is a label of its result."""
        text = rule["expr"]
        kept = (
            grouped(text)
            if text.startswith(("sum by", "histogram_quantile"))
            else labels_of(next(selectors(text)).metric)
        )
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= kept

    def test_names_are_unique(self) -> None:
        """Two alerts of one name would hide each other."""
        names = [rule["alert"] for rule in RULES]
        assert len(set(names)) == len(names)

    def test_every_condition_of_the_line_has_its_alert(self) -> None:
        """By name, or by the alert for all others."""
        by_name = {
            value
            for rule in RULES
            for selector in selectors(rule["expr"])
            if selector.metric == "dmdd_degraded"
            for _, operator, value in selector.matchers
            if operator == "="
        }
        (rest,) = (rule for rule in RULES if rule["alert"] == "Degraded")
        ((_, _, left_out),) = next(selectors(rest["expr"])).matchers
        drift = "dmdd_drift == 1" in {rule["expr"] for rule in RULES}
        assert drift
        assert set(left_out.split("|")) == by_name | {"drift"}

    def test_what_costs_parts_or_records_is_alerted(self) -> None:
        """Line, heartbeat, answers, lanes, spool, losses, drift, latency, refused input, disk."""
        read = {selector.metric for rule in RULES for selector in selectors(rule["expr"])}
        assert read >= {
            "up",
            "dmdd_state",
            "dmdd_heartbeats_total",
            "dmdd_open_parts",
            "dmdd_parts_total",
            "dmdd_late_total",
            "dmdd_refused_total",
            "dmdd_lanes",
            "dmdd_lane_faults_total",
            "dmdd_spool_bytes",
            "dmdd_lost_total",
            "dmdd_degraded",
            "dmdd_drift",
            "dmdd_verdict_seconds_bucket",
            "node_filesystem_avail_bytes",
        }


class TestPrometheus:
    """Its own settings."""

    def test_it_reads_the_line_and_its_rules(self) -> None:
        """The rules are there; the jobs are those that alerts ask for; the port is the documented one."""
        settings = loaded("prometheus.yml")
        assert all((DEPLOY / "prometheus" / name).is_file() for name in settings["rule_files"])
        jobs = {job["job_name"]: job["static_configs"] for job in settings["scrape_configs"]}
        assert set(jobs) == VALUES["job"]
        assert jobs["dmdd"][0]["targets"] == re.findall(r'A usual one is "(\S+)"', (ROOT / "config.toml").read_text())
        assert all("line" in target["labels"] for job in jobs.values() for target in job)

    def test_a_scrape_is_shorter_than_what_waits_for_it(self) -> None:
        """No rate has less than four samples, no alert waits less than two."""
        seconds = {"s": 1, "m": 60}
        scrape = int(loaded("prometheus.yml")["global"]["scrape_interval"].rstrip("s"))
        spans = [span for _, text in expressions() for span in re.findall(r"\[(\d+)([sm])\]", text)]
        waits = [re.match(r"(\d+)([sm])", rule["for"]) for rule in RULES if "for" in rule]
        assert min(int(count) * seconds[unit] for count, unit in spans) >= 4 * scrape
        assert min(int(wait[1]) * seconds[wait[2]] for wait in waits if wait) >= 2 * scrape


class TestDashboard:
    """What Grafana shows."""

    def test_every_metric_is_shown(self) -> None:
        """A family that nobody looks at is one too many."""
        shown = families((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"])
        assert shown == set(FAMILIES)

    def test_every_panel_is_of_the_chosen_line(self) -> None:
        """No panel mixes lines; each has its source and a title, and reads something."""
        for panel in PANELS:
            assert panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
            for target in panel["targets"]:
                for selector in selectors(target["expr"]):
                    assert ("line", "=~", "$line") in selector.matchers, panel["title"]

    def test_legends_name_labels_that_are_left(self) -> None:
        """A legend never says a label that the expression has summed away."""
        for panel in PANELS:
            for target in panel["targets"]:
                text = target["expr"]
                summed = re.search(r"\b(sum|max)\b", text)
                kept = grouped(text) if summed else set.union(*(labels_of(one.metric) for one in selectors(text)))
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]

    def test_panels_do_not_overlap(self) -> None:
        """Each stands on its own cells of the grid, 24 wide; their numbers are unique."""
        cells = [
            (x, y)
            for panel in DASHBOARD["panels"]
            for grid in [panel["gridPos"]]
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24
        numbers = [panel["id"] for panel in DASHBOARD["panels"]]
        assert len(set(numbers)) == len(numbers)

    def test_variables_are_defined(self) -> None:
        """Every variable in an expression can be chosen, from series that the line serves."""
        names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        assert names == {"datasource", "line"}
        used = {name for _, text in expressions() for name in re.findall(r"\$(\w+)", text)}
        assert used <= names
        (query,) = (one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["name"] == "line")
        assert "line" in labels_of(next(selectors(query)).metric)
