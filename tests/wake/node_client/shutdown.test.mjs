// The last test: the server is asked to stop, and says so to all before it goes.

import assert from 'node:assert/strict';
import test, { after } from 'node:test';

import { closeAll, GatewayClient } from './gateway_client.mjs';

after(closeAll);

test('shutdown is told to all before the connections end', async () => {
  const clients = await Promise.all([GatewayClient.connect(), GatewayClient.connect()]);
  process.kill(Number(process.env.GATEWAY_PID), 'SIGTERM');
  for (const client of clients) {
    const { reason } = await client.event('shutdown');
    assert(typeof reason === 'string' && reason.length > 0);
    const code = await client.closeCode();
    assert([1001, 1012].includes(code), `closed with ${code}`); // going away, or service restart
  }
});
