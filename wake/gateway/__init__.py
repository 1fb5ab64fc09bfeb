"""The WebSocket door: the gateway protocol, as docs/protocol.md says and its clients speak it."""
