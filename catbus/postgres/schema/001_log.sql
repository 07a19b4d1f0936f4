-- The message log: its tables.
--
-- The files of this directory are applied in the order of their numbers, each once, by whoever holds the advisory lock;
-- none of them begins or ends a transaction. `schema_version` says which was the last.

CREATE SCHEMA IF NOT EXISTS catbus;
REVOKE ALL ON SCHEMA catbus FROM PUBLIC;

CREATE TABLE catbus.schema_version (version integer NOT NULL);
CREATE UNIQUE INDEX schema_version_one_row ON catbus.schema_version ((true));
INSERT INTO catbus.schema_version VALUES (0);
COMMENT ON TABLE catbus.schema_version IS 'One row: the number of the newest file of the schema that was applied';

-- A database that was restored or failed over may have lost entries, or have others under the same numbers. It is
-- recognised by what Postgres says of itself, and gets another epoch.
CREATE TABLE catbus.epochs (
    epoch             text        PRIMARY KEY,
    ordinal           integer     NOT NULL UNIQUE GENERATED ALWAYS AS IDENTITY,
    after_seq         bigint      NOT NULL,
    system_identifier bigint      NOT NULL,
    timeline          integer     NOT NULL,
    began             timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE catbus.epochs IS 'The incarnations of the log';
COMMENT ON COLUMN catbus.epochs.after_seq IS 'The log up to here is the one of the epoch before';

-- The name of the current WAL file begins with the timeline. pg_control_checkpoint() would be easier to read, but keeps
-- naming the old timeline until the first checkpoint after a failover.
INSERT INTO catbus.epochs (epoch, after_seq, system_identifier, timeline)
SELECT gen_random_uuid()::text,
       0,
       (SELECT c.system_identifier FROM pg_control_system() AS c),
       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer;

-- Everyone who changes the log locks this row first. The lock gives the log its order. The row itself changes with a
-- new epoch and with retention only: each change leaves a version behind that all others have to step over for as long
-- as any transaction in the database is open.
CREATE TABLE catbus.head (
    epoch text     NOT NULL REFERENCES catbus.epochs,
    slot  smallint NOT NULL CHECK (slot BETWEEN 0 AND 7),
    floor bigint   NOT NULL CHECK (floor > 0),
    seal  text     NOT NULL DEFAULT gen_random_uuid()::text || gen_random_uuid()::text
);
CREATE UNIQUE INDEX head_one_row ON catbus.head ((true));
INSERT INTO catbus.head (epoch, slot, floor) SELECT e.epoch, 0, 1 FROM catbus.epochs AS e;
COMMENT ON TABLE catbus.head IS 'One row: the state of the log, and the lock under which the log changes';
COMMENT ON COLUMN catbus.head.seal IS 'By this secret, entries in a notification are known to come from catbus.append';
COMMENT ON COLUMN catbus.head.slot IS 'The partition that takes new entries';
COMMENT ON COLUMN catbus.head.floor IS 'The oldest seq that still exists; the next one to be given when there is none';

-- Retention empties the oldest partition whole, at a cost that does not depend on its size.
CREATE TABLE catbus.entries (
    seq      bigint   NOT NULL,
    at       bigint   NOT NULL,
    number   bigint   NOT NULL,
    slot     smallint NOT NULL,
    channel  text     COLLATE "C" NOT NULL,
    payload  text     NOT NULL,
    producer bytea    NOT NULL,
    sender   text,
    origin   bytea
) PARTITION BY LIST (slot);
COMMENT ON TABLE catbus.entries IS 'The log. Only catbus.append writes to it';
COMMENT ON COLUMN catbus.entries.at IS 'When it was committed, in milliseconds since 1970';
COMMENT ON COLUMN catbus.entries.number IS 'With producer, the key by which a second try of a publish is recognised';
COMMENT ON COLUMN catbus.entries.payload IS 'JSON, as the client wrote it';
COMMENT ON COLUMN catbus.entries.sender IS 'The client_id of who published it';
COMMENT ON COLUMN catbus.entries.origin IS 'The producer that does not want it back';

-- Compression would take place under the head lock, and take longer there than the writing that it spares.
ALTER TABLE catbus.entries ALTER COLUMN payload SET STORAGE EXTERNAL;

DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        -- A payload of a few KB that stays in its row is read at twice the speed of one in the TOAST table.
        -- Vacuuming rows that are never updated and will be truncated would rewrite them all for nothing, and hold the
        -- lock that retention needs. And a table that was never analysed is never taken to be tiny: connections that
        -- plan their statements while the log is short keep plans that are good when it is long.
        EXECUTE format(
            'CREATE TABLE catbus.entries_%1$s PARTITION OF catbus.entries FOR VALUES IN (%1$s) WITH (
                 toast_tuple_target = 8160, autovacuum_enabled = false, toast.autovacuum_enabled = false)', slot);
        EXECUTE format('CREATE UNIQUE INDEX entries_%1$s_seq ON catbus.entries_%1$s (seq)', slot);
        EXECUTE format('CREATE UNIQUE INDEX entries_%1$s_key ON catbus.entries_%1$s (producer, number)', slot);
        EXECUTE format('CREATE INDEX entries_%1$s_channel ON catbus.entries_%1$s (channel, seq)', slot);
    END LOOP;
END
$$;
