-- The tables of the shop, in the database of the broker, and the consumer of its worker. It may be run again.

CREATE SCHEMA IF NOT EXISTS shop;

CREATE TABLE IF NOT EXISTS shop.orders (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text    NOT NULL,
    item     text    NOT NULL,
    cents    integer NOT NULL
);

-- Nothing here keeps a worker from charging an order twice: no unique key, and no status that a worker looks at. The
-- consumer does, because its position moves in the transaction that inserts the row.
CREATE TABLE IF NOT EXISTS shop.charges (
    order_id bigint  NOT NULL REFERENCES shop.orders,
    cents    integer NOT NULL,
    worker   integer NOT NULL
);
CREATE INDEX IF NOT EXISTS charges_order_id ON shop.charges (order_id);

-- Webhooks are delivered at least once. The key tells a repeated one.
CREATE TABLE IF NOT EXISTS shop.mails (
    order_id bigint PRIMARY KEY REFERENCES shop.orders
);

-- What the page shows of an order.
CREATE OR REPLACE VIEW shop.order_list AS
SELECT o.id, o.customer, o.item, o.cents, count(c.*) AS charges, min(c.worker) AS worker,
       EXISTS (SELECT FROM shop.mails AS m WHERE m.order_id = o.id) AS mailed
FROM shop.orders AS o LEFT JOIN shop.charges AS c ON c.order_id = o.id
GROUP BY o.id;

-- Publish what has happened to an order, when the transaction commits, and never if it does not.
CREATE OR REPLACE FUNCTION shop.announce(event text, id bigint) RETURNS void
LANGUAGE sql
AS $$
    SELECT catbus.publish('orders.' || event || '.' || o.id, to_jsonb(o)) FROM shop.order_list AS o WHERE o.id = announce.id
$$;

-- With `hold`, what was not charged yet stays in the log, however long the worker is away.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM catbus.consumer_positions() AS p WHERE p.consumer = 'charging') THEN
        PERFORM catbus.create_consumer('charging', 'orders.placed.*', partitions => 2, hold => true);
    END IF;
END
$$;
