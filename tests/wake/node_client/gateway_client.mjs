// A client of the gateway protocol, written from docs/protocol.md and from nothing else.
// It checks on every connection, in every test, that responses answer a request of its own once,
// and that the events' `seq` counts up without a gap.

import { randomUUID } from 'node:crypto';
import { WebSocket } from 'ws';

export const URL_OF_GATEWAY = process.env.GATEWAY_URL;
export const TOKEN = process.env.GATEWAY_TOKEN;
// A site of its own whose waiting times are short: rows about silence take no half minute.
export const IMPATIENT_URL = process.env.IMPATIENT_GATEWAY_URL;

const PATIENCE_MS = 10_000;

const open = new Set();

/** Close what tests have left open, so that the process can end; for `after`. */
export async function closeAll() {
  const closed = await Promise.allSettled([...open].map((client) => client.close()));
  const defect = closed.find(({ status }) => status === 'rejected');
  if (defect) throw defect.reason;
}

/** The error of a response, as the server wrote it; what it left out is undefined. */
export class GatewayError extends Error {
  constructor({ code, message, details, retryable, retryAfterMs }) {
    super(message);
    Object.assign(this, { code, details, retryable, retryAfterMs });
  }
}

/** The params of a good `connect`; undefined takes a field away. */
export function connectParams(changes = {}) {
  return {
    minProtocol: 4,
    maxProtocol: 4,
    client: {
      id: 'cli',
      version: '2026.9.6',
      platform: 'linux',
      deviceFamily: 'Linux',
      mode: 'cli',
      instanceId: randomUUID(),
    },
    caps: [],
    auth: { token: TOKEN },
    role: 'operator',
    scopes: ['operator.admin'],
    ...changes,
  };
}

export class GatewayClient {
  #socket;
  #unclaimed = []; // events and stray responses that nobody has waited for yet
  #waiting = new Set();
  #asked = new Set();
  #seq = null;
  #failure = null;
  #closed;

  constructor(url, options) {
    this.#socket = new WebSocket(url, options);
    open.add(this);
    this.#closed = new Promise((resolve) => {
      this.#socket.on('close', (code, reason) => {
        open.delete(this);
        this.#fail(new Error(`closed with ${code} ${reason}`));
        resolve(code);
      });
    });
    this.#socket.on('error', (error) => this.#fail(error));
    this.#socket.on('message', (data, isBinary) => this.#receive(data, isBinary));
  }

  /** Open a connection and wait for the challenge. */
  static async open({ url = URL_OF_GATEWAY, ...options } = {}) {
    const client = new GatewayClient(url, options);
    client.challenge = await client.event('connect.challenge');
    return client;
  }

  /** Open a connection and bring it past its handshake. */
  static async connect(changes = {}, options = {}) {
    const client = await GatewayClient.open(options);
    client.hello = await client.request('connect', connectParams(changes));
    return client;
  }

  /** The names of the extensions that both sides agreed on, as permessage-deflate. */
  get extensions() {
    return this.#socket.extensions;
  }

  /** Send anything: an object as JSON, a string or bytes as they are. */
  send(frame) {
    const raw = typeof frame === 'string' || Buffer.isBuffer(frame);
    this.#socket.send(raw ? frame : JSON.stringify(frame));
  }

  /**
   * Ask, and return the payload; a refusal is thrown as a GatewayError.
   * Spaces make the frame `bytes` long.
   */
  async request(method, params = {}, { bytes = 0 } = {}) {
    const id = randomUUID();
    this.#asked.add(id);
    this.send(JSON.stringify({ type: 'req', id, method, params }).padEnd(bytes, ' '));
    const response = await this.frame(
      (frame) => frame.type === 'res' && frame.id === id,
      `response to ${method}`,
    );
    if (response.ok === true && !('error' in response)) return response.payload;
    if (response.ok === false && !('payload' in response)) throw new GatewayError(response.error);
    throw new Error(`neither an answer nor a refusal: ${JSON.stringify(response)}`);
  }

  /** The payload of the next event of that name that `wanted` is true of; others stay. */
  async event(name, wanted = () => true) {
    const frame = await this.frame(
      (one) => one.type === 'event' && one.event === name && wanted(one.payload),
      `event ${name}`,
    );
    return frame.payload;
  }

  /** The payloads of the events of that name that came and nobody has waited for. */
  unclaimed(name) {
    return this.#unclaimed
      .filter((frame) => frame.type === 'event' && frame.event === name)
      .map((frame) => frame.payload);
  }

  /** The next frame, or one that came before, that `wanted` is true of. */
  frame(wanted, what) {
    const index = this.#unclaimed.findIndex(wanted);
    if (index !== -1) return Promise.resolve(this.#unclaimed.splice(index, 1)[0]);
    if (this.#failure) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      const late = setTimeout(() => {
        this.#waiting.delete(waiter);
        const others = this.#unclaimed.map((frame) => JSON.stringify(frame).slice(0, 300));
        reject(new Error(`no ${what} in ${PATIENCE_MS} ms, but:\n${others.join('\n')}`));
      }, PATIENCE_MS);
      const settled = (settle) => (value) => {
        clearTimeout(late);
        this.#waiting.delete(waiter);
        settle(value);
      };
      const waiter = { wanted, resolve: settled(resolve), reject: settled(reject) };
      this.#waiting.add(waiter);
    });
  }

  /** Wait until the server has ended the connection, and return its close code. */
  async closeCode() {
    const late = setTimeout(() => this.#socket.terminate(), PATIENCE_MS); // then it is 1006
    const code = await this.#closed;
    clearTimeout(late);
    return code;
  }

  /** End the connection; throws what was wrong with what came over it. */
  async close() {
    const defect = this.#failure;
    this.#socket.close();
    await this.closeCode();
    if (defect) throw defect;
  }

  #receive(data, isBinary) {
    if (isBinary) return this.#fail(new Error('a binary frame'));
    const frame = JSON.parse(data.toString());
    if (frame.type === 'event') {
      if (!Number.isInteger(frame.seq) || (this.#seq !== null && frame.seq !== this.#seq + 1)) {
        return this.#fail(new Error(`${frame.event} has seq ${frame.seq} after ${this.#seq}`));
      }
      this.#seq = frame.seq;
    } else if (frame.type !== 'res') {
      return this.#fail(new Error(`neither an event nor a response: ${data}`));
    } else if (this.#asked.has(frame.id)) {
      this.#asked.delete(frame.id);
    } else if (typeof frame.id === 'string' && frame.ok === true) {
      return this.#fail(new Error(`an answer that was not asked for: ${data}`));
    }
    for (const waiter of this.#waiting) {
      if (waiter.wanted(frame)) return waiter.resolve(frame);
    }
    this.#unclaimed.push(frame);
  }

  #fail(error) {
    this.#failure ??= error;
    for (const waiter of [...this.#waiting]) waiter.reject(this.#failure);
  }
}
