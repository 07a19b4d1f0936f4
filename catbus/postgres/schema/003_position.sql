-- The position of the log, and what a replica polls. The functions of this file change nothing.

-- The head and the floor, for the replicas and for other functions. It is cheap, and is called all the time.
--
-- head   the newest committed seq
-- floor  the oldest seq that still exists; head + 1 when the log is empty
CREATE FUNCTION catbus.log_position() RETURNS TABLE (epoch text, head bigint, floor bigint)
LANGUAGE plpgsql
AS $$
DECLARE
    newest bigint;
BEGIN
    -- Two statements, in this order, and therefore VOLATILE: TRUNCATE hides rows from older snapshots, too. If
    -- retention empties the whole log before the first statement has run, the second one sees the floor that moved with
    -- it.
    SELECT e.seq INTO newest FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    RETURN QUERY SELECT h.epoch, greatest(newest, h.floor - 1), h.floor FROM catbus.head AS h;
END
$$;

-- catbus.log_position(), for the transactions of others. It leaves no lock behind.
--
-- A role with EXECUTE calls it before it reads tables of its own. What it then reads has all that was published up to the
-- head, and a subscription from the head on gets the rest. A later call would tell of changes that the tables did not show.
CREATE FUNCTION catbus.position() RETURNS TABLE (epoch text, head bigint, floor bigint)
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    -- The locks on the tables of the log end with the inner block, by RAISE, and variables outlive it. Otherwise retention
    -- would wait for the end of the caller's transaction.
    BEGIN
        SELECT p.epoch, p.head, p.floor INTO STRICT epoch, head, floor FROM catbus.log_position() AS p;
        RAISE EXCEPTION USING ERRCODE = 'CB099';
    EXCEPTION WHEN SQLSTATE 'CB099' THEN
        NULL;
    END;
    RETURN NEXT;
END
$$;
COMMENT ON FUNCTION catbus.position IS 'The position of the log, to be read before tables whose changes are then followed';

-- The fingerprint of an entry, which identifies it without showing it: a hash, and the time. Of an erased entry, whose
-- contents are gone, it is the time alone. Null for an entry that does not exist. A notification loses white space
-- around a payload, so the fingerprint leaves it out.
CREATE FUNCTION catbus.fingerprint(seq bigint) RETURNS bytea
LANGUAGE plpgsql
AS $$
DECLARE
    found bytea;
BEGIN
    SELECT CASE WHEN e.channel = '_erased' THEN int8send(e.at)
                ELSE sha256(convert_to(format('%s %s %s', e.at, e.channel, btrim(e.payload, E' \t\r\n')), 'UTF8'))
                     || int8send(e.at)
           END
    INTO found FROM catbus.entries AS e WHERE e.seq = fingerprint.seq;
    RETURN found;
END
$$;

-- catbus.log_position(), and what shows whether this is the log that a replica knows that has applied `seq`. It is cheap,
-- takes no lock, and is called all the time.
--
-- fingerprint             of the entry `seq`
-- standby                 the database is a standby; the next two are null then
-- same_system             the epoch began in this cluster, or in one from which it was copied file by file
-- same_timeline           there was no failover since, and no restore to a point in time
-- role_version            differs after every change of roles
-- revocation_version      differs after every change of catbus.revocations
-- deleted_ranges_version  differs after every change of catbus.deleted_ranges; null while that is empty
-- erasure                 the number of the newest erasure. All entries that it and earlier ones have erased are at or
--                         below `head`
CREATE FUNCTION catbus.poll(seq bigint) RETURNS TABLE (
    epoch text, head bigint, floor bigint, fingerprint bytea, standby boolean, same_system boolean,
    same_timeline boolean, role_version text, revocation_version text, deleted_ranges_version bigint, erasure bigint
)
LANGUAGE plpgsql
AS $$
BEGIN
    standby := pg_is_in_recovery();
    -- Before the head is read.
    SELECT max(e.erasure) INTO STRICT erasure FROM catbus.erasures AS e;
    -- Before the floor is read: if retention removes the entry in between, the floor shows it.
    fingerprint := catbus.fingerprint(poll.seq);
    SELECT p.epoch, p.head, p.floor INTO epoch, head, floor FROM catbus.log_position() AS p;
    SELECT md5(string_agg(c.id::text, ' ' ORDER BY c.id)) INTO role_version FROM catbus.role_changes AS c;
    SELECT md5(string_agg(c.id::text, ' ' ORDER BY c.id)) INTO revocation_version FROM catbus.revocation_changes AS c;
    SELECT max(d.change) INTO deleted_ranges_version FROM catbus.deleted_ranges AS d;
    IF NOT standby THEN
        SELECT e.system_identifier = c.system_identifier, e.timeline = c.timeline
        INTO STRICT same_system, same_timeline
        FROM catbus.epochs AS e CROSS JOIN catbus.cluster_identity() AS c WHERE e.epoch = poll.epoch;
    END IF;
    RETURN NEXT;
END
$$;

-- Whether this is the server that a replica has checked, which started at this time.
CREATE FUNCTION catbus.is_same_server(started timestamptz) RETURNS boolean
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN pg_postmaster_start_time() = started;
END
$$;

REVOKE ALL ON FUNCTION catbus.log_position, catbus.position, catbus.fingerprint, catbus.poll, catbus.is_same_server FROM PUBLIC;
