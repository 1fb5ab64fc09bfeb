// The console: a client of the gateway protocol (docs/protocol.md) like any other, in a page.
//
// What the gateway tells is kept in maps by id, so that what is told twice is there once, and the
// page is painted from them, once per frame at most. After every connect it subscribes first and
// reads then, so that nothing falls in between. Text from the wire is only ever set as text.

// --- Parts ---------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const page = document.body.dataset;

const byId = (id) => document.getElementById(id);

function make(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const [property, value] of Object.entries(properties)) {
        if (property in node) node[property] = value;
        else node.setAttribute(property, value);
    }
    node.append(...children);
    return node;
}

function setText(node, text) {
    if (node.textContent !== text) node.textContent = text;
}

// Make the children of a list those of `items`, in their order. One element stands for one key for
// as long as the key is there: it keeps its focus, and what was opened in it. An item that is the
// same object as before is not painted again. Of two items with one key the first is there.
function arrange(list, items, keyOf, create, update) {
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    const keys = new Map();
    for (const item of items) if (!keys.has(keyOf(item))) keys.set(keyOf(item), item);
    const present = new Map();
    for (const node of [...list.children]) {
        if (keys.has(node.dataset.key)) present.set(node.dataset.key, node);
        else node.remove();
    }
    let next = list.firstElementChild;
    for (const [key, item] of keys) {
        let node = present.get(key);
        if (!node) {
            node = create(item);
            node.dataset.key = key;
        }
        if (node === next) next = next.nextElementSibling;
        else list.insertBefore(node, next);
        if (node.item !== item) update(node, item);
        node.item = item;
    }
    if (focused?.isConnected && focused !== document.activeElement) {
        focused.focus({ preventScroll: true });
    }
}

const counted = (count, singular, plural = `${singular}s`) =>
    `${count.toLocaleString("en")} ${count === 1 ? singular : plural}`;

const firstLine = (text) => text.trim().split("\n", 1)[0];

function clock(ts) {
    const at = new Date(ts);
    const isToday = at.toDateString() === new Date().toDateString();
    const time = at.toLocaleTimeString("en-GB");
    return isToday
        ? time
        : `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

const moment = (ts) =>
    make(
        "time",
        { dateTime: new Date(ts).toISOString(), title: new Date(ts).toString() },
        clock(ts),
    );

function runTime(milliseconds) {
    const seconds = milliseconds / 1000;
    if (seconds < 1) return `${milliseconds} ms`;
    if (seconds < 60) return `${seconds.toFixed(1)} s`;
    const minutes = Math.floor(Math.round(seconds) / 60);
    if (minutes < 60) return `${minutes} min ${Math.round(seconds) % 60} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const WORDS = { "backing-off": "backing off", held: "held back", dead: "dead letter" };

const badge = (state) =>
    make("span", { className: "badge", "data-state": state }, WORDS[state] ?? state);

// A key as machines use it, to be broken after its colons.
function code(text) {
    const node = make("span", { className: "code" });
    for (const segment of text.split(/(?<=:)/)) node.append(segment, make("wbr"));
    return node;
}

const later = (milliseconds, act) => {
    let timer;
    return () => {
        clearTimeout(timer);
        timer = setTimeout(act, milliseconds);
    };
};

// --- The connection ------------------------------------------------------------------------------

const HELLO_MILLISECONDS = 10_000;
const LEAST_WAIT_MILLISECONDS = 500;
const LONGEST_WAIT_MILLISECONDS = 15_000;
// A connection that lived so long was a good one: the next failure is a first one again.
const GOOD_AFTER_MILLISECONDS = 5_000;

// What the gateway answers when it does not do what was asked, in its own words.
class Refused extends Error {
    constructor({ message, retryable = false, details = {} }) {
        super(message);
        this.isRetryable = retryable;
        this.reason = details.code;
    }
}

class ConnectionLost extends Error {}

const newId = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
        byte.toString(16).padStart(2, "0"),
    ).join("");

function instanceId() {
    const stored = sessionStorage.getItem("consoleInstance") ?? newId();
    sessionStorage.setItem("consoleInstance", stored);
    return stored;
}

// Refusals that trying again does not change, and the state that they end in.
const FINAL = {
    AUTH_TOKEN_MISSING: "signed-out",
    CONTROL_UI_ORIGIN_NOT_ALLOWED: "refused",
    PROTOCOL_MISMATCH: "refused",
};

// One connection after the other. `state` is connecting, live, lost (to be tried again at
// `retryAt`), signed-out or refused (with `reason`; both are not tried again by themselves).
class Gateway {
    state = "connecting";
    reason = "";
    retryAt = 0;
    #socket = null;
    #pending = new Map();
    #lastId = 0;
    #sequence = null;
    #failures = 0;
    #liveSince = 0;
    #tickMilliseconds = 0;
    #timers = { hello: 0, tick: 0, retry: 0 };

    // `onState()` is called when `state` changes, `onHello(hello)` when it becomes live,
    // `onEvent(name, payload)` for each event.
    constructor(address, { onState, onHello, onEvent }) {
        this.address = address;
        this.on = { state: onState, hello: onHello, event: onEvent };
    }

    open() {
        clearTimeout(this.#timers.retry);
        this.#drop();
        this.#become("connecting");
        const socket = new WebSocket(this.address);
        this.#socket = socket;
        this.#sequence = null;
        socket.onmessage = ({ data }) => {
            if (socket === this.#socket) this.#receive(JSON.parse(data));
        };
        socket.onclose = () => {
            if (socket === this.#socket) this.#lose();
        };
        this.#timers.hello = setTimeout(() => this.#lose(), HELLO_MILLISECONDS);
    }

    // Try now what else would be tried later.
    hurry() {
        if (this.state === "lost") this.open();
    }

    // Return the payload of the answer. Throws Refused or ConnectionLost.
    request(method, params = {}) {
        if (this.state !== "live") return Promise.reject(new ConnectionLost());
        return this.#send(method, params);
    }

    #send(method, params) {
        const id = String(++this.#lastId);
        return new Promise((resolve, reject) => {
            this.#pending.set(id, { resolve, reject });
            this.#socket.send(JSON.stringify({ type: "req", id, method, params }));
        });
    }

    #receive(frame) {
        if (frame.type === "res") {
            const waiting = this.#pending.get(frame.id);
            this.#pending.delete(frame.id);
            if (frame.ok) waiting?.resolve(frame.payload);
            else waiting?.reject(new Refused(frame.error));
            return;
        }
        if (frame.type !== "event") return;
        if (this.#sequence !== null && frame.seq !== this.#sequence + 1) {
            this.#lose(); // something was told that did not come: begin anew
            return;
        }
        this.#sequence = frame.seq;
        if (frame.event === "connect.challenge") this.#shakeHands();
        if (frame.event === "tick") this.#expectTick();
        this.on.event(frame.event, frame.payload);
    }

    async #shakeHands() {
        const socket = this.#socket;
        let hello;
        try {
            hello = await this.#send("connect", {
                minProtocol: 4,
                maxProtocol: 4,
                client: {
                    id: "openclaw-console",
                    version: page.version,
                    platform: "web",
                    mode: "webchat",
                    instanceId: instanceId(),
                },
                // No credential: it is the cookie of the session, which the browser sends itself.
                role: "operator",
                scopes: [],
            });
        } catch (error) {
            if (socket === this.#socket && FINAL[error.reason]) {
                this.#drop();
                this.#become(FINAL[error.reason], error.message);
            }
            return; // the gateway closes, and the next try may do better
        }
        clearTimeout(this.#timers.hello);
        this.#tickMilliseconds = hello.policy.tickIntervalMs;
        this.#expectTick();
        this.#liveSince = performance.now();
        this.#become("live");
        this.on.hello(hello);
    }

    #expectTick() {
        clearTimeout(this.#timers.tick);
        const twoMissed = this.#tickMilliseconds * 2.5;
        this.#timers.tick = setTimeout(() => this.#lose(), twoMissed);
    }

    #lose() {
        const wasGood =
            this.state === "live" && performance.now() - this.#liveSince > GOOD_AFTER_MILLISECONDS;
        this.#failures = wasGood ? 0 : this.#failures + 1;
        this.#drop();
        const least = LEAST_WAIT_MILLISECONDS;
        const longest = Math.min(LONGEST_WAIT_MILLISECONDS, least * 2 ** (this.#failures + 1));
        // Anywhere in between, so that all the pages of a gateway do not come back at once.
        const wait = least + Math.random() * (longest - least);
        this.retryAt = Date.now() + wait;
        this.#timers.retry = setTimeout(() => this.open(), wait);
        this.#become("lost");
    }

    #drop() {
        clearTimeout(this.#timers.hello);
        clearTimeout(this.#timers.tick);
        const socket = this.#socket;
        this.#socket = null;
        socket?.close();
        for (const { reject } of this.#pending.values()) reject(new ConnectionLost());
        this.#pending.clear();
    }

    #become(state, reason = "") {
        this.state = state;
        this.reason = reason;
        this.on.state();
    }
}

// --- What is known -------------------------------------------------------------------------------

// On a phone one scrolls past the sessions to all the rest.
const SESSIONS_PAGE = matchMedia("(min-width: 48rem)").matches ? 50 : 15;
const TIMELINE_PAGE = 50;
const MOST_MORE_ITEMS = 200;
const MOST_RUNS = 15;
const MOST_PER_REQUEST = { sessions: 200, history: 100 };

const known = {
    scopes: [],
    health: null,
    // How many sessions are due and run, and how many wait because their agent does not.
    due: 0,
    waiting: 0,
    sessions: new Map(),
    // How many sessions are shown at most; whether a list came, whether there are more, how many.
    list: { size: SESSIONS_PAGE, isRead: false, hasMore: false, total: 0 },
    filter: { search: "", state: "", agentId: "" },
    runs: new Map(),
    presence: [],
    activity: null,
    // The session that is shown: see `showSession`.
    shown: null,
    // What could not be done, by what it is about.
    problems: new Map(),
};

// Keys have no spaces; under one scope, all agents' sessions have the same one.
const sessionId = ({ agentId, key }) => `${agentId} ${key}`;

const includes = (scope) =>
    known.scopes.includes(scope) || known.scopes.includes("operator.admin");

const gateway = new Gateway(
    `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`,
    { onState: paintConnection, onHello: begin, onEvent: hear },
);

// Return a function that has something read soon: at most once in `every` milliseconds, never
// twice at once; now if asked so. What fails is said, and tried again.
function reader(what, every, read) {
    let timer = null;
    let isReading = false;
    let wanted = null;
    let startedAt = -Infinity;

    async function start() {
        timer = null;
        isReading = true;
        wanted = null;
        startedAt = performance.now();
        let failure = null;
        try {
            await read();
        } catch (error) {
            failure = error;
        }
        isReading = false;
        if (!failure) known.problems.delete(what);
        else if (failure instanceof Refused) {
            known.problems.set(what, `${what} could not be read: ${failure.message}.`);
        } else if (!(failure instanceof ConnectionLost)) console.error(failure);
        paint();
        if (wanted) soon(wanted.isNow);
        else if (failure?.isRetryable) soon();
    }

    function soon(isNow = false) {
        if (isReading) {
            wanted = { isNow: isNow || Boolean(wanted?.isNow) };
            return;
        }
        if (timer !== null && !isNow) return;
        clearTimeout(timer);
        timer = setTimeout(start, isNow ? 0 : Math.max(0, startedAt + every - performance.now()));
    }

    return soon;
}

const readSessions = reader("The sessions", 2000, loadSessions);
const readTimeline = reader("The session", 2000, loadTimeline);
const readTotals = reader("The totals", 2000, loadTotals);
const readActivity = reader("The last hour", 5000, loadActivity);

function begin(hello) {
    const { name, scopes } = hello.auth;
    // Somebody else signed in meanwhile, in another tab: nothing of this page is theirs.
    if (name && name !== `user ${page.user}`) {
        location.reload();
        return;
    }
    known.scopes = scopes;
    takeHealth(hello.snapshot.health);
    known.presence = hello.snapshot.presence;
    // Those that ended meanwhile are not told of again.
    for (const [id, run] of known.runs) if (run.status === "running") known.runs.delete(id);
    readSessions(true);
    readTimeline(true);
    readActivity(true);
    paintForm();
    resolveKey();
    paint();
}

function hear(name, payload) {
    if (name === "health") takeHealth(payload);
    else if (name === "presence") known.presence = payload.presence;
    else if (name === "heartbeat") takeRun(payload);
    else if (name === "sessions.changed") takeChange(payload);
    else if (name === "session.message") takeMessage(payload);
    else if (name === "tick") readSessions(); // what is due now was scheduled a moment ago
    paint();
}

// --- How things stand ----------------------------------------------------------------------------

// When the heartbeats were switched here, by the gateway's clock: an older health does not know it.
let switchedAt = 0;

function takeHealth(health) {
    const { heartbeats } = health.ts < switchedAt ? known.health : health;
    known.health = { ...health, heartbeats };
    takeTotals();
}

// The health counts what is due, whether its agent runs or not.
function takeTotals() {
    if (isAnyHeld()) readTotals();
    else Object.assign(known, { due: known.health.queue.due, waiting: 0 });
}

const isHeld = (agent) =>
    !agent.enabled || agent.paused || agent.runner === "none" || agent.unreached !== null;

const isAnyHeld = () => !known.health.heartbeats.enabled || known.health.agents.some(isHeld);

async function loadTotals() {
    const total = async (state) =>
        (await gateway.request("sessions.list", { state, limit: 1 })).totalCount;
    [known.due, known.waiting] = await Promise.all([total("due"), total("waiting")]);
}

async function loadActivity() {
    known.activity = (await gateway.request("activity", { minutes: 60 })).minutes;
}

function takeRun(run) {
    const before = known.runs.get(run.runId);
    if (before && before.status !== "running" && run.status === "running") return;
    known.runs.set(run.runId, { ...before, ...run });
    const newest = [...known.runs.values()].sort((one, other) => other.ts - one.ts);
    for (const { runId } of newest.slice(MOST_RUNS)) known.runs.delete(runId);
}

// --- Sessions ------------------------------------------------------------------------------------

// Return the parts of a filter that were chosen.
const asked = (filter) => Object.fromEntries(Object.entries(filter).filter(([, value]) => value));

// While a list is read: the changes since it was asked for, which may be newer than it.
let changesMeanwhile = null;

async function loadSessions() {
    const { filter } = known;
    await gateway.request("sessions.subscribe");
    const changes = (changesMeanwhile = []);
    const { size } = known.list;
    const rows = new Map();
    let answer;
    let offset = 0;
    try {
        do {
            const limit = Math.min(MOST_PER_REQUEST.sessions, size - offset);
            answer = await gateway.request("sessions.list", { ...asked(filter), offset, limit });
            for (const row of answer.sessions) rows.set(sessionId(row), row);
            offset = answer.nextOffset;
        } while (answer.hasMore && offset < size);
    } finally {
        if (changesMeanwhile === changes) changesMeanwhile = null;
    }
    if (filter !== known.filter) return; // the next reading is under way
    known.sessions = rows;
    takeAnswer(answer);
    for (const row of rows.values()) takeLastRun(row);
    for (const row of changes) takeRow(row);
    const { shown } = known;
    if (shown?.isRead) shown.row = rows.get(sessionId(shown)) ?? shown.row;
}

function takeAnswer({ hasMore, totalCount }) {
    Object.assign(known.list, { isRead: true, hasMore, total: totalCount });
}

async function loadMoreSessions() {
    const { filter, sessions } = known;
    const answer = await gateway.request("sessions.list", {
        ...asked(filter),
        offset: sessions.size,
        limit: SESSIONS_PAGE,
    });
    if (known.filter !== filter || known.sessions !== sessions) return;
    for (const row of answer.sessions) {
        if (!sessions.has(sessionId(row))) sessions.set(sessionId(row), row);
    }
    known.list.size += SESSIONS_PAGE;
    takeAnswer(answer);
}

function takeChange(change) {
    if (change.reason === "many") {
        readSessions();
        readTimeline();
        return;
    }
    changesMeanwhile?.push(change.session);
    const id = sessionId(change.session);
    const wasListed = known.sessions.has(id);
    takeRow(change.session);
    if (wasListed !== known.sessions.has(id)) readSessions(); // for the total
    const { shown } = known;
    if (shown && id === sessionId(shown)) {
        shown.row = change.session;
        // Neither an event nor a heartbeat: somebody requeued or discarded its dead letters.
        if (change.reason === "changed") readTimeline();
    }
}

function takeRow(row) {
    takeLastRun(row);
    const { sessions, list } = known;
    if (matches(row)) sessions.set(sessionId(row), row);
    else sessions.delete(sessionId(row));
    for (const last of newestFirst().slice(list.size)) {
        sessions.delete(sessionId(last));
        list.hasMore = true;
    }
}

const newestFirst = () =>
    [...known.sessions.values()].sort(
        (one, other) => (other.lastEventAt ?? 0) - (one.lastEventAt ?? 0),
    );

function takeLastRun({ key, agentId, lastHeartbeat }) {
    if (lastHeartbeat) takeRun({ ...lastHeartbeat, sessionKey: key, agentId });
}

function matches(row) {
    const { search, state, agentId } = known.filter;
    return (
        (!state || (state === "dead" ? row.dead > 0 : row.state === state)) &&
        (!agentId || row.agentId === agentId) &&
        row.key.toLowerCase().includes(search.toLowerCase())
    );
}

function setFilter(changes) {
    const filter = { ...known.filter, ...changes };
    known.filter = { ...filter, search: filter.search.trim() }; // as the gateway does
    known.sessions = new Map([...known.sessions].filter(([, row]) => matches(row)));
    Object.assign(known.list, { size: SESSIONS_PAGE, isRead: false });
    readSessions(true);
    paint();
}

// --- One session ---------------------------------------------------------------------------------

// While a history is read: the messages since it was asked for.
let messagesMeanwhile = null;
// The end of following the session that was shown before: it may be the same one again.
let leaving = null;

const itemId = ({ kind, id }) => `${kind} ${id}`;

// Show the session of that key (as it was written somewhere) and agent ("" for the key's own).
function showSession(key, agentId) {
    const { shown } = known;
    if (shown && sessionId(shown) === `${agentId} ${key}`) return;
    if (shown) {
        const { key: left, agentId: itsAgent } = shown;
        leaving = gateway
            .request("sessions.messages.unsubscribe", { key: left, agentId: itsAgent })
            .catch(() => {});
    }
    known.problems.delete("The session");
    known.shown = null;
    if (key) {
        const unread = { row: null, items: new Map(), isRead: false, hasMore: false, before: null };
        known.shown = { key, agentId, size: TIMELINE_PAGE, ...unread };
        readTimeline(true);
    }
    paint();
}

async function loadTimeline() {
    const { shown } = known;
    if (!shown) return;
    await leaving;
    const wanted = { key: shown.key, agentId: shown.agentId || undefined };
    const { key, agentId } = await gateway.request("sessions.messages.subscribe", wanted);
    const messages = (messagesMeanwhile = []);
    Object.assign(shown, { key, agentId });
    const items = new Map();
    let answer;
    try {
        do {
            const limit = Math.min(MOST_PER_REQUEST.history, shown.size - items.size);
            const { before } = answer ?? {};
            answer = await gateway.request("sessions.history", { key, agentId, before, limit });
            for (const item of answer.items) items.set(itemId(item), item);
        } while (answer.hasMore && items.size < shown.size);
    } finally {
        if (messagesMeanwhile === messages) messagesMeanwhile = null;
    }
    if (shown !== known.shown) return; // the next reading is under way
    const { hasMore, before, session } = answer;
    Object.assign(shown, { items, hasMore, before, row: session, isRead: true });
    for (const item of messages) takeItem(item);
    if (key !== wanted.key || agentId !== wanted.agentId) followShown();
}

async function loadOlder() {
    const { shown } = known;
    const { key, agentId, before, items } = shown;
    const answer = await gateway.request("sessions.history", {
        key,
        agentId,
        before,
        limit: TIMELINE_PAGE,
    });
    if (known.shown !== shown || shown.items !== items) return;
    for (const item of answer.items) if (!items.has(itemId(item))) items.set(itemId(item), item);
    Object.assign(shown, { hasMore: answer.hasMore, before: answer.before, size: items.size });
}

function takeMessage({ sessionKey, agentId, item }) {
    if (!known.shown || sessionId(known.shown) !== `${agentId} ${sessionKey}`) return;
    messagesMeanwhile?.push(item);
    takeItem(item);
    // A page that stands open for days does not grow for ever.
    if (known.shown.items.size > known.shown.size + MOST_MORE_ITEMS) readTimeline();
}

function takeItem(item) {
    const { items } = known.shown;
    items.set(itemId(item), item);
    if (item.kind !== "heartbeat") return;
    const state = ["delivered", "quiet"].includes(item.status) ? "delivered" : "dead";
    for (const id of item.eventIds) {
        const event = items.get(itemId({ kind: "event", id }));
        const settled = { state, settledAt: item.finishedAt, runId: item.id };
        if (event) items.set(itemId(event), { ...event, ...settled });
    }
}

// --- Painting ------------------------------------------------------------------------------------

let isPaintDue = false;

function paint() {
    if (isPaintDue) return;
    isPaintDue = true;
    requestAnimationFrame(() => {
        isPaintDue = false;
        paintBanners();
        paintNumbers();
        paintList();
        paintSession();
        paintRuns();
        paintForm();
        paintCharts();
        paintPresence();
    });
}

const CONNECTION_WORDS = {
    connecting: "Connecting…",
    live: "Live",
    lost: "Connection lost",
    "signed-out": "Signed out:",
};

let countdown = null;

function paintConnection() {
    const { state, reason } = gateway;
    byId("connection").dataset.state = state;
    setText(byId("connection-text"), CONNECTION_WORDS[state] ?? `Refused: ${reason}`);
    byId("try-now").hidden = !["lost", "refused"].includes(state);
    byId("sign-in").hidden = state !== "signed-out";
    clearInterval(countdown);
    // Beside the words that are read out, or they would be read out every second.
    const count = () => {
        const seconds = Math.max(1, Math.ceil((gateway.retryAt - Date.now()) / 1000));
        setText(byId("connection-countdown"), state === "lost" ? `; next try in ${seconds} s` : "");
    };
    count();
    if (state === "lost") countdown = setInterval(count, 500);
    paint();
}

// Each banner: its words, a command that mends it, and what a button does.
function banners() {
    const { health, problems } = known;
    const all = [...problems.values()].map((words) => ({ words }));
    if (!health) return all;
    if (!health.heartbeats.enabled) {
        const who = includes("operator.admin") ? "" : " An administrator can resume them.";
        return [{ words: `Heartbeats are paused: events wait.${who}`, isPaused: true }, ...all];
    }
    const agent = health.agents.find((one) => one.isDefault);
    if (agent?.runner === "none") {
        all.push({
            words: `Events wait: agent ${agent.id} has no runner. Set one: `,
            command: `manage.py agents set ${agent.id} --runner command -- PROGRAM ARGS…`,
        });
    } else if (agent?.paused) {
        all.push({ words: `Events wait: agent ${agent.id} is paused.` });
    }
    return all;
}

function paintBanners() {
    arrange(
        byId("banners"),
        banners(),
        ({ words }) => words,
        ({ words, command, isPaused }) => {
            const banner = make("p", { className: "banner" }, words);
            if (command) banner.append(make("code", {}, command));
            if (isPaused && includes("operator.admin")) {
                const resume = make("button", { type: "button", className: "small" }, "Resume");
                resume.addEventListener("click", () => switchHeartbeats(true));
                banner.append(" ", resume);
            }
            return banner;
        },
        () => {},
    );
    const isRunning = known.health?.heartbeats.enabled ?? false;
    byId("pause").hidden = !(isRunning && includes("operator.admin"));
}

// Each number: its name, its value, and the state of the sessions that it leads to.
function paintNumbers() {
    if (!known.health) return;
    const { queue } = known.health;
    const numbers = [
        { title: "Queued", value: queue.queued, state: "" },
        { title: "Due", value: known.due, state: "due" },
        { title: "Running", value: queue.running, state: "running" },
        { title: "Waiting", value: known.waiting, state: "waiting" },
        { title: "Dead letters", value: queue.dead, state: "dead" },
    ];
    arrange(
        byId("numbers"),
        numbers,
        ({ title }) => title,
        ({ title, state }) => {
            const what = state === "dead" ? "with dead letters" : state;
            const words = state ? `Show the sessions: ${what}` : "Show all sessions";
            const button = make("button", { type: "button", className: "number", title: words });
            const [first, ...rest] = title.split(/(?= )/);
            const name = make("span", { className: "number-title" }, first);
            name.append(make("span", { className: "rest" }, ...rest));
            button.append(name, make("strong"));
            button.addEventListener("click", () => {
                byId("filter").elements.state.value = state;
                setFilter({ state });
            });
            return button;
        },
        (button, { title, value, state }) => {
            setText(button.lastElementChild, value.toLocaleString("en"));
            if (state) button.setAttribute("aria-pressed", String(known.filter.state === state));
            button.classList.toggle("alarm", title === "Dead letters" && value > 0);
        },
    );
}

const linkTo = ({ key, agentId }) => `#${new URLSearchParams({ session: key, agent: agentId })}`;

function paintList() {
    const rows = newestFirst();
    const { isRead, hasMore, total } = known.list;
    const current = known.shown && sessionId(known.shown);
    arrange(
        byId("sessions"),
        rows,
        sessionId,
        (row) => make("li", {}, make("a", { href: linkTo(row) })),
        (node, row) => {
            const link = node.firstElementChild;
            const facts = make("span", { className: "facts" }, badge(row.state));
            if (row.queued) facts.append(make("span", {}, `${row.queued} queued`));
            if (row.dead) {
                const words = counted(row.dead, "dead letter");
                facts.append(make("span", { className: "alarm" }, words));
            }
            if (row.lastEventAt) facts.append(moment(row.lastEventAt));
            link.replaceChildren(code(row.key), facts);
            if (row.lastHeartbeat?.preview) {
                const line = firstLine(row.lastHeartbeat.preview);
                link.append(make("span", { className: "preview" }, line));
            }
        },
    );
    for (const { dataset, firstElementChild: link } of byId("sessions").children) {
        if (dataset.key === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
    }
    const { search, state, agentId } = known.filter;
    setText(
        byId("list-count"),
        isRead && rows.length ? `${rows.length} of ${Math.max(total, rows.length)}` : "",
    );
    byId("more-sessions").hidden = !hasMore;
    sayEmpty("sessions-empty", isRead && !rows.length, () =>
        search || state || agentId
            ? ["No session is like that."]
            : ["There is no session yet. An event makes the first one."],
    );
}

function sayEmpty(id, isEmpty, words) {
    const node = byId(id);
    if (isEmpty && node.hidden) node.replaceChildren(...words());
    node.hidden = !isEmpty;
}

function paintSession() {
    const { shown } = known;
    document.body.dataset.view = shown ? "session" : "overview";
    byId("session").hidden = !shown;
    document.title = `${shown ? shown.key : "Console"} | OpenClaw wake gateway`;
    if (!shown) return;
    const title = byId("session-title");
    if (title.textContent !== shown.key) title.replaceChildren(code(shown.key));
    paintFacts(shown.row, byId("session-facts"));
    const hold = shown.row?.holdReason;
    setText(byId("session-hold"), hold ? `${hold[0].toUpperCase()}${hold.slice(1)}. Its events wait.` : "");
    byId("session-hold").hidden = !hold;
    byId("send-here").hidden = !includes("operator.write");
    leadTo("session-page", page.sessionsPage, shown.row && shown.key);
    leadTo("dead-letters-page", page.deadLettersPage, shown.row?.dead && shown.key);

    const items = [...shown.items.values()].sort(
        // A heartbeat comes after the events of its millisecond; ids grow with time.
        (one, other) =>
            other.ts - one.ts ||
            other.kind.localeCompare(one.kind) ||
            other.id.localeCompare(one.id),
    );
    arrange(byId("timeline"), items, itemId, newItem, (node, item) =>
        item.kind === "event" ? updateEvent(node, item) : updateHeartbeat(node, item),
    );
    byId("older").hidden = !shown.hasMore;
    sayEmpty("timeline-empty", shown.isRead && !items.length, () => [
        "Nothing has happened in this session yet. An event sent to it appears here.",
    ]);
}

function leadTo(id, address, key) {
    const link = byId(id);
    link.hidden = !(address && key);
    if (!link.hidden) link.href = address + encodeURIComponent(key);
}

function paintFacts(row, node) {
    if (node.row === row) return;
    node.row = row;
    node.replaceChildren();
    if (!row) return;
    node.append(badge(row.state), make("span", {}, `agent ${row.agentId}`));
    node.append(make("span", {}, `${row.queued} queued`));
    if (row.dead) {
        node.append(make("span", { className: "alarm" }, counted(row.dead, "dead letter")));
    }
    if (row.attempts) node.append(make("span", {}, `attempt ${row.attempts}`));
    if (row.dueAt && row.state !== "running") {
        node.append(make("span", {}, `due (${row.dueReason}) `, moment(row.dueAt)));
    }
}

function block(text) {
    const node = make("pre", { className: "block" }, text);
    // What scrolls must be in reach of the keyboard.
    if (text.length > 1000 || text.split("\n").length > 10) node.tabIndex = 0;
    return node;
}

function newItem({ kind, id }) {
    const head = make("div", { className: "item-head" });
    const body = make("div");
    const node = make("li", { className: "item", "data-kind": kind }, head, body);
    if (kind === "heartbeat") node.append(exactWords(id));
    return node;
}

function updateEvent(node, event) {
    const [head, body] = node.children;
    head.replaceChildren(
        make("strong", {}, event.turn === null ? "Event" : `Turn ${event.turn}`),
        badge(event.state),
        make("span", {}, event.external ? `from ${event.source}, outside` : `from ${event.source}`),
        moment(event.ts),
    );
    if (event.settledAt) head.append(make("span", {}, "settled ", moment(event.settledAt)));
    if (body.textContent !== event.text) body.replaceChildren(block(event.text));
}

function updateHeartbeat(node, run) {
    const [head, body, details] = node.children;
    head.replaceChildren(
        make("strong", {}, "Heartbeat"),
        badge(run.status),
        make("span", {}, `because of: ${run.reason}`),
    );
    if (run.attempt > 1) head.append(make("span", {}, `attempt ${run.attempt}`));
    head.append(make("span", {}, counted(run.eventCount, "event")), moment(run.ts));
    if (run.durationMs !== null) head.append(make("span", {}, `took ${runTime(run.durationMs)}`));
    const words = `${run.error} ${run.reply}`;
    if (node.words !== words) {
        node.words = words;
        body.replaceChildren();
        if (run.error) body.append(make("p", { className: "refusal" }, run.error));
        if (run.reply) body.append(block(run.reply));
        if (run.replyCut) body.append(make("p", { className: "note" }, "It goes on; see below."));
    }
    if (node.finishedAt !== run.finishedAt) details.read();
    node.finishedAt = run.finishedAt;
}

// The exact prompt and reply of a run, asked for when somebody opens them, and again at its end.
function exactWords(runId) {
    const words = make("div");
    const details = make("details", {}, make("summary", {}, "Exact prompt and reply"), words);
    const part = (title, text) => [
        make("h4", {}, title),
        text ? block(text) : make("p", { className: "note" }, "none"),
    ];
    details.read = async () => {
        if (!details.open) return;
        try {
            const run = await gateway.request("heartbeats.get", { runId });
            words.replaceChildren(...part("Prompt", run.prompt), ...part("Reply", run.reply));
        } catch (error) {
            const why = error instanceof Refused ? error.message : "there is no connection";
            words.replaceChildren(make("p", { className: "refusal" }, `Not read: ${why}.`));
        }
    };
    details.addEventListener("toggle", details.read);
    return details;
}

function paintRuns() {
    const runs = [...known.runs.values()].sort((one, other) => other.ts - one.ts);
    arrange(
        byId("runs"),
        runs,
        ({ runId }) => runId,
        ({ sessionKey, agentId }) =>
            make("li", {}, make("a", { href: linkTo({ key: sessionKey, agentId }) })),
        (node, run) => {
            const facts = make("span", { className: "facts" }, badge(run.status));
            if (run.eventCount !== undefined) {
                facts.append(make("span", {}, counted(run.eventCount, "event")));
            }
            if (run.durationMs !== null) facts.append(make("span", {}, runTime(run.durationMs)));
            facts.append(moment(run.ts));
            node.firstElementChild.replaceChildren(code(run.sessionKey), facts);
            if (run.preview) {
                const line = make("span", { className: "preview" }, firstLine(run.preview));
                node.firstElementChild.append(line);
            }
        },
    );
    sayEmpty("runs-empty", known.list.isRead && !runs.length, () => [
        "No heartbeat has run yet. An event makes one run: ",
        make("code", {}, 'manage.py system_event "Hello"'),
    ]);
}

function paintPresence() {
    const entries = [...known.presence].sort((one, other) => other.ts - one.ts);
    const nameOf = ({ host, deviceId, instanceId }) => host || deviceId || instanceId || "unnamed";
    arrange(
        byId("presence"),
        entries,
        ({ key }) => key,
        () => make("li"),
        (node, entry) => {
            const { ip, version, platform, mode, reason, ts } = entry;
            const facts = [ip, version, platform, mode, reason].filter(Boolean);
            node.replaceChildren(
                make("strong", {}, nameOf(entry)),
                make("span", { className: "facts" }, facts.join(" · "), " ", moment(ts)),
            );
        },
    );
    sayEmpty("presence-empty", !entries.length, () => ["Nobody has reported within five minutes."]);
}

// --- The last hour -------------------------------------------------------------------------------

// Each chart: what it is called, the parts of each minute's bar from below, what is said of a
// minute, how a height is written, and what is said of the whole.
const CHARTS = [
    {
        title: "Throughput",
        bar: ({ delivered, dead }) => [
            ["good", delivered],
            ["bad", dead],
        ],
        say: ({ queued, delivered, dead }) =>
            `${delivered} delivered, ${dead} dead, ${queued} came in`,
        write: (height) => `${height} a minute`,
        sum: (minutes) => {
            const total = (name) => minutes.reduce((sum, minute) => sum + minute[name], 0);
            const dead = total("dead");
            const delivered = `${counted(total("delivered"), "event")} delivered`;
            return dead ? `${delivered}, ${dead} dead` : delivered;
        },
    },
    {
        title: "Queue depth",
        bar: ({ depth }) => [["good", depth]],
        say: ({ depth }) => `${counted(depth, "event")} queued`,
        write: (height) => counted(height, "event"),
        sum: (minutes) => `${counted(minutes.at(-1)?.depth ?? 0, "event")} a moment ago`,
    },
    {
        title: "Delivery time",
        bar: ({ deliveryMs }) =>
            deliveryMs
                ? [
                      ["good", deliveryMs.median],
                      ["rest", deliveryMs.p95 - deliveryMs.median],
                  ]
                : [],
        say: ({ deliveryMs }) =>
            deliveryMs
                ? `half within ${runTime(deliveryMs.median)}, 95 % within ${runTime(deliveryMs.p95)}`
                : "nothing delivered",
        write: runTime,
        sum: (minutes) => {
            const last = minutes.findLast(({ deliveryMs }) => deliveryMs);
            return last
                ? `half within ${runTime(last.deliveryMs.median)} lately`
                : "nothing delivered yet";
        },
    },
];
const CHART_HEIGHT = 40;
const MINUTE_WIDTH = 5;

let drawn = null;

function paintCharts() {
    if (known.activity === drawn) return;
    drawn = known.activity;
    byId("charts").replaceChildren(...CHARTS.map((chart) => draw(chart, drawn)));
}

function draw({ title, bar, say, write, sum }, minutes) {
    const bars = minutes.map(bar);
    const heights = bars.map((parts) => parts.reduce((height, [, value]) => height + value, 0));
    const top = Math.max(...heights, 0);
    const most = top ? `at most ${write(top)}` : "";
    const told = [sum(minutes), most].filter(Boolean).join(", ");
    const drawing = shape("svg", {
        role: "img",
        "aria-label": `${title}, minute by minute: ${told}`,
        viewBox: `0 0 ${minutes.length * MINUTE_WIDTH} ${CHART_HEIGHT}`,
        preserveAspectRatio: "none",
    });
    for (const [place, minute] of minutes.entries()) {
        const x = place * MINUTE_WIDTH;
        const words = shape("title");
        words.textContent = `${clock(minute.ts).slice(0, -3)}: ${say(minute)}`;
        const group = shape("g");
        group.append(words);
        const whole = { x, width: MINUTE_WIDTH, height: CHART_HEIGHT, class: "minute" };
        group.append(shape("rect", whole));
        let y = CHART_HEIGHT;
        for (const [kind, value] of bars[place].filter(([, value]) => value)) {
            // What is there is seen, however little it is.
            const height = Math.max((value / top) * CHART_HEIGHT, 1);
            y -= height;
            group.append(shape("rect", { x, y, width: MINUTE_WIDTH - 1, height, class: kind }));
        }
        drawing.append(group);
    }
    const caption = make("figcaption", {}, make("strong", {}, title));
    caption.append(make("span", {}, sum(minutes)));
    const scale = make("p", { className: "scale" });
    scale.append(...["an hour ago", most, "now"].map((words) => make("span", {}, words)));
    return make("figure", {}, caption, drawing, scale);
}

function shape(name, attributes = {}) {
    const node = document.createElementNS(SVG, name);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
}

// --- Sending and steering ------------------------------------------------------------------------

const send = byId("send");
const fields = send.elements;
// The key in the form is the shown session's, and goes with it; not one that somebody typed.
let isKeyOfShown = true;
// What the form's key and agent mean: as `sessions.resolve` answers, or null.
let resolved = null;
let asking = 0;

function paintForm() {
    const agents = known.health?.agents ?? [];
    const described = (agent) =>
        agent.name && agent.name !== agent.id ? `${agent.id} (${agent.name})` : agent.id;
    const usual = agents.find((agent) => agent.isDefault);
    const none = `The default agent${usual ? ` (${usual.id})` : ""}`;
    paintChoices(byId("send-agent"), none, agents.filter((agent) => agent.enabled), described);
    paintChoices(byId("filter-agent"), "All agents", agents, described);
    if (isKeyOfShown) fields.agentId.value = known.shown?.agentId ?? "";
    const isDenied = known.scopes.length > 0 && !includes("operator.write");
    byId("send-denied").hidden = !isDenied;
    send.hidden = isDenied;
    byId("jump-to-send").hidden = isDenied;
    const what = resolved;
    if (!what) return;
    const goesTo = byId("goes-to");
    goesTo.classList.toggle("refusal", Boolean(what.error));
    setText(goesTo, what.error ?? goal(what));
}

function paintChoices(select, none, agents, described) {
    const options = [["", none], ...agents.map((agent) => [agent.id, described(agent)])];
    const told = JSON.stringify(options);
    if (select.told === told) return;
    select.told = told;
    const { value } = select;
    select.replaceChildren(...options.map(([id, words]) => make("option", { value: id }, words)));
    select.value = options.some(([id]) => id === value) ? value : "";
}

function goal({ key, isMain, exists, agentId, hasKey }) {
    const isNow = fields.mode.value === "now";
    const notes = [];
    if (isMain) notes.push(`the main session of ${agentId}`);
    if (!exists) notes.push("new");
    if (!hasKey && isNow && !fields.agentId.value) notes.push("every enabled agent is nudged");
    if (!isNow && !isMain) notes.push("woken at once: no schedule visits it");
    return `Goes to ${key}${notes.length ? ` (${notes.join("; ")})` : ""}`;
}

async function resolveKey() {
    const mine = ++asking;
    const key = fields.sessionKey.value.trim();
    const agentId = fields.agentId.value || undefined;
    try {
        // A blank key is the main session's.
        const answer = await gateway.request("sessions.resolve", { key: key || " ", agentId });
        if (mine === asking) resolved = { ...answer, hasKey: Boolean(key) };
    } catch (error) {
        if (mine !== asking || error instanceof ConnectionLost) return;
        resolved = { error: error.message };
    }
    paint();
}

async function completeKey() {
    const search = fields.sessionKey.value.trim();
    try {
        const answer = await gateway.request("sessions.list", { search, limit: 10 });
        if (search !== fields.sessionKey.value.trim()) return;
        byId("keys").replaceChildren(
            ...answer.sessions.map(({ key }) => make("option", { value: key })),
        );
    } catch {
        // Completion is a convenience: what is wrong is said elsewhere.
    }
}

const resolveSoon = later(200, resolveKey);
const completeSoon = later(300, completeKey);

// The form follows the session that is shown, until somebody types another key.
function followShown() {
    if (!isKeyOfShown && fields.sessionKey.value) return;
    isKeyOfShown = true;
    fields.sessionKey.value = known.shown?.key ?? "";
    fields.agentId.value = known.shown?.agentId ?? "";
    resolveKey();
}

function sayReceipt(receipt) {
    const agentId = resolved?.agentId ?? fields.agentId.value;
    const link = make("a", { href: linkTo({ key: receipt.sessionKey, agentId }) });
    link.append(code(receipt.sessionKey));
    const isStored = receipt.eventOutcome === "queued";
    const words = isStored ? "Queued in " : "Coalesced with an equal event that waits in ";
    const id = make("span", { className: "code" }, receipt.eventId);
    byId("receipt").replaceChildren(words, link, " as event ", id);
}

async function submit() {
    const button = send.querySelector("[type=submit]");
    if (button.disabled) return; // one is under way: `requestSubmit` does not mind the button
    button.disabled = true;
    const refusal = byId("refusal");
    byId("receipt").replaceChildren();
    refusal.textContent = "";
    const wasLive = gateway.state === "live";
    const text = fields.text.value;
    try {
        const receipt = await gateway.request("wake", {
            text,
            mode: fields.mode.value,
            sessionKey: fields.sessionKey.value.trim() || undefined,
            agentId: fields.agentId.value || undefined,
        });
        if (!receipt.ok) throw new Refused({ message: receipt.error });
        sayReceipt(receipt);
        // What was typed meanwhile is the next one.
        if (fields.text.value === text) fields.text.value = "";
        resolveSoon();
    } catch (error) {
        if (error instanceof Refused) refusal.textContent = error.message;
        else if (!wasLive) refusal.textContent = "Not sent: there is no connection to the gateway.";
        else {
            refusal.textContent =
                "The connection was lost before the answer came. " +
                "Look into the session before you send this again.";
        }
    }
    button.disabled = false;
}

async function switchHeartbeats(enabled) {
    try {
        const { ts } = await gateway.request("set-heartbeats", { enabled });
        switchedAt = ts ?? 0;
        known.health = { ...known.health, heartbeats: { enabled } };
        known.problems.delete("Heartbeats");
        takeTotals();
    } catch (error) {
        const why = error instanceof Refused ? error.message : "there is no connection";
        known.problems.set("Heartbeats", `Heartbeats could not be switched: ${why}.`);
    }
    paint();
}

// --- The page's own events -----------------------------------------------------------------------

function route() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    showSession(wanted.get("session") ?? "", wanted.get("agent") ?? "");
    followShown();
    const login = new URL(page.login, location.href);
    login.searchParams.set("next", location.pathname + location.hash);
    byId("sign-in").href = login.href;
}

const more = (load) => async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
        await load();
        known.problems.delete("More");
    } catch (error) {
        if (error instanceof Refused) {
            known.problems.set("More", `More could not be read: ${error.message}.`);
        }
    }
    button.disabled = false;
    paint();
};

window.addEventListener("hashchange", () => {
    const left = known.shown;
    route();
    // What was chosen gets the focus; who comes back finds it where it was.
    requestAnimationFrame(() => {
        const rows = [...byId("sessions").children];
        const back = left && rows.find(({ dataset }) => dataset.key === sessionId(left));
        if (known.shown) byId("session-title").focus();
        else back?.firstElementChild.focus();
    });
});
document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, textarea, select, dialog");
    if (event.key === "Escape" && known.shown && !isTyping) location.hash = "";
});
window.addEventListener("online", () => gateway.hurry());
document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    gateway.hurry();
    readActivity();
});
setInterval(() => {
    if (!document.hidden && gateway.state === "live") readActivity();
}, 15_000);

// Without the address: what stands there is the session that is shown.
document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
});
byId("try-now").addEventListener("click", () => gateway.open());
byId("more-sessions").addEventListener("click", more(loadMoreSessions));
byId("older").addEventListener("click", more(loadOlder));

const filter = byId("filter");
const filterSoon = later(250, () => setFilter(Object.fromEntries(new FormData(filter))));
filter.addEventListener("input", filterSoon);
filter.addEventListener("submit", (event) => event.preventDefault());

send.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
});
send.addEventListener("input", () => setText(byId("refusal"), ""));
fields.text.addEventListener("keydown", (event) => {
    const isCommand = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (isCommand && !event.repeat) send.requestSubmit();
});
fields.sessionKey.addEventListener("input", () => {
    isKeyOfShown = false;
    resolveSoon();
    completeSoon();
});
fields.sessionKey.addEventListener("focus", completeKey);
fields.agentId.addEventListener("change", () => {
    isKeyOfShown = false;
    resolveKey();
});
for (const choice of fields.mode) choice.addEventListener("change", paint);
byId("jump-to-send").addEventListener("click", () => fields.text.focus());
byId("send-here").addEventListener("click", () => {
    isKeyOfShown = true;
    followShown();
    fields.text.focus();
});

byId("pause").addEventListener("click", () => byId("pause-dialog").showModal());
byId("pause-dialog").addEventListener("close", ({ target }) => {
    if (target.returnValue === "pause") switchHeartbeats(false);
    target.returnValue = "";
});

route();
gateway.open();
