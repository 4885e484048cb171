"""What the Redis server does in one step. Each may be repeated after a lost reply.

A lock is the text `token nonce holder` under its key, and it expires with the lease. The nonce tells this
acquisition from any other of the same holder.
"""

from __future__ import annotations

import hashlib


class Script:
    """A Lua script, and the bytes that ask a server to run it: by its digest, or as a whole.

    Packed here because redis-py takes ten times as long for it, which is a twentieth of a request.
    """

    def __init__(self, keys: int, text: str) -> None:
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._by_digest = _packed("EVALSHA", digest, keys)
        self._whole = _packed("EVAL", text, keys)

    def request(self, words: tuple[str | int, ...], whole: bool = False) -> bytes:
        """Run it with these keys and arguments; `whole` where the server does not know it yet."""
        return b"*%d\r\n%b%b" % (3 + len(words), self._whole if whole else self._by_digest, _packed(*words))


def _packed(*words: str | int) -> bytes:
    encoded = [str(word).encode() for word in words]
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded])


ACQUIRE = Script(
    2,
    """
local held = redis.call('GET', KEYS[1])
if held then
    local holder = string.match(held, '^%d+ %w+ (.*)$')
    if holder ~= ARGV[1] then
        return '0 ' .. redis.call('PTTL', KEYS[1]) .. ' ' .. (holder or held)
    end
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return held
end
local time = redis.call('TIME')
local token = time[1] * 1000000 + time[2]
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if token <= last then
    token = last + 1
end
token = string.format('%.0f', token)
held = token .. ' ' .. ARGV[2] .. ' ' .. ARGV[1]
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], held, 'PX', ARGV[3])
return held
""",
)
"""KEYS: lock, last token. ARGV: holder, nonce, lease in ms. Returns `token nonce holder`, or `0 msleft owner`."""

RENEW = Script(
    1,
    """
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%d+ (%w+) ') == ARGV[1] then
    return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
""",
)
"""KEYS: lock. ARGV: nonce, lease in ms. Returns whether it is still held by the nonce."""

RELEASE = Script(
    1,
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
""",
)
"""KEYS: lock. ARGV: nonce and '', or '' and the holder; channel. Returns whether it was held so."""

LOOK = Script(
    1,
    """
local held = redis.call('GET', KEYS[1])
if not held then
    return false
end
return '0 ' .. redis.call('PTTL', KEYS[1]) .. ' ' .. (string.match(held, '^%d+ %w+ (.*)$') or held)
""",
)
"""KEYS: lock. Returns `0 msleft owner`, or nil."""
