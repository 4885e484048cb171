"""Leases on a Redis or Valkey server.

Read `manager`, `scripts` (what runs on the server), `connections`, `pubsub` (a release wakes the waiters), `address`
(the URL), `errors`.
May import the waiting room, the interface and the ground.
"""
