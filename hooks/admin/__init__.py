"""The admin's pages of the HTTP door, a file for each kind."""

from hooks.admin import deliveries, mappings, policy, simulator, tokens

__all__ = ["deliveries", "mappings", "policy", "simulator", "tokens"]
