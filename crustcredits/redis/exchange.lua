-- One atomic message of one process, for any number of buckets: its reports about its tokens, and
-- its requests for more. Times and durations are in microseconds, unless stated otherwise.
--
-- A bucket is a sorted set with one member for each token that is out. Its score is the time, by
-- this server's clock, at which the token returns. A hash holds the waiting processes: for each,
-- the start of its wait, its last message, and how many tokens may be out for it. KEYS[1] is the
-- marker, a hash; without it the count is taken for lost. The two keys of each bucket follow.
--
-- ARGV, for the process:
--   process; the epoch it knows (0: none);
--   1 if no tokens may be granted for a while, because it had no answer for long or has more to
--   register, else 0; a fresh epoch;
--   this server's last time as far as it knows (0: none), its age by the process's own clock, and
--   the tolerance of that age;
--   the duration without grants after a loss; the lease of a new token;
--   how long members stay after their return; milliseconds that the marker lives.
-- Then for each bucket:
--   tokens wanted; how many may be out; the number of the first new token;
--   the age of a request for which to count the tokens out at its arrival (-1: none);
--   the number of return times and of given-back tokens that follow;
--   the return times, each as a number and the duration until then; the numbers given back.
--
-- Answer: {known, epoch, duration until tokens are granted again, this server's clock}, and for
-- each bucket {given, out, counted, and the durations until the next tokens return, one for each
-- token that was wanted and not given}. `known` is 0 if the process has to register its tokens
-- first; then nothing else was done.

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

-- Identity of this server. After a failover or restart, reports to the last one may be missing.
local server = redis.pcall('INFO', 'server')
local run = type(server) == 'string' and string.match(server, 'run_id:(%w+)')

local marker = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'opens', 'longest', 'heard')
local epoch, opens, longest = tonumber(marker[1]), tonumber(marker[3]) or 0, math.max(lease, tonumber(marker[4]) or 0)
-- Without permission for INFO, nothing is concluded from it.
local same = run == false or run == nil or run == marker[2]
-- The clock was set, so that tokens return at the wrong time, or this message is read long after it
-- was sent.
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

-- Only ever extend the lifetime: other processes may have longer leases.
local function live(key, milliseconds)
    if redis.call('PTTL', key) < milliseconds then
        redis.call('PEXPIRE', key, milliseconds)
    end
end

-- Number of processes that have waited longer than this one and can be served, and the time since
-- which this one has waited.
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
        -- The message may have arrived before, with its answer lost.
        redis.call('ZREM', key, name(number))
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - kept))
    -- Members from a clock that was ahead.
    redis.call('ZREMRANGEBYSCORE', key, '(' .. whole(now + longest), '+inf')
    local counted = -1
    if age >= 0 then
        counted = redis.call('ZCOUNT', key, '(' .. whole(now - age), '+inf')
    end
    local later = '(' .. whole(now)
    local out = redis.call('ZCOUNT', key, later, '+inf')
    local given = 0
    if wanted > 0 and now >= opens then
        -- One token stays free for each process that has waited longer, however slow it is.
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
