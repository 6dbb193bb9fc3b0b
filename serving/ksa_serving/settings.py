"""What of the service can be set, with the limits that every request meets. Sizes in bytes, times in seconds."""

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from recsys_ksa.config import Strict


class Limits(Strict):
    """Beyond these a request is refused; each is tested at the limit and one past it."""

    body_bytes: PositiveInt = 1024 * 1024
    """Largest request body."""
    header_bytes: PositiveInt = 16 * 1024
    """Names and values of all headers."""
    events_per_call: PositiveInt = 1000
    """Events in one call, kept or given for one answer."""
    k: PositiveInt = 1000
    """Items in one answer."""
    user_id_bytes: PositiveInt = 256
    """Longest user id, as UTF-8."""
    item_id_bytes: PositiveInt = 256
    """Longest item id, as UTF-8."""
    event_id_bytes: PositiveInt = 64
    """Longest event id, as UTF-8."""
    event_type_bytes: PositiveInt = 64
    """Longest event type, as UTF-8."""
    seconds_ahead: NonNegativeFloat = 300.0
    """How far ahead of the server's clock an event may lie, where the clock is unix."""


class ServeSettings(Strict):
    """How one process serves."""

    limits: Limits = Limits()
    state_bytes: PositiveInt = 2 * 1024**3
    """User states held in memory; the least recently used are dropped beyond it and rebuilt when asked for."""
    model_threads: PositiveInt = 2
    """Threads that run the model, so that the event loop stays free."""
    rebuild_step_events: PositiveInt = 8192
    """Events appended at once while a state is rebuilt; bounds its memory."""
    group_events: PositiveInt = 4096
    """Most events in one transaction of the event log."""
    waiting_calls: PositiveInt = 4096
    """Calls that may wait for the event log before others are refused."""
    concurrent_requests: PositiveInt = 512
    """Users' requests answered at once; beyond it: 503. Twice as many connections are kept."""
    graceful_seconds: PositiveInt = 20
    """How long requests may take to finish after SIGTERM."""
    keep_alive_seconds: PositiveFloat = 15
    """How long an idle connection is kept."""
