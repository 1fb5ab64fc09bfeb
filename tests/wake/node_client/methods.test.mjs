// Every method of the table: what it takes, what it answers, what it refuses, and its scope.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import test, { after, before } from 'node:test';

import { closeAll, GatewayClient } from './gateway_client.mjs';

const SCOPES = {
  wake: 'operator.write',
  'system-event': 'operator.admin',
  'system-presence': 'operator.read',
  'last-heartbeat': 'operator.read',
  'set-heartbeats': 'operator.admin',
  health: 'operator.read',
  status: 'operator.read',
  'agents.list': 'operator.read',
  'sessions.list': 'operator.read',
  'sessions.resolve': 'operator.read',
  'sessions.history': 'operator.read',
  'sessions.subscribe': 'operator.read',
  'sessions.unsubscribe': 'operator.read',
  'sessions.messages.subscribe': 'operator.read',
  'sessions.messages.unsubscribe': 'operator.read',
  'heartbeats.get': 'operator.read',
  activity: 'operator.read',
  'agent.attach': 'operator.write',
  'agent.detach': 'operator.write',
  'heartbeat.progress': 'operator.write',
  'heartbeat.done': 'operator.write',
};

let client;
const called = new Set();

/** Ask over the connection that all tests here share, and which holds every scope. */
function call(method, params = {}) {
  called.add(method);
  return client.request(method, params);
}

/** The call must be refused as INVALID_REQUEST, with this text. */
function refuses(method, params, message) {
  return assert.rejects(call(method, params), { code: 'INVALID_REQUEST', message });
}

/** Wake a session of this name and wait until its agent has been given the event. */
async function delivered(sessionKey, text = 'ping', more = {}) {
  const { eventId, sessionKey: key } = await call('wake', {
    mode: 'now',
    text,
    sessionKey,
    ...more,
  });
  const ended = await client.event(
    'heartbeat',
    (run) => run.sessionKey === key && run.status !== 'running',
  );
  return { eventId, key, ended };
}

async function row(key) {
  const { sessions } = await call('sessions.list', { search: key });
  return sessions.find((session) => session.key === key);
}

/** Run with all heartbeats off, so that events stay queued. */
async function whilePaused(work) {
  await call('set-heartbeats', { enabled: false });
  try {
    return await work();
  } finally {
    await call('set-heartbeats', { enabled: true });
  }
}

before(async () => {
  client = await GatewayClient.connect();
});

after(closeAll);

// --- wake -----------------------------------------------------------------------------------------

test('wake answers with a receipt', async () => {
  const receipt = await call('wake', {
    mode: 'now',
    text: 'hello',
    sessionKey: 'Node:Receipt',
    more: 1,
  });
  assert.deepEqual(
    { ...receipt, eventId: typeof receipt.eventId },
    {
      ok: true,
      mode: 'now',
      eventOutcome: 'queued',
      sessionKey: 'agent:main:node:receipt',
      eventId: 'string',
    },
  );
});

test('wake without a key, or with a blank one, is for the main session', async () => {
  const waiting = (await row('agent:main:main'))?.queued ?? 0;
  for (const params of [{}, { sessionKey: '  ' }, { sessionKey: 'main' }]) {
    const receipt = await call('wake', { mode: 'next-heartbeat', text: randomUUID(), ...params });
    assert.equal(receipt.sessionKey, 'agent:main:main');
    assert.equal(receipt.mode, 'next-heartbeat');
  }
  // They wait for the scheduled heartbeat.
  assert.equal((await row('agent:main:main')).queued, waiting + 3);
});

test('wake in mode next-heartbeat wakes any other session at once', async () => {
  const { key } = await delivered('node:next', 'ping', { mode: 'next-heartbeat' });
  assert.equal((await row(key)).queued, 0);
});

test('the same wake again is coalesced while the first one waits', async () => {
  await whilePaused(async () => {
    const wake = { mode: 'now', text: 'again', sessionKey: 'node:again' };
    const first = await call('wake', wake);
    const second = await call('wake', wake);
    assert.equal(first.eventOutcome, 'queued');
    assert.deepEqual(second, { ...first, eventOutcome: 'coalesced' });
  });
});

test('wake for another agent needs that agent selected', async () => {
  const sessionKey = 'agent:ops:node:x';
  const { key } = await delivered(sessionKey, 'ping', { agentId: 'ops' });
  assert.equal(key, sessionKey);
  await refuses(
    'wake',
    { mode: 'now', text: 'x', sessionKey },
    `session key "${sessionKey}" targets agent "ops" but the default agent is "main"; ` +
      'cross-agent wake is not supported',
  );
});

test('a blank text is answered, not refused', async () => {
  assert.deepEqual(await call('wake', { mode: 'now', text: ' \n ' }), {
    ok: false,
    error: 'text required',
  });
});

for (const [what, params, message] of [
  ['no mode', { text: 'x' }, /mode/],
  ['an unknown mode', { text: 'x', mode: 'later' }, /mode/],
  ['no text', { mode: 'now' }, /text/],
  ['a text that is none', { mode: 'now', text: 7 }, /text/],
  ['an empty session key', { mode: 'now', text: 'x', sessionKey: '' }, /sessionKey/],
  [
    'a malformed session key',
    { mode: 'now', text: 'x', sessionKey: 'agent:ops' },
    'malformed session key "agent:ops"',
  ],
  ['a key with a space', { mode: 'now', text: 'x', sessionKey: 'a b' }, /a b/],
  ['an unknown agent', { mode: 'now', text: 'x', agentId: 'nobody' }, /"nobody"/],
  ['a disabled agent', { mode: 'now', text: 'x', agentId: 'retired' }, /"retired"/],
]) {
  test(`wake refuses ${what}`, () => refuses('wake', params, message));
}

// --- system-event, presence -----------------------------------------------------------------------

test('system-event goes to the main session, or wakes the one it names', async () => {
  assert.equal((await call('system-event', { text: `to main ${randomUUID()}` })).ok, true);
  assert.equal(
    (await call('system-event', { text: 'to one', sessionKey: 'node:system' })).ok,
    true,
  );
  const key = 'agent:main:node:system';
  await client.event('heartbeat', (run) => run.sessionKey === key && run.status !== 'running');
});

test('system-event refuses a blank text', () =>
  refuses('system-event', { text: ' ' }, 'text required'));

test('system-event refuses no text', () => refuses('system-event', {}, /text/));

test('system-event of a node shows in system-presence', async () => {
  const node = {
    host: 'kitchen',
    ip: '192.0.2.7',
    version: '2026.9.6',
    platform: 'linux',
    deviceFamily: 'Linux',
    mode: 'node',
    reason: 'connect',
    instanceId: randomUUID(),
    deviceId: 'd'.repeat(64),
    roles: ['node'],
    scopes: ['operator.read'],
  };
  const text = 'Node: kitchen (192.0.2.7) · app 2026.9.6 · mode node · reason connect';
  const sent = { ...node, text, lastInputSeconds: 5, tags: ['tag'], modelIdentifier: 'm' };
  assert.equal((await call('system-event', sent)).ok, true);
  const entries = await call('system-presence');
  const entry = entries.find(({ instanceId }) => instanceId === node.instanceId);
  for (const [name, value] of Object.entries({ ...node, text }))
    assert.deepEqual(entry[name], value, name);
  assert(Math.abs(entry.ts - Date.now()) < 60_000);
});

// --- How things stand -----------------------------------------------------------------------------

test('last-heartbeat tells the newest one', async () => {
  const { key } = await delivered('node:last', 'for the last heartbeat');
  const last = await call('last-heartbeat');
  assert.equal(last.sessionKey, key);
  assert.equal(last.status, 'delivered');
  assert.equal(typeof last.reason, 'string');
  assert.match(last.preview, /for the last heartbeat/); // the agent under test is an echo
  assert(last.durationMs >= 0);
  assert(Math.abs(last.ts - Date.now()) < 60_000);
});

const switchHeartbeats = async (wanted) => {
  const { ok, enabled } = await call('set-heartbeats', { enabled: wanted });
  assert.deepEqual({ ok, enabled }, { ok: true, enabled: wanted });
};

test('set-heartbeats turns all heartbeats off and on', async () => {
  await switchHeartbeats(false);
  const { sessionKey: key } = await call('wake', {
    mode: 'now',
    text: 'wait',
    sessionKey: 'node:paused',
  });
  const held = await row(key);
  assert.equal(held.queued, 1);
  assert.equal(typeof held.holdReason, 'string');
  await switchHeartbeats(true);
  await client.event('heartbeat', (run) => run.sessionKey === key && run.status === 'delivered');
  assert.equal((await row(key)).queued, 0);
});

for (const params of [{}, { enabled: 'yes' }, { enabled: null }]) {
  test(`set-heartbeats refuses ${JSON.stringify(params)}`, () =>
    refuses('set-heartbeats', params, 'invalid set-heartbeats params: enabled (boolean) required'));
}

test('health', async () => {
  const health = await call('health');
  assert.equal(health.ok, true);
  assert(Math.abs(health.ts - Date.now()) < 60_000);
  assert(health.durationMs >= 0);
  assert(Array.isArray(health.agents));
  for (const count of ['queued', 'due', 'running', 'dead'])
    assert(Number.isInteger(health.queue[count]), count);
});

test('status', async () => {
  const status = await call('status');
  assert.equal(typeof status, 'object');
  assert(JSON.stringify(status).includes(client.hello.server.version));
});

test('agents.list', async () => {
  const { defaultId, mainKey, scope, agents } = await call('agents.list');
  assert.deepEqual(
    { defaultId, mainKey, scope },
    { defaultId: 'main', mainKey: 'main', scope: 'per-sender' },
  );
  const ids = agents.map(({ id }) => id);
  assert(ids.includes('main') && ids.includes('ops'), ids);
  assert(agents.every(({ name }) => typeof name === 'string'));
});

// --- Taking heartbeats ----------------------------------------------------------------------------

test('a client takes the heartbeats of an agent', async () => {
  const attached = await call('agent.attach', { agentId: 'boxed', capacity: 2 });
  assert.deepEqual(
    { ...attached, leaseMs: typeof attached.leaseMs, maxReplyBytes: typeof attached.maxReplyBytes },
    {
      ok: true,
      agentId: 'boxed',
      capacity: 2,
      running: 0,
      leaseMs: 'number',
      maxReplyBytes: 'number',
    },
  );
  const { eventId, sessionKey } = await call('wake', {
    mode: 'now',
    text: 'for the inbox',
    sessionKey: 'node:inbox',
    agentId: 'boxed',
  });
  const run = await client.event('heartbeat.run', (given) => given.sessionKey === sessionKey);
  assert.equal(run.agentId, 'boxed');
  assert.equal(run.attempt, 1);
  assert.deepEqual(
    run.events.map(({ id, text }) => [id, text]),
    [[eventId, 'for the inbox']],
  );
  assert(run.prompt.includes('for the inbox'));
  assert(run.deadlineMs > 0 && run.deadlineMs <= run.timeoutMs);
  const { runId } = run;
  const extended = await call('heartbeat.progress', { runId });
  assert.deepEqual({ ...extended, deadlineMs: 0 }, { ok: true, runId, deadlineMs: 0 });
  const detached = await call('agent.detach', { agentId: 'boxed' });
  assert.deepEqual(detached, { ok: true, agentId: 'boxed', running: 1 });
  const done = await call('heartbeat.done', { runId, status: 'delivered', reply: 'seen' });
  assert.deepEqual(done, { ok: true, runId });
  assert.equal((await call('heartbeats.get', { runId })).reply, 'seen');
  await assert.rejects(call('heartbeat.done', { runId, status: 'delivered' }), {
    code: 'INVALID_REQUEST',
    details: { code: 'LEASE_LOST' },
  });
});

test('agent.attach refuses other agents', async () => {
  await refuses('agent.attach', { agentId: 'nobody' }, 'unknown agent "nobody"');
  await assert.rejects(call('agent.attach', { agentId: 'main' }), { code: 'INVALID_REQUEST' });
});

// --- Sessions -------------------------------------------------------------------------------------

test('sessions.list tells what a session is doing', async () => {
  const { key, ended } = await delivered('node:row', 'for the row');
  const session = await row(key);
  assert.deepEqual(
    {
      ...session,
      lastEventAt: typeof session.lastEventAt,
      lastHeartbeat: typeof session.lastHeartbeat,
    },
    {
      key,
      agentId: 'main',
      queued: 0,
      dead: 0,
      running: false,
      state: 'idle',
      holdReason: null,
      dueAt: null,
      dueReason: '',
      attempts: 0,
      lastEventAt: 'number',
      lastHeartbeat: 'object',
    },
  );
  const { runId, status, reason, preview, durationMs, ts } = session.lastHeartbeat;
  assert.deepEqual([runId, status, reason], [ended.runId, 'delivered', 'wake']);
  assert.match(preview, /for the row/);
  assert(preview.length <= 200);
  assert(durationMs >= 0 && Math.abs(ts - Date.now()) < 60_000);
});

test('sessions.list is read in pages, newest event first', async () => {
  await whilePaused(async () => {
    for (const name of ['a', 'b', 'c']) {
      await call('wake', { mode: 'now', text: 'x', sessionKey: `node:page:${name}` });
    }
  });
  const search = 'NODE:Page:';
  const first = await call('sessions.list', { search, limit: 2 });
  assert.deepEqual(
    [first.count, first.totalCount, first.hasMore, first.nextOffset],
    [2, 3, true, 2],
  );
  const rest = await call('sessions.list', { search, limit: 2, offset: first.nextOffset });
  assert.deepEqual(
    [rest.count, rest.totalCount, rest.hasMore, rest.nextOffset],
    [1, 3, false, null],
  );
  const keys = [...first.sessions, ...rest.sessions].map(({ key }) => key.split(':').pop());
  assert.deepEqual(keys, ['c', 'b', 'a']);
  assert(Math.abs(first.ts - Date.now()) < 60_000);
});

test('sessions.list filters by agent, state and dead letters', async () => {
  const { key } = await delivered('agent:failing:node:dead', 'in vain', { agentId: 'failing' });
  const dead = await call('sessions.list', { state: 'dead' });
  assert(dead.sessions.every((session) => session.dead > 0));
  assert.equal(dead.sessions.find((session) => session.key === key).dead, 1);
  const failing = await call('sessions.list', { agentId: 'failing' });
  assert(failing.sessions.every(({ agentId }) => agentId === 'failing'));
  assert(failing.sessions.some((session) => session.key === key));
  const waiting = await call('sessions.list', { state: 'scheduled' });
  assert(waiting.sessions.every(({ state }) => state === 'scheduled'));
  assert(waiting.sessions.some((session) => session.key === 'agent:main:main'));
});

for (const [field, params] of [
  ['limit', { limit: 0 }],
  ['limit', { limit: 201 }],
  ['offset', { offset: -1 }],
  ['state', { state: 'asleep' }],
  ['search', { search: 7 }],
  ['nobody', { agentId: 'nobody' }],
]) {
  test(`sessions.list refuses ${JSON.stringify(params)}`, () =>
    refuses('sessions.list', params, new RegExp(field)));
}

test('sessions.resolve gives the canonical key and makes nothing', async () => {
  const resolved = await call('sessions.resolve', { key: 'Node:Nowhere' });
  const key = 'agent:main:node:nowhere';
  assert.deepEqual(resolved, { ok: true, key, agentId: 'main', exists: false, isMain: false });
  assert.equal(await row(key), undefined);
});

test('sessions.resolve knows the main sessions', async () => {
  assert.deepEqual(await call('sessions.resolve', { key: ' ' }), {
    ok: true,
    key: 'agent:main:main',
    agentId: 'main',
    exists: true,
    isMain: true,
  });
  const ops = await call('sessions.resolve', { key: 'main', agentId: 'ops' });
  assert.deepEqual([ops.key, ops.agentId, ops.isMain], ['agent:ops:main', 'ops', true]);
});

for (const [params, message] of [
  [{}, /key/],
  [{ key: '' }, /key/],
  [{ key: 'agent:ops' }, 'malformed session key "agent:ops"'],
  [{ key: 'agent:ops:x' }, /cross-agent wake is not supported$/],
  [{ key: 'x', agentId: 'nobody' }, /"nobody"/],
]) {
  test(`sessions.resolve refuses ${JSON.stringify(params)}`, () =>
    refuses('sessions.resolve', params, message));
}

test('sessions.history tells events and heartbeats, newest first', async () => {
  const { key, eventId, ended } = await delivered('node:history', 'to be told');
  const history = await call('sessions.history', { key });
  assert.deepEqual(
    [history.key, history.agentId, history.hasMore, history.before],
    [key, 'main', false, null],
  );
  assert.deepEqual(history.session, await row(key));
  const [heartbeat, event] = history.items;
  assert.equal(history.items.length, 2);
  const { ts, settledAt, turn, source, ...told } = event;
  assert.deepEqual(told, {
    kind: 'event',
    id: eventId,
    text: 'to be told',
    external: false,
    state: 'delivered',
    runId: ended.runId,
  });
  assert(ts <= settledAt && turn === null && typeof source === 'string');
  assert.equal(heartbeat.kind, 'heartbeat');
  assert.equal(heartbeat.id, ended.runId);
  assert.equal(heartbeat.status, 'delivered');
  assert.equal(heartbeat.reason, 'wake');
  assert.equal(heartbeat.attempt, 1);
  assert.equal(heartbeat.eventCount, 1);
  // Times are whole milliseconds, each rounded by itself.
  assert(Math.abs(heartbeat.durationMs - (heartbeat.finishedAt - heartbeat.ts)) <= 1);
  assert.match(heartbeat.reply, /to be told/);
  assert.equal(heartbeat.replyCut, false);
  assert.equal(heartbeat.error, '');
  assert.deepEqual(heartbeat.eventIds, [eventId]);
});

test('sessions.history is read in pages that leave nothing out and tell nothing twice', async () => {
  const sessionKey = 'node:pages';
  for (let round = 0; round < 3; round += 1) await delivered(sessionKey, `round ${round}`);
  const whole = await call('sessions.history', { key: sessionKey });
  assert.equal(whole.items.length, 6);
  const told = [];
  let before;
  do {
    const page = await call('sessions.history', {
      key: sessionKey,
      limit: 2,
      ...(before && { before }),
    });
    assert(page.items.length <= 2);
    assert.equal(page.hasMore, page.before !== null);
    told.push(...page.items);
    before = page.before;
  } while (before);
  assert.deepEqual(told, whole.items);
  const times = told.map(({ ts }) => ts);
  assert.deepEqual(
    times,
    [...times].sort((one, other) => other - one),
  );
});

test('sessions.history of a session that is not there is empty', async () => {
  const { session, items } = await call('sessions.history', { key: 'node:nowhere' });
  assert.deepEqual([session, items], [null, []]);
});

for (const [params, message] of [
  [{}, /key/],
  [{ key: 'x', limit: 101 }, /limit/],
  [{ key: 'x', before: 'no such page' }, /before/],
  [{ key: 'agent:ops' }, 'malformed session key "agent:ops"'],
]) {
  test(`sessions.history refuses ${JSON.stringify(params)}`, () =>
    refuses('sessions.history', params, message));
}

test('heartbeats.get gives the exact prompt and the whole reply', async () => {
  const text = 'a long tale '.repeat(1000).trim();
  const { key, eventId, ended } = await delivered('node:long', text);
  const { items } = await call('sessions.history', { key });
  const short = items.find(({ id }) => id === ended.runId);
  assert.equal(short.replyCut, true);
  assert(short.reply.length <= 4000);
  const whole = await call('heartbeats.get', { runId: ended.runId });
  const { prompt, reply, ...rest } = whole;
  assert(prompt.includes(text) && prompt.includes(eventId));
  assert(reply.includes(text) && reply.startsWith(short.reply));
  const { reply: cut, ...same } = short;
  assert.deepEqual(rest, { ...same, replyCut: false, sessionKey: key, agentId: 'main' });
});

test('heartbeats.get tells why a heartbeat failed', async () => {
  const { ended } = await delivered('agent:failing:node:why', 'x', { agentId: 'failing' });
  const { status, error } = await call('heartbeats.get', { runId: ended.runId });
  assert.equal(status, ended.status);
  assert.match(error, /nobody is at home/);
});

test('heartbeats.get refuses an unknown run', async () => {
  for (const runId of [randomUUID(), 'no id at all']) {
    await refuses('heartbeats.get', { runId }, `unknown run: ${runId}`);
  }
  await refuses('heartbeats.get', {}, /runId/);
});

test('activity counts by the minute', async () => {
  await delivered('node:activity');
  const { ts, minutes } = await call('activity', { minutes: 5 });
  assert.equal(minutes.length, 5);
  minutes.forEach((minute, index) => {
    assert.equal(minute.ts, minutes[0].ts + index * 60_000);
    assert.equal(minute.ts % 60_000, 0);
    for (const count of ['queued', 'delivered', 'dead', 'depth']) assert(minute[count] >= 0, count);
    if (minute.deliveryMs) assert(minute.deliveryMs.median <= minute.deliveryMs.p95);
  });
  assert(minutes[4].ts <= ts && ts < minutes[4].ts + 60_000);
  const sum = (count) => minutes.reduce((total, minute) => total + minute[count], 0);
  assert(sum('queued') >= sum('delivered') + sum('dead'));
  assert(sum('delivered') >= 1);
  assert(minutes.some(({ deliveryMs }) => deliveryMs));
  assert.equal((await call('activity')).minutes.length, 60);
});

for (const minutes of [4, 181, 'all']) {
  test(`activity refuses minutes ${minutes}`, () => refuses('activity', { minutes }, /minutes/));
}

// --- Subscriptions: what they bring is in events.test.mjs ------------------------------------------

test('session changes are subscribed to and not', async () => {
  assert.deepEqual(await call('sessions.subscribe'), { subscribed: true });
  assert.deepEqual(await call('sessions.unsubscribe'), { subscribed: false });
});

test('the messages of one session are subscribed to and not', async () => {
  const session = { key: 'agent:ops:node:m', agentId: 'ops' };
  const params = { key: 'Node:M', agentId: 'ops' };
  assert.deepEqual(await call('sessions.messages.subscribe', params), {
    subscribed: true,
    ...session,
  });
  assert.deepEqual(await call('sessions.messages.unsubscribe', params), {
    subscribed: false,
    ...session,
  });
});

for (const method of ['sessions.messages.subscribe', 'sessions.messages.unsubscribe']) {
  test(`${method} refuses what is no session key`, async () => {
    await refuses(method, {}, /key/);
    await refuses(method, { key: 'agent:ops' }, 'malformed session key "agent:ops"');
  });
}

// --- All methods ----------------------------------------------------------------------------------

test('an unknown method', () =>
  refuses('sessions.explode', {}, 'unknown method: sessions.explode'));

for (const [method, scope] of Object.entries(SCOPES)) {
  test(`${method} needs ${scope}`, async () => {
    const lower = {
      'operator.read': 'operator.pairing',
      'operator.write': 'operator.read',
      'operator.admin': 'operator.write',
    };
    const lesser = await GatewayClient.connect({ scopes: [lower[scope]] });
    await assert.rejects(lesser.request(method, {}), {
      code: 'FORBIDDEN',
      message: `missing scope: ${scope}`,
      details: { code: 'MISSING_SCOPE', missingScope: scope, requiredScopes: [scope] },
    });
    await lesser.close();
  });
}

test('operator.write includes operator.read', async () => {
  const writer = await GatewayClient.connect({ scopes: ['operator.write'] });
  assert.equal((await writer.request('health')).ok, true);
  await writer.close();
});

test('many requests at once are each given their own answer', async () => {
  const keys = Array.from({ length: 40 }, (_, number) => `agent:main:node:many:${number}`);
  const answers = await Promise.all(keys.map((key) => call('sessions.resolve', { key })));
  assert.deepEqual(
    answers.map(({ key }) => key),
    keys,
  );
});

for (const [what, frame] of [
  ['not JSON', '{"type":"req",'],
  ['no object', '[]'],
  ['no method', { type: 'req', id: 'x', params: {} }],
  ['an id that is no text', { type: 'req', id: 7, method: 'health', params: {} }],
]) {
  test(`after hello a malformed frame (${what}) is answered and the connection stays`, async () => {
    client.send(frame);
    const { error } = await client.frame(({ ok }) => ok === false, 'refusal');
    assert.equal(error.code, 'INVALID_REQUEST');
    assert.match(error.message, /^invalid request frame: /);
    assert.equal((await call('health')).ok, true);
  });
}

test('the server names every method, and every one that it names is called here', () => {
  const named = [...client.hello.features.methods].sort();
  assert.deepEqual(named, Object.keys(SCOPES).sort());
  assert.deepEqual([...called].filter((method) => named.includes(method)).sort(), named);
});
