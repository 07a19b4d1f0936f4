-- Appending to the log: one call per batch, in autocommit.
--
-- The i-th elements of the arrays are one entry. Its key is (producer, number); keys within a call are distinct.
-- afters[i] is null, or for a retry the head that the client knew when it first sent the entry.
--
-- seqs[i]  the entry's seq; below `first` when an earlier call has brought it already
--          0   the key exists, with another channel or payload: nothing was appended for it
--          -1  nobody can know whether the key existed, as retention has passed afters[i]: nothing was appended for it
-- first    the first seq that this call was free to give
-- at       the time of the new entries
--
-- Raises CB001 when the epoch is another one, and 55P03 when the head row is not had within two seconds.
CREATE FUNCTION catbus.append(
    synchronous_commit text,
    epoch     text,
    channels  text[],
    payloads  text[],
    producers bytea[],
    numbers   bigint[],
    senders   text[],
    origins   bytea[],
    afters    bigint[]
) RETURNS TABLE (at bigint, first bigint, seqs bigint[])
LANGUAGE plpgsql
-- The plans are those for a big log, whatever its size and statistics were when a connection made them.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    head    record;
    last    bigint;
    added   bigint;
    hint    text;
    luggage text;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.append needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;

    -- Both hold until the transaction has ended, which the SET clauses above do not: COMMIT is what waits for the disk.
    PERFORM set_config('synchronous_commit', append.synchronous_commit, true), set_config('lock_timeout', '2s', true);

    -- FOR UPDATE leaves no version of the row behind, and still writes: a call that finds nothing but duplicates waits
    -- for the same disks and standbys as the call that brought the originals.
    SELECT h.epoch, h.slot, h.floor, h.seal INTO STRICT head FROM catbus.head AS h FOR UPDATE;
    IF head.epoch IS DISTINCT FROM append.epoch THEN
        RAISE EXCEPTION 'the epoch of the log is %, not %', head.epoch, append.epoch USING ERRCODE = 'CB001';
    END IF;

    -- From here on every statement sees all that was committed by those who had the lock before.
    SELECT e.seq, e.at INTO last, at FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    -- In an empty log both are null, and greatest ignores that. A clock that was set back must not turn time back.
    first := greatest(last + 1, head.floor);
    at := greatest(at, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);

    -- One look per producer settles the usual case: where it has nothing from its lowest number on, its keys are new.
    -- In the order of the index that takes half the time; LIMIT keeps the planner from turning the nesting inside out.
    IF NOT EXISTS (
        SELECT FROM (
            SELECT key.producer, min(key.number) AS lowest
            FROM unnest(producers, numbers) AS key (producer, number)
            GROUP BY key.producer ORDER BY key.producer
        ) AS key
        CROSS JOIN LATERAL (
            SELECT FROM catbus.entries AS e WHERE e.producer = key.producer AND e.number >= key.lowest LIMIT 1
        ) AS known
    ) AND NOT EXISTS (
        SELECT FROM unnest(afters) AS retry (after) WHERE retry.after < head.floor - 1
    ) THEN
        added := cardinality(channels);
        seqs := ARRAY(SELECT generate_series(first, first + added - 1));
    ELSE
        SELECT count(*) FILTER (WHERE entry.new),
               array_agg(
                   CASE WHEN entry.new THEN first - 1 + entry.nth ELSE entry.known END
                   ORDER BY entry.i)
        INTO added, seqs
        FROM (
            SELECT checked.i, checked.known, checked.known IS NULL AS new,
                   count(*) FILTER (WHERE checked.known IS NULL) OVER (ORDER BY checked.i) AS nth
            FROM (
                SELECT given.i,
                       CASE WHEN e.seq IS NULL THEN CASE WHEN given.after < head.floor - 1 THEN -1 END
                            WHEN e.channel = given.channel AND e.payload = given.payload THEN e.seq
                            ELSE 0
                       END AS known
                FROM unnest(channels, payloads, producers, numbers, afters)
                     WITH ORDINALITY AS given (channel, payload, producer, number, after, i)
                LEFT JOIN catbus.entries AS e ON e.producer = given.producer AND e.number = given.number
            ) AS checked
        ) AS entry;
    END IF;

    IF added > 0 THEN
        INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender, origin)
        SELECT head.slot, new.seq, append.at, new.channel, new.payload, new.producer, new.number, new.sender, new.origin
        FROM unnest(seqs, channels, payloads, producers, numbers, senders, origins)
             AS new (seq, channel, payload, producer, number, sender, origin)
        WHERE new.seq >= first;

        -- One stopped listener keeps the queue of notifications from shrinking, and when it is full no commit that
        -- notifies succeeds. Nobody depends on them: the table is the truth.
        IF pg_notification_queue_usage() <= 0.5 THEN
            hint := format('%s:%s:%s', head.epoch, first, first + added - 1);
            -- Few small entries travel along, so that nobody has to read them. One takes 34 bytes at least, so that
            -- more than 28 cannot fit; and big payloads are not put together only to be found too big. Whoever may
            -- connect may notify: a seal that only the owner of the log can make tells that they stand in it. The secret
            -- comes last in it, because a hash can be continued by who does not know how its text began.
            IF added <= 28 AND (
                SELECT sum(octet_length(new.payload))
                FROM unnest(seqs, payloads) AS new (seq, payload) WHERE new.seq >= first
            ) <= 1000 THEN
                SELECT '[' || string_agg(format('[%s,%s,%s,%s,%s,%s]',
                           new.seq, at, to_json(new.channel), coalesce(to_json(new.sender)::text, 'null'),
                           coalesce(to_json(encode(new.origin, 'hex'))::text, 'null'), new.payload),
                       ',' ORDER BY new.seq) || ']'
                INTO luggage
                FROM unnest(seqs, channels, payloads, senders, origins) AS new (seq, channel, payload, sender, origin)
                WHERE new.seq >= first;
                IF octet_length(hint) + octet_length(luggage) + 34 <= 1000 THEN
                    hint := format('%s %s %s', hint,
                        left(encode(sha256(convert_to(hint || luggage || head.seal, 'UTF8')), 'hex'), 32), luggage);
                END IF;
            END IF;
            PERFORM pg_notify('catbus', hint);
        END IF;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.append FROM PUBLIC;
