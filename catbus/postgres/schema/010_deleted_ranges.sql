-- Deleted ranges: seqs whose rows somebody deleted by hand. A subscription that has to read such a range stops before
-- it, until `catbus repair` has the range announced as a gap.

-- Within one snapshot every seq exists from the floor up to the highest visible one: an append takes its seqs under the
-- lock of the head row, and releases the lock when its rows are visible. So a seq that is missing below a visible one
-- was deleted, unless the floor, read by a later statement, shows that retention removed it.
CREATE TABLE catbus.deleted_ranges (
    first    bigint      NOT NULL PRIMARY KEY,
    last     bigint      NOT NULL CHECK (last >= first),
    repaired boolean     NOT NULL,
    found    timestamptz NOT NULL DEFAULT now(),
    change   bigint      NOT NULL UNIQUE
);
CREATE INDEX deleted_ranges_repaired ON catbus.deleted_ranges (last) WHERE repaired;
COMMENT ON TABLE catbus.deleted_ranges IS 'Seqs that are missing in the log, and not because of retention';
COMMENT ON COLUMN catbus.deleted_ranges.repaired IS
    'Readers go on behind the range and announce a gap; otherwise they stop before it';
COMMENT ON COLUMN catbus.deleted_ranges.change IS
    'The greatest one rises with every change, so that a poll finds the change';
CREATE SEQUENCE catbus.deleted_range_changes CACHE 1;

-- Find the deleted range directly behind `after`, and record it if it is new, so that all replicas report it. Returns
-- no row if the next entry exists, or if nothing follows. With `repaired`, readers go on behind `last` and announce a
-- gap up to there.
CREATE FUNCTION catbus.record_deleted_range(after bigint)
RETURNS TABLE (first bigint, last bigint, repaired boolean)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    next    bigint;
    oldest  bigint;
    covered bigint;
    a       bigint := after + 1;
    b       bigint;
BEGIN
    SELECT e.seq INTO next FROM catbus.entries AS e WHERE e.seq > after ORDER BY e.seq LIMIT 1;
    SELECT h.floor INTO STRICT oldest FROM catbus.head AS h;
    IF next IS NULL OR next = a OR oldest > a THEN
        RETURN;
    END IF;
    b := next - 1;
    SELECT d.last INTO covered
    FROM catbus.deleted_ranges AS d WHERE d.repaired AND d.first <= a ORDER BY d.first DESC LIMIT 1;
    IF covered >= a THEN
        RETURN QUERY SELECT a, least(b, covered), true;
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM catbus.deleted_ranges AS d WHERE d.first = a AND d.last = b) THEN
        LOCK TABLE catbus.deleted_ranges IN SHARE ROW EXCLUSIVE MODE;
        DELETE FROM catbus.deleted_ranges AS d WHERE NOT d.repaired AND d.first <= b AND d.last >= a;
        INSERT INTO catbus.deleted_ranges (first, last, repaired, change)
        VALUES (a, b, false, nextval('catbus.deleted_range_changes'))
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT a, b, false;
END
$$;

-- The deleted ranges in `after < seq <= until` that are not repaired. Seqs below the floor, as a later statement reads
-- it, were removed by retention.
CREATE FUNCTION catbus.list_deleted_ranges(after bigint, until bigint) RETURNS TABLE (first bigint, last bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT n.before + 1, n.seq - 1
    FROM (
        SELECT s.seq, lag(s.seq, 1, after) OVER (ORDER BY s.seq) AS before
        FROM (
            SELECT e.seq FROM catbus.entries AS e WHERE e.seq > after AND e.seq <= until
            UNION ALL SELECT until + 1
        ) AS s
    ) AS n
    WHERE n.seq > n.before + 1 AND NOT EXISTS (
        SELECT FROM catbus.deleted_ranges AS d WHERE d.repaired AND d.first <= n.before + 1 AND d.last >= n.seq - 1
    )
    ORDER BY n.seq;
END
$$;

-- Have readers go on behind ranges: the i-th elements of the arrays are one range. Entries that exist within a range
-- are delivered as before.
--
-- Raises 55P03 when the lock of the head row is not free within two seconds.
CREATE FUNCTION catbus.repair(firsts bigint[], lasts bigint[]) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    wanted record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.repair needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    -- The lookup of a retry takes the same lock, so it comes before all of this or after it.
    PERFORM FROM catbus.head FOR UPDATE;
    LOCK TABLE catbus.deleted_ranges IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM catbus.deleted_ranges AS d USING catbus.head AS head WHERE d.last < head.floor;
    FOR wanted IN SELECT r.first, r.last FROM unnest(firsts, lasts) AS r (first, last) ORDER BY r.first LOOP
        WITH merged AS (
            DELETE FROM catbus.deleted_ranges AS d WHERE d.first <= wanted.last AND d.last >= wanted.first
            RETURNING d.first, d.last
        )
        SELECT least(wanted.first, min(m.first)) AS first, greatest(wanted.last, max(m.last)) AS last INTO wanted
        FROM merged AS m;
        INSERT INTO catbus.deleted_ranges (first, last, repaired, change)
        VALUES (wanted.first, wanted.last, true, nextval('catbus.deleted_range_changes'));
    END LOOP;
END
$$;

-- Record the ranges that a DELETE by hand makes, so that all replicas report them at once. Above the newest remaining
-- entry there is no range: such a log was set back, and a new epoch begins.
CREATE FUNCTION catbus.note_deleted_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    LOCK TABLE catbus.deleted_ranges IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO catbus.deleted_ranges (first, last, repaired, change)
    SELECT min(d.seq), max(d.seq), false, nextval('catbus.deleted_range_changes')
    FROM (
        SELECT g.seq, g.seq - row_number() OVER (ORDER BY g.seq) AS island
        FROM deleted AS g CROSS JOIN catbus.head AS h
        WHERE g.seq >= h.floor AND g.seq < (SELECT max(e.seq) FROM catbus.entries AS e)
    ) AS d
    GROUP BY d.island
    ON CONFLICT (first) DO NOTHING;
    RETURN NULL;
END
$$;

-- Check an UPDATE by hand: an entry remains a message that can be delivered, or an erased one, under its seq and its key.
CREATE FUNCTION catbus.check_changed_entry() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    IF (NEW.seq, NEW.slot, NEW.producer, NEW.number) IS DISTINCT FROM (OLD.seq, OLD.slot, OLD.producer, OLD.number) THEN
        RAISE EXCEPTION 'message % has to keep its seq, slot, producer and number', OLD.seq
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.channel = '_erased' AND NEW.payload = 'null' AND NEW.sender IS NULL AND NEW.origin IS NULL THEN
        RETURN NEW;
    END IF;
    PERFORM catbus.check_message(NEW.channel, NEW.payload);
    IF NEW.payload ~ '[\r\n]' THEN
        RAISE EXCEPTION 'a payload has no line breaks in it' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;

-- How many seqs of how many ranges are missing and not repaired, and the first ten ranges; and `repaired`, where the
-- newest repaired range ends (null without one).
CREATE FUNCTION catbus.deleted_range_report()
RETURNS TABLE (ranges bigint, missing bigint, firsts bigint[], lasts bigint[], repaired bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT count(*) FILTER (WHERE NOT d.repaired),
           coalesce(sum(d.last - d.first + 1) FILTER (WHERE NOT d.repaired), 0)::bigint,
           (array_agg(d.first ORDER BY d.first) FILTER (WHERE NOT d.repaired))[1:10],
           (array_agg(d.last ORDER BY d.first) FILTER (WHERE NOT d.repaired))[1:10],
           max(d.last) FILTER (WHERE d.repaired)
    FROM catbus.deleted_ranges AS d CROSS JOIN catbus.head AS head WHERE d.last >= head.floor;
END
$$;

REVOKE ALL ON FUNCTION catbus.record_deleted_range, catbus.list_deleted_ranges, catbus.repair,
    catbus.note_deleted_entries, catbus.check_changed_entry, catbus.deleted_range_report FROM PUBLIC;

-- A statement fires the triggers of the table that it names, so the partitions have the trigger, too. Retention empties
-- a partition by TRUNCATE, which fires none of them.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['entries'] || ARRAY(SELECT format('entries_%s', n) FROM generate_series(0, 7) AS n) LOOP
        EXECUTE format('CREATE TRIGGER note_deleted AFTER DELETE ON catbus.%I REFERENCING OLD TABLE AS deleted
                        FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_deleted_entries()', name);
        EXECUTE format('ALTER TABLE catbus.%I ENABLE ALWAYS TRIGGER note_deleted', name);
    END LOOP;
END
$$;
CREATE TRIGGER check_changed BEFORE UPDATE ON catbus.entries
    FOR EACH ROW EXECUTE FUNCTION catbus.check_changed_entry();
ALTER TABLE catbus.entries ENABLE ALWAYS TRIGGER check_changed;
