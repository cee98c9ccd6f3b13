-- A key without a response is unfinished and never expires; status_code 202 marks an unknown outcome.

CREATE TABLE idempotency_keys (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    idempotency_key varchar(255) NOT NULL,
    caller varchar(255) NOT NULL DEFAULT '',
    payment_id bigint REFERENCES payments,
    refund_id bigint REFERENCES refunds,
    request_hash varchar(64) NOT NULL,
    begin_id varchar(50),
    response_body text,
    status_code integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,

    CONSTRAINT idx_idempotency_key UNIQUE (idempotency_key, caller),
    CONSTRAINT idempotency_keys_response_has_status CHECK (
        response_body IS NULL OR status_code IS NOT NULL
    )
);

CREATE INDEX idx_idempotency_expires ON idempotency_keys (expires_at);

COMMENT ON COLUMN idempotency_keys.request_hash IS 'SHA-256 of the validated request and its operation';
COMMENT ON COLUMN idempotency_keys.begin_id IS
    'whose claim this is: a key that was released or has expired is claimed anew in the same row';
COMMENT ON COLUMN idempotency_keys.response_body IS 'the first answer, replayed byte for byte';
