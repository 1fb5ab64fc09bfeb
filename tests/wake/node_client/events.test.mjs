// Every event that comes by itself. That `seq` counts up is checked in gateway_client.mjs.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import test, { after, before } from 'node:test';

import { closeAll, GatewayClient, IMPATIENT_URL } from './gateway_client.mjs';

let client; // sends, and asks for nothing

before(async () => {
  client = await GatewayClient.connect();
});

after(closeAll);

const recent = (ts) => Math.abs(ts - Date.now()) < 60_000;

function wake(sessionKey, text = 'ping') {
  return client.request('wake', { mode: 'now', text, sessionKey });
}

const endOf = (key) => (run) => run.sessionKey === key && run.status !== 'running';

test('heartbeat tells the start and the end of each run, unasked', async () => {
  const watching = await GatewayClient.connect({ scopes: ['operator.read'] });
  const { sessionKey: key } = await wake('node:run', 'what the agent echoes');
  const started = await watching.event('heartbeat', (run) => run.sessionKey === key);
  const { ts, runId, durationMs, preview, ...start } = started;
  assert.deepEqual(start, {
    sessionKey: key,
    agentId: 'main',
    status: 'running',
    reason: 'wake',
    attempt: 1,
    eventCount: 1,
  });
  assert(recent(ts));
  assert.equal(durationMs, null);
  const ended = await watching.event('heartbeat', (run) => run.sessionKey === key);
  assert.deepEqual(
    { ...ended, ts: 0, durationMs: 0, preview: '' },
    { ...start, runId, status: 'delivered', ts: 0, durationMs: 0, preview: '' },
  );
  assert(ended.durationMs >= 0 && ended.ts >= ts);
  assert.match(ended.preview, /what the agent echoes/);
  await watching.close();
});

/**
 * Wake a session until the change of it that is `wanted` is told by its name. `many` may come in its
 * place, where an agent or the settings were changed just before: then a client lists again.
 */
async function toldByName(watching, name, wanted = () => true) {
  for (;;) {
    const { sessionKey: key } = await wake(name);
    const change = await watching.event(
      'sessions.changed',
      (told) => told.reason === 'many' || (told.sessionKey === key && wanted(told)),
    );
    if (change.reason !== 'many') return { key, change };
  }
}

test('sessions.changed comes to who subscribed, and to nobody else', async () => {
  const [watching, witness, other] = await Promise.all(
    [1, 2, 3].map(() => GatewayClient.connect()),
  );
  await watching.request('sessions.subscribe');
  await witness.request('sessions.subscribe');
  // Steps in between may be left out; the last word is how the session stands at the end.
  const { key, change: last } = await toldByName(
    watching,
    'node:changes',
    ({ session }) => session.state === 'idle' && session.lastHeartbeat,
  );
  assert.equal(last.agentId, 'main');
  assert(['event', 'heartbeat', 'changed'].includes(last.reason), last.reason);
  assert(recent(last.ts));
  assert.deepEqual([last.session.key, last.session.queued], [key, 0]);
  assert.equal(last.session.lastHeartbeat.status, 'delivered');

  await watching.request('sessions.unsubscribe');
  const { key: later } = await toldByName(witness, 'node:unchanged');
  for (const connection of [watching, other]) {
    await connection.request('health'); // what was sent before has come by now
    const told = connection.unclaimed('sessions.changed');
    assert(!told.some(({ sessionKey }) => sessionKey === later), 'unsubscribed, and told');
  }
  assert.deepEqual(other.unclaimed('sessions.changed'), []);
  await Promise.all([watching.close(), witness.close(), other.close()]);
});

test('session.message tells the events and heartbeats of the session subscribed to', async () => {
  const [watching, witness, other] = await Promise.all(
    [1, 2, 3].map(() => GatewayClient.connect()),
  );
  const { key } = await watching.request('sessions.messages.subscribe', { key: 'node:told' });
  await witness.request('sessions.messages.subscribe', { key });
  await other.request('sessions.messages.subscribe', { key: 'node:another' });
  const { eventId } = await wake(key, 'to be told');
  const told = ({ sessionKey, item }) => sessionKey === key && item.kind === 'event';
  const event = await watching.event('session.message', told);
  assert.equal(event.agentId, 'main');
  assert.deepEqual([event.item.id, event.item.text], [eventId, 'to be told']);
  const done = await watching.event(
    'session.message',
    ({ item }) => item.kind === 'heartbeat' && item.status === 'delivered',
  );
  assert.equal(done.sessionKey, key);
  assert.deepEqual(done.item.eventIds, [eventId]);
  assert.match(done.item.reply, /to be told/);
  const { items } = await watching.request('sessions.history', { key });
  assert.deepEqual(
    done.item,
    items.find(({ id }) => id === done.item.id),
  );

  await watching.request('sessions.messages.unsubscribe', { key });
  await wake(key, 'not to be told');
  await witness.event('session.message', ({ item }) => item.text === 'not to be told');
  for (const connection of [watching, other]) {
    await connection.request('health'); // what was sent before has come by now
    const rest = connection.unclaimed('session.message');
    assert(!JSON.stringify(rest).includes('not to be told'));
  }
  assert.deepEqual(other.unclaimed('session.message'), []);
  await Promise.all([watching.close(), witness.close(), other.close()]);
});

test('presence tells a newcomer to all', async () => {
  const watching = await GatewayClient.connect();
  const instanceId = randomUUID();
  await client.request('system-event', {
    text: 'Node: porch',
    host: 'porch',
    mode: 'node',
    reason: 'connect',
    instanceId,
  });
  const { presence } = await watching.event('presence', ({ presence: entries }) =>
    entries.some((entry) => entry.instanceId === instanceId),
  );
  assert.deepEqual(
    presence.map((entry) => entry.instanceId).sort(),
    (await watching.request('system-presence')).map((entry) => entry.instanceId).sort(),
  );
  await watching.close();
});

test('health is what the method answers', async () => {
  const watching = await GatewayClient.connect();
  await client.request('set-heartbeats', { enabled: false });
  await client.request('set-heartbeats', { enabled: true });
  const told = await watching.event('health');
  const asked = await watching.request('health');
  assert.deepEqual(Object.keys(told).sort(), Object.keys(asked).sort());
  assert(told.ok && recent(told.ts));
  await watching.close();
});

test('tick comes as often as the policy says', async () => {
  const waiting = await GatewayClient.connect({}, { url: IMPATIENT_URL });
  const ticks = [];
  for (let count = 0; count < 3; count += 1) ticks.push((await waiting.event('tick')).ts);
  assert(recent(ticks[0]) && ticks[0] < ticks[1] && ticks[1] < ticks[2], ticks);
  await waiting.close();
});
