"""The admin's pages of the core, made for an operator who reads them at night.

Sessions, events, heartbeats and reply posts are read-only: `wake.queue` is the only place that
moves events, and a deleted row would leave its counters wrong. What an operator can do with them
are actions.
"""

from wake.admin import access, agents, events, heartbeats, replies, sessions

__all__ = ["access", "agents", "events", "heartbeats", "replies", "sessions"]
