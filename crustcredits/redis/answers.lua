-- The answers that processes share, and the leases of the calls that fetch new ones. `exchange.lua`
-- follows in the same script.
--
-- An answer is a field of a hash, under the name of its key and endpoint. Its text is a version, when
-- its request started, when the last one was made invalid, its kind (0: none, 1: a balance, 2: an
-- error), the process that fetches a new one ('-': none), and the value. Any other text is ignored.
-- The field '*' has the time at which all answers were made invalid. A sorted set has the time at which
-- each field is forgotten, another one the last message of each process that fetches.
--
-- Numbers of this part, for the process: operations; 1 if it fetches answers, else 0; after how long
-- without a message a process does not fetch any more; how many answers may be kept; how long the time
-- of an invalidation is kept. Then for each operation, of which ARGV[3] has the texts one after another:
--   1, to find an answer: length of the name; how old a balance, an error, and an old balance may be;
--   2, to publish one: lengths of the name and the value; when its request started, how long it is
--      kept, its kind; 1 if the process does not fetch it any more;
--   3, to stop fetching: length of the name;
--   4, to make invalid: length of the name.
-- Answer to each operation 1: 1 if found, 2 if another process fetches, 3 if this process shall fetch;
-- the age of the value that comes with it, and its length. The values are returned as a text.

-- As in `protocol.py`.
local FIND, PUBLISH, FREE, INVALIDATE = 1, 2, 3, 4
local BALANCE, ERROR = 1, 2

local function exchange_answers(process, now, read, whole, hash, expiries, fetchers)
    local count, fetches, lease, most, memory = read(), read(), read(), read(), read()
    local texts, position, numbers, values = ARGV[3] or '', 1, {}, {}
    local longest = memory

    local function text(length)
        position = position + length
        return string.sub(texts, position - length, position - 1)
    end

    local function find(name)
        local found = redis.call('HGET', hash, name) or ''
        local asked, invalid_before, kind, owner, value = string.match(found, '^1 (%d+) (%d+) (%d) (%S+) (%S*)$')
        if asked and tonumber(asked) > now then
            asked, kind = nil, nil -- the clock was set back
        end
        return {
            asked = tonumber(asked) or 0,
            invalid_before = tonumber(invalid_before) or 0,
            kind = tonumber(kind) or 0,
            owner = owner or '-',
            value = value or '',
        }
    end

    local function forgets_at(name)
        return tonumber(redis.call('ZSCORE', expiries, name)) or 0
    end

    local function save(name, entry, duration)
        local times = whole(entry.asked) .. ' ' .. whole(entry.invalid_before)
        local parts = {'1', times, whole(entry.kind), entry.owner, entry.value}
        redis.call('HSET', hash, name, table.concat(parts, ' '))
        redis.call('ZADD', expiries, whole(math.max(now + duration, entry.invalid_before + memory)), name)
        longest = math.max(longest, duration)
    end

    local function is_fetched(entry)
        if entry.owner == '-' or entry.owner == process then
            return false
        end
        return (tonumber(redis.call('ZSCORE', fetchers, entry.owner)) or 0) > now - lease
    end

    if count + fetches > 0 then
        redis.call('ZADD', fetchers, whole(now), process)
    end
    local all_invalid_before = tonumber(redis.call('HGET', hash, '*')) or 0
    for _ = 1, count do
        local operation, length = read(), read()
        if operation == FIND then
            local name, max_age, max_error_age, usable = text(length), read(), read(), read()
            local entry = find(name)
            local age = now - entry.asked
            local is_valid = entry.kind > 0 and entry.asked >= math.max(entry.invalid_before, all_invalid_before)
            local finding = 1
            if not (is_valid and age < (entry.kind == ERROR and max_error_age or max_age)) then
                finding = is_fetched(entry) and 2 or 3
                if finding == 3 then
                    entry.owner = process
                end
                if finding == 3 or forgets_at(name) < now + memory / 2 then
                    save(name, entry, memory)
                end
                is_valid = is_valid and entry.kind == BALANCE and age < usable
            end
            local value = is_valid and entry.kind .. entry.value or ''
            numbers[#numbers + 1] = finding
            numbers[#numbers + 1] = whole(is_valid and age or 0)
            numbers[#numbers + 1] = #value
            values[#values + 1] = value
        elseif operation == PUBLISH then
            local size, asked, duration, kind, frees = read(), read(), read(), read(), read()
            local name, value = text(length), text(size)
            local entry = find(name)
            if asked >= math.max(entry.invalid_before, all_invalid_before) and asked > entry.asked then
                entry.asked, entry.kind, entry.value = asked, kind, value
            end
            if frees == 1 and entry.owner == process then
                entry.owner = '-'
            end
            save(name, entry, duration)
        elseif operation == FREE then
            local name = text(length)
            local entry = find(name)
            if entry.owner == process then
                entry.owner = '-'
                save(name, entry, memory)
            end
        elseif operation == INVALIDATE then
            local name = text(length)
            if name == '*' then
                redis.call('DEL', hash)
                redis.call('DEL', expiries)
                redis.call('HSET', hash, name, whole(now))
                redis.call('ZADD', expiries, whole(now + memory), name)
                all_invalid_before = now
            else
                save(name, {asked = 0, invalid_before = now, kind = 0, owner = '-', value = ''}, memory)
            end
        end
    end

    -- Delete expired answers. If too many remain, delete the ones that expire first.
    local forgotten = redis.call('ZRANGEBYSCORE', expiries, '-inf', whole(now), 'LIMIT', 0, 64)
    local surplus = redis.call('ZCARD', expiries) - #forgotten - most
    if surplus > 0 then
        forgotten = redis.call('ZRANGEBYSCORE', expiries, '-inf', '+inf', 'LIMIT', 0, #forgotten + surplus)
    end
    for _, name in ipairs(forgotten) do
        local is_expired = forgets_at(name) <= now
        -- An invalidation is remembered, so that no answer of before it comes back.
        if is_expired or name ~= '*' and find(name).invalid_before + memory <= now then
            redis.call('HDEL', hash, name)
            redis.call('ZREM', expiries, name)
        end
    end
    redis.call('ZREMRANGEBYSCORE', fetchers, '-inf', whole(now - memory))
    for _, key in ipairs({hash, expiries, fetchers}) do
        if redis.call('PTTL', key) < longest / 1000 then
            redis.call('PEXPIRE', key, math.ceil(longest / 1000))
        end
    end
    return numbers, table.concat(values)
end
