-- Notifications: they show positions in the log and nothing else, and only authenticated ones are believed.
--
-- Every role that may connect to the database hears all notifications and may send any; PostgreSQL has no permission
-- for either. Only the owner of the schema can read `catbus.head.notification_secret`, from which replicas derive the
-- keys (catbus/postgres/notifications/encryption.py).

-- HMAC-SHA256 (RFC 2104) with a key of 32 bytes. Its block is the key, eight bytes at a time, and 32 zeros.
CREATE FUNCTION catbus.hmac(key bytea, message bytea) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    digits text := encode(key, 'hex');
    word   bigint;
    inner_block bytea := '';
    outer_block bytea := '';
BEGIN
    FOR i IN 0..3 LOOP
        word := ('x' || substr(digits, 16 * i + 1, 16))::bit(64)::bigint;
        inner_block := inner_block || int8send(word # x'3636363636363636'::bigint);
        outer_block := outer_block || int8send(word # x'5c5c5c5c5c5c5c5c'::bigint);
    END LOOP;
    RETURN sha256(outer_block || decode(repeat('5c', 32), 'hex')
        || sha256(inner_block || decode(repeat('36', 32), 'hex') || message));
END
$$;

-- Sends `shown`, which contains no space, and `enclosed` if it fits. Between them stands a MAC that only the owner of
-- the schema can make.
--
-- A listener that does not read keeps the notification queue from shrinking, and while the queue is full every commit
-- that notifies fails. So nothing is sent while the queue is more than half full. Nothing depends on notifications: the
-- tables are the truth.
CREATE FUNCTION catbus.notify(channel text, shown text, enclosed text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    secret text;
    mac    text;
BEGIN
    IF pg_notification_queue_usage() > 0.5 THEN
        RETURN;
    END IF;
    -- A notification has at most 7,999 bytes, and the MAC takes 44 of them.
    IF octet_length(shown) + octet_length(enclosed) > 7900 THEN
        enclosed := NULL;
    END IF;
    SELECT h.notification_secret INTO STRICT secret FROM catbus.head AS h;
    mac := encode(catbus.hmac(
        sha256(convert_to(secret, 'UTF8')),
        convert_to(format('%s %s %s', channel, shown, enclosed), 'UTF8')
    ), 'base64');
    PERFORM pg_notify(channel, concat_ws(' ', shown, mac, enclosed));
END
$$;

-- The key of a role in a form that only holders of the secret can read: 16 random bytes, and the key under a mask that
-- is derived from them.
CREATE FUNCTION catbus.mask_role(key bytea) RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
    nonce  text := encode(uuid_send(gen_random_uuid()), 'hex');
    digits text := encode(key, 'hex');
    masked text := nonce;
    mask   text;
BEGIN
    SELECT encode(catbus.hmac(
        sha256(convert_to(h.notification_secret, 'UTF8')), convert_to('mask of catbus_roles ' || nonce, 'UTF8')), 'hex')
    INTO STRICT mask FROM catbus.head AS h;
    FOR i IN 0..3 LOOP
        masked := masked || encode(int8send(('x' || substr(digits, 16 * i + 1, 16))::bit(64)::bigint
            # ('x' || substr(mask, 16 * i + 1, 16))::bit(64)::bigint), 'hex');
    END LOOP;
    RETURN masked;
END
$$;

REVOKE ALL ON FUNCTION catbus.hmac, catbus.notify, catbus.mask_role FROM PUBLIC;
