"""The page for people, in a real headless Chromium."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksa_serving.service import Service

pytestmark = pytest.mark.service
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
NOW = 1_700_000_000
PATIENCE_MS = 180_000
"""What the page does takes no second; a machine with other work may need many."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium; packaging/system.sh installs it, or set CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, make_service: Callable[..., Service], serve_in_thread: Any) -> Iterator[Any]:
    """The page of a service whose user ann has 30 events: 7 chunks of 4, and 2 events more."""
    service = make_service()
    with serve_in_thread(service) as client:
        events = [{"item_id": f"item-{n % 9}", "timestamp": NOW - 3000 + 100 * n} for n in range(30)]
        client.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
        context = browser.new_context(base_url=str(client.base_url), viewport={"width": 1200, "height": 900})
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        # The service's clock stands at NOW; so does the browser's.
        page.clock.set_fixed_time(NOW)
        page.goto("/")
        yield page
        assert page.faults == []
        context.close()


def open_user(page: Any, user: str) -> None:
    page.fill("#user", user)
    page.click("#user-form button[type=submit]")
    page.wait_for_selector("#items li")
    page.wait_for_selector("body:not([data-busy])")


def test_a_history_is_drawn_as_the_state_divides_it(page: Any):
    open_user(page, "ann")
    kinds = [re.sub("chunk ", "", span.get_attribute("class")) for span in page.query_selector_all(".chunk")]
    assert kinds == ["summary"] * 5 + ["window"] * 2 + ["open"]  # the toy's window: 2 chunks before the last event's
    assert page.locator(".chunk.open i").count() == 2
    assert page.locator("#events li").count() == 30
    facts = page.inner_text("#facts")
    assert "30 events" in facts
    assert re.search(r"answered in [\d.]+ ms", facts)
    assert "state" in facts


def test_a_click_appends_an_event_and_the_answer_changes(page: Any):
    open_user(page, "ann")
    first = [li.get_attribute("data-item") for li in page.query_selector_all("#items li")]
    assert len(first) == 12
    page.click("#items li:nth-child(3) .add")
    page.locator("#facts", has_text=re.compile(r"^31 events")).wait_for()
    page.wait_for_selector("body:not([data-busy])")
    after = [li.get_attribute("data-item") for li in page.query_selector_all("#items li")]
    assert after != first
    assert page.locator(".move:not(:empty)").count() > 0  # what moved is marked
    assert page.inner_text("#events li:first-child b") == f"Item {first[2].removeprefix('item-')}"


def test_an_explanation_points_at_chunks_dates_and_items(page: Any):
    open_user(page, "ann")
    page.click("#items li:first-child .why")
    page.wait_for_selector("#reasons li")
    assert page.locator("#reasons li").count() == 6
    assert page.locator(".chunk.reason").count() == 6
    assert "attention went to the far past" in page.inner_text("#why-summary")
    dated = r"20\d\d-\d\d-\d\d \d\d:\d\d to .* seen as (summary|events) .*Item \d"
    assert re.search(dated, page.inner_text("#reasons"))


def test_a_new_user_begins_with_an_answer_and_an_item_found_by_its_title(page: Any):
    page.click("#new-user")
    page.wait_for_selector("#items li")
    assert page.inner_text("#facts").startswith("0 events")
    page.fill("#search", "item-17")
    page.click("#found button >> nth=0")
    page.locator("#facts", has_text=re.compile(r"^1 events")).wait_for()


def test_lists_and_deletion(page: Any):
    open_user(page, "ann")
    page.select_option("#list", "again")
    page.locator("#items li:nth-child(10)").wait_for(state="detached")
    page.wait_for_selector("body:not([data-busy])")
    assert page.locator("#items li").count() == 9
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#forget")
    page.locator("#facts", has_text=re.compile(r"^0 events")).wait_for()


def test_text_of_users_and_items_never_becomes_markup(page: Any):
    attack = "<img src=x onerror=document.title='owned'>"
    open_user(page, attack)
    page.evaluate(
        """async (item) => fetch(`/v1/users/${encodeURIComponent(item).replaceAll('.', '%2E')}/events`, {method: 'POST',
        body: JSON.stringify({events: [{item_id: item, timestamp: 5}]})})""",
        attack,
    )
    open_user(page, attack)
    assert page.inner_text("#events li:first-child b") == attack
    assert page.title() == "recsys_ksa: a user's whole life"


def test_the_page_loads_nothing_from_elsewhere(page: Any):
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.reload()
    open_user(page, "ann")
    base = page.evaluate("location.origin")
    assert requested
    assert all(url.startswith(base) for url in requested)


def test_the_pages_files_are_part_of_the_package():
    import ksa_serving

    folder = Path(ksa_serving.__file__).parent / "page"
    assert {file.name for file in folder.iterdir()} == {"page.html", "page.js", "page.css"}
