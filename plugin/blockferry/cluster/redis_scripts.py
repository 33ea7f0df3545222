"""What a log index does within Redis, each as one script: nothing comes between its parts.

    blockferry:names                  sorted set of all names below, each with its kind, so that a prefix is a range
    blockferry:key:NAME               a JSON object
    blockferry:epoch:EPOCH            `open LIFE` or `closed LIFE`, LIFE being the run_id of the server that was asked
    blockferry:all:EPOCH              bitmap of the chunks that were claimed, the first chunk being the highest bit
    blockferry:host:EPOCH\\0HOST       bitmap of the chunks that this host claimed first
    blockferry:queue:NAME             list of pieces; bytes:NAME counts their bytes, bell:NAME wakes whoever waits

A server that is full refuses the first write of a script that could take up memory, or none of its writes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

PREFIX = "blockferry:"


@dataclasses.dataclass(frozen=True)
class Script:
    """A script in Redis' Lua."""

    text: str

    @functools.cached_property
    def digest(self) -> str:
        """The name by which a server knows the script."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


# KEYS: names, key:NAME. ARGV: name, object, milliseconds that it lasts ("" for ever), NX if it has to be new.
PUT = Script("""
local how = {}
if ARGV[3] ~= '' then how = {'PX', ARGV[3]} end
if ARGV[4] ~= '' then how[#how + 1] = ARGV[4] end
if not redis.call('SET', KEYS[2], ARGV[2], unpack(how)) then return 0 end
redis.call('ZADD', KEYS[1], 0, ARGV[1])
return 1
""")

# KEYS: names. ARGV: prefix. Returns name, object, name, object, ...; names of what has vanished go.
LIST = Script("""
local found = {}
for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], '[' .. ARGV[1], '(' .. ARGV[1] .. '\\255')) do
    local value = redis.call('GET', 'blockferry:' .. name)
    if value then
        found[#found + 1] = name
        found[#found + 1] = value
    else
        redis.call('ZREM', KEYS[1], name)
    end
end
return found
""")

# KEYS: names. ARGV: prefixes.
REMOVE = Script("""
for _, prefix in ipairs(ARGV) do
    for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], '[' .. prefix, '(' .. prefix .. '\\255')) do
        redis.call('UNLINK', 'blockferry:' .. name)
        redis.call('ZREM', KEYS[1], name)
    end
end
""")

# KEYS: names, epoch:EPOCH. ARGV: name, open LIFE, closed LIFE. Returns 0 if the epoch is of another life.
OPEN = Script("""
local state = redis.call('GET', KEYS[2])
if state and state ~= ARGV[2] and state ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[1], 0, ARGV[1])
return 1
""")

# KEYS: epoch:EPOCH. ARGV: open LIFE, closed LIFE.
CLOSE = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end
""")

# KEYS: names, epoch:EPOCH, all:EPOCH, host:EPOCH HOST. ARGV: open LIFE, chunks as uint32, names of the last two keys.
# Returns a byte a chunk, 1 where the host is the first; nil if the epoch is not open.
CLAIM = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
local chunks, won, fresh = ARGV[2], {}, false
for each = 1, #chunks / 4 do
    local chunk = struct.unpack('<I4', chunks, 4 * each - 3)
    if redis.call('SETBIT', KEYS[3], chunk, 1) == 0 then
        redis.call('SETBIT', KEYS[4], chunk, 1)
        won[each] = '\\1'
        fresh = true
    else
        won[each] = redis.call('GETBIT', KEYS[4], chunk) == 1 and '\\1' or '\\0'
    end
end
if fresh then redis.call('ZADD', KEYS[1], 0, ARGV[3], 0, ARGV[4]) end
return table.concat(won)
""")

# KEYS: epoch:EPOCH, host:EPOCH HOST. ARGV: open LIFE, closed LIFE. Returns the bitmap; nil if the epoch is not known.
CLAIMED = Script("""
local state = redis.call('GET', KEYS[1])
if state ~= ARGV[1] and state ~= ARGV[2] then return false end
return redis.call('GET', KEYS[2]) or ''
""")

# KEYS: names, queue:NAME, bytes:NAME, bell:NAME. ARGV: piece, most bytes, names of the last three keys.
PUSH = Script("""
if tonumber(redis.call('GET', KEYS[3]) or 0) >= tonumber(ARGV[2]) then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[1])
redis.call('INCRBY', KEYS[3], #ARGV[1])
if redis.call('LLEN', KEYS[4]) == 0 then redis.call('RPUSH', KEYS[4], '') end
redis.call('ZADD', KEYS[1], 0, ARGV[3], 0, ARGV[4], 0, ARGV[5])
return 1
""")

# KEYS: queue:NAME, bytes:NAME. Returns the first piece; nil if there is none.
POP = Script("""
local piece = redis.call('LPOP', KEYS[1])
if piece then redis.call('DECRBY', KEYS[2], #piece) end
return piece
""")
