// A device's key pair, and the proof that a client holds it.

import { createHash, generateKeyPairSync, sign } from 'node:crypto';

export class Device {
  constructor() {
    const { publicKey, privateKey } = generateKeyPairSync('ed25519');
    this.privateKey = privateKey;
    this.publicKey = publicKey.export({ format: 'jwk' }).x; // base64url, no padding
    const raw = Buffer.from(this.publicKey, 'base64url');
    this.id = createHash('sha256').update(raw).digest('hex');
  }

  /** The `device` of a connect with these params, over the text of `version` (v2 or v3). */
  prove(params, { nonce, version = 'v2', id = this.id, signedAt = Date.now() }) {
    const { client, role, scopes, auth } = params;
    const signed = [
      version,
      id,
      client.id,
      client.mode,
      role,
      scopes.join(','),
      signedAt,
      auth?.token ?? '',
      nonce,
    ];
    if (version === 'v3') {
      signed.push(client.platform.toLowerCase(), client.deviceFamily.toLowerCase());
    }
    const signature = sign(null, Buffer.from(signed.join('|')), this.privateKey);
    return {
      id,
      publicKey: this.publicKey,
      signature: signature.toString('base64url'),
      signedAt,
      nonce,
    };
  }
}
