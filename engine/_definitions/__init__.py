"""What a decorator was told, checked once.

Read `definition`, `options`, `parameters`, `retries`, `keycache`.
May import concurrency (limits), records and keys; it knows no run.
"""
