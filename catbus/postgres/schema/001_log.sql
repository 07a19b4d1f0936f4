-- The tables of the message log.
--
-- The files of this directory are applied once each, in the order of their numbers, under an advisory lock. No file
-- begins or ends a transaction. `schema_version` holds the number of the newest file that was applied. A file that was
-- released does not change, but for its comments.
--
-- The functions get their settings (search path, planner) in the last file.

CREATE SCHEMA IF NOT EXISTS catbus;
REVOKE ALL ON SCHEMA catbus FROM PUBLIC;

CREATE TABLE catbus.schema_version (version integer NOT NULL, digest text NOT NULL);
CREATE UNIQUE INDEX schema_version_one_row ON catbus.schema_version ((true));
INSERT INTO catbus.schema_version VALUES (0, '');
COMMENT ON TABLE catbus.schema_version IS 'One row: the number of the newest file of the schema that was applied';
COMMENT ON COLUMN catbus.schema_version.digest IS 'A digest of all applied files, which tells other builds apart';

-- The cluster and the timeline of this database. Fails on a standby.
--
-- The name of the current WAL file begins with the timeline. pg_control_checkpoint() would be easier to read, but it
-- returns the old timeline until the first checkpoint after a failover.
CREATE FUNCTION catbus.cluster_identity() RETURNS TABLE (system_identifier bigint, timeline integer)
LANGUAGE sql
AS $$
    SELECT c.system_identifier, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer
    FROM pg_control_system() AS c
$$;

REVOKE ALL ON FUNCTION catbus.cluster_identity FROM PUBLIC;

-- A database that was restored or failed over may lack entries, or have other entries under the same seqs. Its system
-- identifier, its timeline or a fingerprint shows that, and it gets a new epoch.
CREATE TABLE catbus.epochs (
    epoch             text        PRIMARY KEY,
    ordinal           integer     NOT NULL UNIQUE GENERATED ALWAYS AS IDENTITY,
    after_seq         bigint      NOT NULL,
    system_identifier bigint      NOT NULL,
    timeline          integer     NOT NULL,
    began             timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE catbus.epochs IS 'The epochs of the log: its identity changes when it is restored or fails over';
COMMENT ON COLUMN catbus.epochs.after_seq IS 'Up to this seq the log is the same as in the epoch before';

INSERT INTO catbus.epochs (epoch, after_seq, system_identifier, timeline)
SELECT gen_random_uuid()::text, 0, c.system_identifier, c.timeline FROM catbus.cluster_identity() AS c;

-- Every change of the log locks this row first. The lock gives the log its order. Only a new epoch and retention update
-- the row itself: each update leaves a row version behind, which all others have to step over for as long as any
-- transaction in the database is open.
CREATE TABLE catbus.head (
    epoch text     NOT NULL REFERENCES catbus.epochs,
    slot  smallint NOT NULL CHECK (slot BETWEEN 0 AND 7),
    floor bigint   NOT NULL CHECK (floor > 0),
    notification_secret text NOT NULL DEFAULT gen_random_uuid()::text || gen_random_uuid()::text
);
CREATE UNIQUE INDEX head_one_row ON catbus.head ((true));
INSERT INTO catbus.head (epoch, slot, floor) SELECT e.epoch, 0, 1 FROM catbus.epochs AS e;
COMMENT ON TABLE catbus.head IS 'One row: the state of the log, and the lock under which the log changes';
COMMENT ON COLUMN catbus.head.slot IS 'The partition that takes new entries';
COMMENT ON COLUMN catbus.head.floor IS 'The oldest seq that still exists; the next seq when the log is empty';
COMMENT ON COLUMN catbus.head.notification_secret IS 'The secret that authenticates and encrypts notifications';

-- Retention empties the oldest partition as a whole, at a cost that does not depend on its size.
CREATE TABLE catbus.entries (
    seq      bigint   NOT NULL,
    at       bigint   NOT NULL,
    number   bigint   NOT NULL,
    slot     smallint NOT NULL,
    channel  text     COLLATE "C" NOT NULL,
    payload  text     NOT NULL,
    producer bytea    NOT NULL,
    sender   text,
    origin   bytea,
    retain   boolean
) PARTITION BY LIST (slot);
COMMENT ON TABLE catbus.entries IS 'The log. Only catbus.append and catbus.move_outbox write to it';
COMMENT ON COLUMN catbus.entries.at IS 'The time of the append, in milliseconds since 1970';
COMMENT ON COLUMN catbus.entries.number IS 'With producer, the key that identifies a retry of a publish';
COMMENT ON COLUMN catbus.entries.payload IS 'JSON, as the client wrote it';
COMMENT ON COLUMN catbus.entries.sender IS 'The client_id of the publisher';
COMMENT ON COLUMN catbus.entries.origin IS 'The producer that does not want to receive the message';
COMMENT ON COLUMN catbus.entries.retain IS 'True if it was published with `retain`; otherwise null';

-- Compression would take place under the lock of the head row, and take longer there than the writing that it saves.
ALTER TABLE catbus.entries ALTER COLUMN payload SET STORAGE EXTERNAL;

DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        -- A payload of a few KB that stays in its row is read twice as fast as one in the TOAST table.
        -- Vacuum would rewrite all rows for nothing, as they are never updated and will be truncated, and would hold
        -- the lock that retention needs. And the planner never takes a table that was never analysed for tiny:
        -- connections that plan their statements while the log is short keep plans that are good when it is long.
        EXECUTE format(
            'CREATE TABLE catbus.entries_%1$s PARTITION OF catbus.entries FOR VALUES IN (%1$s) WITH (
                 toast_tuple_target = 8160, autovacuum_enabled = false, toast.autovacuum_enabled = false)', slot);
        EXECUTE format('CREATE UNIQUE INDEX entries_%1$s_seq ON catbus.entries_%1$s (seq)', slot);
        EXECUTE format('CREATE UNIQUE INDEX entries_%1$s_key ON catbus.entries_%1$s (producer, number)', slot);
        EXECUTE format('CREATE INDEX entries_%1$s_channel ON catbus.entries_%1$s (channel, seq)', slot);
    END LOOP;
END
$$;
