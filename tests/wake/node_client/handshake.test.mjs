// Who is let in, and every row of the table of failures: its error and its close code.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import test, { after } from 'node:test';

import { Device } from './device.mjs';
import {
  closeAll,
  connectParams,
  GatewayClient,
  GatewayError,
  IMPATIENT_URL,
  TOKEN,
  URL_OF_GATEWAY,
} from './gateway_client.mjs';

const SITE = URL_OF_GATEWAY.replace(/^ws/, 'http').replace(/\/$/, '');
const ALL_SCOPES = ['operator.admin', 'operator.read', 'operator.write'];

after(closeAll);

/** Connect in vain: the error as it was answered on the request, and the code of the close. */
async function refused(params, { method = 'connect', ...options } = {}) {
  const client = await GatewayClient.open(options);
  const error = await client.request(method, params).then(
    () => assert.fail('it was let in'),
    (reason) => reason,
  );
  assert(error instanceof GatewayError, error);
  const { code, message, details } = error;
  return { code, message, details, closed: await client.closeCode() };
}

// --- Let in ---------------------------------------------------------------------------------------

test('the server speaks first, with a nonce of each connection', async () => {
  const [one, other] = await Promise.all([GatewayClient.open(), GatewayClient.open()]);
  assert.match(one.challenge.nonce, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
  assert.notEqual(one.challenge.nonce, other.challenge.nonce);
  assert(Math.abs(one.challenge.ts - Date.now()) < 60_000);
  await Promise.all([one.close(), other.close()]);
});

for (const path of ['/', '/ws']) {
  test(`hello-ok at ${path}`, async () => {
    const client = await GatewayClient.connect({}, { url: URL_OF_GATEWAY.replace(/\/$/, path) });
    const { hello } = client;
    assert.equal(hello.type, 'hello-ok');
    assert.equal(hello.protocol, 4);
    assert.match(hello.server.connId, /^[0-9a-f-]{36}$/);
    assert.equal(typeof hello.server.version, 'string');
    assert(Array.isArray(hello.snapshot.presence));
    assert.equal(hello.snapshot.health.ok, true);
    assert(Number.isInteger(hello.snapshot.stateVersion.presence));
    assert(Number.isInteger(hello.snapshot.stateVersion.health));
    assert(hello.snapshot.uptimeMs >= 0);
    assert.deepEqual(hello.snapshot.sessionDefaults, {
      defaultAgentId: 'main',
      mainKey: 'main',
      mainSessionKey: 'agent:main:main',
      scope: 'per-sender',
    });
    assert.equal(hello.auth.role, 'operator');
    assert.deepEqual(hello.policy, {
      maxPayload: 26214400,
      maxBufferedBytes: 52428800,
      tickIntervalMs: 30000,
    });
    assert.deepEqual([...hello.features.events].sort(), [
      'connect.challenge',
      'health',
      'heartbeat',
      'heartbeat.lost',
      'heartbeat.run',
      'presence',
      'session.message',
      'sessions.changed',
      'shutdown',
      'tick',
    ]);
    await client.close();
  });
}

for (const [minProtocol, maxProtocol, spoken] of [
  [4, 4, 4],
  [3, 3, 3],
  [3, 4, 4],
  [1, 3, 3],
  [4, 9, 4],
]) {
  test(`protocols ${minProtocol} to ${maxProtocol} speak ${spoken}`, async () => {
    const client = await GatewayClient.connect({ minProtocol, maxProtocol });
    assert.equal(client.hello.protocol, spoken);
    await client.close();
  });
}

for (const [id, mode] of [
  ['cli', 'cli'],
  ['gateway-client', 'backend'],
  ['openclaw-control-ui', 'webchat'],
  ['a client that nobody has heard of', 'backend'],
]) {
  test(`a client may be ${id} (${mode})`, async () => {
    const client = await GatewayClient.connect({
      client: { ...connectParams().client, id, mode },
      commands: ['camera.snap'],
      permissions: { 'camera.capture': true },
      locale: 'en-GB',
      userAgent: 'node',
    });
    await client.close();
  });
}

for (const [asked, given] of [
  [undefined, ALL_SCOPES],
  [[], ALL_SCOPES],
  [['operator.read'], ['operator.read']],
  [
    ['operator.write', 'operator.read'],
    ['operator.read', 'operator.write'],
  ],
]) {
  test(`asked for scopes ${JSON.stringify(asked)}`, async () => {
    const client = await GatewayClient.connect({ scopes: asked });
    assert.deepEqual([...client.hello.auth.scopes].sort(), given);
    await client.close();
  });
}

for (const perMessageDeflate of [true, false]) {
  test(`permessage-deflate ${perMessageDeflate ? 'on' : 'off'}`, async () => {
    const client = await GatewayClient.connect({}, { perMessageDeflate });
    assert.equal(client.extensions, perMessageDeflate ? 'permessage-deflate' : '');
    const text = 'so long that it is worth packing '.repeat(1000).trim();
    const receipt = await client.request('wake', { mode: 'now', text, sessionKey: 'node:deflate' });
    const history = await client.request('sessions.history', { key: receipt.sessionKey });
    const stored = history.items.find(({ id }) => id === receipt.eventId);
    assert.equal(stored.text, text);
    await client.close();
  });
}

// --- Device proofs --------------------------------------------------------------------------------

async function proving(change, changes = {}) {
  const client = await GatewayClient.open();
  const device = new Device();
  const params = connectParams(changes);
  params.device = change(device, params, client.challenge.nonce);
  const answer = await client.request('connect', params).catch((error) => error);
  if (!(answer instanceof Error)) {
    await client.close();
    return answer;
  }
  assert(answer instanceof GatewayError, answer);
  assert.equal(await client.closeCode(), 1008);
  return answer;
}

for (const version of ['v2', 'v3']) {
  test(`a device proof over the text of ${version}`, async () => {
    const hello = await proving((device, params, nonce) =>
      device.prove(params, { nonce, version }),
    );
    assert.equal(hello.type, 'hello-ok');
  });
}

for (const seconds of [-100, 100]) {
  test(`a clock that is ${seconds} s off is near enough`, async () => {
    const signedAt = Date.now() + seconds * 1000;
    const hello = await proving((device, params, nonce) =>
      device.prove(params, { nonce, signedAt }),
    );
    assert.equal(hello.type, 'hello-ok');
  });
}

const PROOFS = {
  'signed by another key': [
    'DEVICE_AUTH_SIGNATURE_INVALID',
    (device, params, nonce) => ({
      ...device.prove(params, { nonce }),
      signature: new Device().prove(params, { nonce }).signature,
    }),
  ],
  'signed for other scopes': [
    'DEVICE_AUTH_SIGNATURE_INVALID',
    (device, params, nonce) => device.prove({ ...params, scopes: ['operator.read'] }, { nonce }),
  ],
  'signed for another token': [
    'DEVICE_AUTH_SIGNATURE_INVALID',
    (device, params, nonce) => device.prove({ ...params, auth: { token: 'other' } }, { nonce }),
  ],
  'v3 signed for another platform': [
    'DEVICE_AUTH_SIGNATURE_INVALID',
    (device, params, nonce) =>
      device.prove(
        { ...params, client: { ...params.client, platform: 'darwin' } },
        { nonce, version: 'v3' },
      ),
  ],
  'a signature that is none': [
    'DEVICE_AUTH_SIGNATURE_INVALID',
    (device, params, nonce) => ({ ...device.prove(params, { nonce }), signature: 'AAAA' }),
  ],
  'a nonce of its own': [
    'DEVICE_AUTH_NONCE_MISMATCH',
    (device, params) => device.prove(params, { nonce: randomUUID() }),
  ],
  'signed 130 s ago': [
    'DEVICE_AUTH_SIGNATURE_EXPIRED',
    (device, params, nonce) => device.prove(params, { nonce, signedAt: Date.now() - 130_000 }),
  ],
  'signed 130 s from now': [
    'DEVICE_AUTH_SIGNATURE_EXPIRED',
    (device, params, nonce) => device.prove(params, { nonce, signedAt: Date.now() + 130_000 }),
  ],
  "another device's id": [
    'DEVICE_AUTH_DEVICE_ID_MISMATCH',
    (device, params, nonce) => device.prove(params, { nonce, id: new Device().id }),
  ],
};

for (const [name, [detailsCode, change]] of Object.entries(PROOFS)) {
  test(`a bad device proof: ${name}`, async () => {
    const error = await proving(change);
    assert.equal(error.code, 'INVALID_REQUEST');
    assert.equal(error.details.code, detailsCode);
  });
}

test('a device proof stands in for no token', async () => {
  const change = (device, params, nonce) => device.prove(params, { nonce });
  const without = await proving(change, { auth: undefined });
  assert.equal(without.details.code, 'AUTH_TOKEN_MISSING');
  const wrong = await proving(change, { auth: { token: 'wrong' } });
  assert.equal(wrong.details.code, 'AUTH_TOKEN_MISMATCH');
});

// --- Failures -------------------------------------------------------------------------------------

test('failure: wrong token', async () => {
  assert.deepEqual(await refused(connectParams({ auth: { token: `${TOKEN}x` } })), {
    code: 'INVALID_REQUEST',
    message: 'unauthorized: gateway token mismatch (provide gateway auth token)',
    details: {
      code: 'AUTH_TOKEN_MISMATCH',
      authReason: 'token_mismatch',
      canRetryWithDeviceToken: false,
      recommendedNextStep: 'update_auth_credentials',
    },
    closed: 1008,
  });
});

for (const auth of [undefined, {}]) {
  test(`failure: no credential (auth ${JSON.stringify(auth)})`, async () => {
    const { code, message, details, closed } = await refused(connectParams({ auth }));
    assert.equal(code, 'INVALID_REQUEST');
    assert.match(message, /^unauthorized: gateway token missing /);
    assert.equal(details.code, 'AUTH_TOKEN_MISSING');
    assert.equal(closed, 1008);
  });
}

test('failure: first request is not connect', async () => {
  const { code, message, closed } = await refused({}, { method: 'health' });
  assert.equal(code, 'INVALID_REQUEST');
  assert.equal(message, 'invalid handshake: first request must be connect');
  assert.equal(closed, 1008);
});

for (const [minProtocol, maxProtocol] of [
  [5, 6],
  [1, 2],
]) {
  test(`failure: no common protocol (${minProtocol} to ${maxProtocol})`, async () => {
    assert.deepEqual(await refused(connectParams({ minProtocol, maxProtocol })), {
      code: 'INVALID_REQUEST',
      message: 'protocol mismatch',
      details: {
        code: 'PROTOCOL_MISMATCH',
        clientMinProtocol: minProtocol,
        clientMaxProtocol: maxProtocol,
        expectedProtocol: 4,
      },
      closed: 1002,
    });
  });
}

const { client: CLIENT } = connectParams();
for (const [field, changes] of [
  ['minProtocol', { minProtocol: undefined }],
  ['maxProtocol', { maxProtocol: 'four' }],
  ['client', { client: undefined }],
  ['client.id', { client: { ...CLIENT, id: '' } }],
  ['client.mode', { client: { ...CLIENT, mode: 7 } }],
  ['auth', { auth: TOKEN }],
  ['auth.token', { auth: { token: 7 } }],
  ['scopes', { scopes: 'operator.read' }],
  ['role', { role: 7 }],
  ['device', { device: 'mine' }],
  ['device.signedAt', { device: { ...new Device().prove(connectParams(), {}), signedAt: 'now' } }],
]) {
  test(`failure: bad params (${field})`, async () => {
    const { code, message, closed } = await refused(connectParams(changes));
    assert.equal(code, 'INVALID_REQUEST');
    assert.match(message, /^invalid connect params: /);
    assert(
      field.split('.').every((name) => message.includes(name)),
      message,
    );
    assert.equal(closed, 1008);
  });
}

for (const [what, frame] of [
  ['not JSON', '{"type":"req",'],
  [
    'a binary frame',
    Buffer.from(
      JSON.stringify({ type: 'req', id: '1', method: 'connect', params: connectParams() }),
    ),
  ],
]) {
  test(`failure: ${what}`, async () => {
    const client = await GatewayClient.open();
    client.send(frame);
    assert.equal(await client.closeCode(), 1008);
  });
}

test('failure: nothing for too long', async () => {
  const client = await GatewayClient.open({ url: IMPATIENT_URL });
  assert.equal(await client.closeCode(), 1008);
});

for (const perMessageDeflate of [true, false]) {
  const packed = perMessageDeflate ? ', packed' : '';
  const tooBig = (client, method, params, bytes) => {
    client.request(method, params, { bytes }).catch(() => {});
    return client.closeCode();
  };

  test(`failure: a frame over 64 KiB before hello${packed}`, async () => {
    const bytes = 64 * 1024;
    const fits = await GatewayClient.open({ perMessageDeflate });
    assert.equal((await fits.request('connect', connectParams(), { bytes })).type, 'hello-ok');
    await fits.close();
    const client = await GatewayClient.open({ perMessageDeflate });
    assert.equal(await tooBig(client, 'connect', connectParams(), bytes + 1), 1009);
  });

  test(`failure: a frame over maxPayload after hello${packed}`, async () => {
    const client = await GatewayClient.connect({}, { perMessageDeflate });
    const bytes = client.hello.policy.maxPayload;
    assert.equal((await client.request('health', {}, { bytes })).ok, true);
    assert.equal(await tooBig(client, 'health', {}, bytes + 1), 1009);
  });
}

// --- Browsers -------------------------------------------------------------------------------------

/** Sign in at the site's own form, and return the cookies as a browser sends them. */
async function signIn() {
  const cookies = new Map();
  const visit = async (options) => {
    const answer = await fetch(`${SITE}/admin/login/`, { redirect: 'manual', ...options });
    for (const line of answer.headers.getSetCookie()) {
      const [, name, value] = line.match(/^([^=]+)=([^;]*)/);
      cookies.set(name, value);
    }
    return answer;
  };
  const header = () => [...cookies].map((pair) => pair.join('=')).join('; ');
  const form = await (await visit({})).text();
  const [, csrfmiddlewaretoken] = form.match(/name="csrfmiddlewaretoken" value="([^"]+)"/);
  const answer = await visit({
    method: 'POST',
    headers: { cookie: header(), origin: SITE },
    body: new URLSearchParams({
      csrfmiddlewaretoken,
      username: 'admin',
      password: process.env.ADMIN_PASSWORD,
      next: '/admin/',
    }),
  });
  assert.equal(answer.status, 302, 'the sign-in failed');
  return header();
}

const FROM_ELSEWHERE = {
  code: 'INVALID_REQUEST',
  message: 'origin not allowed',
  details: { code: 'CONTROL_UI_ORIGIN_NOT_ALLOWED' },
  closed: 1008,
};

test('failure: a browser from elsewhere, whatever token it has', async () => {
  for (const origin of ['https://elsewhere.example', `${SITE}0`, 'null']) {
    assert.deepEqual(await refused(connectParams(), { origin }), FROM_ELSEWHERE);
  }
});

test("a browser on this site's own page, with a token", async () => {
  const client = await GatewayClient.connect({}, { origin: SITE });
  await client.close();
});

test('a signed-in superuser needs no token on the own page, and gets nothing elsewhere', async () => {
  const headers = { cookie: await signIn() };
  const params = { auth: undefined, scopes: [] };
  const client = await GatewayClient.connect(params, { origin: SITE, headers });
  assert.deepEqual([...client.hello.auth.scopes].sort(), ALL_SCOPES);
  await client.close();
  const elsewhere = { origin: 'https://elsewhere.example', headers };
  assert.deepEqual(await refused(connectParams(params), elsewhere), FROM_ELSEWHERE);
  const signedOut = await refused(connectParams(params), { origin: SITE });
  assert.equal(signedOut.details.code, 'AUTH_TOKEN_MISSING');
});
