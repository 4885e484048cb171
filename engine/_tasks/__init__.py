"""What users call: tasks and flows, and the ways to call them.

Read `base` (how a call becomes a run), `task` and `flow` (the verbs), then `mapping`, `streaming`, `generators`;
`owner` says who owns what is submitted.
May import every other room of the engine; only the plugin imports it.
"""
