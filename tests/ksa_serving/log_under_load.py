"""A child process that keeps events until it is killed; `test_kill.py` starts it. Imports no torch.

    python log_under_load.py DIRECTORY SEED [POINT]

It prints `ready`, then for each acknowledged call one line of JSON: the user and [event number, outcome] pairs, or
`forgotten` for a user who was deleted. Event numbers name events (`story_event`), so the parent knows what was
acknowledged. Calls run at once, some events are sent again, some are late, and states are asked for in between. At
POINT, as `ksa_serving.log_entries:LogEntries.save/after/3`, it kills itself: after the third call of that function, or
the first one after it that does not fail.
"""

import asyncio
import importlib
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from ksa_serving.command import open_store
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release

NUM_USERS = 5
STRIDE = 10_000
"""Events of one sender, at most; times stay in the past for a thousand kills."""


def story_event(number: int) -> NewEvent:
    """Return event `number` of user `number` mod 5: every second one has an id, every seventh lies far back."""
    timestamp = 1_000_000 + number // 3 - (500 if number % 7 == 0 else 0)
    # The item names the event, so that events without an id are told apart too.
    return NewEvent(f"item-{number}", timestamp, f"e{number}" if number % 2 else None, ("view", "buy")[number % 2])


def open_service(directory: Path) -> Service:
    """Return a service with a cold store, memory too small for all users, and a little to write down often."""
    release, settings = (
        toy_release(),
        ServeSettings(state_bytes=4000, spill_events=8, cold_bytes=2 * 10**7, purge_after_seconds=0.05),
    )
    log = EventLog(directory, "arrival")
    models = {release.state_fingerprint: release.model}
    store = open_store("lmdb", directory, models, log, settings)
    return Service(release, log, store, settings, models=models)


async def keep_events(service: Service, draw: random.Random, number: int) -> None:
    sent: list[int] = []
    while True:
        user = draw.randrange(NUM_USERS)
        new = [n * NUM_USERS + user for n in range(number, number + draw.randint(1, 6))]
        number += len(new)
        again = [old for old in draw.sample(sent, min(5, len(sent))) if old % NUM_USERS == user]
        numbers = new + again
        events = [story_event(n) for n in numbers]
        wire = [EventMessage(event.item_id, event.timestamp, event.event_id, event.event_type) for event in events]
        answer = await service.events.post(f"user-{user}", EventsRequest(wire))
        outcomes = [[n, result.status] for n, result in zip(numbers, answer.results)]
        print(json.dumps([f"user-{user}", outcomes]), flush=True)
        sent += new
        if draw.random() < 0.4:
            await service.questions.recommend(f"user-{user}", RecommendRequest(k=1))


async def delete_users(service: Service, seed: int) -> None:
    for number in itertools.count():
        user = f"doomed-{seed}-{number}"
        for start in range(0, 40, 10):
            wire = [EventMessage(f"{user}-item-{n}", 1_000_000 + n) for n in range(start, start + 10)]
            await service.events.post(user, EventsRequest(wire))
            await service.questions.recommend(user, RecommendRequest(k=1))
        await service.events.forget(user)
        print(json.dumps([user, "forgotten"]), flush=True)
        await asyncio.sleep(0.02)


def arm(point: str) -> None:
    """Kill this process at a point."""
    where, when, nth = point.split("/")
    module, path = where.split(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    step, calls = getattr(owner, name), itertools.count(1)

    def deadly(*given: Any, **named: Any) -> Any:
        last = next(calls) >= int(nth)  # the call itself may fail, as one to a store that is being compacted
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(*given, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


async def main(directory: Path, seed: int) -> None:
    service = open_service(directory)
    print("ready", flush=True)
    senders = range(seed * 4, seed * 4 + 4)
    keeping = (keep_events(service, random.Random(n), n * STRIDE) for n in senders)
    await asyncio.gather(delete_users(service, seed), *keeping)


def run(directory: str, seed: str, *points: str) -> None:
    for point in points:
        arm(point)
    asyncio.run(main(Path(directory), int(seed)))


if __name__ == "__main__":
    run(*sys.argv[1:])
