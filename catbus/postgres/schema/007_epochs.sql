-- Epochs: whether the database still has the log that somebody knows, and a new epoch where it has not.

-- Where the database is. The name of the current WAL file begins with the timeline. Fails on a standby.
CREATE FUNCTION catbus.place() RETURNS TABLE (system_identifier bigint, timeline integer)
LANGUAGE sql
AS $$
    SELECT c.system_identifier, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer
    FROM pg_control_system() AS c
$$;

REVOKE ALL ON FUNCTION catbus.place FROM PUBLIC;

-- By what an entry is recognised, without showing it; null for one that is not there. White space around a payload gets
-- lost in a notification.
CREATE FUNCTION catbus.mark(seq bigint) RETURNS bytea
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    found bytea;
BEGIN
    SELECT sha256(convert_to(format('%s %s %s', e.at, e.channel, btrim(e.payload, E' \t\r\n')), 'UTF8'))
    INTO found FROM catbus.entries AS e WHERE e.seq = mark.seq;
    RETURN found;
END
$$;

REVOKE ALL ON FUNCTION catbus.mark FROM PUBLIC;

-- catbus.position(), and what tells whether this is the log that somebody knows who has applied `seq`: cheap, without a
-- lock, asked all the time.
--
-- mark            that of the entry `seq`
-- standby         this is no primary, and the last two are null
-- same_system     the database is in the cluster in which the epoch began, or one that was copied from it file by file
-- same_timeline   nobody has failed over since, or restored to a moment
CREATE FUNCTION catbus.look(seq bigint) RETURNS TABLE (
    epoch text, head bigint, floor bigint, mark bytea, standby boolean, same_system boolean, same_timeline boolean
)
LANGUAGE plpgsql
AS $$
BEGIN
    standby := pg_is_in_recovery();
    -- Before the floor is read: where retention takes the entry away in between, the floor says so.
    mark := catbus.mark(look.seq);
    SELECT p.epoch, p.head, p.floor INTO epoch, head, floor FROM catbus.position() AS p;
    IF NOT standby THEN
        SELECT e.system_identifier = p.system_identifier, e.timeline = p.timeline
        INTO STRICT same_system, same_timeline
        FROM catbus.epochs AS e CROSS JOIN catbus.place() AS p WHERE e.epoch = look.epoch;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.look FROM PUBLIC;

-- Begin a new epoch, unless another one than `expected` has begun already.
--
-- agreed   the newest seq up to which the log is known to be that of the epoch before; null for the head, which is right
--          only where nothing was appended since the two parted
-- made     whether this call has begun it
--
-- Raises 55P03 when the head row is not had within two seconds.
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
        SELECT p.head INTO newest FROM catbus.position() AS p;
        -- The sequence behind the ordinals may have been left behind by a restore.
        INSERT INTO catbus.epochs (epoch, ordinal, after_seq, system_identifier, timeline)
        OVERRIDING SYSTEM VALUE
        SELECT gen_random_uuid()::text, (SELECT max(e.ordinal) + 1 FROM catbus.epochs AS e),
               greatest(least(agreed, newest), 0), p.system_identifier, p.timeline
        FROM catbus.place() AS p
        RETURNING epochs.epoch INTO epoch;
        UPDATE catbus.head SET epoch = new_epoch.epoch;
        IF pg_notification_queue_usage() <= 0.5 THEN
            PERFORM pg_notify('catbus', format('%s:%s:%s', epoch, newest + 1, newest));
        END IF;
    END IF;
    SELECT e.after_seq INTO after_seq FROM catbus.epochs AS e WHERE e.epoch = new_epoch.epoch;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.new_epoch FROM PUBLIC;

-- Go on in the same epoch after failing over to a standby that had every commit.
CREATE FUNCTION catbus.keep_epoch(expected text) RETURNS void
LANGUAGE sql
AS $$
    UPDATE catbus.epochs AS e SET timeline = p.timeline
    FROM catbus.place() AS p WHERE e.epoch = expected AND e.system_identifier = p.system_identifier
$$;

REVOKE ALL ON FUNCTION catbus.keep_epoch FROM PUBLIC;
