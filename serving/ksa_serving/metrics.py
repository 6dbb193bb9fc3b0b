"""`/metrics`: Prometheus names in one place. Labels come from fixed sets; no user is in them."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ksa_serving.messages import EventStatus
from ksa_serving.state_store import Tier

if TYPE_CHECKING:
    from ksa_serving.service import Service

Family = TypeVar("Family", Counter, Histogram)
SHORT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.5)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


REBUILDS = dict.fromkeys(("absent", "mismatch", "unrewindable", "known-items"), 0)
REPLAYS = dict.fromkeys(("late", "retracted", "cold"), 0)
MISSES = dict.fromkeys(("absent", "fingerprint", "owner", "parity", "damaged", "unavailable", "unwritten"), 0)
HITS = dict.fromkeys(("memory", "cold"), 0)
"""All causes and tiers, told also while they are 0."""


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests", "route", "status")
        self.seconds = self._histogram("request_seconds", "Time to answer", SECONDS, "route")
        self.events = self._counter("events", "Events by outcome", "status")
        self.batch_size = self._histogram("batch_questions", "Questions in one pass", (1, 2, 4, 8, 16, 32, 64, 128))
        self.batch_wait = self._histogram("batch_wait_seconds", "How long a batch's first question waited", SECONDS)
        self.rejections = self._counter("event_rejections", "Events rejected, by why", "reason")
        self.commit = self._histogram("commit_seconds", "Transactions of the event log, fsync included", SHORT_SECONDS)
        self.sync = self._histogram("sync_seconds", "Ends of those: the log's write and fsync", SHORT_SECONDS)
        self.commit_calls = self._histogram("commit_calls", "Calls in one commit", (1, 2, 4, 8, 16, 64, 256, 1024))
        self.refused = self._counter("refused", "Requests refused for want of room or time", "code")
        self.audits = self._counter("audits", "States computed anew and compared", "result")
        self.forgotten = self._counter("forgotten_users", "Users deleted")
        self.tiers: dict[str, Tier] = {}
        for result in ("equal", "different"):  # an alert on what was never told would never ring
            self.audits.labels(result)
        for status in get_args(EventStatus):
            self.events.labels(status)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def watch(self, service: "Service") -> None:
        """Also tell, at each scrape, what the service's parts count themselves."""
        self.registry.register(_ServiceCollector(self, service))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _remembered(Counter(f"ksa_{name}", text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return _remembered(Histogram(f"ksa_{name}", text, labels, buckets=buckets, registry=self.registry))


def _remembered(family: Family) -> Family:
    """Have a family remember its few labels: it looks them up under a lock, which costs as much as counting."""
    vars(family)["labels"] = cache(family.labels)
    return family


class _ServiceCollector:
    def __init__(self, metrics: Metrics, service: "Service"):
        self._metrics, self._service = metrics, service

    def collect(self) -> Iterator[Metric]:
        service, store = self._service, self._service.store
        states = service.served.states
        tiers = self._metrics.tiers
        evictions = {name: tier.evictions for name, tier in tiers.items()}
        yield _counted("state_rebuilds", "States built from the whole log", "cause", REBUILDS | states.rebuilds)
        yield _counted("state_replays", "States rewound and replayed", "cause", REPLAYS | states.replays)
        yield _counted("state_misses", "Records not used", "cause", MISSES | store.misses)
        yield _counted("state_hits", "Records used", "tier", HITS | getattr(store, "hits", {}))
        yield _counted("state_evictions", "Records let go for want of room", "tier", evictions)
        for name, text, values in (
            ("states_held", "States kept", {name: tier.num_records for name, tier in tiers.items()}),
            ("state_bytes", "Bytes of states", {name: tier.nbytes for name, tier in tiers.items()}),
        ):
            family = GaugeMetricFamily(f"ksa_{name}", text, labels=["tier"])
            for tier, value in values.items():
                family.add_metric([tier], value)
            yield family
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "replay_lag_entries": ("Entries that states do not follow yet", lambda: service.upkeep.lag_entries),
            "replay_lag_seconds": ("For how long, at most", lambda: service.upkeep.lag_seconds),
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


def _counted(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"ksa_{name}", text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family
