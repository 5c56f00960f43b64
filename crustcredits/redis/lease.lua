-- One atomic message about one lease. A term begins when a holder acquires it, and has a number.
--
-- KEYS[1] is the lease: its holder and the number of the term. It expires with the lease. KEYS[2] is
-- the number of the last term. It never expires, so the next number is higher also after a term
-- whose lease has expired.
-- ARGV: the holder, new for each term; "acquire", "renew" or "release"; milliseconds of the lease.
--
-- Answer: {number of the holder's term, or 0 if the lease is not its own; milliseconds until the lease
-- expires}. A message that arrives again finds its own lease.

local value = redis.call('GET', KEYS[1])
local holder, number = string.match(value or '', '^(%S+) (%d+)$')
local is_own = holder == ARGV[1]

if ARGV[2] == 'release' then
    if is_own then
        redis.call('DEL', KEYS[1])
    end
    return {0, 0}
end

if ARGV[2] == 'acquire' and not value then
    local clock = redis.call('TIME')
    local now = clock[1] * 1000000 + clock[2]
    local next_number = redis.call('INCR', KEYS[2])
    if next_number < now then
        -- The first term, or the last number was lost. In microseconds since 1970, the number is
        -- higher than one that was given earlier.
        next_number = now
        redis.call('SET', KEYS[2], string.format('%.0f', now))
    end
    number, is_own = string.format('%.0f', next_number), true
    redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. number, 'NX', 'PX', ARGV[3])
elseif is_own then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {is_own and tonumber(number) or 0, redis.call('PTTL', KEYS[1])}
