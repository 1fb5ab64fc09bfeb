"""The counts of `wake.metrics` and the state of the queue as Prometheus reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import accumulate
from typing import Final

from django.db.models import Sum
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from wake import metrics, status
from wake.models import Tally

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
PREFIX: Final = "openclaw_"

# Amounts by the labels that are stored with them.
Amounts = Mapping[str, float]

GAUGES: Final = {
    "events": "Events that are not settled, by state.",
    "sessions": "Sessions with work, by state: due, running, held back by a limit of their agent.",
    "build_info": "Always 1; the label says which version it is.",
    "uptime_seconds": "For how long the process that answers has been up.",
}


class _Families:
    """What `generate_latest` takes: something that collects."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def page(now: datetime) -> bytes:
    """Return all metrics in Prometheus' text format. Raises DatabaseError."""
    totals: defaultdict[str, dict[str, float]] = defaultdict(dict)
    summed = Tally.objects.order_by().values("name", "labels").annotate(total=Sum("value"))
    for name, labels, total in summed.values_list("name", "labels", "total"):
        totals[name][labels] = total
    counted = [
        _histogram(metric, totals[f"{metric.name}_bucket"], totals[f"{metric.name}_sum"])
        if metric.buckets
        else _counter(metric, totals[metric.name])
        for metric in metrics.METRICS
    ]
    return generate_latest(_Families([*counted, *_gauges(status.queue_counts(now))]))


def _counter(metric: metrics.Metric, amounts: Amounts) -> Metric:
    family = CounterMetricFamily(PREFIX + metric.name, metric.help, labels=metric.labels)
    for labels, amount in sorted(amounts.items()):
        family.add_metric(_values(metric, labels), amount)
    return family


def _histogram(metric: metrics.Metric, buckets: Amounts, sums: Amounts) -> Metric:
    family = HistogramMetricFamily(PREFIX + metric.name, metric.help, labels=metric.labels)
    limits = [*map(metrics.bucket_name, metric.buckets), metrics.INFINITY]
    for labels, total in sorted(sums.items()):
        hits = [buckets.get(f"{labels},le={limit}".lstrip(","), 0.0) for limit in limits]
        family.add_metric(
            _values(metric, labels), list(zip(limits, accumulate(hits), strict=True)), total
        )
    return family


def _values(metric: metrics.Metric, labels: str) -> list[str]:
    stored = metrics.parsed(labels)
    return [stored.get(name, "") for name in metric.labels]


def _gauges(counts: status.QueueCounts) -> Iterable[Metric]:
    events = _gauge("events", "state")
    events.add_metric(["queued"], counts.queued)
    events.add_metric(["dead"], counts.dead)
    sessions = _gauge("sessions", "state")
    sessions.add_metric(["due"], counts.due)
    sessions.add_metric(["running"], counts.running)
    sessions.add_metric(["held"], counts.held)
    build = _gauge("build_info", "version")
    build.add_metric([status.version()], 1)
    uptime = _gauge("uptime_seconds")
    uptime.add_metric([], status.uptime_ms() / 1000)
    return events, sessions, build, uptime


def _gauge(name: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, GAUGES[name], labels=labels)
