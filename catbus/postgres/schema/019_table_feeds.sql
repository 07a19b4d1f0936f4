-- Table feeds: triggers that publish every change of a table.
--
-- The trigger function belongs to the owner of the table and runs with the rights of that role: making JSON of a row calls
-- casts of the types of its columns, which may be functions that somebody else has made. Only publishing runs with the
-- rights of the owner of the log.
--
-- A feed must not make the changes of a table fail. So every value has a channel, a message that cannot be published is
-- replaced by one with the key alone, and columns that are gone are left out.

-- A row as a feed sees it.
--
-- segments  the values for the placeholders of the channel
-- body      the chosen columns as a JSON object; null if they are too large to be read
-- key       the key of the row as a JSON object
CREATE TYPE catbus.feed_row AS (segments text[], body text, key text);

-- A value as a segment of a channel. Different values have different segments. A value of letters, digits, _ and single -
-- is its own segment, if it has at most 48 bytes. Other bytes are written as -- and two hexadecimal digits, so a - is
-- written like them if another - follows. A longer segment is replaced by a hash of the value.
CREATE FUNCTION catbus.feed_segment(value text) RETURNS text
LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    plain   text COLLATE "C" := value;
    encoded text COLLATE "C";
BEGIN
    IF plain IS NULL THEN
        RETURN '--null';
    ELSIF plain = '' THEN
        RETURN '--empty';
    ELSIF plain ~ '^[A-Za-z0-9_-]{1,48}$' AND position('--' IN plain) = 0 THEN
        RETURN plain;
    ELSIF octet_length(plain) <= 48 THEN
        SELECT string_agg(
            CASE WHEN c.one ~ '[A-Za-z0-9_]' OR c.one = '-' AND c.next ~ '^[A-Za-z0-9_]?$' THEN c.one
                 ELSE regexp_replace(upper(encode(convert_to(c.one, 'UTF8'), 'hex')), '(..)', '--\1', 'g')
            END, '' ORDER BY c.nth)
        INTO encoded
        FROM (
            SELECT s.one, s.nth, lead(s.one, 1, '') OVER (ORDER BY s.nth) AS next
            FROM regexp_split_to_table(plain, '') WITH ORDINALITY AS s (one, nth)
        ) AS c;
        IF length(encoded) <= 48 THEN
            RETURN encoded;
        END IF;
    END IF;
    RETURN '--h' || left(encode(sha256(convert_to(plain, 'UTF8')), 'hex'), 32);
END
$$;

-- The channel of a row: `channel` with its placeholders replaced. It has its first segment in front of any placeholder, so
-- no value makes it a reserved channel.
CREATE FUNCTION catbus.feed_channel(channel text, segments text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
AS $$
DECLARE
    made    text := channel;
    segment text;
BEGIN
    FOREACH segment IN ARRAY segments LOOP
        -- The next placeholder: a segment has no braces in it.
        made := regexp_replace(made, '\{[^{}]*\}', catbus.feed_segment(segment));
    END LOOP;
    RETURN made;
END
$$;

-- The query that makes a catbus.feed_row: of the row $1, or with `scan` of every row of the table. It runs with the rights
-- of the owner of the table.
--
-- It names the columns that the table has now: a column that was renamed or dropped is left out, and in a channel it counts
-- as null. Large values stay where they are stored: the query looks at their sizes first.
CREATE FUNCTION catbus.feed_query(relation regclass, options text, scan boolean) RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
    place text := CASE WHEN scan THEN 't.' ELSE '($1).' END;
    made  text;
BEGIN
    WITH present AS (
        SELECT a.attname::text AS name, a.attnum AS nth, a.attlen AS length FROM pg_attribute AS a
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> 'v'
    ), chosen AS (
        SELECT p.name, p.nth, p.length FROM present AS p WHERE options::json ->> 'columns' IS NULL
        UNION ALL
        SELECT p.name, c.nth, p.length
        FROM json_array_elements_text((options::json ->> 'columns')::json) WITH ORDINALITY AS c (name, nth)
        JOIN present AS p ON p.name = c.name
    )
    SELECT format(
        'SELECT ARRAY[%s]::text[],'
        ' CASE WHEN %s <= 1000000 THEN (SELECT row_to_json(r.*)::text FROM (SELECT %s) AS r) END,'
        ' (SELECT row_to_json(r.*)::text FROM (SELECT %s) AS r)',
        (SELECT string_agg(CASE WHEN p.name IS NULL THEN 'NULL' ELSE format('%s%I::text', place, p.name) END, ', '
                           ORDER BY c.nth)
         FROM json_array_elements_text(options::json -> 'placeholders') WITH ORDINALITY AS c (name, nth)
         LEFT JOIN present AS p ON p.name = c.name),
        (SELECT coalesce(string_agg(format('coalesce(pg_column_size(%s%I), 0)', place, c.name), ' + '), '0')
         FROM chosen AS c WHERE c.length < 0),
        (SELECT string_agg(format('%s%I', place, c.name), ', ' ORDER BY c.nth) FROM chosen AS c),
        (SELECT string_agg(format('%s%I', place, p.name), ', ' ORDER BY c.nth)
         FROM json_array_elements_text(options::json -> 'key') WITH ORDINALITY AS c (name, nth)
         JOIN present AS p ON p.name = c.name)
    ) INTO made;
    IF scan THEN
        made := made || format(' FROM %s%s AS t',
                               (SELECT CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END FROM pg_class AS c WHERE c.oid = relation),
                               relation);
    END IF;
    RETURN made;
END
$$;

-- Publish the change of one row, from `before` (null: it was inserted) to `after` (null: it was deleted).
--
-- A row whose channel or key changes is deleted where it was, and inserted where it is. A change that subscribers do not
-- see is not published. A message that is too large, or that has JSON in it that is not publishable, is replaced by one
-- with the key of the row, and that by one without.
--
-- Retained rows do not have to fit into the budget of the retained messages: their table has the same rows.
CREATE FUNCTION catbus.publish_change(options text, before catbus.feed_row, after catbus.feed_row) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    given      json    := options;
    retain     boolean := given ->> 'retain';
    was        text    := catbus.feed_channel(given ->> 'channel', before.segments);
    becomes    text    := catbus.feed_channel(given ->> 'channel', after.segments);
    shown      catbus.feed_row := before;
    operation  text    := 'delete';
    beginning  text;
    old        text    := '';
    candidates text[];
    candidate  text;
BEGIN
    IF before.segments IS NOT NULL AND after.segments IS NOT NULL THEN
        IF was <> becomes OR before.key <> after.key THEN
            PERFORM catbus.publish_change(options, before, NULL);
            operation := 'insert';
        ELSIF before.body = after.body THEN
            RETURN;
        ELSE
            operation := 'update';
            IF (given ->> 'old')::boolean THEN
                old := ',"old":' || before.body;
            END IF;
        END IF;
    ELSIF before.segments IS NULL THEN
        operation := 'insert';
    END IF;
    IF operation <> 'delete' THEN
        shown := after;
    END IF;

    IF NOT retain THEN
        beginning := format('{"operation":"%s","row":', operation);
        candidates := ARRAY[
            beginning || shown.body || old || '}',
            beginning || shown.key || ',"truncated":true}',
            beginning || 'null,"truncated":true}'
        ];
    ELSIF operation = 'delete' THEN
        candidates := ARRAY['null'];
    ELSE
        candidates := ARRAY[shown.body, left(shown.key, -1) || ',"truncated":true}', '{"truncated":true}'];
    END IF;
    FOREACH candidate IN ARRAY candidates LOOP
        CONTINUE WHEN candidate IS NULL;
        -- Line breaks are white space between values: in strings they are escaped.
        candidate := translate(candidate, E'\r\n', '  ');
        -- Nothing else can be wrong with it: see catbus.check_message.
        EXIT WHEN octet_length(candidate) < 65000 AND position('\u' IN candidate) = 0
                  AND length(candidate) - length(translate(candidate, '[{', '')) <= 64;
        BEGIN
            PERFORM catbus.check_message(coalesce(becomes, was), candidate);
            EXIT;
        EXCEPTION WHEN invalid_parameter_value THEN
            NULL;
        END;
    END LOOP;
    PERFORM catbus.enqueue(coalesce(becomes, was), candidate, retain);
END
$$;

-- Publish every change of a table.
--
-- channel  the channel of a row; a segment {column} is the value of that column (see catbus.feed_segment). The first segment
--          is not a placeholder
-- columns  the columns that are published; by default all that the table has at that time
-- old      a message about an update also has the row as it was before
-- retain   the message is the row itself, and the retained message of its channel; null removes it. The rows that exist are
--          published, too. The channel needs the columns of the primary key
--
-- A second call for a table replaces the settings of the first one. The caller has the rights of the owner of the table; if
-- the caller also has those of the owner of the log, that owner gets the right to publish feeds.
--
-- Raises 22023 for a wrong argument, 42501 if the caller or the owner of the table lacks a right, and 55P03 if other
-- transactions use the table for more than two seconds.
CREATE FUNCTION catbus.watch(
    relation regclass,
    channel  text,
    columns  text[]  DEFAULT NULL,
    old      boolean DEFAULT false,
    retain   boolean DEFAULT false
) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    function regprocedure;
    -- A message does not depend on the settings of the session that changes the row.
    settings CONSTANT text := 'SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on
        SET "TimeZone" = ''UTC'' SET "DateStyle" = ''ISO, YMD'' SET "IntervalStyle" = ''postgres''
        SET extra_float_digits = 1 SET bytea_output = ''hex'' SET lc_monetary = ''C''';
    place    record;
    names    text[];
    key      text[];
    missing  text;
    options  text;
    made     text;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.watch needs the isolation level "read committed", not "%"',
            current_setting('transaction_isolation') USING ERRCODE = '25001';
    END IF;
    SELECT c.relname, c.relkind, c.relpersistence, c.relowner, n.nspname,
           (SELECT l.nspowner FROM pg_namespace AS l WHERE l.nspname = 'catbus') AS log_owner
    INTO place FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = relation;
    IF (place.relkind IN ('r', 'p') AND place.relpersistence = 'p' AND place.nspname <> 'catbus') IS NOT TRUE THEN
        RAISE EXCEPTION 'not a table that can be watched: "%"', relation
            USING ERRCODE = '22023', DETAIL = 'It is an ordinary or a partitioned table, neither temporary nor UNLOGGED.';
    ELSIF NOT pg_has_role(current_user, place.relowner, 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', relation USING ERRCODE = '42501';
    END IF;
    -- It is watched as its owner, so the owner must not change before the triggers are there.
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', relation);
    SELECT c.relowner INTO STRICT place.relowner FROM pg_class AS c WHERE c.oid = relation;

    -- A placeholder counts with the 48 bytes that it has at most.
    IF (channel ~ '^[A-Za-z0-9-][A-Za-z0-9_-]*(\.([A-Za-z0-9_-]+|\{[^{}]+\}))*$'
        AND octet_length(regexp_replace(channel, '\{[^{}]+\}', repeat('x', 48), 'g')) <= 255
        AND cardinality(string_to_array(regexp_replace(channel, '\{[^{}]+\}', 'x', 'g'), '.')) <= 32) IS NOT TRUE
    THEN
        RAISE EXCEPTION 'not a channel with placeholders: "%"', left(channel, 64)
            USING ERRCODE = '22023',
                  DETAIL = 'Segments are A-Z, a-z, 0-9, _ and -, or {column}, and the first one is no placeholder. There are '
                           'at most 32 and, with 48 for each placeholder, 255 bytes.',
                  HINT = 'For example: orders.{id}';
    END IF;
    SELECT coalesce(array_agg(m.found[1] ORDER BY m.nth), '{}') INTO names
    FROM regexp_matches(channel, '\{([^{}]+)\}', 'g') WITH ORDINALITY AS m (found, nth);
    SELECT n.name INTO missing FROM unnest(names || columns) AS n (name)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = n.name AND a.attnum > 0
                                            AND NOT a.attisdropped AND a.attgenerated <> 'v');
    IF FOUND THEN
        RAISE EXCEPTION 'the table % has no column "%" that can be published', relation, left(missing, 64)
            USING ERRCODE = '22023';
    END IF;
    SELECT array_agg(a.attname::text ORDER BY k.nth) INTO key
    FROM pg_index AS i CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, nth)
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    WHERE i.indrelid = relation AND i.indisprimary AND k.nth <= i.indnkeyatts;
    IF retain AND (key <@ names) IS NOT TRUE THEN
        RAISE EXCEPTION 'with retain, every row needs a channel of its own'
            USING ERRCODE = '22023', DETAIL = 'The channel has all columns of the primary key as placeholders.';
    ELSIF retain AND 'truncated' = ANY (columns) THEN
        RAISE EXCEPTION 'with retain, the column "truncated" cannot be published' USING ERRCODE = '22023';
    END IF;
    options := json_build_object(
        'channel', channel, 'placeholders', names, 'columns', columns, 'key', coalesce(key, names),
        'old', coalesce(old, false), 'retain', coalesce(retain, false));

    IF pg_has_role(current_user, place.log_owner, 'USAGE') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA catbus TO %s', place.relowner::regrole);
        EXECUTE format('GRANT EXECUTE ON FUNCTION catbus.feed_query, catbus.publish_change TO %s', place.relowner::regrole);
    END IF;
    SELECT f.name INTO missing FROM unnest(ARRAY[
        'catbus.feed_query(regclass, text, boolean)', 'catbus.publish_change(text, catbus.feed_row, catbus.feed_row)'
    ]) AS f (name)
    WHERE NOT (has_schema_privilege(place.relowner, 'catbus', 'USAGE')
               AND has_function_privilege(place.relowner, f.name, 'EXECUTE'));
    IF FOUND THEN
        RAISE EXCEPTION 'the owner of the table % may not publish a feed', relation
            USING ERRCODE = '42501',
                  HINT = format('GRANT USAGE ON SCHEMA catbus TO %1$s; GRANT EXECUTE ON FUNCTION catbus.feed_query, '
                                'catbus.publish_change TO %1$s;', place.relowner::regrole);
    END IF;

    SELECT t.tgfoid INTO function FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
    WHERE t.tgrelid = relation AND t.tgname = '!catbus_feed' AND p.proowner = place.relowner;
    IF NOT FOUND THEN
        -- The name of a table alone would be that of another table's function after a renaming.
        made := format('%I.%I', place.nspname, format('catbus_feed_%s_%s', relation::oid, place.relname)::name);
        EXECUTE format($create$
            CREATE FUNCTION %s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER %s AS $body$
            DECLARE
                before catbus.feed_row;
                after  catbus.feed_row;
                query  text := TG_ARGV[2];
            BEGIN
                IF TG_OP = 'TRUNCATE' THEN
                    FOR before IN EXECUTE catbus.feed_query(TG_RELID, TG_ARGV[0], true) LOOP
                        PERFORM catbus.publish_change(TG_ARGV[0], before, NULL);
                    END LOOP;
                    RETURN NULL;
                END IF;
                -- The query was made for a table with these columns.
                IF (SELECT array_agg(a.attname ORDER BY a.attname)::text FROM pg_attribute AS a
                    WHERE a.attrelid = TG_RELID AND a.attnum > 0 AND NOT a.attisdropped) <> TG_ARGV[1]
                THEN
                    query := catbus.feed_query(TG_RELID, TG_ARGV[0], false);
                END IF;
                IF TG_OP <> 'INSERT' THEN
                    EXECUTE query INTO before USING OLD;
                END IF;
                IF TG_OP <> 'DELETE' THEN
                    EXECUTE query INTO after USING NEW;
                END IF;
                PERFORM catbus.publish_change(TG_ARGV[0], before, after);
                RETURN NULL;
            END
            $body$ $create$, made, settings);
        EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', made);
        EXECUTE format('ALTER FUNCTION %s() OWNER TO %s', made, place.relowner::regrole);
        function := made || '()';
    END IF;
    -- AFTER triggers fire in the order of their names. This one is the first, so that another one that changes the row again
    -- has its message later.
    EXECUTE format('CREATE OR REPLACE TRIGGER "!catbus_feed" AFTER INSERT OR UPDATE OR DELETE ON %s
                    FOR EACH ROW EXECUTE FUNCTION %s(%L, %L, %L)', relation, function::oid::regproc, options,
                   (SELECT array_agg(a.attname ORDER BY a.attname) FROM pg_attribute AS a
                    WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped),
                   catbus.feed_query(relation, options, false));
    EXECUTE format('CREATE OR REPLACE TRIGGER "!catbus_feed_truncate" BEFORE TRUNCATE ON %s
                    FOR EACH STATEMENT EXECUTE FUNCTION %s(%L)', relation, function::oid::regproc, options);
    -- Also for what logical replication brings.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER "!catbus_feed", ENABLE ALWAYS TRIGGER "!catbus_feed_truncate"',
                   relation);

    IF retain THEN
        -- Like the triggers, with the rights of the owner of the table.
        made := format('%I.%I', place.nspname, format('catbus_fill_%s', relation::oid));
        EXECUTE format($create$
            CREATE FUNCTION %s(options text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER %s AS $body$
            DECLARE
                after catbus.feed_row;
            BEGIN
                FOR after IN EXECUTE catbus.feed_query(%L, options, true) LOOP
                    PERFORM catbus.publish_change(options, NULL, after);
                END LOOP;
            END
            $body$ $create$, made, settings, relation::oid);
        EXECUTE format('ALTER FUNCTION %s(text) OWNER TO %s', made, place.relowner::regrole);
        EXECUTE format('SELECT %s(%L::text)', made, options);
        EXECUTE format('DROP FUNCTION %s(text)', made);
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.watch IS 'Publishes every change of a table';

-- Publish changes of a table no longer. Retained messages stay.
--
-- Raises 42704 if it is not watched, 42501 if the caller lacks the rights of its owner, and 55P03 if other transactions use
-- it for more than two seconds.
CREATE FUNCTION catbus.unwatch(relation regclass) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    function regproc;
BEGIN
    SELECT t.tgfoid INTO function FROM pg_trigger AS t
    WHERE t.tgrelid = relation AND t.tgname = '!catbus_feed' AND t.tgparentid = 0;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the table % is not watched', relation USING ERRCODE = '42704';
    END IF;
    EXECUTE format('DROP TRIGGER "!catbus_feed" ON %s', relation);
    EXECUTE format('DROP TRIGGER IF EXISTS "!catbus_feed_truncate" ON %s', relation);
    IF NOT EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgfoid = function) THEN
        EXECUTE format('DROP FUNCTION %s()', function);
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.unwatch IS 'Publishes changes of a table no longer';

REVOKE ALL ON FUNCTION catbus.feed_segment, catbus.feed_channel, catbus.feed_query, catbus.publish_change, catbus.watch,
    catbus.unwatch FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['feed_segment', 'feed_channel', 'feed_query', 'publish_change', 'watch', 'unwatch'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
END
$$;
ALTER FUNCTION catbus.watch SET lock_timeout = '2s';
ALTER FUNCTION catbus.unwatch SET lock_timeout = '2s';
ALTER FUNCTION catbus.publish_change SET plan_cache_mode = force_generic_plan SET jit = off;
