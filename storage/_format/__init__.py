"""The container of every object that onceflow writes: a header, then the payload.

Read `envelope`, `digest`.
May import the runtime room and the errors.
"""
