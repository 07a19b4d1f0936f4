-- Presence: which sessions are in which channels, written by the replicas of the sessions and read by all.
--
-- Nothing of it survives a crash, a failover or a standby, and nothing has to: replicas write their memberships again.
-- Rows count while their replica sends heartbeats. What a reader has to know, it finds in one statement:
--
-- - Each change takes a version, under a lock that ends after the change is visible. So versions become visible in their
--   order, and whoever reads what is newer than the greatest version that it saw misses nothing.
-- - `catbus.presence_table.incarnation` says which table it is: versions mean nothing in another one.
-- - Memberships that have ended stay for a minute. `purged` is the greatest version that was deleted: who has not read up
--   to there has to read everything again.

CREATE SEQUENCE catbus.presence_version CACHE 1;
COMMENT ON SEQUENCE catbus.presence_version IS 'Versions of memberships; it is logged, so that it goes on after a crash';

CREATE UNLOGGED TABLE catbus.presence (
    channel   text        COLLATE "C" NOT NULL,
    member    text        COLLATE "C" NOT NULL,
    replica   text        COLLATE "C" NOT NULL,
    session   bigint      NOT NULL,
    client_id text,
    info      text,
    at        bigint      NOT NULL,
    state     smallint    NOT NULL,
    changed   timestamptz NOT NULL,
    version   bigint      NOT NULL,
    PRIMARY KEY (channel, member, replica, session)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
-- What is new is read from here, and never walks over old dead rows.
CREATE INDEX presence_changes ON catbus.presence (version, channel);
CREATE INDEX presence_of_replica ON catbus.presence (replica, version) WHERE state = 0;
CREATE INDEX presence_ended ON catbus.presence (changed) WHERE state <> 0;
COMMENT ON TABLE catbus.presence IS 'Sessions in channels';
COMMENT ON COLUMN catbus.presence.member IS 'The member to which the session belongs: a client_id, or the session itself';
COMMENT ON COLUMN catbus.presence.at IS 'When it joined or gave its info: milliseconds since 1970 by the clock of its replica';
COMMENT ON COLUMN catbus.presence.state IS '0: present; 1: its session has ended; 2: it has left the channel';

CREATE UNLOGGED TABLE catbus.presence_replicas (
    replica        text        COLLATE "C" PRIMARY KEY,
    last_heartbeat timestamptz NOT NULL,
    batch          bigint      NOT NULL,
    expelled       boolean     NOT NULL DEFAULT false
) WITH (fillfactor = 50);
COMMENT ON TABLE catbus.presence_replicas IS 'Replicas with memberships';
COMMENT ON COLUMN catbus.presence_replicas.batch IS 'The newest batch of the replica: a late one does not undo it';
COMMENT ON COLUMN catbus.presence_replicas.expelled IS 'Its memberships are being ended; it has to write all of them again';

CREATE UNLOGGED TABLE catbus.presence_table (
    incarnation text   NOT NULL,
    purged      bigint NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX presence_table_one_row ON catbus.presence_table ((true));

-- Take the lock under which versions are given. It makes no version of a row, and no WAL. Nobody waits for a disk or a
-- standby while it is held.
CREATE FUNCTION catbus.lock_presence() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '2s', true);
    PERFORM pg_advisory_xact_lock(8102099357864587109);  -- "presence" in ASCII
END
$$;

-- Write a batch of a replica's memberships, which is a heartbeat, too. The arrays have an item for each membership.
--
-- begins      the replica begins to write all its memberships. Otherwise nothing is written if it is not known
-- ends_below  its memberships with a lower version have ended; 0: with a lower version than this batch
--
-- Returns a version below those of the memberships, or null if the replica is not known or the batch is late; and whether
-- more are left to be ended.
CREATE FUNCTION catbus.write_presence(
    own text, own_batch bigint, begins boolean, ends_below bigint,
    channels text[], members text[], sessions bigint[], clients text[], infos text[], times bigint[], states bigint[],
    OUT first bigint, OUT more boolean
)
LANGUAGE plpgsql
AS $$
DECLARE
    changes bigint := 0;
    ended   bigint := 0;
BEGIN
    more := false;
    IF begins OR ends_below IS NOT NULL OR cardinality(channels) > 0 THEN
        PERFORM catbus.lock_presence();
    END IF;
    IF begins THEN
        INSERT INTO catbus.presence_table (incarnation) VALUES (gen_random_uuid()::text) ON CONFLICT DO NOTHING;
        INSERT INTO catbus.presence_replicas AS r (replica, last_heartbeat, batch) VALUES (own, clock_timestamp(), own_batch)
        ON CONFLICT (replica) DO UPDATE SET
            last_heartbeat = excluded.last_heartbeat, batch = excluded.batch, expelled = false
        WHERE r.batch < excluded.batch;
    ELSE
        UPDATE catbus.presence_replicas AS r SET last_heartbeat = clock_timestamp(), batch = own_batch
        WHERE r.replica = own AND r.batch < own_batch AND NOT r.expelled;
    END IF;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    first := 0;
    IF begins OR ends_below IS NOT NULL OR cardinality(channels) > 0 THEN
        first := nextval('catbus.presence_version');
        INSERT INTO catbus.presence AS p
            (channel, member, replica, session, client_id, info, at, state, changed, version)
        SELECT g.channel, g.member, own, g.session, g.client, g.info, g.at, g.state, clock_timestamp(),
               nextval('catbus.presence_version')
        FROM unnest(channels, members, sessions, clients, infos, times, states)
            AS g (channel, member, session, client, info, at, state)
        ON CONFLICT ON CONSTRAINT presence_pkey DO UPDATE SET
            client_id = excluded.client_id, info = excluded.info, at = excluded.at, state = excluded.state,
            changed = excluded.changed, version = excluded.version;
        GET DIAGNOSTICS changes = ROW_COUNT;
    END IF;
    IF ends_below IS NOT NULL THEN
        ended := catbus.end_presence(own, CASE ends_below WHEN 0 THEN first ELSE ends_below END);
        more := ended >= 2000;
    END IF;
    IF changes + ended > 0 THEN
        PERFORM catbus.notify('catbus_presence', currval('catbus.presence_version')::text);
    END IF;
END
$$;

-- End up to 2,000 memberships of a replica with a version below this one. Returns how many. The caller has the lock.
CREATE FUNCTION catbus.end_presence(of_replica text, below bigint) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    found_rows bigint;
BEGIN
    UPDATE catbus.presence AS p SET state = 1, info = NULL, changed = clock_timestamp(),
        version = nextval('catbus.presence_version')
    WHERE (p.channel, p.member, p.replica, p.session) IN (
        SELECT o.channel, o.member, o.replica, o.session FROM catbus.presence AS o
        WHERE o.replica = of_replica AND o.state = 0 AND o.version < below LIMIT 2000
    );
    GET DIAGNOSTICS found_rows = ROW_COUNT;
    RETURN found_rows;
END
$$;

-- Delete what ended more than a minute ago, and end the memberships of replicas without a heartbeat for a minute: a part
-- of both in each call. A replica that was only unreachable is rejected then, and writes all its memberships again.
CREATE FUNCTION catbus.purge_presence() RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    limit_time timestamptz := clock_timestamp() - interval '1 minute';
    dead       text;
BEGIN
    SELECT r.replica INTO dead FROM catbus.presence_replicas AS r WHERE r.last_heartbeat < limit_time LIMIT 1;
    IF dead IS NULL AND NOT EXISTS (SELECT FROM catbus.presence AS p WHERE p.state <> 0 AND p.changed < limit_time) THEN
        RETURN;
    END IF;
    PERFORM catbus.lock_presence();
    WITH deleted AS (
        DELETE FROM catbus.presence AS p
        WHERE (p.channel, p.member, p.replica, p.session) IN (
            SELECT o.channel, o.member, o.replica, o.session FROM catbus.presence AS o
            WHERE o.state <> 0 AND o.changed < limit_time ORDER BY o.changed LIMIT 5000
        ) AND p.state <> 0 AND p.changed < limit_time
        RETURNING p.version
    )
    UPDATE catbus.presence_table AS t SET purged = greatest(t.purged, d.version)
    FROM (SELECT max(version) AS version FROM deleted) AS d;
    -- Meanwhile it may have sent a heartbeat.
    UPDATE catbus.presence_replicas AS r SET expelled = true WHERE r.replica = dead AND r.last_heartbeat < limit_time;
    IF FOUND THEN
        IF catbus.end_presence(dead, 9223372036854775807) < 2000 THEN
            DELETE FROM catbus.presence_replicas AS r WHERE r.replica = dead;
        END IF;
        PERFORM catbus.notify('catbus_presence', nextval('catbus.presence_version')::text);
    END IF;
END
$$;

-- The replicas with a recent heartbeat. Three of them may be late or lost.
CREATE FUNCTION catbus.present_replicas() RETURNS text[]
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(array_agg(r.replica), '{}') FROM catbus.presence_replicas AS r
    WHERE r.last_heartbeat > clock_timestamp() - interval '12 s' AND NOT r.expelled
$$;

-- The state of the table, and up to `most` changes after a version: in channels of `exact`, or below one of `prefixes`
-- (which end with a dot), or all. There is always a row; without changes, its channel is null. All of it is from one
-- moment, as the function is not volatile.
CREATE FUNCTION catbus.presence_changes(after bigint, everything boolean, exact text[], prefixes text[], most bigint)
RETURNS TABLE (
    incarnation text, purged bigint, newest bigint, replicas text[],
    replica text, session bigint, channel text, client_id text, info text, at bigint, state smallint, version bigint
)
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(t.incarnation, ''), coalesce(t.purged, 0),
           greatest(t.purged, 0, (SELECT p.version FROM catbus.presence AS p ORDER BY p.version DESC LIMIT 1)),
           catbus.present_replicas(),
           c.replica, c.session, c.channel, c.client_id, c.info, c.at, c.state, c.version
    FROM (SELECT) AS one
    LEFT JOIN catbus.presence_table AS t ON true
    LEFT JOIN LATERAL (
        SELECT p.* FROM catbus.presence AS p
        WHERE p.version > after AND (
            everything OR p.channel = ANY (exact)
            OR EXISTS (SELECT FROM unnest(prefixes) AS u (prefix) WHERE starts_with(p.channel, u.prefix))
        )
        ORDER BY p.version LIMIT most
    ) AS c ON true
    ORDER BY c.version
$$;

-- Present memberships in the channels from `low` to below `high`, in the order of the key, after the given one; and the
-- incarnation of the table. There is always a row.
CREATE FUNCTION catbus.presence_page(
    low text, high text, after_channel text, after_member text, after_replica text, after_session bigint, most bigint
) RETURNS TABLE (
    incarnation text,
    replica text, session bigint, channel text, client_id text, info text, at bigint, state smallint, version bigint,
    member text
)
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(t.incarnation, ''),
           c.replica, c.session, c.channel, c.client_id, c.info, c.at, c.state, c.version, c.member
    FROM (SELECT) AS one
    LEFT JOIN catbus.presence_table AS t ON true
    LEFT JOIN LATERAL (
        SELECT p.* FROM catbus.presence AS p
        WHERE p.channel >= low COLLATE "C" AND p.channel < high COLLATE "C" AND p.state = 0
          AND (p.channel, p.member, p.replica, p.session)
            > (after_channel COLLATE "C", after_member COLLATE "C", after_replica COLLATE "C", after_session)
        ORDER BY p.channel, p.member, p.replica, p.session LIMIT most
    ) AS c ON true
    ORDER BY c.channel, c.member, c.replica, c.session
$$;

-- Members in the channels from `low` to below `high`, in order, after the given one: each with the number of its sessions
-- and their latest info. `reserved`: whether reserved channels are included.
CREATE FUNCTION catbus.presence_members(
    low text, high text, reserved boolean, after_channel text, after_member text, most bigint
) RETURNS TABLE (channel text, member text, sessions bigint, client_id text, session text, info text)
LANGUAGE sql STABLE
AS $$
    SELECT p.channel, p.member, count(*), min(p.client_id),
           CASE WHEN min(p.client_id) IS NULL THEN min(p.replica || '-' || p.session) END,
           (array_agg(p.info ORDER BY p.at DESC, p.replica DESC, p.session DESC) FILTER (WHERE p.info IS NOT NULL))[1]
    FROM catbus.presence AS p
    WHERE p.channel >= low COLLATE "C" AND p.channel < high COLLATE "C" AND p.state = 0
      AND (p.channel, p.member) > (after_channel COLLATE "C", after_member COLLATE "C")
      AND p.replica = ANY (catbus.present_replicas())
      AND (reserved OR NOT starts_with(p.channel, '_'))
    GROUP BY p.channel, p.member ORDER BY p.channel, p.member LIMIT most
$$;

REVOKE ALL ON FUNCTION catbus.lock_presence, catbus.write_presence, catbus.end_presence, catbus.purge_presence,
    catbus.present_replicas, catbus.presence_changes, catbus.presence_page, catbus.presence_members FROM PUBLIC;

-- As in 011_settings.sql. The plans are those for a big table.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'lock_presence', 'write_presence', 'end_presence', 'purge_presence', 'present_replicas', 'presence_changes',
        'presence_page', 'presence_members'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on SET plan_cache_mode = force_generic_plan
                        SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashagg = off SET jit = off', name);
    END LOOP;
END
$$;
