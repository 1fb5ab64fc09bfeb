"""The WebSocket door: the gateway protocol, as docs/contract.md and its clients speak it."""
