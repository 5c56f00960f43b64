-- One atomic message of one process: its reports about its tokens in any number of buckets, its
-- requests for permits, and its part about shared answers, for which `answers.lua` comes before in the
-- same script. Times and durations are in microseconds, unless stated otherwise.
--
-- A bucket is a sorted set with one member for each token that is out. Its score is the time, by
-- this server's clock, at which the token returns. A hash holds the processes that wait for the
-- bucket: for each, the start of its wait, its last message, how many tokens may be out for it, and
-- when it asks again.
-- A permit takes one token of each bucket of its request, or none.
--
-- KEYS[1] is the marker, a hash; without it the count is taken for lost. KEYS[2] holds the number of
-- the process's last message. KEYS[3] is a hash of processes. In strict mode it maps each process to
-- its share, its last message and the start of its share's use. Otherwise it maps each process with
-- tokens out to the time it was last served. The two modes use different keys. The two keys of each
-- bucket follow, and at the end the three keys of shared answers, if the process shares any.
--
-- A process was served if it received the reply. Only its next message proves that. A process that is
-- not served counts by itself after the grace time: with tokens that it had out, or after a lease with
-- its share.
--
-- ARGV[1] is the process. ARGV[2] has numbers with a space between, for the process:
--   the number of this message;
--   the epoch it knows (0: none); a fresh epoch;
--   1 if no permits may be granted for a while, because the process has more to register;
--   after how long without a process that was served all processes may be cut off from this server;
--   the grace time;
--   this server's time at the last message that had an answer (0: none), its age by the process's
--   own clock, and the tolerance of that age;
--   the duration without grants after a loss; the lease of a new token;
--   how long members stay after their return; milliseconds that the marker lives;
--   1 if the process is strict, else 0; 1 if it leaves: it ends, or has no tokens out and is not
--   strict; its share of the limit without this server, in billionths;
--   1 if this share is used here, 0 if the process may use it by itself; after how long without a
--   message a share is not used here; 1 if the process shares answers, else 0.
-- Then the numbers of the shared answers, see `answers.lua`.
-- Then for each bucket:
--   how many permits it waits for besides those that it asks for, and how many tokens may be out
--   for these; the number of return times and of unused tokens that follow;
--   the return times, each as a number and the duration until then; the unused numbers.
-- Then for each request for permits:
--   permits wanted; the number of the first one;
--   two buckets, by their place in this message (0: none), each with how many tokens may be out.
--
-- Answer: a text of numbers with a space between: known, epoch, duration until permits are granted
-- again, this server's clock; the numbers of the shared answers; for each bucket tokens out, permits
-- that it did not allow, permits that it allows besides, the number of durations that follow, durations
-- until tokens return for the permits not allowed; and then the permits granted for each request.
-- `known` is 0 if the process has to register its tokens first; then nothing else was done. The values
-- of the shared answers follow in a second line. A message that arrives again changes nothing in the
-- count.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local process, numbers, cursor = ARGV[1], {}, 0
for number in string.gmatch(ARGV[2], '%S+') do
    numbers[#numbers + 1] = tonumber(number)
end

local function read()
    cursor = cursor + 1
    return numbers[cursor]
end

local message, known_epoch, fresh = read(), read(), read()
local stop, still, grace = read(), read(), read()
local last_clock, last_age, tolerance = read(), read(), read()
local pause, lease, retention, life = read(), read(), read(), read()
local strict, leaves, share, lends, silence = read(), read(), read(), read(), read()
local shares_answers = read()

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

local repeated = message <= (tonumber(redis.call('GET', KEYS[2])) or 0)
local marker = redis.pcall(
    'HMGET', KEYS[1], 'epoch', 'server', 'opens', 'longest', 'heard', 'served', 'cautious_until'
)
if marker.err then
    if string.sub(marker.err, 1, 9) ~= 'WRONGTYPE' then
        return marker -- the process sees this error
    end
    redis.call('DEL', KEYS[1]) -- it is of another program
    marker = {}
end
local epoch, grants_from = tonumber(marker[1]), tonumber(marker[3]) or 0
local longest = math.max(lease, tonumber(marker[4]) or 0)
local last_served, cautious_until = tonumber(marker[6]) or 0, tonumber(marker[7]) or 0
if not repeated then
    -- After a failover or restart, reports to the last server may be missing. Without permission for
    -- INFO, nothing is concluded from it.
    local server = info('replication', 'master_replid')
    local same = server == nil or server == marker[2]
    -- The clock was set, so that tokens return at the wrong time, or this message is read long after
    -- it was sent.
    local heard = tonumber(marker[5]) or 0
    local clock_jumped = now < heard
        or last_clock > 0 and math.abs(now - last_clock - last_age) > tolerance + last_age / 200
    if not epoch or not same or ((known_epoch == epoch or known_epoch == 0) and clock_jumped) then
        grants_from, epoch, last_served, cautious_until = now + pause, fresh, now, 0
    elseif stop == 1 then
        grants_from = now + pause
    end
    if known_epoch == epoch then
        last_served = math.max(last_served, last_clock)
    end
    if strict == 0 and share > 0 then
        -- After an outage of all processes, grant nothing until each degraded process could report.
        local silent = now - last_served
        if silent >= lease then
            cautious_until = now + pause -- nothing else is out: each has at most its share
        elseif silent > still then
            if last_served < cautious_until then
                cautious_until = now + pause -- none was served after that time
            end
            local entries = redis.call('HGETALL', KEYS[3])
            for entry = 1, #entries, 2 do
                local age = now - (tonumber(entries[entry + 1]) or 0)
                if entries[entry] ~= process and age >= lease then
                    cautious_until = now + pause
                elseif entries[entry] ~= process and age >= grace then
                    grants_from = now + pause
                end
            end
        end
    end
    grants_from, cautious_until = math.min(grants_from, now + pause), math.min(cautious_until, now + pause)
    redis.call('HSET', KEYS[1], 'epoch', whole(epoch), 'server', server or marker[2] or '', 'heard', whole(now))
    redis.call('HSET', KEYS[1], 'opens', whole(grants_from), 'longest', whole(longest))
    redis.call('HSET', KEYS[1], 'served', whole(last_served), 'cautious_until', whole(cautious_until))
    redis.call('PEXPIRE', KEYS[1], life)
end
local answer = {1, whole(epoch or 0), whole(math.max(0, grants_from - now)), whole(now)}
if known_epoch ~= epoch and known_epoch ~= 0 then
    answer[1] = 0
    return table.concat(answer, ' ')
end

-- Only ever extend the lifetime: other processes may have longer leases.
local function extend_life(key, milliseconds)
    if redis.call('PTTL', key) < milliseconds then
        redis.call('PEXPIRE', key, milliseconds)
    end
end

-- The part of each limit that may be out. Strict processes use no more here than their shares, because
-- each one that is cut off uses its own by itself. One that was cut off for long may have used its
-- share until a moment ago, when a new one took its place. So the share of the new one is used later.
-- Redis may read a first message late. By then the process may use its share alone.
local usable_part = 1
if strict == 0 and not repeated then
    if leaves == 1 then
        redis.call('HDEL', KEYS[3], process)
    elseif share > 0 and redis.call('HSETNX', KEYS[3], process, whole(now)) == 0 then
        if last_clock > 0 then
            redis.call('HSET', KEYS[3], process, whole(last_clock))
        end
    elseif share > 0 then
        local entries = redis.call('HGETALL', KEYS[3])
        for entry = 1, #entries, 2 do
            if (tonumber(entries[entry + 1]) or 0) < now - longest then
                redis.call('HDEL', KEYS[3], entries[entry])
            end
        end
    end
    extend_life(KEYS[3], math.ceil((lease + retention) / 1000))
elseif strict == 1 then
    local entries, total, silent, own_from = redis.call('HGETALL', KEYS[3]), 0, {}, nil
    for entry = 1, #entries, 2 do
        local other, value = entries[entry], entries[entry + 1]
        local part_of, heard, from = string.match(value, '(%d+) (%d+) (%d+)')
        part_of, heard, from = tonumber(part_of), tonumber(heard), tonumber(from)
        if other == process then
            -- These are times of a clock that may have been set back.
            own_from = from <= heard and math.min(from, now) or math.min(from, now + lease + silence)
        elseif heard < now - silence or heard > now then
            silent[#silent + 1] = {other, part_of, heard}
        elseif from <= now then
            total = total + part_of
        end
    end
    if not own_from then
        own_from = now
        for _, other in ipairs(silent) do
            if other[3] < now - lease then
                own_from = now + lease + silence
            end
        end
    end
    if lends == 0 then
        own_from = now + silence -- and longer with each such message
    elseif own_from <= now and last_clock > 0 then
        total = total + share
    end
    if not repeated and leaves == 1 then
        redis.call('HDEL', KEYS[3], process)
    elseif not repeated and last_clock > 0 then
        redis.call('HSET', KEYS[3], process, whole(share) .. ' ' .. whole(now) .. ' ' .. whole(own_from))
        redis.call('PEXPIRE', KEYS[3], 30 * life)
        for _, other in ipairs(silent) do
            -- The shares of all processes that run add up to no more than the limit.
            if total + other[2] > 1e9 + 1e3 or other[3] < now - 30000 * life then
                redis.call('HDEL', KEYS[3], other[1])
            end
        end
    end
    usable_part = math.min(1, total / 1e9)
end

local values = ''
if shares_answers == 1 then
    local told_of_answers
    told_of_answers, values = exchange_answers(process, now, read, whole, KEYS[#KEYS - 2], KEYS[#KEYS - 1], KEYS[#KEYS])
    for _, number in ipairs(told_of_answers) do
        answer[#answer + 1] = number
    end
end

-- The buckets of this message.
local keys, lines, waits, out, missing, room, lines_read = {}, {}, {}, {}, {}, {}, {}
local count = (#KEYS - 3 - 3 * shares_answers) / 2
for bucket = 1, count do
    local key = KEYS[2 + 2 * bucket]
    waits[bucket], room[bucket] = read(), math.floor(read() * usable_part + 0.001) -- the shares were rounded
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
        redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - retention))
        -- Members from a clock that was ahead; durations were rounded up.
        redis.call('ZREMRANGEBYSCORE', key, '(' .. whole(now + longest + 1000), '+inf')
    end
    keys[bucket], lines[bucket], missing[bucket] = key, KEYS[3 + 2 * bucket], 0
    out[bucket] = redis.call('ZCOUNT', key, '(' .. whole(now), '+inf')
end

-- The processes that wait for a bucket, with their starts and rooms, and since when this one waits.
local function waiting(bucket)
    if not lines_read[bucket] then
        local entries, found = redis.call('HGETALL', lines[bucket]), {}
        for entry = 1, #entries, 2 do
            local other = entries[entry]
            local start, heard, most, again = string.match(entries[entry + 1], '(%d+) (%d+) (%d+) (%d+)')
            local last = math.max(tonumber(heard), tonumber(again))
            if last < now - pause - tolerance or tonumber(heard) > now then
                redis.call('HDEL', lines[bucket], other)
            elseif other == process then
                found.start = tonumber(start)
            else
                found[#found + 1] = {tonumber(start), tonumber(most)}
            end
        end
        lines_read[bucket] = found
    end
    return lines_read[bucket]
end

local function since_of(bucket)
    return waiting(bucket).start or now
end

-- Tokens of this process that are out.
local function held(bucket)
    local total = 0
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', keys[bucket], '(' .. whole(now), '+inf')) do
        if string.sub(member, 1, #process + 1) == process .. ':' then
            total = total + 1
        end
    end
    return total
end

-- Permits that a bucket allows for calls that have waited since then. One token stays free for each
-- process that has waited longer and can be served, however slow it is.
local function allowed(bucket, most, start)
    local before = 0
    for _, other in ipairs(waiting(bucket)) do
        if other[1] < start and other[2] > out[bucket] then
            before = before + 1
        end
    end
    local free = most - out[bucket] - before
    if now < cautious_until then
        -- As in degraded mode: at least one token, and no more than the share.
        free = math.min(free, math.max(1, math.floor(most * share / 1e9 + 0.001)) - held(bucket))
    end
    return math.max(0, free)
end

-- A process waits for its second bucket only with requests that the first one allows, and keeps its
-- place at the first one meanwhile. So the first in the line of a second bucket is stopped by no other
-- process, and no two processes stop each other.
local granted, has_grant, since, within = {}, {}, {}, {}
while cursor < #numbers do
    local wanted, first = read(), read()
    local own, own_most = read(), math.floor(read() * usable_part + 0.001)
    local common, common_most = read(), math.floor(read() * usable_part + 0.001)
    local given = 0
    if repeated then
        while given < wanted and redis.call('ZSCORE', keys[own], name(first + given)) do
            given = given + 1
        end
    elseif now >= grants_from then
        since[own], since[common] = since_of(own), since[common] or now
        given = math.min(wanted, allowed(own, own_most, since[own]))
        missing[own] = missing[own] + wanted - given
        room[own] = math.max(room[own], own_most)
        if common > 0 and given > 0 then
            local here = math.min(given, allowed(common, common_most, since_of(common)))
            if here < given then
                missing[common] = missing[common] + given - here
                room[common] = math.max(room[common], common_most)
                within[own] = common
            end
            since[common] = not has_grant[common] and here == 0 and since_of(common) or now
            given = here
        end
        if given > 0 then
            since[own] = now
            has_grant[common] = true
        end
        for _, bucket in ipairs(common > 0 and {own, common} or {own}) do
            for number = first, first + given - 1 do
                redis.call('ZADD', keys[bucket], whole(now + lease), name(number))
            end
            out[bucket] = out[bucket] + given
        end
    end
    granted[#granted + 1] = given
end

-- Durations until tokens return for the permits that a bucket did not allow. Each process that has
-- waited longer takes one of the next tokens.
local function returning(bucket, start)
    local before = 0
    for _, other in ipairs(waiting(bucket)) do
        if other[1] < start then
            before = before + 1
        end
    end
    local skipped, later = math.max(0, out[bucket] - room[bucket]) + before, '(' .. whole(now)
    local coming = redis.call(
        'ZRANGEBYSCORE', keys[bucket], later, '+inf', 'WITHSCORES', 'LIMIT', skipped, missing[bucket]
    )
    local durations = {}
    for score = 2, #coming, 2 do
        durations[#durations + 1] = math.ceil(tonumber(coming[score]) - now)
    end
    if now < cautious_until then
        for place = 1, missing[bucket] do
            durations[place] = math.min(durations[place] or cautious_until - now, cautious_until - now)
        end
    end
    return durations
end

local again = {}
for bucket = 1, count do
    local free = 0
    if waits[bucket] > 0 and now >= grants_from then
        free = math.min(waits[bucket], allowed(bucket, room[bucket], since[bucket] or since_of(bucket)))
        missing[bucket] = missing[bucket] + waits[bucket] - free
    end
    local durations = {}
    if missing[bucket] > 0 then
        durations = returning(bucket, since[bucket] or since_of(bucket))
        again[bucket] = now + (durations[1] or 0)
    elseif free > 0 then
        again[bucket] = now -- it keeps its place until it asks
    end
    for _, number in ipairs({out[bucket], missing[bucket], free, #durations}) do
        answer[#answer + 1] = number
    end
    for _, duration in ipairs(durations) do
        answer[#answer + 1] = whole(duration)
    end
end

if not repeated then
    for bucket = 1, count do
        local next_ask = again[bucket] or (within[bucket] and again[within[bucket]])
        if next_ask then
            local entry = {whole(since[bucket] or since_of(bucket)), whole(now), whole(room[bucket]), whole(next_ask)}
            redis.call('HSET', lines[bucket], process, table.concat(entry, ' '))
            extend_life(lines[bucket], math.ceil((next_ask - now + 2 * pause) / 1000))
        elseif now >= grants_from then
            redis.call('HDEL', lines[bucket], process)
        end
        extend_life(keys[bucket], math.ceil((lease + retention) / 1000))
    end
    redis.call('SET', KEYS[2], whole(message), 'PX', math.ceil((lease + retention) / 1000))
end
for _, given in ipairs(granted) do
    answer[#answer + 1] = given
end
return table.concat(answer, ' ') .. (values ~= '' and '\n' .. values or '')
