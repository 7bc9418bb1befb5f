"""What the server does for us in one go. A command for each block costs us 20 to 40 us, and there are many
thousands of them a second; as arguments of a script it costs 1 to 3 (bench/micro/shared_index.py).
"""

from __future__ import annotations

READ = """
local runs, last = {}, nil
for key in string.gmatch(ARGV[1], '%d+') do
  local holders = redis.call('HKEYS', key)
  if #holders == 0 then break end
  table.sort(holders)
  local all = table.concat(holders, '\\n')
  if all == last then
    runs[#runs][1] = runs[#runs][1] + 1
  else
    runs[#runs + 1] = {1, holders}
    last = all
  end
end
return runs
"""
"""Who holds the blocks with these keys, which are one argument with spaces between them, up to the first
that nobody holds: blocks in a row, and the fields they have in common.
"""

WRITE = """
local at = 1
while at <= #ARGV do
  local what, holder, set, suffix, count = unpack(ARGV, at, at + 4)
  at = at + 5
  for _ = 1, tonumber(count) do
    local key = ARGV[at]
    if what == 'stored' then
      local engine = 'engine:' .. ARGV[at + 1]
      redis.call('HSET', key, holder, '')
      redis.call('SADD', set, key .. suffix)
      redis.call('ZADD', engine, ARGV[at + 2], key)
      redis.call('PERSIST', engine)
      at = at + 3
    else
      redis.call('HDEL', key, holder)
      redis.call('SREM', set, key .. suffix)
      at = at + 1
    end
  end
end
"""
"""Changes one after the other: ``stored`` or ``removed``, the field of who did, the set of what we wrote for
it, what a key has after it there, and how many there are; then as many keys, those of stored blocks with
the engine's hash and the key's place among those that the hash stands for.
"""

Arguments = list[str | bytes | int]

MOST_ARGUMENTS = 1500
"""Of one call: about 500 blocks, to hash which takes us 2 ms, and to write which the server one. Meanwhile
neither does anything else.
"""
