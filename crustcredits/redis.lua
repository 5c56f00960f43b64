-- What one process has to say of its tokens, and to ask for: one atomic message for as many buckets as there are keys.
--
-- A bucket is a sorted set with a member for each token that is out, scored with the microsecond of this server's clock at
-- which it comes home. KEYS[1] is the marker: a hash that would be lost together with them, so that a loss is noticed.
--
-- ARGV: process, the epoch it knows (0: none), the highest count it has seen, a fresh epoch, and in microseconds the pause after
-- a loss, and how long members are kept after they have come home; milliseconds that the marker lives. Then for each bucket: tokens
-- wanted, how many may be out, the lease of a new one, the number of the first new one, the age of a request of which to tell how
-- many can have been counted when it arrived (-1: none), how many homes and how many returned ones follow; the homes, each
-- with its number and in how many microseconds it is to come home; the returned ones, each with its number.
--
-- Answer: {known, epoch, count, microseconds until tokens are given again}, and for each bucket {given, out, counted, and in how many
-- microseconds the next ones come home, as many as were wanted in vain}. `known` is 0 where the process has to register what
-- it holds first: then nothing else was done.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local place = 1
local function read()
    place = place + 1
    return tonumber(ARGV[place])
end

local process, known, seen, fresh, pause, kept, life = ARGV[1], read(), read(), read(), read(), read(), read()

local function name(number)
    return process .. ':' .. string.format('%.0f', number)
end

local marker = redis.call('HMGET', KEYS[1], 'epoch', 'count', 'opens')
local epoch, count, opens = tonumber(marker[1]), tonumber(marker[2]), tonumber(marker[3])
if not epoch or (known == epoch and seen > count) then
    -- New, or lost, or an older state has come back.
    epoch, count, opens = fresh, 0, now + pause
    redis.call('HSET', KEYS[1], 'epoch', string.format('%.0f', epoch), 'opens', string.format('%.0f', opens))
    redis.call('HSET', KEYS[1], 'count', 0)
end
count = redis.call('HINCRBY', KEYS[1], 'count', 1)
redis.call('PEXPIRE', KEYS[1], life)
if known ~= epoch and known ~= 0 then
    return {{0, epoch, count, math.max(0, opens - now)}}
end

local answers = {{1, epoch, count, math.max(0, opens - now)}}
for bucket = 2, #KEYS do
    local key = KEYS[bucket]
    local wanted, room, lease, first, age, homes, returned = read(), read(), read(), read(), read(), read(), read()
    for _ = 1, homes do
        local number, home = read(), read()
        redis.call('ZADD', key, string.format('%.0f', now + home), name(number))
    end
    for _ = 1, returned do
        redis.call('ZREM', key, name(read()))
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now - kept))
    local counted = -1
    if age >= 0 then
        counted = redis.call('ZCOUNT', key, string.format('(%.0f', now - age), '+inf')
    end
    local later = string.format('(%.0f', now)
    local out = redis.call('ZCOUNT', key, later, '+inf')
    local given = 0
    if now >= opens then
        given = math.max(0, math.min(wanted, room - out))
    end
    for number = first, first + given - 1 do
        redis.call('ZADD', key, string.format('%.0f', now + lease), name(number))
    end
    redis.call('PEXPIRE', key, math.ceil((lease + kept) / 1000))
    local answer = {given, out + given, counted}
    if given < wanted then
        local skipped = math.max(0, out + given - room)
        local coming = redis.call('ZRANGEBYSCORE', key, later, '+inf', 'WITHSCORES', 'LIMIT', skipped, wanted - given)
        for score = 2, #coming, 2 do
            answer[#answer + 1] = math.ceil(tonumber(coming[score]) - now)
        end
    end
    answers[bucket] = answer
end
return answers
