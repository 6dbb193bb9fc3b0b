"""Where a history has an item and what its spans are: as a list has it, and in the service's explanations."""

import random
from pathlib import Path
from typing import get_args

import httpx
import pytest

from ksa_serving.event_log import EventLog
from ksa_serving.events import Meeting, NewEvent, Owner
from recsys_ksa.order import TieKind


@pytest.mark.parametrize("tie", get_args(TieKind))
def test_meetings_are_where_the_one_order_has_them(tmp_path: Path, seed: int, tie: TieKind):
    draw, log, ann = random.Random(seed), EventLog(tmp_path, tie), Owner("ann")
    ids = iter(range(10**6))
    for _ in range(8):
        span = draw.choice([3, 40, 10**6])  # many ties, some, none
        kept = [f"e{next(ids)}" for _ in range(draw.randrange(1, 60))]
        log.append(ann, [NewEvent(draw.choice("abcd"), draw.randrange(span), event_id) for event_id in kept])
        for event_id in draw.sample(kept, len(kept) // 5):
            log.retract(ann, event_id).result()
        log.append(Owner("bob"), [NewEvent("a", draw.randrange(span))])
        with log.view(ann) as view:
            history = view.newest(view.head.num_events)
            for item in "abcde":
                wanted = [Meeting(n, event.timestamp) for n, event in enumerate(history) if event.item_id == item]
                assert view.meetings(item) == wanted
            firsts = [draw.randrange(len(history) + 3) for _ in range(draw.randrange(8))]
            spans = [(first, first + draw.randrange(20)) for first in firsts]  # in any order, some beyond the end
            assert view.spans(spans) == [history[first : last + 1] for first, last in spans]
    log.close()


def test_an_explanation_knows_which_chunks_have_the_item(client: httpx.Client, seed: int):
    """The toy model tells how many events of the item it was given in each chunk."""
    draw = random.Random(seed)
    for turn in range(5):
        events = [
            {"item_id": f"item-{draw.randrange(4)}", "timestamp": draw.randrange(1000), "event_id": f"{turn}-{n}"}
            for n in range(draw.randrange(1, 40))
        ]
        client.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
        for item in ("item-0", "item-3", "item-9"):
            asked = {"item_id": item, "chunks": 64}
            answer = client.post("/v1/users/ann/explain", json=asked).raise_for_status().json()
            assert sum(len(chunk["events"]) for chunk in answer["chunks"]) == answer["num_events"]
            for chunk in answer["chunks"]:
                assert chunk["own_item_change"] == sum(event["item_id"] == item for event in chunk["events"])
