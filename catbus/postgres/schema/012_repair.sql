-- Holes: messages that somebody has taken out of the log by hand. A subscription that has to read them stops before
-- them, until `catbus repair` has them announced as a gap.

-- Within one snapshot every seq is there from the floor up to the greatest one that can be seen: an append numbers under
-- the lock of the head row, which ends after its rows can be seen. So what is missing before a greater seq was taken out,
-- unless the floor, read by a later statement, says that retention did it.
CREATE TABLE catbus.holes (
    first    bigint      NOT NULL PRIMARY KEY,
    last     bigint      NOT NULL CHECK (last >= first),
    repaired boolean     NOT NULL,
    found    timestamptz NOT NULL DEFAULT now(),
    change   bigint      NOT NULL UNIQUE
);
CREATE INDEX holes_repaired ON catbus.holes (last) WHERE repaired;
COMMENT ON TABLE catbus.holes IS 'Messages that are missing in the log, and not because of retention';
COMMENT ON COLUMN catbus.holes.repaired IS 'Readers go on behind it and announce a gap; otherwise they stop before it';
COMMENT ON COLUMN catbus.holes.change IS 'The greatest one changes with every change, so that a look finds it';
CREATE SEQUENCE catbus.hole_changes CACHE 1;

-- Up to where seqs are known to have been given, a few seconds ago: it stays when the rows of the log are gone.
CREATE SEQUENCE catbus.reached MINVALUE 0 START 0 CACHE 1;

-- What keeps readers from going on after a seq: no row when the next entry is there, or nothing comes after it. With
-- `repaired` they go on after `last`, and announce a gap up to there.
--
-- A hole that nobody knew of is noted, so that all replicas tell of it.
CREATE FUNCTION catbus.find_hole(after bigint)
RETURNS TABLE (first bigint, last bigint, repaired boolean)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
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
    SELECT h.last INTO covered
    FROM catbus.holes AS h WHERE h.repaired AND h.first <= a ORDER BY h.first DESC LIMIT 1;
    IF covered >= a THEN
        RETURN QUERY SELECT a, least(b, covered), true;
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM catbus.holes AS h WHERE h.first = a AND h.last = b) THEN
        LOCK TABLE catbus.holes IN SHARE ROW EXCLUSIVE MODE;
        DELETE FROM catbus.holes AS h WHERE NOT h.repaired AND h.first <= b AND h.last >= a;
        INSERT INTO catbus.holes (first, last, repaired, change) VALUES (a, b, false, nextval('catbus.hole_changes'))
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT a, b, false;
END
$$;

REVOKE ALL ON FUNCTION catbus.find_hole FROM PUBLIC;

-- The holes in `after < seq <= until`, those left out that are repaired already. What is below the floor, as a later
-- statement reads it, is retention's.
CREATE FUNCTION catbus.list_holes(after bigint, until bigint) RETURNS TABLE (first bigint, last bigint)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
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
        SELECT FROM catbus.holes AS h WHERE h.repaired AND h.first <= n.before + 1 AND h.last >= n.seq - 1
    )
    ORDER BY n.seq;
END
$$;

REVOKE ALL ON FUNCTION catbus.list_holes FROM PUBLIC;

-- Have readers go on behind holes: the i-th elements of the arrays are one. What is there in them all the same is
-- delivered as before.
--
-- Raises 55P03 when the head row is not had within two seconds.
CREATE FUNCTION catbus.repair(firsts bigint[], lasts bigint[]) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    hole record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.repair needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    -- A retry that is looked up meanwhile comes before all of this or after it.
    PERFORM FROM catbus.head FOR UPDATE;
    LOCK TABLE catbus.holes IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM catbus.holes AS h USING catbus.head AS head WHERE h.last < head.floor;
    FOR hole IN SELECT r.first, r.last FROM unnest(firsts, lasts) AS r (first, last) ORDER BY r.first LOOP
        WITH gone AS (
            DELETE FROM catbus.holes AS h WHERE h.first <= hole.last AND h.last >= hole.first RETURNING h.first, h.last
        )
        SELECT least(hole.first, min(g.first)) AS first, greatest(hole.last, max(g.last)) AS last INTO hole
        FROM gone AS g;
        INSERT INTO catbus.holes (first, last, repaired, change)
        VALUES (hole.first, hole.last, true, nextval('catbus.hole_changes'));
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION catbus.repair FROM PUBLIC;

-- A DELETE by hand makes holes, and all replicas tell of them at once. There is no hole above the newest message that is
-- left: that log was set back, and a new epoch begins.
CREATE FUNCTION catbus.note_deleted_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
BEGIN
    LOCK TABLE catbus.holes IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO catbus.holes (first, last, repaired, change)
    SELECT min(d.seq), max(d.seq), false, nextval('catbus.hole_changes')
    FROM (
        SELECT g.seq, g.seq - row_number() OVER (ORDER BY g.seq) AS island
        FROM gone AS g CROSS JOIN catbus.head AS h
        WHERE g.seq >= h.floor AND g.seq < (SELECT max(e.seq) FROM catbus.entries AS e)
    ) AS d
    GROUP BY d.island
    ON CONFLICT (first) DO NOTHING;
    RETURN NULL;
END
$$;

REVOKE ALL ON FUNCTION catbus.note_deleted_entries FROM PUBLIC;

-- What is changed by hand stays a message that can be delivered, under its seq and its key.
CREATE FUNCTION catbus.check_changed_entry() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
BEGIN
    IF (NEW.seq, NEW.slot, NEW.producer, NEW.number) IS DISTINCT FROM (OLD.seq, OLD.slot, OLD.producer, OLD.number) THEN
        RAISE EXCEPTION 'message % has to keep its seq, slot, producer and number', OLD.seq
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    PERFORM catbus.check_message(NEW.channel, NEW.payload);
    IF NEW.payload ~ '[\r\n]' THEN
        RAISE EXCEPTION 'a payload has no line breaks in it' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;

REVOKE ALL ON FUNCTION catbus.check_changed_entry FROM PUBLIC;

-- A statement sets off the triggers of the table that it names. Retention empties a partition by TRUNCATE, which sets off
-- none of them.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['entries'] || ARRAY(SELECT format('entries_%s', n) FROM generate_series(0, 7) AS n) LOOP
        EXECUTE format('CREATE TRIGGER note_deleted AFTER DELETE ON catbus.%I REFERENCING OLD TABLE AS gone
                        FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_deleted_entries()', name);
        EXECUTE format('ALTER TABLE catbus.%I ENABLE ALWAYS TRIGGER note_deleted', name);
    END LOOP;
END
$$;
CREATE TRIGGER check_changed BEFORE UPDATE ON catbus.entries
    FOR EACH ROW EXECUTE FUNCTION catbus.check_changed_entry();
ALTER TABLE catbus.entries ENABLE ALWAYS TRIGGER check_changed;

-- How many holes there are that were not repaired, how many messages are missing in them, and the first few; and up to
-- where the newest repaired one goes, null without one.
CREATE FUNCTION catbus.hole_report()
RETURNS TABLE (holes bigint, missing bigint, firsts bigint[], lasts bigint[], repaired bigint)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT count(*) FILTER (WHERE NOT h.repaired),
           coalesce(sum(h.last - h.first + 1) FILTER (WHERE NOT h.repaired), 0)::bigint,
           (array_agg(h.first ORDER BY h.first) FILTER (WHERE NOT h.repaired))[1:10],
           (array_agg(h.last ORDER BY h.first) FILTER (WHERE NOT h.repaired))[1:10],
           max(h.last) FILTER (WHERE h.repaired)
    FROM catbus.holes AS h CROSS JOIN catbus.head AS head WHERE h.last >= head.floor;
END
$$;

REVOKE ALL ON FUNCTION catbus.hole_report FROM PUBLIC;

-- As before, and `holes`, by which changes of them are known; null while there is none.
DROP FUNCTION catbus.look;
CREATE FUNCTION catbus.look(seq bigint) RETURNS TABLE (
    epoch text, head bigint, floor bigint, mark bytea, standby boolean, same_system boolean, same_timeline boolean,
    role_version text, holes bigint
)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    changes bigint;
BEGIN
    standby := pg_is_in_recovery();
    -- Before the floor is read: where retention takes the entry away in between, the floor says so.
    mark := catbus.mark(look.seq);
    SELECT p.epoch, p.head, p.floor INTO epoch, head, floor FROM catbus.position() AS p;
    SELECT md5(string_agg(c.id::text, ' ' ORDER BY c.id)), count(*) INTO role_version, changes
    FROM catbus.role_changes AS c;
    SELECT max(h.change) INTO holes FROM catbus.holes AS h;
    IF NOT standby THEN
        IF changes > 100 THEN
            DELETE FROM catbus.role_changes;
            INSERT INTO catbus.role_changes DEFAULT VALUES;
        END IF;
        SELECT e.system_identifier = p.system_identifier, e.timeline = p.timeline
        INTO STRICT same_system, same_timeline
        FROM catbus.epochs AS e CROSS JOIN catbus.place() AS p WHERE e.epoch = look.epoch;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.look FROM PUBLIC;

-- The greatest seq that anything in the database knows of beside the entries themselves. What keeps seqs elsewhere is
-- added here: a later file replaces this function.
CREATE FUNCTION catbus.newest_known() RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    newest bigint;
BEGIN
    SELECT greatest(
        (SELECT h.floor - 1 FROM catbus.head AS h),
        (SELECT max(e.after_seq) FROM catbus.epochs AS e),
        (SELECT max(h.last) FROM catbus.holes AS h),
        (SELECT r.last_value FROM catbus.reached AS r)
    ) INTO newest;
    RETURN newest;
END
$$;

REVOKE ALL ON FUNCTION catbus.newest_known FROM PUBLIC;

-- catbus.new_epoch calls this under the head row, when a new epoch begins in a log whose head is `newest`. Returns the head
-- from then on.
--
-- Where the log is empty although seqs were given above its floor, as after a restore that left its rows out, the floor
-- goes above all that is known: no seq is given a second time. What was given and is not known any more was given within
-- seconds: a million is more than that can be. Above the head seqs are given again, so that there is no hole any more.
CREATE FUNCTION catbus.begin_seqs(newest bigint) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    known bigint := catbus.newest_known();
BEGIN
    IF known > newest AND NOT EXISTS (SELECT FROM catbus.entries) THEN
        newest := known + 1000000;
        UPDATE catbus.head SET floor = newest + 1;
    END IF;
    LOCK TABLE catbus.holes IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM catbus.holes AS h WHERE h.first > newest;
    UPDATE catbus.holes AS h SET last = newest, change = nextval('catbus.hole_changes') WHERE h.last > newest;
    RETURN newest;
END
$$;

-- For catbus.append: of a retry that was first sent when the head was below this nobody can know whether its original was in the log:
-- retention or a hole may have it. `next` is the next seq to be given.
CREATE FUNCTION catbus.unknown_below(floor bigint, next bigint) RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    gone bigint;
BEGIN
    SELECT max(h.last) INTO gone FROM catbus.holes AS h WHERE h.repaired AND h.last < next;
    RETURN greatest(floor - 1, gone);
END
$$;

REVOKE ALL ON FUNCTION catbus.begin_seqs, catbus.unknown_below FROM PUBLIC;

-- As before, and notes up to where seqs have been given.
CREATE OR REPLACE FUNCTION catbus.beat(own text, own_report text)
RETURNS TABLE (id text, silent double precision, report text, queue double precision, roles bigint)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO catbus.replicas AS r (id, seen, report) VALUES (own, clock_timestamp(), own_report)
    ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, report = excluded.report;
    DELETE FROM catbus.replicas AS r WHERE r.seen < clock_timestamp() - interval '1 minute';
    PERFORM setval('catbus.reached', p.head)
    FROM catbus.position() AS p CROSS JOIN catbus.reached AS s WHERE p.head > s.last_value;
    RETURN QUERY
    SELECT r.id, extract(epoch FROM clock_timestamp() - r.seen)::double precision, r.report,
           pg_notification_queue_usage(), (SELECT count(*) FROM catbus.roles)
    FROM catbus.replicas AS r ORDER BY r.id = own DESC, r.id;
END
$$;
