-- Retention: the oldest entries are removed a partition at a time, not row by row.
--
-- New entries go into one slot until its first entry is older than a seventh of the age, then into the next slot. The
-- oldest slot is emptied when its newest entry is older than the age. So the log keeps entries for at least the age,
-- and for at most 8/7 of it.
--
-- By size, a slot is closed when it takes up an eighth of the limit. The oldest slot is emptied, whatever its age, when
-- all slots together take up more than the limit.
--
-- A consumer with `hold` that has not received all of a slot keeps it from being emptied by age, and not by size.
--
-- `age` is in milliseconds, `size` in bytes including indexes. Tests give `now`, which replaces the clock that also
-- sets `at`.

-- The step that is due. It takes no lock that blocks anybody, and is called all the time.
--
-- expired  the slot to be emptied; null for none
-- newest   the newest seq in it
-- by_size  its entries are younger than the age, or a consumer holds them, and they are removed because of the size
-- closing  the current slot is to be closed; the next one is empty, or is the expired one
-- bytes    the size of the log
-- held     the oldest slot is older than the age, and a consumer with `hold` has not received all of it
CREATE FUNCTION catbus.retention_due(age bigint, size bigint, now bigint DEFAULT NULL)
RETURNS TABLE (expired smallint, newest bigint, by_size boolean, closing boolean, bytes bigint, held boolean)
LANGUAGE plpgsql
AS $$
DECLARE
    clock   bigint := coalesce(retention_due.now, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);
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
        SELECT s.slot, s.last,
               s.ended > clock - retention_due.age AS young,
               s.ended <= clock - retention_due.age AND coalesce(catbus.held_cursor() < s.last, false) AS held
        FROM slots AS s WHERE s.slot <> current AND s.first IS NOT NULL ORDER BY s.first LIMIT 1
    )
    SELECT o.slot, o.last, o.young OR o.held, whole.takes, coalesce((SELECT w.held FROM oldest AS w), false),
           (c.began <= clock - retention_due.age / 7 OR c.first IS NOT NULL AND c.takes > retention_due.size / 8)
               AND (next.first IS NULL OR next.slot = o.slot)
    INTO expired, newest, by_size, bytes, held, closing
    FROM (SELECT sum(s.takes)::bigint AS takes FROM slots AS s) AS whole
    JOIN slots AS c ON c.slot = current
    JOIN slots AS next ON next.slot = (current + 1) % 8
    LEFT JOIN oldest AS o ON NOT (o.young OR o.held) OR whole.takes > retention_due.size;
    closing := coalesce(closing, false);
    RETURN NEXT;
END
$$;

-- Take one step, in one transaction. If another replica has taken it already, nothing happens.
--
-- floor    the oldest seq that still exists afterwards
-- dropped  the number of removed entries
-- by_size  they were removed because of the size
-- closed   the current slot was closed
-- blocked  the slot that could not be emptied because a transaction uses it
--
-- Raises 55P03 when the lock of the head row is not free within two seconds.
CREATE FUNCTION catbus.retain(age bigint, size bigint, now bigint DEFAULT NULL)
RETURNS TABLE (floor bigint, dropped bigint, by_size boolean, closed boolean, blocked smallint)
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

    -- Waiting for a standby is not necessary: a standby that lacks this step merely has more of the log. Waiting for
    -- the head row blocks nobody, as with an append. It is the first lock: a transaction that had read the partitions
    -- before would keep another step from emptying one, while it waits for that step's lock on the head row.
    PERFORM set_config('synchronous_commit', 'local', true), set_config('lock_timeout', '2s', true);
    SELECT h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;

    -- From here on all appends wait, and all readers wait behind a TRUNCATE that waits.
    PERFORM set_config('lock_timeout', '50ms', true);
    SELECT d.expired, d.newest, d.by_size, d.closing INTO STRICT due
    FROM catbus.retention_due(retain.age, retain.size, retain.now) AS d;
    floor := head.floor;
    current := head.slot;
    dropped := 0;
    by_size := false;
    IF due.expired IS NOT NULL THEN
        BEGIN
            EXECUTE format('TRUNCATE catbus.entries_%s', due.expired);
            floor := due.newest + 1;
            dropped := floor - head.floor;
            by_size := due.by_size;
        EXCEPTION WHEN lock_not_available THEN
            blocked := due.expired;
        END;
    END IF;
    IF due.closing AND blocked IS DISTINCT FROM (head.slot + 1) % 8 THEN
        current := (head.slot + 1) % 8;
    END IF;
    closed := current <> head.slot;
    IF closed OR dropped > 0 THEN
        UPDATE catbus.head AS h SET slot = current, floor = retain.floor;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.retention_due, catbus.retain FROM PUBLIC;

-- catbus.retain in a transaction of its own.
CREATE PROCEDURE catbus.retain_transaction(
    age         bigint,
    size        bigint,
    now         bigint,
    OUT floor   bigint,
    OUT dropped bigint,
    OUT by_size boolean,
    OUT closed  boolean,
    OUT blocked smallint
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    SELECT r.floor, r.dropped, r.by_size, r.closed, r.blocked INTO floor, dropped, by_size, closed, blocked
    FROM catbus.retain(age, size, now) AS r;
END
$$;

REVOKE ALL ON PROCEDURE catbus.retain_transaction FROM PUBLIC;
