-- The heartbeats of replicas. Each replica writes its row every few seconds, without NOTIFY: the rows are for people
-- who ask. They need not survive a crash, nor exist on a standby.
CREATE UNLOGGED TABLE catbus.replicas (
    id             text        PRIMARY KEY,
    last_heartbeat timestamptz NOT NULL,
    report         text        NOT NULL
) WITH (fillfactor = 50);

-- A seq that is known to have been given, some seconds ago at most. It stays when the rows of the log are lost.
CREATE SEQUENCE catbus.reached_seq MINVALUE 0 START 0 CACHE 1;

-- Record that a replica runs, with its report (JSON). Rows of replicas without a heartbeat for a minute are deleted.
-- Returns all others: the report, its age in seconds, how much of the notification queue is in use (0 to 1), and how
-- many roles there are. The caller's own row comes first.
--
-- It also records the head, compacts catbus.role_changes, and forgets revocations.
CREATE FUNCTION catbus.heartbeat(own_id text, own_report text)
RETURNS TABLE (id text, age double precision, report text, queue double precision, roles bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO catbus.replicas AS r (id, last_heartbeat, report) VALUES (own_id, clock_timestamp(), own_report)
    ON CONFLICT (id) DO UPDATE SET last_heartbeat = excluded.last_heartbeat, report = excluded.report;
    DELETE FROM catbus.replicas AS r WHERE r.last_heartbeat < clock_timestamp() - interval '1 minute';
    PERFORM catbus.compact_role_changes();
    PERFORM catbus.forget_revocations();
    PERFORM setval('catbus.reached_seq', p.head)
    FROM catbus.log_position() AS p CROSS JOIN catbus.reached_seq AS s WHERE p.head > s.last_value;
    RETURN QUERY
    SELECT r.id, extract(epoch FROM clock_timestamp() - r.last_heartbeat)::double precision, r.report,
           pg_notification_queue_usage(), (SELECT count(*) FROM catbus.roles)
    FROM catbus.replicas AS r ORDER BY r.id = own_id DESC, r.id;
END
$$;

REVOKE ALL ON FUNCTION catbus.heartbeat FROM PUBLIC;
