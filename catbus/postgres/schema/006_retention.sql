-- Retention: the oldest part of the log goes, a partition at a time and not row by row.
--
-- New entries go into one slot until its first is older than a seventh of the age, then into the next. The oldest slot
-- is emptied when its newest entry is older than the age. So the log keeps at least the age, and 8/7 of it at the most.
-- By size a slot is closed when it takes up an eighth of what all may, and the oldest is emptied, whatever its age, when
-- all take up more than they may.
--
-- `age` is in milliseconds, `size` in bytes with those of the indexes. `now`, for tests, stands for the clock that also
-- gives `at`.

-- What is to be done. It takes no lock that anybody waits for, and is asked all the time.
--
-- victim   the slot to be emptied; null for none
-- newest   the newest seq in it
-- early    it goes by size: its entries are younger than the age
-- closing  the current slot is to be closed; the next one is empty, or the victim
-- bytes    what the log takes up
CREATE FUNCTION catbus.overdue(age bigint, size bigint, now bigint DEFAULT NULL)
RETURNS TABLE (victim smallint, newest bigint, early boolean, closing boolean, bytes bigint)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    clock   bigint := coalesce(overdue.now, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);
    current smallint;
BEGIN
    SELECT h.slot INTO STRICT current FROM catbus.head AS h;
    WITH slots AS MATERIALIZED (
        SELECT n.slot, pg_total_relation_size(format('catbus.entries_%s', n.slot)::regclass) AS takes,
               first.seq AS first, first.at AS began, last.seq AS last, last.at AS ended
        FROM generate_series(0, 7) AS n (slot)
        LEFT JOIN LATERAL (
            SELECT e.seq, e.at FROM catbus.entries AS e WHERE e.slot = n.slot ORDER BY e.seq LIMIT 1
        ) AS first ON true
        LEFT JOIN LATERAL (
            SELECT e.seq, e.at FROM catbus.entries AS e WHERE e.slot = n.slot ORDER BY e.seq DESC LIMIT 1
        ) AS last ON true
    ), oldest AS (
        SELECT s.slot, s.last, s.ended > clock - overdue.age AS young
        FROM slots AS s WHERE s.slot <> current AND s.first IS NOT NULL ORDER BY s.first LIMIT 1
    )
    SELECT o.slot, o.last, o.young, whole.takes,
           (c.began <= clock - overdue.age / 7 OR c.first IS NOT NULL AND c.takes > overdue.size / 8)
               AND (next.first IS NULL OR next.slot = o.slot)
    INTO victim, newest, early, bytes, closing
    FROM (SELECT sum(s.takes)::bigint AS takes FROM slots AS s) AS whole
    JOIN slots AS c ON c.slot = current
    JOIN slots AS next ON next.slot = (current + 1) % 8
    LEFT JOIN oldest AS o ON NOT o.young OR whole.takes > overdue.size;
    closing := coalesce(closing, false);
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.overdue FROM PUBLIC;

-- One step, in one transaction: whoever takes it, the others find that it has been taken.
--
-- floor    the oldest seq that still exists, after it
-- dropped  how many entries went
-- early    they went by size
-- closed   the current slot was closed
-- held     the slot that was to be emptied and was not, because somebody uses it
--
-- Raises 55P03 when the head row is not had within two seconds.
CREATE FUNCTION catbus.retain(age bigint, size bigint, now bigint DEFAULT NULL)
RETURNS TABLE (floor bigint, dropped bigint, early boolean, closed boolean, held smallint)
LANGUAGE plpgsql
AS $$
DECLARE
    head    record;
    due     record;
    current smallint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.retain needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;

    -- Nobody need wait for a standby here: where this has not come to, there is more of the log. The head row is waited
    -- for as an append does, which holds nobody up. It is the first lock: who had looked at the partitions before would
    -- keep another's step from emptying one, while waiting for that other's lock on the head row.
    PERFORM set_config('synchronous_commit', 'local', true), set_config('lock_timeout', '2s', true);
    SELECT h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;

    -- From here on all appends wait, and behind a TRUNCATE that waits all who read.
    PERFORM set_config('lock_timeout', '50ms', true);
    SELECT o.victim, o.newest, o.early, o.closing INTO STRICT due
    FROM catbus.overdue(retain.age, retain.size, retain.now) AS o;
    floor := head.floor;
    current := head.slot;
    dropped := 0;
    early := false;
    IF due.victim IS NOT NULL THEN
        BEGIN
            EXECUTE format('TRUNCATE catbus.entries_%s', due.victim);
            floor := due.newest + 1;
            dropped := floor - head.floor;
            early := due.early;
        EXCEPTION WHEN lock_not_available THEN
            held := due.victim;
        END;
    END IF;
    IF due.closing AND held IS DISTINCT FROM (head.slot + 1) % 8 THEN
        current := (head.slot + 1) % 8;
    END IF;
    closed := current <> head.slot;
    IF closed OR dropped > 0 THEN
        UPDATE catbus.head AS h SET slot = current, floor = retain.floor;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.retain FROM PUBLIC;
