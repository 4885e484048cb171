"""Flows, tasks, cache policies, and the engine that runs them."""
