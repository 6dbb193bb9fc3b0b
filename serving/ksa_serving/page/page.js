// The page for people: one user's history, what comes next, and why. Text enters the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const shown = { user: null, ranks: new Map(), numEvents: 0, lastTime: null, chunkSize: 1, windowChunks: 0 };
const MOST_CHUNKS = 240;
const MOST_EVENTS = 60;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

async function call(method, path, body) {
  const headers = { "content-type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.authorization = `Bearer ${token}`;
  const began = performance.now();
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const value = await answer.json();
  if (answer.status === 401) {
    await askForToken();
    return call(method, path, body);
  }
  if (!answer.ok) throw new Error(value.detail || `${answer.status}`);
  value.milliseconds = performance.now() - began;
  return value;
}

function askForToken() {
  const dialog = $("token-dialog");
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    sessionStorage.setItem("token", $("token").value);
    done();
  }, { once: true }));
}

// An id of dots alone would be taken for a relative path.
const userPath = (verb = "") => `/v1/users/${encodeURIComponent(shown.user).replaceAll(".", "%2E")}${verb}`;
const bytes = (n) => n < 1024 ? `${n} B` : n < 1048576 ? `${(n / 1024).toFixed(1)} KiB` : `${(n / 1048576).toFixed(1)} MiB`;
const small = (n) => Math.abs(n) >= 0.0005 ? n.toFixed(3) : n.toExponential(0);
const day = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");

function requestTime() {
  const clock = $("clock").value;
  if (clock === "none") return { request_time: null };
  if (clock === "day" && shown.lastTime !== null) return { request_time: shown.lastTime + 86400 };
  return {};
}

function eventTime() {
  const now = Math.floor(Date.now() / 1000);
  return $("clock").value === "now" ? now : shown.lastTime === null ? now : shown.lastTime + 60;
}

// Sortable, so that events of one second keep their order.
function eventId() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return `${Date.now().toString(36).padStart(9, "0")}-${random[0].toString(36)}${random[1].toString(36)}`;
}

async function attempt(work) {
  $("message").hidden = true;
  document.body.dataset.busy = "1";
  try {
    await work();
  } catch (error) {
    $("message").textContent = error.message;
    $("message").hidden = false;
  } finally {
    delete document.body.dataset.busy;
  }
}

async function open(user) {
  shown.user = user;
  shown.ranks = new Map();
  $("user").value = user;
  $("why").hidden = true;
  const recent = [user, ...JSON.parse(localStorage.getItem("recent") || "[]").filter((name) => name !== user)].slice(0, 12);
  localStorage.setItem("recent", JSON.stringify(recent));
  $("recent").replaceChildren(...recent.map((name) => element("option", { value: name })));
  await showHistory();
  const age = shown.lastTime === null ? 0 : Date.now() / 1000 - shown.lastTime;
  $("clock").value = age > 30 * 86400 ? "day" : "now";
  await showAnswer();
  $("main").hidden = false;
  $("forget").hidden = false;
}

async function showHistory() {
  const history = await call("GET", userPath(`/events?limit=1000`));
  Object.assign(shown, { numEvents: history.num_events, chunkSize: history.chunk_size, windowChunks: history.window_chunks });
  const newest = history.events.at(-1);
  shown.lastTime = newest ? newest.timestamp : null;
  drawChunks(new Set());
  $("events").replaceChildren(...history.events.slice(-MOST_EVENTS).reverse().map((event) => element(
    "li", { "data-index": event.index },
    element("b", { title: event.item_id }, event.title || event.item_id),
    element("time", {}, day(event.timestamp)), event.event_type ? ` ${event.event_type}` : "",
  )));
}

function drawChunks(reasons) {
  const { numEvents: n, chunkSize: k, windowChunks: w } = shown;
  const chunks = Math.ceil(n / k);
  const current = n ? Math.floor((n - 1) / k) : 0;
  const first = Math.max(0, chunks - MOST_CHUNKS);
  const drawn = [];
  if (first) drawn.push(element("span", { class: "more" }, `${first} older chunks, as summaries …`));
  for (let c = first; c < chunks; c += 1) {
    const events = Math.min(k, n - c * k);
    const kind = c < current - w ? "summary" : events < k ? "open" : "window";
    const marks = kind === "summary" ? 1 : events;
    const span = element("span", {
      class: `chunk ${kind}${reasons.has(c) ? " reason" : ""}`, "data-chunk": c,
      title: `chunk ${c}: events ${c * k} to ${c * k + events - 1}, ${kind === "summary" ? "kept as summaries" : "kept as events"}`,
    });
    for (let mark = 0; mark < marks; mark += 1) span.append(element("i"));
    drawn.push(span);
  }
  $("timeline").replaceChildren(...drawn);
}

async function showAnswer() {
  const answer = await call("POST", userPath("/recommend"), { k: 12, list: $("list").value, ...requestTime() });
  const state = await call("GET", userPath("/state"));
  const titles = new Map();
  if (answer.items.length) {
    const named = await call("POST", "/v1/items:titles", { item_ids: answer.items.map((item) => item.item_id) });
    for (const item of named.items) titles.set(item.item_id, item.title);
  }
  const before = shown.ranks;
  shown.ranks = new Map(answer.items.map((item, rank) => [item.item_id, rank]));
  $("items").replaceChildren(...answer.items.map((item, rank) => {
    const was = before.get(item.item_id);
    const moved = before.size === 0 || was === rank ? "" : was === undefined ? "new" : was > rank ? `▲ ${was - rank}` : `▼ ${rank - was}`;
    const title = titles.get(item.item_id);
    return element(
      "li", { "data-item": item.item_id },
      element("span", { class: "rank" }, `${rank + 1}`),
      element(
        "button", { type: "button", class: "add", title: "Add this as an event", onclick: () => attempt(() => add(item.item_id)) },
        element("span", { class: "name" }, title || item.item_id), title ? element("span", { class: "id" }, item.item_id) : "",
      ),
      element("span", { class: moved.startsWith("▼") ? "move down" : "move" }, moved),
      element("span", { class: "score" }, item.score.toFixed(3)),
      element("button", { type: "button", class: "why", onclick: () => attempt(() => explain(item.item_id, title)) }, "why?"),
    );
  }));
  if (!answer.items.length) $("items").replaceChildren(element("li", {}, "", "No items in this list."));
  $("facts").textContent = `${answer.num_events.toLocaleString("en")} events · answered in ${answer.milliseconds.toFixed(1)} ms · `
    + `state ${bytes(state.nbytes)} K/V + ${bytes(state.seen_nbytes)} own items · from ${answer.state_source} · `
    + `model ${answer.model_version.slice(0, 12)}${answer.degraded ? " · degraded: the state is being computed" : ""}`
    + `${answer.beyond_trained_length ? " · longer than any trained history" : ""}`;
}

async function add(item) {
  const type = $("event-type").value.trim();
  const event = { item_id: item, timestamp: eventTime(), event_id: eventId(), ...(type ? { event_type: type } : {}) };
  const kept = await call("POST", userPath("/events"), { events: [event] });
  const [result] = kept.results;
  if (result.status === "rejected") throw new Error(`The event was rejected: ${result.reason}.`);
  await showHistory();
  await showAnswer();
  $("why").hidden = true;
}

async function explain(item, title) {
  const answer = await call("POST", userPath("/explain"), { item_id: item, chunks: 6, ...requestTime() });
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  $("why-summary").textContent = `${title || item}: score ${answer.score.toFixed(3)}, of which `
    + `${answer.own_item_bias.toFixed(3)} for having had it before. ${percent(answer.summary_attention)} of the attention `
    + `went to the far past, through summaries; the rest to the newest events.`;
  $("reasons").replaceChildren(...answer.chunks.map((chunk) => {
    const names = [...new Set(chunk.events.map((event) => event.title || event.item_id))];
    const signed = (value) => `${value >= 0 ? "+" : ""}${small(value)}`;
    const had = chunk.own_item_change === 0 ? "" : ` (${signed(chunk.own_item_change)} for having had it)`;
    const change = chunk.score_change === null ? "" : `, score ${signed(chunk.score_change)}${had}`;
    const bar = element("span", { class: `bar ${chunk.seen_as}` });
    bar.style.width = `${Math.max(1, 100 * chunk.attention)}%`;
    return element(
      "li", { "data-chunk": chunk.chunk }, bar,
      `${percent(chunk.attention)}${change} · ${day(chunk.first_time)} to ${day(chunk.last_time)} · seen as ${chunk.seen_as} · `,
      element("span", { class: "id" }, names.slice(0, 5).join(", ") + (names.length > 5 ? " …" : "")),
    );
  }));
  drawChunks(new Set(answer.chunks.map((chunk) => chunk.chunk)));
  $("why").hidden = false;
}

let typing = 0;
async function search() {
  const turn = ++typing;
  const text = $("search").value.trim();
  await new Promise((done) => setTimeout(done, 150));
  if (turn !== typing) return;
  if (!text) return $("found").replaceChildren();
  const found = await call("GET", `/v1/items?most=12&text=${encodeURIComponent(text)}`);
  if (turn !== typing) return;
  $("found").replaceChildren(...found.items.map((item) => element(
    "li", {}, element("button", { type: "button", onclick: () => attempt(() => add(item.item_id)) }, item.title || item.item_id),
  )));
}

$("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => open($("user").value));
});
$("new-user").addEventListener("click", () => attempt(() => open(`visitor-${eventId().slice(-6)}`)));
$("forget").addEventListener("click", () => attempt(async () => {
  if (!confirm("Delete all events and states of this user?")) return;
  await call("DELETE", userPath());
  await open(shown.user);
}));
for (const id of ["list", "clock"]) $(id).addEventListener("change", () => attempt(showAnswer));
$("search").addEventListener("input", () => attempt(search));
for (const id of ["options", "search-form"]) $(id).addEventListener("submit", (event) => event.preventDefault());
$("recent").replaceChildren(...JSON.parse(localStorage.getItem("recent") || "[]").map((name) => element("option", { value: name })));
const asked = new URLSearchParams(location.search).get("user");
if (asked) attempt(() => open(asked));
