"""Heartbeats: the loop that claims due sessions, the prompt, and one file for each runner."""
