"""What the Redis server does in one step. Each may be repeated after a lost reply.

A lock is the text `token nonce holder` under its key, and it expires with the lease. The nonce tells this
acquisition from any other of the same holder.
"""

from __future__ import annotations

import hashlib


class Script:
    """A Lua script and the digest by which the server knows it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


ACQUIRE = Script(
    """
local held = redis.call('GET', KEYS[1])
if held then
    local token, nonce, holder = string.match(held, '^(%d+) (%w+) (.*)$')
    if holder ~= ARGV[1] then
        return {'0', redis.call('PTTL', KEYS[1]), holder or held}
    end
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return {token, nonce, holder}
end
local time = redis.call('TIME')
local token = time[1] * 1000000 + time[2]
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if token <= last then
    token = last + 1
end
token = string.format('%.0f', token)
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[3])
return {token, ARGV[2], ARGV[1]}
"""
)
"""KEYS: lock, last token. ARGV: holder, nonce, lease in ms. Returns token, nonce, holder, or 0, ms left, owner."""

RENEW = Script(
    """
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%d+ (%w+) ') == ARGV[1] then
    return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
"""
)
"""KEYS: lock. ARGV: nonce, lease in ms. Returns whether it is still held by the nonce."""

RELEASE = Script(
    """
local held = redis.call('GET', KEYS[1])
if not held then
    return 0
end
local nonce, holder = string.match(held, '^%d+ (%w+) (.*)$')
if nonce ~= ARGV[1] and not (ARGV[1] == '' and holder == ARGV[2]) then
    return 0
end
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[3], 'free')
return 1
"""
)
"""KEYS: lock. ARGV: nonce or '', holder, channel. Returns whether it was held so."""

LOOK = Script(
    """
local held = redis.call('GET', KEYS[1])
if not held then
    return false
end
return {redis.call('PTTL', KEYS[1]), string.match(held, '^%d+ %w+ (.*)$') or held}
"""
)
"""KEYS: lock. Returns ms left and owner, or nil."""
