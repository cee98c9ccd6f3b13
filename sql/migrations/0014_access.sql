-- API keys: who may call the HTTP API, and what for. Of a key's secret only a keyed hash is kept.
CREATE TABLE api_keys (
    api_key_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key_id varchar(20) NOT NULL
        CONSTRAINT idx_api_keys_key_id UNIQUE,
    name varchar(64) NOT NULL
        CONSTRAINT api_keys_name_given CHECK (name <> ''),
    scopes text[] NOT NULL
        CONSTRAINT api_keys_scopes_given CHECK (cardinality(scopes) > 0),
    secret_hash bytea NOT NULL
        CONSTRAINT api_keys_secret_hash_length CHECK (octet_length(secret_hash) = 32),
    created_by varchar(200),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    revoked_by varchar(200),
    last_used_at timestamptz
);

COMMENT ON COLUMN api_keys.key_id IS 'the part of the key that is no secret';
COMMENT ON COLUMN api_keys.name IS 'the caller; several keys of one name are one caller, so that a key can be replaced';
COMMENT ON COLUMN api_keys.last_used_at IS 'about when; noted once an hour at most';

ALTER TABLE transactions ADD COLUMN actor varchar(200);

COMMENT ON COLUMN transactions.actor IS
    'who changed it: an API key, an operator, recovery or the gateway; NULL where access is not controlled';
