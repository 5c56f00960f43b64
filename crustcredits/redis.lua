-- What one process has to say of its tokens, and to ask for: one atomic message for as many buckets as there are keys.
--
-- A bucket is a sorted set with a member for each token that is out, scored with the microsecond of this server's clock at
-- which it comes home; and a line, a hash of the processes that wait: since when, and when they were heard last. KEYS[1] is the
-- marker: a hash that would be lost together with them, so that a loss is noticed. Then come the two of each bucket.
--
-- ARGV: process, the epoch it knows (0: none), whether it has gone on alone (1) and comes back, a fresh epoch, and in microseconds
-- the pause after a loss, and how long members are kept after they have come home; milliseconds that the marker lives. Then for
-- each bucket: tokens wanted, how many may be out, the lease of a new one, the number of the first new one, the age of a request of which to tell how
-- many can have been counted when it arrived (-1: none), how many homes and how many returned ones follow; the homes, each
-- with its number and in how many microseconds it is to come home; the returned ones, each with its number.
--
-- Answer: {known, epoch, microseconds until tokens are given again}, and for each bucket {given, out, counted, and in how many
-- microseconds the next ones come home, as many as were wanted in vain}. `known` is 0 where the process has to register what
-- it holds first: then nothing else was done.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local place = 1
local function read()
    place = place + 1
    return tonumber(ARGV[place])
end

local process, known, back, fresh, pause, kept, life = ARGV[1], read(), read(), read(), read(), read(), read()

local function name(number)
    return process .. ':' .. string.format('%.0f', number)
end

-- How many processes have waited longer than this one, which joins the line, and since when it has waited itself.
local function ahead(line)
    local entries, began, before = redis.call('HGETALL', line), {}, 0
    for entry = 1, #entries, 2 do
        local since, heard = string.match(entries[entry + 1], '(%d+) (%d+)')
        if tonumber(heard) < now - pause then
            redis.call('HDEL', line, entries[entry])
        else
            began[entries[entry]] = tonumber(since)
        end
    end
    local own = began[process] or now
    for other, since in pairs(began) do
        if other ~= process and since < own then
            before = before + 1
        end
    end
    return before, own
end

-- Which server this is. One that takes over, or starts again, may not have all that the last one was told.
local server = redis.pcall('INFO', 'server')
local run = type(server) == 'string' and string.match(server, 'run_id:(%w+)') or ''

local marker = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'opens', 'heard')
local epoch, opens, heard = tonumber(marker[1]), tonumber(marker[3]) or 0, tonumber(marker[4]) or 0
if not epoch or marker[2] ~= run then
    epoch, opens = fresh, now + pause
    redis.call('HSET', KEYS[1], 'epoch', string.format('%.0f', epoch), 'run', run)
elseif back == 1 and heard < now - pause then
    -- All were alone: the others have still to say what they have spent meanwhile.
    opens = now + pause
end
redis.call('HSET', KEYS[1], 'opens', string.format('%.0f', opens), 'heard', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], life)
if known ~= epoch and known ~= 0 then
    return {{0, epoch, math.max(0, opens - now)}}
end

-- Never sooner than others have said: they may keep theirs for longer.
local function live(key, milliseconds)
    if redis.call('PTTL', key) < milliseconds then
        redis.call('PEXPIRE', key, milliseconds)
    end
end

local answers = {{1, epoch, math.max(0, opens - now)}}
for bucket = 2, #KEYS, 2 do
    local key, line = KEYS[bucket], KEYS[bucket + 1]
    local wanted, room, lease, first, age, homes, returned = read(), read(), read(), read(), read(), read(), read()
    for _ = 1, homes do
        local number, home = read(), read()
        redis.call('ZADD', key, string.format('%.0f', now + home), name(number))
    end
    for _ = 1, returned do
        redis.call('ZREM', key, name(read()))
    end
    for number = first, first + wanted - 1 do
        -- The message may have come before, and its answer was lost.
        redis.call('ZREM', key, name(number))
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now - kept))
    local counted = -1
    if age >= 0 then
        counted = redis.call('ZCOUNT', key, string.format('(%.0f', now - age), '+inf')
    end
    local later = string.format('(%.0f', now)
    local out = redis.call('ZCOUNT', key, later, '+inf')
    local given = 0
    if wanted > 0 and now >= opens then
        -- Whoever has waited longer finds one when it comes, however far away it is.
        local before, since = ahead(line)
        given = math.max(0, math.min(wanted, room - out - before))
        if given > 0 then
            since = now
        end
        if given < wanted then
            redis.call('HSET', line, process, string.format('%.0f %.0f', since, now))
            redis.call('PEXPIRE', line, math.ceil(2 * pause / 1000))
        end
    end
    if given == wanted then
        redis.call('HDEL', line, process)
    end
    for number = first, first + given - 1 do
        redis.call('ZADD', key, string.format('%.0f', now + lease), name(number))
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
