"""What of the service can be set, with the limits that every request meets. Sizes in bytes, times in seconds."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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
    candidates: PositiveInt = 4096
    """Items to score, to allow or to deny in one call."""
    users_per_call: PositiveInt = 256
    """Users in one batch call."""
    explained_chunks: PositiveInt = 64
    """Chunks in one explanation."""
    user_id_bytes: PositiveInt = 256
    """Longest user id, as UTF-8."""
    item_id_bytes: PositiveInt = 256
    """Longest item id, as UTF-8."""
    event_id_bytes: PositiveInt = 64
    """Longest event id, as UTF-8."""
    event_type_bytes: PositiveInt = 64
    """Longest event type, as UTF-8."""
    user_events: PositiveInt = 1_000_000
    """Events kept of one user; one more is rejected (`history-full`) until some are taken back."""
    seconds_ahead: NonNegativeFloat = 300.0
    """How far ahead of the server's clock an event may lie, where the clock is unix."""


class ServeSettings(Strict):
    """How one process serves."""

    limits: Limits = Limits()
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network, the exact search and the states that are held are; on cuda the states' rows are in pages."""
    state_bytes: PositiveInt = 2 * 1024**3
    """User states held in memory, on cuda the GPU's; the least recently used are written to the cold store and dropped
    beyond it."""
    cold_bytes: PositiveInt = 32 * 1024**3
    """Largest size of the embedded cold store's file; a sparse file, it takes what is used."""
    cold_parity: Literal["exact", "int8"] = "exact"
    """How rows are kept cold: as they are, or rounded to int8 in about a quarter of the bytes. States made from
    rounded ones are approximate, and every answer from one says `state_parity: int8`."""
    largest_share: PositiveFloat = 0.01
    """Of the memory for states, and of the embedded cold store, what one user may take from others. A larger state is
    held in memory where others leave room, and is the first to go; it is not written to the cold store."""
    spill_events: PositiveInt = 256
    """A long history's cold record is written again after so many further events."""
    model_threads: PositiveInt = 4
    """Threads for what is quick: states, answers, answers to long histories, states that catch up. Each does one batch
    at a time; long work has threads beside them."""
    long_history_events: PositiveInt = 10_000
    """Histories beyond it are answered apart, so that others do not wait for their many own items."""
    batch_questions: PositiveInt = 64
    """Most questions answered in one pass of the model."""
    catch_up_seconds: NonNegativeFloat = 1.0
    """New events are gathered so long before states that are held follow them; an answer never waits for that."""
    catch_up_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the time in which states that are held may follow new events before anyone asks for them. With too
    small a share they fall behind many events, and the first questions after those wait."""
    rebuild_step_events: PositiveInt = 8192
    """Events appended at once while a state is rebuilt; bounds its memory."""
    inline_events: PositiveInt = 20_000
    """An answer computes at most so many events; where more are missing it is degraded, and the rest is done after."""
    replay_events_per_second: PositiveFloat = 512.0
    """What late, corrected and retracted events of one user may cost: events read again, counted from some before the
    change. A user begins with `inline_events` of them; beyond it answers are degraded, and the replay is done in the
    background, as often as that refills."""
    settle_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the time in which such a replay goes on: answers need the rest."""
    deadline_seconds: PositiveFloat = 10.0
    """How long a request may wait for work to begin, unless its `x-deadline-ms` header says; beyond it: 504."""
    requests_per_second: PositiveFloat | None = None
    """Of one client (token, else address), with bursts of twice as many; beyond it: 429. None: no bound."""
    user_events_per_second: NonNegativeFloat = 200.0
    """Sent for one user, with bursts of 50 seconds' worth; beyond it: 429. 0: no bound, as where histories of many
    thousand events are brought in."""
    purge_after_seconds: PositiveFloat = 10.0
    """Deletions are gathered so long before the cold store is rewritten without them."""
    audit_share: NonNegativeFloat = 1e-4
    """Share of the answers whose state is computed anew in the background and compared."""
    audit_tolerance: PositiveFloat = 1e-5
    """Largest difference of a row, relative to its norm, that an audit takes as none (float32)."""
    audit_tolerance_int8: PositiveFloat = 0.2
    """The same for states made from rows rounded to int8."""
    warm_users: NonNegativeInt = 1000
    """Users whose states are made ready in a new release before it is activated, the last active first."""
    warm_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the time in which they are made ready: answers need the rest."""
    group_events: PositiveInt = 4096
    """Most events in one transaction of the event log."""
    waiting_calls: PositiveInt = 4096
    """Calls that may wait for the event log before others are refused."""
    concurrent_questions: PositiveInt = 32
    """Requests answered from states at once; beyond it: 503. More make all wait longer, and answer nobody sooner; where
    an accelerator answers, some batches of questions are right."""
    concurrent_writes: PositiveInt = 48
    """Requests that change events at once; beyond it: 503."""
    connections: PositiveInt = 4096
    """Kept at once; on one beyond it a request is answered 503, and it is closed."""
    unready_after_seconds: PositiveFloat = 60.0
    """How long states may lag behind the event log, or the cold store be unwritable, before `/readyz` says so."""
    graceful_seconds: PositiveInt = 20
    """How long requests may take to finish after SIGTERM."""
    keep_alive_seconds: PositiveFloat = 15
    """How long a connection is kept on which nothing comes, between requests or within one."""

    @property
    def pool_bytes(self) -> int | None:
        """Of pages for states: a quarter more than are held, for those in use; None: each has tensors of its own."""
        return None if self.device == "cpu" else self.state_bytes + self.state_bytes // 4
