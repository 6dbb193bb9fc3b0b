"""`/metrics`: Prometheus names in one place. Labels come from fixed sets; no user is in them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ksa_serving.service import Service

Family = TypeVar("Family", Counter, Histogram)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests", "route", "status")
        self.seconds = self._histogram("request_seconds", "Time to answer", SECONDS, "route")
        self.events = self._counter("events", "Events by outcome", "status")
        self.batch_size = self._histogram("batch_questions", "Questions in one pass", (1, 2, 4, 8, 16, 32, 64, 128))
        self.batch_wait = self._histogram("batch_wait_seconds", "How long a batch's first question waited", SECONDS)
        self.commit = self._histogram("commit_seconds", "Commits of the event log, fsync included", SECONDS)
        self.commit_calls = self._histogram("commit_calls", "Calls in one commit", (1, 2, 4, 8, 16, 64, 256, 1024))
        self.refused = self._counter("refused", "Requests refused for want of room or time", "code")
        self.audits = self._counter("audits", "States computed anew and compared", "result")
        self.forgotten = self._counter("forgotten_users", "Users deleted")

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def watch(self, service: "Service") -> None:
        """Also tell, at each scrape, what the service's parts count themselves."""
        self.registry.register(_ServiceCollector(service))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _remembered(Counter(f"ksa_{name}", text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return _remembered(Histogram(f"ksa_{name}", text, labels, buckets=buckets, registry=self.registry))


def _remembered(family: Family) -> Family:
    """Have a family remember its few labels: it looks them up under a lock, which costs as much as counting."""
    vars(family)["labels"] = cache(family.labels)
    return family


class _ServiceCollector:
    def __init__(self, service: "Service"):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, store = self._service, self._service.store
        states = service.served.states
        yield _labelled("state_rebuilds", "States built from the whole log", "cause", states.rebuilds)
        yield _labelled("state_replays", "States rewound and replayed", "cause", states.replays)
        yield _labelled("state_misses", "Records not used", "cause", store.misses)
        yield _labelled("state_hits", "Records used, by tier", "tier", getattr(store, "hits", {}))
        yield _counted("state_evictions", "Records let go for want of room", store.evictions)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "states_held": ("States in memory", lambda: len(store)),
            "state_bytes": ("Bytes of states in memory", lambda: store.nbytes),
            "cold_store_available": ("0 while the cold store fails and is not asked", lambda: store.is_available),
            "log_waiting_calls": ("Calls that wait for the event log", lambda: service.log.writer.num_waiting),
            "waiting_questions": ("Questions that wait for the model", lambda: service.served.num_waiting),
            "settling_users": (
                "Users whose states are computed at length",
                lambda: service.upkeep.num_settling,
            ),
            "index_recall": (
                "Recall@100 of the index, as measured when it was loaded",
                lambda: service.served.release.index_recall,
            ),
            "ready": ("1 when ready", lambda: service.unready() is None),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"ksa_{name}", text, value=float(value()))


def _labelled(name: str, text: str, label: str, counts: "dict[str, int]") -> Metric:
    family = CounterMetricFamily(f"ksa_{name}", text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _counted(name: str, text: str, count: int) -> Metric:
    return CounterMetricFamily(f"ksa_{name}", text, value=count)
