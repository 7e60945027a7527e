"""Alerts and dashboard ask for metrics that exist, and each alert says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.manifests.kustomize import MANIFESTS, ROOT, build, find, pods

OTHERS = {
    # Of Prometheus itself, of kube-state-metrics and of the kubelet.
    *("up", "kube_deployment_spec_replicas", "kube_statefulset_status_replicas_ready", "kube_pod_status_phase"),
    *("kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"),
}
MONITORING = "components/monitoring"


def _alerts() -> list[dict[str, Any]]:
    groups = find(build(MONITORING), "PrometheusRule", "evergreen")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> dict[str, Any]:
    data = find(build(MONITORING), "ConfigMap", "evergreen-dashboard")["data"]
    found: dict[str, Any] = json.loads(data["evergreen.json"])
    return found


def _expressions() -> Iterator[str]:
    yield from (alert["expr"] for alert in _alerts())
    yield from (target["expr"] for panel in _dashboard()["panels"] for target in panel["targets"])


def _metrics(expression: str) -> set[str]:
    plain = re.sub(r'"[^"]*"|\b(?:by|on|without|ignoring)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]', " ", expression)
    return set(re.findall(r"\b(?:evergreen|kube|kubelet)_\w+|\bup\b", plain))


def _known() -> set[str]:
    """The series of every metric that the source makes, by the suffixes that Prometheus' client gives each kind."""
    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"], "Info": ["_info"]}
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    found = re.findall(r'\b(Counter|Gauge|Histogram|Info)\(\s*"(evergreen_\w+)"', source)
    return {name + suffix for kind, name in found for suffix in suffixes[kind]}


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    asked = set().union(*(_metrics(expression) for expression in _expressions()))
    assert len(asked) > 20
    assert asked <= _known() | OTHERS


def test_metrics_are_found_in_an_expression() -> None:
    expression = (
        'sum by (le) (rate(evergreen_a_bucket{x="evergreen_b"}[5m])) / on (up) kube_c > 1 and absent(up{job="d"})'
    )
    assert _metrics(expression) == {"evergreen_a_bucket", "kube_c", "up"}


def test_every_alert_leads_to_its_heading_in_the_runbook() -> None:
    names = [alert["alert"] for alert in _alerts()]
    assert len(set(names)) == len(names) > 15
    for alert in _alerts():
        heading = re.sub(r"(?<!^)(?=[A-Z])", "-", alert["alert"]).lower()
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{heading}"
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_values_in_descriptions_are_formatted() -> None:
    for alert in _alerts():
        for template in re.findall(r"\{\{(.*?)\}\}", alert["annotations"]["description"]):
            assert re.fullmatch(r" \$(value( \| humanize\w*)?|labels\.\w+) ", template), alert["alert"]


def test_dashboard_panels_do_not_overlap() -> None:
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in _dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in _dashboard()["panels"]}) == len(places)


@pytest.mark.parametrize(
    ("kind", "endpoints", "variant"),
    [
        ("ServiceMonitor", "endpoints", "components/monitoring"),
        ("PodMonitor", "podMetricsEndpoints", "components/stream"),
    ],
)
def test_monitors_name_a_port_of_the_pods_that_they_select(kind: str, endpoints: str, variant: str) -> None:
    (monitor,) = (found for found in build(MONITORING) if found["kind"] == kind)
    (endpoint,) = monitor["spec"][endpoints]
    labels = monitor["spec"]["selector"]["matchLabels"]
    selected = [pod for pod in pods(build(variant)) if labels.items() <= pod.labels.items()]
    assert selected
    for pod in selected:
        assert endpoint["port"] in {port["name"] for c in pod.spec["containers"] for port in c["ports"]}


def test_the_component_is_in_the_tree() -> None:
    assert (MANIFESTS / MONITORING / "evergreen.json").is_file()
