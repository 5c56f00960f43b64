-- What one process has to say of its tokens, and to ask for: one atomic message for any number of buckets.
--
-- A bucket is a sorted set with a member for each token that is out, scored with the microsecond of this server's clock at
-- which it comes home; and a line, a hash of the processes that wait: since when, when they were heard last, and how many
-- may be out for them. KEYS[1] is the marker: a hash without which the count is taken for lost. Then come the two of each bucket.
--
-- ARGV, spans and times in microseconds: process; the epoch it knows (0: none); whether no tokens may be given for a while (1),
-- because it had no answer for long, or has more to register; a fresh epoch; what this server's clock said last, as far as it knows
-- (0: nothing), and how long ago that is by its own, give or take a slack; the pause after a loss; the lease of a new token; how long
-- members are kept after they have come home; milliseconds that the marker lives. Then for each bucket: tokens wanted; how many may
-- be out; the number of the first new one; the age of a request of which to tell how many can have been counted when it
-- arrived (-1: none); how many homes and how many returned ones follow; the homes, each with its number and when it is
-- to come home from now; the returned ones, each with its number.
--
-- Answer: {known, epoch, until tokens are given again, this server's clock}, and for each bucket {given, out, counted, and when the
-- next ones come home from now, as many as were wanted in vain}. `known` is 0 where the process has to register what it holds
-- first: then nothing else was done.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local place = 1
local function read()
    place = place + 1
    return tonumber(ARGV[place])
end

local process, known, hold, fresh = ARGV[1], read(), read(), read()
local told, ago, slack = read(), read(), read()
local pause, lease, kept, life = read(), read(), read(), read()

local function whole(number)
    return string.format('%.0f', number)
end

local function name(number)
    return process .. ':' .. whole(number)
end

-- Which server this is. One that takes over, or starts again, may not have all that the last one was told.
local server = redis.pcall('INFO', 'server')
local run = type(server) == 'string' and string.match(server, 'run_id:(%w+)')

local marker = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'opens', 'longest', 'heard')
local epoch, opens, longest = tonumber(marker[1]), tonumber(marker[3]) or 0, math.max(lease, tonumber(marker[4]) or 0)
-- Where INFO is not allowed nothing is concluded from it.
local same = run == false or run == nil or run == marker[2]
-- The clock was set, so that tokens come home at the wrong time; or this message is read long after it was sent.
local astray = told > 0 and math.abs(now - told - ago) > slack + ago / 200 or now < (tonumber(marker[5]) or 0)
if not epoch or not same or ((known == epoch or known == 0) and astray) then
    epoch, opens = fresh, now + pause
elseif hold == 1 then
    opens = now + pause
end
opens = math.min(opens, now + pause)
redis.call('HSET', KEYS[1], 'epoch', whole(epoch), 'run', run or marker[2] or '', 'heard', whole(now))
redis.call('HSET', KEYS[1], 'opens', whole(opens), 'longest', whole(longest))
redis.call('PEXPIRE', KEYS[1], life)
local head = {1, epoch, math.max(0, opens - now), now}
if known ~= epoch and known ~= 0 then
    head[1] = 0
    return {head}
end

-- Never sooner than others have said: they may keep theirs for longer.
local function live(key, milliseconds)
    if redis.call('PTTL', key) < milliseconds then
        redis.call('PEXPIRE', key, milliseconds)
    end
end

-- How many processes have waited longer than this one, which joins the line, and can be served; and since when it has waited itself.
local function ahead(line, out)
    local entries, own, began = redis.call('HGETALL', line), now, {}
    for entry = 1, #entries, 2 do
        local other = entries[entry]
        local since, heard, room = string.match(entries[entry + 1], '(%d+) (%d+) (%d+)')
        if tonumber(heard) < now - pause or tonumber(heard) > now then
            redis.call('HDEL', line, other)
        elseif other == process then
            own = tonumber(since)
        elseif tonumber(room) > out then
            began[#began + 1] = tonumber(since)
        end
    end
    local before = 0
    for _, since in ipairs(began) do
        if since < own then
            before = before + 1
        end
    end
    return before, own
end

local answers = {head}
for bucket = 2, #KEYS, 2 do
    local key, line = KEYS[bucket], KEYS[bucket + 1]
    local wanted, room, first, age, homes, returned = read(), read(), read(), read(), read(), read()
    for _ = 1, homes do
        local number, home = read(), read()
        redis.call('ZADD', key, whole(now + home), name(number))
    end
    for _ = 1, returned do
        redis.call('ZREM', key, name(read()))
    end
    for number = first, first + wanted - 1 do
        -- The message may have come before, and its answer was lost.
        redis.call('ZREM', key, name(number))
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - kept))
    redis.call('ZREMRANGEBYSCORE', key, '(' .. whole(now + longest), '+inf') -- of a clock that was ahead
    local counted = -1
    if age >= 0 then
        counted = redis.call('ZCOUNT', key, '(' .. whole(now - age), '+inf')
    end
    local later = '(' .. whole(now)
    local out = redis.call('ZCOUNT', key, later, '+inf')
    local given = 0
    if wanted > 0 and now >= opens then
        -- Whoever has waited longer finds one when it comes, however far away it is.
        local before, since = ahead(line, out)
        given = math.max(0, math.min(wanted, room - out - before))
        if given > 0 then
            since = now
        end
        if given < wanted then
            redis.call('HSET', line, process, whole(since) .. ' ' .. whole(now) .. ' ' .. whole(room))
            redis.call('PEXPIRE', line, math.ceil(2 * pause / 1000))
        end
    end
    if given == wanted then
        redis.call('HDEL', line, process)
    end
    for number = first, first + given - 1 do
        redis.call('ZADD', key, whole(now + lease), name(number))
    end
    live(key, math.ceil((lease + kept) / 1000))
    local answer = {given, out + given, counted}
    if given < wanted then
        local skipped = math.max(0, out + given - room)
        local coming = redis.call('ZRANGEBYSCORE', key, later, '+inf', 'WITHSCORES', 'LIMIT', skipped, wanted - given)
        for score = 2, #coming, 2 do
            answer[#answer + 1] = math.ceil(tonumber(coming[score]) - now)
        end
    end
    answers[#answers + 1] = answer
end
return answers
