import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from ksa_serving.errors import InvalidRequestError, OverloadedError
from ksa_serving.events import Owner, StoredEvent
from ksa_serving.messages import EventMessage, EventsRequest, ExplainRequest, RecommendRequest, StateTier
from ksa_serving.service import Service
from ksa_serving.settings import Limits, ServeSettings
from ksa_serving.testing import ToyModel, toy_release

NOW = 1_700_000_000  # where the service's clock stands (conftest)
MakeService = Callable[..., Service]


def event(item_id: str = "item-1", timestamp: int = 100, **rest: Any) -> EventMessage:
    return EventMessage(item_id, timestamp, **rest)


def statuses(answer: Any) -> list[tuple[str, str | None]]:
    return [(result.status, result.reason) for result in answer.results]


async def post(service: Service, user_id: str, *events: EventMessage) -> Any:
    return await service.events.post(user_id, EventsRequest(list(events)))


async def ask(service: Service, user_id: str, **fields: Any) -> Any:
    return await service.questions.recommend(user_id, msgspec.convert(fields, RecommendRequest))


def test_each_event_gets_its_own_result(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        first = await post(service, "ann", event(event_id="1"), event(), event(), event("x", -1), event("", 5))
        assert statuses(first) == [
            ("accepted", None),
            ("accepted", None),
            ("duplicate", None),
            ("rejected", "negative-time"),
            ("rejected", "empty-item-id"),
        ]
        second = await post(
            service, "ann", event(event_id="1"), event("y", event_id="1"), event("z", 50), event("w", 200)
        )
        assert statuses(second) == [
            ("duplicate", None),
            ("rejected", "conflict"),
            ("late-applied", None),
            ("accepted", None),
        ]
        assert second.seq > first.seq
        assert (await service.questions.state("ann")).num_events == 4
        counted = {
            sample.labels["status"]: sample.value
            for family in service.metrics.events.collect()
            for sample in family.samples
            if sample.name == "ksa_events_total" and sample.value
        }
        assert counted == {"accepted": 3, "duplicate": 2, "rejected": 3, "late-applied": 1}
        await service.close()

    asyncio.run(story())


def test_an_answer_knows_every_acknowledged_event(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        for n in range(20):
            answer = await post(service, "ann", event(f"item-{n}", 100 + n))
            asked = await ask(service, "ann")
            assert (asked.num_events, asked.state_seq, asked.seq) == (n + 1, answer.seq, answer.seq)
        assert asked.state_source == "host"
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize("tier", ["host", "gpu"])
def test_answers_name_the_memory_that_held_their_state(make_service: MakeService, tier: StateTier):
    async def story() -> None:
        service = make_service(replace(toy_release(), model=ToyModel(tier=tier)), ServeSettings(audit_share=1.0))
        await post(service, "ann", event())
        assert (await ask(service, "ann")).state_source == "rebuilt"
        for timestamp in (200, 50):  # appended, and late
            assert (await ask(service, "ann")).state_source == tier
            await post(service, "ann", event("item-2", timestamp))
            assert (await ask(service, "ann")).state_source == tier
        assert (await service.questions.state("ann")).state_source == tier
        await service.close()
        assert service.metrics.audits.labels("equal")._value.get() > 0

    asyncio.run(story())


def test_an_explanation_is_of_the_state_that_was_found_whatever_comes_meanwhile(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        await post(service, "ann", *(event(f"item-{n}", 100 + n, event_id=str(n)) for n in range(9)))
        await ask(service, "ann")
        owner = Owner("ann")
        record = service.served.states.held(owner)
        assert record is not None

        def newest(count: int) -> list[StoredEvent]:
            with service.log.view(owner) as view:
                return service.questions._newest(view, record, count)

        await post(service, "ann", event("item-30", 500), event("item-31", 501))
        assert [one.item_id for one in newest(2)] == ["item-7", "item-8"]
        assert len(newest(50)) == 9
        await service.events.retract("ann", "8")
        with pytest.raises(OverloadedError, match="changed meanwhile"):
            newest(2)
        why = await service.questions.explain("ann", ExplainRequest("item-1"))
        assert (why.num_events, sum(len(chunk.events) for chunk in why.chunks)) == (10, 10)
        await service.close()

    asyncio.run(story())


def test_a_long_history_does_not_hold_up_others(make_service: MakeService):
    may_go_on = threading.Event()

    class SlowForMany(ToyModel):
        def recommend(self, questions: Any) -> Any:
            if any(question.state.num_events > 5 for question in questions):
                assert may_go_on.wait(120)
            return super().recommend(questions)

    async def story() -> None:
        service = make_service(replace(toy_release(), model=SlowForMany()), ServeSettings(long_history_events=5))
        await post(service, "long", *(event(f"item-{n}", n) for n in range(6)))
        await post(service, "short", event())
        long = asyncio.ensure_future(ask(service, "long"))
        await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(ask(service, "short"), 60)).num_events == 1
        assert not long.done()
        may_go_on.set()
        assert (await long).num_events == 6
        await service.close()

    asyncio.run(story())


def test_events_sent_at_once_are_applied_once_each(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        await post(service, "ann", event("item-0", 1))
        await ask(service, "ann")
        posts = [post(service, "ann", event(f"item-{n}", 100 + n % 7)) for n in range(60)]
        questions = [ask(service, "ann") for _ in range(20)]
        answers = await asyncio.gather(*posts, *questions)
        assert sum(1 for answer in answers[:60] if answer.results[0].status in ("accepted", "late-applied")) == 60
        final = await ask(service, "ann")
        assert final.num_events == 61
        service.store.drop(Owner("ann"))
        rebuilt = await ask(service, "ann")
        assert (rebuilt.items, rebuilt.state_source) == (final.items, "rebuilt")
        await service.close()

    asyncio.run(story())


def test_a_state_that_is_held_catches_up_in_the_background(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        await post(service, "ann", event("item-1", 1))
        await ask(service, "ann")
        answer = await post(service, "ann", event("item-2", 2))
        while (await service.questions.state("ann")).state_seq != answer.seq:
            await asyncio.sleep(0.01)
        await service.close()

    asyncio.run(story())


def test_a_failing_model_loses_no_event_and_no_acknowledgement(
    make_service: MakeService, caplog: pytest.LogCaptureFixture
):
    class Failing(ToyModel):
        broken = False

        def append(self, *args: Any, **rest: Any) -> Any:
            if self.broken:
                raise RuntimeError("the model is broken")
            return super().append(*args, **rest)

    async def story() -> None:
        failing = Failing()
        service = make_service(_with(failing))
        await post(service, "ann-secret", event("item-1", 1))
        await ask(service, "ann-secret")
        failing.broken = True
        assert statuses(await post(service, "ann-secret", event("item-2", 2))) == [("accepted", None)]
        while not caplog.records:
            await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError):
            await ask(service, "ann-secret")
        failing.broken = False
        assert (await ask(service, "ann-secret")).num_events == 2
        await service.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(story())
    assert "could not catch up" in caplog.text
    assert "ann-secret" not in caplog.text


def _with(recommender: Any) -> Any:
    return replace(toy_release(), model=recommender)


def test_the_event_loop_stays_free_while_the_model_works(make_service: MakeService):
    started, go_on = threading.Event(), threading.Event()

    class Slow(ToyModel):
        def recommend(self, *args: Any, **rest: Any) -> Any:
            started.set()
            assert go_on.wait(120)
            return super().recommend(*args, **rest)

    async def story() -> None:
        service = make_service(_with(Slow()))
        slow = asyncio.create_task(ask(service, "ann"))
        await asyncio.to_thread(started.wait)
        assert statuses(await post(service, "ann", event())) == [("accepted", None)]  # not even the user's lock is held
        go_on.set()
        await slow
        await service.close()

    asyncio.run(story())


def test_request_events_serve_one_answer_only(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        given_events = [{"item_id": "item-5", "timestamp": 50}, {"item_id": "item-6", "timestamp": 60}]
        stranger = await ask(service, "eve", events=given_events, request_time=100)
        await post(service, "ann", event("item-5", 50), event("item-6", 60))
        known = await ask(service, "ann", request_time=100)
        assert stranger.items == known.items
        assert (stranger.num_events, stranger.state_source) == (2, "none")
        assert (await service.questions.state("eve")).num_events == 0
        assert (await ask(service, "eve")).num_events == 0
        more = await ask(
            service, "ann", events=[*given_events, {"item_id": "item-7", "timestamp": 55}], request_time=100
        )
        assert more.num_events == 3  # two it knew already, one earlier than its last
        assert (await ask(service, "ann", request_time=100)).items == known.items
        await service.close()

    asyncio.run(story())


def test_lists_divide_the_items(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        await post(service, "ann", *(event(f"item-{n}", n) for n in range(5)))
        names = {
            which: {item.item_id for item in (await ask(service, "ann", k=1000, list=which)).items}
            for which in ("all", "again", "new")
        }
        assert names["again"] == {f"item-{n}" for n in range(5)}
        assert names["again"] | names["new"] == names["all"]
        assert not names["again"] & names["new"]
        unseen = await ask(service, "ann", k=1000, exclude_seen=True)
        assert {item.item_id for item in unseen.items} == names["new"]
        await service.close()

    asyncio.run(story())


def test_request_time_is_the_servers_clock_or_none_or_as_given(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        await post(service, "ann", event())
        missing, none = await ask(service, "ann"), await ask(service, "ann", request_time=None)
        given_time, before = await ask(service, "ann", request_time=NOW), await ask(service, "ann", request_time=5)
        assert (missing.request_time, none.request_time, given_time.request_time) == (NOW, None, NOW)
        assert missing.items == given_time.items != none.items
        assert before.items == (await ask(service, "ann", request_time=100)).items  # before the last event: gap 0
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize("clock", ["relative", "ordinal"])
def test_clocks_that_are_not_unix_know_no_future_and_no_server_clock(make_service: MakeService, clock: Any):
    async def story() -> None:
        service = make_service(toy_release(clock=clock))
        assert statuses(await post(service, "ann", event("item-1", NOW * 1000))) == [("accepted", None)]
        assert statuses(await post(service, "ann", event("item-1", 2**53))) == [("rejected", "time-out-of-range")]
        assert (await ask(service, "ann")).request_time is None
        if clock == "ordinal":
            with pytest.raises(InvalidRequestError, match="no clock"):
                await ask(service, "ann", request_time=5)
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("given_event", "reason"),
    [
        (event("a", NOW + 300), None),
        (event("a", NOW + 301), "time-in-future"),
        (event("a", 2**80), "time-out-of-range"),
        (event("a", 0), None),
        (event("a" * 256), None),
        (event("a" * 257), "item-id-too-long"),
        (event("é" * 129), "item-id-too-long"),
        (event("a", event_id="b" * 64), None),
        (event("a", event_id="b" * 65), "event-id-too-long"),
        (event("a", event_id=""), "empty-event-id"),
        (event("a", event_id="\0"), "invalid-event-id"),
        (event("a", event_type="c" * 64), None),
        (event("a", event_type="c" * 65), "event-type-too-long"),
        (event("naïve \N{SNOWMAN} '; DROP TABLE events; --"), None),
        (event("nul\0inside"), None),
    ],
)
def test_an_event_is_kept_or_rejected_for_a_reason(
    make_service: MakeService, given_event: EventMessage, reason: str | None
):
    async def story() -> None:
        service = make_service()
        expected = ("accepted", None) if reason is None else ("rejected", reason)
        assert statuses(await post(service, "ann", given_event)) == [expected]
        stored = service.log.read(Owner("ann"))[1]
        assert [kept.item_id for kept in stored] == ([given_event.item_id] if reason is None else [])
        await service.close()

    asyncio.run(story())


def test_limits_hold_at_the_limit_and_one_past_it(make_service: MakeService):
    async def story() -> None:
        service = make_service(settings=ServeSettings(limits=Limits(events_per_call=3, k=4, user_id_bytes=5)))
        three = [event(f"item-{n}", n) for n in range(3)]
        assert len((await post(service, "ann", *three)).results) == 3
        with pytest.raises(InvalidRequestError, match="at most 3"):
            await post(service, "ann", *three, event())
        given_events = [{"item_id": "a", "timestamp": n} for n in range(4)]
        assert (await ask(service, "eve", k=1, events=given_events[:3])).num_events == 3
        with pytest.raises(InvalidRequestError, match="at most 3"):
            await ask(service, "eve", k=1, events=given_events)
        assert len((await ask(service, "ann", k=4)).items) == 4
        for k in (0, 5, -1, 2**70):
            with pytest.raises(InvalidRequestError, match="expected 1 to 4"):
                await ask(service, "ann", k=k)
        await ask(service, "abcde", k=1)
        for user_id in ("", "abcdef", "ééé", "a\n"):
            with pytest.raises(InvalidRequestError, match="user id"):
                await ask(service, user_id, k=1)
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize("fields", [{"list": "again", "exclude_seen": True}, {"list": "new", "exclude_seen": False}])
def test_a_question_that_contradicts_itself_is_refused(make_service: MakeService, fields: dict[str, Any]):
    service = make_service()
    with pytest.raises(InvalidRequestError, match="contradicts"):
        asyncio.run(ask(service, "ann", **fields))


def test_a_bad_event_in_a_question_is_named(make_service: MakeService):
    service = make_service()
    given_events = [{"item_id": "a", "timestamp": 1}, {"item_id": "a", "timestamp": -1}]
    with pytest.raises(InvalidRequestError, match=r"events\[1\]: negative-time"):
        asyncio.run(ask(service, "ann", events=given_events))


def test_long_histories_are_flagged(make_service: MakeService):
    async def story() -> None:
        service = make_service()  # the toy says it was trained on 1,000 events
        await post(service, "ann", *(event("item-1", n) for n in range(1000)))
        assert not (await ask(service, "ann")).beyond_trained_length
        await post(service, "ann", event("item-1", 1000))
        assert (await ask(service, "ann")).beyond_trained_length
        await service.close()

    asyncio.run(story())


def test_unready_while_draining_or_unwritable(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        assert service.unready() is None
        service.log.writer.healthy = False
        assert service.unready() == "event log cannot be written"
        while service.unready():  # asking tries the log again
            await asyncio.sleep(0.01)
        await service.close()
        assert service.unready() == "draining"

    asyncio.run(story())


def test_an_audit_finds_a_state_that_is_wrong_and_drops_it(make_service: MakeService, caplog: pytest.LogCaptureFixture):
    async def story() -> None:
        service = make_service(settings=ServeSettings(audit_share=1.0))
        await post(service, "ann", *(event(f"item-{n}", n) for n in range(9)))
        await ask(service, "ann")
        await ask(service, "ann")
        while not service.metrics.text().count(b'ksa_audits_total{result="equal"} 1.0'):
            await asyncio.sleep(0.01)
        record = service.served.states.held(Owner("ann"))
        assert record is not None
        wrong = replace(record, seq=record.seq, state=replace(record.state, seen=frozenset({"item-77"})))
        service.store.drop(Owner("ann"))
        service.store.put(wrong)
        await ask(service, "ann")
        while service.served.states.held(Owner("ann")) is not None:
            await asyncio.sleep(0.01)
        assert (await ask(service, "ann")).state_source == "rebuilt"
        await service.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(story())
    assert "a state differs from its log" in caplog.text
