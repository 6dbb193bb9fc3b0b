"""`/metrics`: counters in Prometheus's text format. Labels come from fixed sets; no user is in them."""

from collections import Counter
from collections.abc import Mapping

from ksa_serving.service import Service


def metrics_text(service: Service, requests: Mapping[tuple[str, int], int]) -> str:
    """Return all metrics. `requests`: count by (route, status)."""
    lines: list[str] = []
    _add(lines, "requests_total", "Requests", {f'route="{r}",status="{s}"': n for (r, s), n in requests.items()})
    _add(lines, "events_total", "Events by outcome", _labelled("status", service.event_counts))
    _add(lines, "state_rebuilds_total", "States built from the log", _labelled("cause", service.states.rebuilds))
    _add(lines, "state_misses_total", "States not used", _labelled("cause", service.store.misses))
    _add(lines, "states_held", "States in memory", {"": len(service.store)}, "gauge")
    _add(lines, "state_bytes", "Bytes of states in memory", {"": service.store.nbytes}, "gauge")
    _add(lines, "ready", "1 when ready", {"": int(service.unready() is None)}, "gauge")
    return "\n".join(lines) + "\n"


def _labelled(label: str, counts: Counter[str]) -> dict[str, int]:
    return {f'{label}="{name}"': count for name, count in sorted(counts.items())}


def _add(lines: list[str], name: str, text: str, values: Mapping[str, int], kind: str = "counter") -> None:
    lines += [f"# HELP ksa_{name} {text}.", f"# TYPE ksa_{name} {kind}"]
    lines += [
        f"ksa_{name}{{{labels}}} {value}" if labels else f"ksa_{name} {value}" for labels, value in values.items()
    ]
