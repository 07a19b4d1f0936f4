-- New epochs: a database that was restored or failed over gets one.

-- Begin a new epoch, unless another epoch than `expected` has begun already.
--
-- agreed  the newest seq up to which the log is known to be that of the epoch before. Null stands for the head, which is
--         right only if nothing was appended since the two logs parted
-- made    whether this call has begun the epoch
--
-- Raises 55P03 when the lock of the head row is not free within two seconds.
CREATE FUNCTION catbus.new_epoch(expected text, agreed bigint DEFAULT NULL)
RETURNS TABLE (epoch text, after_seq bigint, made boolean)
LANGUAGE plpgsql
AS $$
DECLARE
    newest bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.new_epoch needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    SELECT h.epoch INTO STRICT epoch FROM catbus.head AS h FOR UPDATE;
    made := epoch = expected;
    IF made THEN
        SELECT p.head INTO newest FROM catbus.log_position() AS p;
        -- A restore may have left the sequence of the ordinals behind.
        INSERT INTO catbus.epochs (epoch, ordinal, after_seq, system_identifier, timeline)
        OVERRIDING SYSTEM VALUE
        SELECT gen_random_uuid()::text, (SELECT max(e.ordinal) + 1 FROM catbus.epochs AS e),
               greatest(least(agreed, newest), 0), c.system_identifier, c.timeline
        FROM catbus.cluster_identity() AS c
        RETURNING epochs.epoch INTO epoch;
        newest := catbus.prepare_head(newest);
        UPDATE catbus.head SET epoch = new_epoch.epoch;
        PERFORM catbus.notify('catbus', format('%s:%s:%s', epoch, newest + 1, newest));
    END IF;
    SELECT e.after_seq INTO after_seq FROM catbus.epochs AS e WHERE e.epoch = new_epoch.epoch;
    RETURN NEXT;
END
$$;

-- Keep the epoch after a failover to a standby that had every commit.
CREATE FUNCTION catbus.keep_epoch(expected text) RETURNS void
LANGUAGE sql
AS $$
    UPDATE catbus.epochs AS e SET timeline = c.timeline
    FROM catbus.cluster_identity() AS c WHERE e.epoch = expected AND e.system_identifier = c.system_identifier
$$;

-- The highest seq that any epoch, range, retained message or sequence of the database refers to. A later file that stores seqs elsewhere
-- replaces this function.
CREATE FUNCTION catbus.highest_seq() RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    newest bigint;
BEGIN
    SELECT greatest(
        (SELECT h.floor - 1 FROM catbus.head AS h),
        (SELECT max(e.after_seq) FROM catbus.epochs AS e),
        (SELECT max(d.last) FROM catbus.deleted_ranges AS d),
        (SELECT max(r.seq) FROM catbus.retained AS r),
        (SELECT max(n.cursor) FROM catbus.consumer_cursors AS n),
        (SELECT max(r.seq) FROM catbus.rejected_messages AS r),
        (SELECT s.last_value FROM catbus.reached_seq AS s)
    ) INTO newest;
    RETURN newest;
END
$$;

-- Prepare the head for a new epoch of a log whose head is `newest`, and return the new head. catbus.new_epoch calls it
-- under the lock of the head row.
--
-- A restore that left out the rows of the log leaves it empty although seqs above its floor were given. Then the floor
-- moves above all seqs that are known, so that no seq is given twice. The seqs that are not known were given within a
-- few seconds: there are less than a million of them.
--
-- Seqs above the head are given again, so no range above it counts as deleted any more, and retained messages above it,
-- which the log has lost, are deleted.
CREATE FUNCTION catbus.prepare_head(newest bigint) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    known bigint := catbus.highest_seq();
BEGIN
    IF known > newest AND NOT EXISTS (SELECT FROM catbus.entries) THEN
        newest := known + 1000000;
        UPDATE catbus.head SET floor = newest + 1;
    END IF;
    DELETE FROM catbus.retained AS r WHERE r.seq > newest;
    LOCK TABLE catbus.deleted_ranges IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM catbus.deleted_ranges AS d WHERE d.first > newest;
    UPDATE catbus.deleted_ranges AS d SET last = newest, change = nextval('catbus.deleted_range_changes')
    WHERE d.last > newest;
    RETURN newest;
END
$$;

REVOKE ALL ON FUNCTION catbus.new_epoch, catbus.keep_epoch, catbus.highest_seq, catbus.prepare_head FROM PUBLIC;

-- catbus.new_epoch in a transaction of its own.
CREATE PROCEDURE catbus.new_epoch_transaction(
    expected      text,
    agreed        bigint,
    OUT epoch     text,
    OUT after_seq bigint,
    OUT made      boolean
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    SELECT e.epoch, e.after_seq, e.made INTO epoch, after_seq, made FROM catbus.new_epoch(expected, agreed) AS e;
END
$$;

REVOKE ALL ON PROCEDURE catbus.new_epoch_transaction FROM PUBLIC;
