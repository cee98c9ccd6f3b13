-- Messages to other services, written in the transaction of the change that they tell of.

CREATE TABLE outbox (
    message_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id bigint NOT NULL REFERENCES payments,
    sequence integer NOT NULL
        CONSTRAINT outbox_sequence_positive CHECK (sequence > 0),
    destination varchar(20) NOT NULL,
    event varchar(50) NOT NULL,
    payload jsonb NOT NULL,
    attempts integer NOT NULL DEFAULT 0
        CONSTRAINT outbox_attempts_not_negative CHECK (attempts >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    delivered_at timestamptz,
    dead_at timestamptz,
    last_error varchar(500),

    CONSTRAINT idx_outbox_payment_sequence UNIQUE (payment_id, sequence),
    CONSTRAINT outbox_delivered_or_dead CHECK (delivered_at IS NULL OR dead_at IS NULL)
);

COMMENT ON COLUMN outbox.sequence IS 'counts the messages of one payment, in the order of their commits';
