"""One run from its call to its final state.

Read `perform` (the way of a call), `attempts` (the body, its retries, limits and timeout), then `hooks`, `prints`.
May import every room below: caching, transactions, runners, lifecycle, runs …
"""
