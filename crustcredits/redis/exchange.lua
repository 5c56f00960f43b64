-- One atomic message of one process: its reports about its tokens in any number of buckets, and its
-- requests for permits. Times and durations are in microseconds, unless stated otherwise.
--
-- A bucket is a sorted set with one member for each token that is out. Its score is the time, by
-- this server's clock, at which the token returns. A hash holds the processes that wait for the
-- bucket: for each, the start of its wait, its last message, and how many tokens may be out for it.
-- A permit takes one token of each bucket of its request, or none.
--
-- KEYS[1] is the marker, a hash; without it the count is taken for lost. KEYS[2] holds the number of
-- the process's last message. KEYS[3] is a hash of the strict processes: for each its share, and its
-- last message. The two keys of each bucket follow.
--
-- ARGV, for the process:
--   process; the number of this message;
--   the epoch it knows (0: none); a fresh epoch;
--   1 if no permits may be granted for a while, because it had no answer for long or has more to
--   register, else 0;
--   1 if this server did not know this script, else 0;
--   this server's last time as far as it knows (0: none), its age by the process's own clock, and
--   the tolerance of that age;
--   the duration without grants after a loss; the lease of a new token;
--   how long members stay after their return; milliseconds that the marker lives;
--   1 if the process is strict, else 0; its share of the limit, in billionths, which is 0 while it may
--   use this share by itself; after how long without a message its share is not used here.
-- Then for each bucket:
--   the number of return times and of unused tokens that follow;
--   the return times, each as a number and the duration until then; the unused numbers.
-- Then for each request for permits:
--   permits wanted; the number of the first one;
--   two buckets, by their place in this message (0: none), each with how many tokens may be out.
--
-- Answer: {known, epoch, duration until permits are granted again, this server's clock}; for each
-- bucket {tokens out, permits that it did not allow, durations until as many tokens return}; and
-- then {permits granted, for each request}. `known` is 0 if the process has to register its tokens
-- first; then nothing else was done. A message that arrives again changes nothing.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local place = 1
local function read()
    place = place + 1
    return tonumber(ARGV[place])
end

local process, message, known, fresh = ARGV[1], read(), read(), read()
local hold, is_new = read(), read()
local told, ago, slack = read(), read(), read()
local pause, lease, kept, life = read(), read(), read(), read()
local strict, share, silence = read(), read(), read()

local function whole(number)
    return string.format('%.0f', number)
end

local function name(number)
    return process .. ':' .. whole(number)
end

local function info(section, field)
    local text = redis.pcall('INFO', section)
    return type(text) == 'string' and string.match(text, field .. ':(%w+)') or nil
end

-- A process that has tokens out sends messages, and so this script, soon after a server's start.
-- Without the script nobody counts here, unless this server has taken over from another one.
local function is_unused()
    local up = tonumber(info('server', 'uptime_in_seconds'))
    local before = info('replication', 'master_replid2')
    return is_new == 1 and known == 0 and up and up * 1000000 > pause and before == string.rep('0', 40)
end

local repeated = message <= (tonumber(redis.call('GET', KEYS[2])) or 0)
local marker = redis.call('HMGET', KEYS[1], 'epoch', 'server', 'opens', 'longest', 'heard')
local epoch, opens, longest = tonumber(marker[1]), tonumber(marker[3]) or 0, math.max(lease, tonumber(marker[4]) or 0)
if not repeated then
    -- After a failover or restart, reports to the last server may be missing. Without permission for
    -- INFO, nothing is concluded from it.
    local server = info('replication', 'master_replid')
    local same = server == nil or server == marker[2]
    -- The clock was set, so that tokens return at the wrong time, or this message is read long after
    -- it was sent.
    local astray = told > 0 and math.abs(now - told - ago) > slack + ago / 200 or now < (tonumber(marker[5]) or 0)
    if not epoch or not same or ((known == epoch or known == 0) and astray) then
        opens = (not epoch and is_unused()) and now or now + pause
        epoch = fresh
    elseif hold == 1 then
        opens = now + pause
    end
    opens = math.min(opens, now + pause)
    redis.call('HSET', KEYS[1], 'epoch', whole(epoch), 'server', server or marker[2] or '', 'heard', whole(now))
    redis.call('HSET', KEYS[1], 'opens', whole(opens), 'longest', whole(longest))
    redis.call('PEXPIRE', KEYS[1], life)
end
local head = {1, epoch or 0, math.max(0, opens - now), now}
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

-- The part of each limit that may be out. Strict processes use no more here than their shares, because
-- each one that is cut off uses its own by itself.
local part = 1
if strict == 1 then
    if not repeated then
        redis.call('HSET', KEYS[3], process, whole(share) .. ' ' .. whole(now))
        redis.call('PEXPIRE', KEYS[3], life)
    end
    local entries, total = redis.call('HGETALL', KEYS[3]), 0
    for entry = 1, #entries, 2 do
        local own, heard = string.match(entries[entry + 1], '(%d+) (%d+)')
        if tonumber(heard) < now - silence or tonumber(heard) > now then
            redis.call('HDEL', KEYS[3], entries[entry])
        else
            total = total + tonumber(own)
        end
    end
    part = math.min(1, total / 1e9)
end

-- The buckets of this message.
local keys, lines, out, missing, room, order = {}, {}, {}, {}, {}, {}
local count = (#KEYS - 3) / 2
for bucket = 1, count do
    local key = KEYS[2 + 2 * bucket]
    local returns, unused = read(), read()
    for _ = 1, returns do
        local number, back = read(), read()
        if not repeated then
            redis.call('ZADD', key, whole(now + back), name(number))
        end
    end
    for _ = 1, unused do
        local number = read()
        if not repeated then
            redis.call('ZREM', key, name(number))
        end
    end
    if not repeated then
        redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - kept))
        -- Members from a clock that was ahead.
        redis.call('ZREMRANGEBYSCORE', key, '(' .. whole(now + longest), '+inf')
    end
    keys[bucket], lines[bucket], missing[bucket], room[bucket] = key, KEYS[3 + 2 * bucket], 0, 0
    out[bucket] = redis.call('ZCOUNT', key, '(' .. whole(now), '+inf')
end

-- The processes that wait for a bucket, with their starts and rooms, and since when this one waits.
local function waiting(bucket)
    if not order[bucket] then
        local entries, found = redis.call('HGETALL', lines[bucket]), {since = now}
        for entry = 1, #entries, 2 do
            local other = entries[entry]
            local since, heard, most = string.match(entries[entry + 1], '(%d+) (%d+) (%d+)')
            if tonumber(heard) < now - pause or tonumber(heard) > now then
                redis.call('HDEL', lines[bucket], other)
            elseif other == process then
                found.since = tonumber(since)
            else
                found[#found + 1] = {tonumber(since), tonumber(most)}
            end
        end
        order[bucket] = found
    end
    return order[bucket]
end

-- Permits that a bucket allows. One token stays free for each process that has waited longer and can
-- be served, however slow it is.
local function allowed(bucket, most)
    local before, found = 0, waiting(bucket)
    for _, other in ipairs(found) do
        if other[1] < found.since and other[2] > out[bucket] then
            before = before + 1
        end
    end
    return math.max(0, most - out[bucket] - before)
end

local granted, served = {}, {}
while place < #ARGV do
    local wanted, first = read(), read()
    local places, rooms = {read()}, {read()}
    places[2], rooms[2] = read(), read()
    for side = 1, 2 do
        rooms[side] = math.floor(rooms[side] * part + 0.001) -- the shares were rounded
    end
    local given = 0
    if repeated then
        while given < wanted and redis.call('ZSCORE', keys[places[1]], name(first + given)) do
            given = given + 1
        end
    else
        -- A process waits only for the first bucket that stops it. If it waited for both, another one
        -- could be before it at the one and behind it at the other, so that neither is served.
        given = now >= opens and wanted or 0
        for side = 1, 2 do
            local bucket = places[side]
            if bucket > 0 and given > 0 then
                local here = math.min(given, allowed(bucket, rooms[side]))
                missing[bucket] = missing[bucket] + given - here
                given = here
            end
        end
        for side = 1, 2 do
            local bucket = places[side]
            if bucket > 0 then
                for number = first, first + given - 1 do
                    redis.call('ZADD', keys[bucket], whole(now + lease), name(number))
                end
                out[bucket] = out[bucket] + given
                room[bucket] = math.max(room[bucket], rooms[side])
                served[bucket] = served[bucket] or given > 0
            end
        end
    end
    granted[#granted + 1] = given
end

local answers = {head}
for bucket = 1, count do
    local answer = {out[bucket], missing[bucket]}
    if missing[bucket] > 0 then
        local since = served[bucket] and now or waiting(bucket).since
        redis.call('HSET', lines[bucket], process, whole(since) .. ' ' .. whole(now) .. ' ' .. whole(room[bucket]))
        redis.call('PEXPIRE', lines[bucket], math.ceil(2 * pause / 1000))
        local skipped = math.max(0, out[bucket] - room[bucket])
        local later = '(' .. whole(now)
        local coming = redis.call(
            'ZRANGEBYSCORE', keys[bucket], later, '+inf', 'WITHSCORES', 'LIMIT', skipped, missing[bucket]
        )
        for score = 2, #coming, 2 do
            answer[#answer + 1] = math.ceil(tonumber(coming[score]) - now)
        end
    elseif not repeated and now >= opens then
        redis.call('HDEL', lines[bucket], process)
    end
    if not repeated then
        live(keys[bucket], math.ceil((lease + kept) / 1000))
    end
    answers[#answers + 1] = answer
end
if not repeated then
    redis.call('SET', KEYS[2], whole(message), 'PX', math.ceil((lease + kept) / 1000))
end
answers[#answers + 1] = granted
return answers
