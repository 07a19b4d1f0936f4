-- Roles: what a token that says nothing by itself stands for, and what it allows.

CREATE TABLE catbus.roles (
    key       bytea       PRIMARY KEY CHECK (octet_length(key) = 32),
    client_id text,
    created   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE catbus.roles IS 'The bearers of role- tokens';
COMMENT ON COLUMN catbus.roles.key IS 'SHA-256 of the token, which itself is kept nowhere; its first 12 hexadecimal digits are the role''s handle';
COMMENT ON COLUMN catbus.roles.client_id IS 'Who the bearer is: the sender of its messages';

-- What stands here is believed as it is, so it has to be right whoever writes it.
CREATE TABLE catbus.role_grants (
    role       bytea NOT NULL REFERENCES catbus.roles ON DELETE CASCADE,
    permission text  NOT NULL CHECK (permission IN ('read', 'write')),
    pattern    text  COLLATE "C" NOT NULL CHECK (
        pattern ~ '^(\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?)$'
        AND octet_length(pattern) <= 255
        AND cardinality(string_to_array(pattern, '.')) <= 32
    ),
    PRIMARY KEY (role, permission, pattern)
);
COMMENT ON TABLE catbus.role_grants IS 'What the bearer of a role may read, and what it may publish to';
