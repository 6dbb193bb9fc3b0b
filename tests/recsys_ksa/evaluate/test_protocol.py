import numpy as np
import pytest

from recsys_ksa.errors import ProtocolError
from recsys_ksa.evaluate.protocol import (
    ask,
    check_honest,
    check_request_time,
    default_protocol,
    held_out_start,
    honest_protocols,
    request_times,
)
from recsys_ksa.evaluate.ranking import chunks

DAY = 86_400


def events_of(histories, user: int) -> list[tuple[int, int]]:
    rows = histories.rows(user)
    return list(zip(histories.item_index[rows].tolist(), histories.timestamp[rows].tolist()))


def slow_questions(histories, protocol: str, part: str, test_days: int = 20, valid_days: int = 10) -> list[tuple]:
    """(user, known events, target time, last known time, targets), from the protocol's words alone."""
    end = int(histories.timestamp.max())
    test_start = end - test_days * DAY + 1
    found = []
    for user in range(histories.num_users):
        events = events_of(histories, user)
        times = sorted({time for _, time in events})
        if protocol == "loo-classic":
            if len(events) < 3:
                continue
            at = len(events) - (1 if part == "test" else 2)
            found.append((user, at, events[at][1], events[at - 1][1], {events[at][0]}))
            continue
        if protocol == "loo":
            asked = times[-1:] if part == "test" else times[-2:-1]
            asked = asked if len(times) >= 3 else []
        elif part == "test":
            asked = [time for time in times if time >= test_start][:50]
        else:
            asked = [time for time in times if test_start - valid_days * DAY <= time < test_start][:50]
        for time in asked:
            known = [event for event in events if event[1] < time]
            last = known[-1][1] if known else time
            found.append((user, len(known), time, last, {item for item, at in events if at == time}))
    return found


@pytest.mark.parametrize("part", ["test", "valid"])
@pytest.mark.parametrize("protocol", ["loo", "loo-classic", "global"])
def test_questions_equal_a_slow_loop(protocol, part, rng, random_histories):
    histories = random_histories(rng, users=30)
    questions = ask(histories, protocol, part)
    found = [
        (
            int(questions.user[q]),
            int(questions.cut[q]),
            int(questions.timestamp[q]),
            int(questions.last_timestamp[q]),
            set(questions.target_item[questions.target_offsets[q] : questions.target_offsets[q + 1]].tolist()),
        )
        for q in range(len(questions))
    ]
    assert found == slow_questions(histories, protocol, part)
    assert questions.number.tolist() == list(range(len(questions)))


def test_global_asks_a_users_first_fifty_timestamps(make_histories):
    times = [(1, 0), *((item % 5 + 1, 30 * DAY + item) for item in range(80)), (2, 40 * DAY)]
    questions = ask(make_histories([times]), "global")
    assert questions.timestamp.tolist() == [30 * DAY + item for item in range(50)]


def test_a_question_before_any_event_is_asked_and_shown_no_time(make_histories):
    histories = make_histories([[(1, 0), (2, 90 * DAY)], [(3, 85 * DAY), (4, 86 * DAY)]])
    questions = ask(histories, "global")
    first = questions.user.tolist().index(1)
    assert questions.cut[first] == 0
    for variant in ("target", "drawn", "none"):
        assert not request_times(questions, variant, histories.user_ids())[1][first]


def test_a_slice_keeps_its_targets_and_numbers(rng, random_histories):
    questions = ask(random_histories(rng, users=60), "global")  # of 20, one draw in 5,000 asks fewer than five
    part = questions.slice(2, 5)
    assert part.number.tolist() == [2, 3, 4]
    assert (
        part.target_item.tolist()
        == questions.target_item[questions.target_offsets[2] : questions.target_offsets[5]].tolist()
    )
    keep = np.zeros(61, dtype=bool)
    keep[questions.user[4]] = True
    few = questions.of_users(keep)
    assert set(few.user.tolist()) == {int(questions.user[4])}
    assert few.target_offsets[-1] == len(few.target_item)


def test_chunks_hold_every_question_once(rng, random_histories, monkeypatch):
    questions = ask(random_histories(rng), "global")
    monkeypatch.setattr("recsys_ksa.evaluate.ranking.MAX_EVENTS", 30)
    numbers = [number for chunk in chunks(questions, 12) for number in chunk.number.tolist()]
    assert numbers == list(range(len(questions)))


def test_drawn_times_lie_between_last_event_and_target_and_depend_on_neither_order_nor_batch(make_histories):
    histories = make_histories([[(1, 0), (2, 50 * DAY), (3, 50 * DAY + gap)] for gap in range(300)])
    questions = ask(histories, "loo")
    ids = histories.user_ids()
    drawn, shown = request_times(questions, "drawn", ids)
    assert np.all((drawn >= questions.last_timestamp) & (drawn <= questions.timestamp))
    assert shown.all()
    part, _ = request_times(questions.slice(100, 120), "drawn", ids)
    assert part.tolist() == drawn[100:120].tolist()
    # Uniform, both ends included: gaps of 1 second draw both.
    share = (drawn - questions.last_timestamp)[10:] / questions.gap[10:]
    assert 0.45 < share.mean() < 0.55


def test_target_and_no_request_time(make_histories):
    questions = ask(make_histories([[(1, 0), (2, 5), (3, 9)]]), "loo")
    assert [array.tolist() for array in request_times(questions, "target", ["u0"])] == [[9], [True]]
    assert [array.tolist() for array in request_times(questions, "none", ["u0"])] == [[5], [False]]


@pytest.mark.parametrize("span", ["loo", "loo-classic", "global", "any"])
@pytest.mark.parametrize("protocol", ["loo", "loo-classic", "global"])
def test_a_protocol_whose_held_out_events_were_trained_on_is_refused(
    span, protocol, rng, random_histories, make_dataset
):
    dataset = make_dataset(random_histories(rng))
    held_out = held_out_start(dataset.histories, protocol)
    if span == protocol or span == "any":
        check_honest(dataset, protocol, span)
        return
    leaks = (held_out_start(dataset.histories, span) > held_out).any()
    if leaks:
        with pytest.raises(ProtocolError, match="trained on validation or test events"):
            check_honest(dataset, protocol, span)


def test_loo_after_training_on_all_but_two_events_is_refused(make_histories, make_dataset):
    dataset = make_dataset(make_histories([[(1, 0), (2, 5), (3, 9), (4, 9)]]))
    with pytest.raises(ProtocolError, match=r"1 of 1 users.*loo-classic"):
        check_honest(dataset, "loo", "loo-classic")
    assert honest_protocols(dataset, "loo-classic")["loo-classic"] is None


def test_loo_classic_is_refused_where_the_source_sorted_its_ties(rng, random_histories, make_dataset):
    histories = random_histories(rng)
    with pytest.raises(ProtocolError, match=r"P\(next id > id \| tie\) = 1\.0000"):
        check_honest(make_dataset(histories, tie="arrival", is_artefact=True), "loo-classic", "any")
    with pytest.raises(ProtocolError, match="hash order"):
        check_honest(make_dataset(histories, tie="hash"), "loo-classic", "any")


def test_an_ordinal_clock_has_neither_global_nor_request_times(rng, random_histories, make_dataset):
    dataset = make_dataset(random_histories(rng), clock="ordinal")
    with pytest.raises(ProtocolError, match="ordinal"):
        check_honest(dataset, "global", "any")
    with pytest.raises(ProtocolError, match="ordinal"):
        check_request_time("drawn", dataset.manifest)
    check_request_time("none", dataset.manifest)
    assert default_protocol(dataset, "any") == "loo"


def test_a_relative_clock_allows_everything(rng, random_histories, make_dataset):
    dataset = make_dataset(random_histories(rng), clock="relative")
    assert all(reason is None for reason in honest_protocols(dataset, "any").values())
    check_request_time("drawn", dataset.manifest)


def test_the_default_protocol_follows_the_training_span(rng, random_histories, make_histories, make_dataset):
    dataset = make_dataset(random_histories(rng))
    assert default_protocol(dataset, "loo") == "loo"
    assert default_protocol(dataset, "any") == "global"
    # A log shorter than its test days has nothing before the cut.
    assert default_protocol(make_dataset(make_histories([[(1, 0), (2, DAY), (3, 2 * DAY)]])), "any") == "loo"


def test_a_protocol_without_questions_is_refused(make_histories):
    with pytest.raises(ProtocolError, match="every history is too short"):
        ask(make_histories([[(1, 0), (2, 0)]]), "loo")
