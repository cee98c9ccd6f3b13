-- What delivering the outbox needs: leases, the request that caused a message, and indexes of what is open.

ALTER TABLE payments
    ADD COLUMN last_sequence integer NOT NULL DEFAULT 0
        CONSTRAINT payments_last_sequence_not_negative CHECK (last_sequence >= 0);

COMMENT ON COLUMN payments.last_sequence IS 'the sequence of the newest outbox message; counted under the row''s lock';

ALTER TABLE outbox
    ADD COLUMN request_id varchar(128),
    ADD COLUMN traceparent varchar(55),
    ADD COLUMN first_attempt_at timestamptz,
    ADD COLUMN lease_id uuid,
    ADD CONSTRAINT outbox_destination_known CHECK (destination IN ('order', 'inventory', 'notification')),
    ADD CONSTRAINT outbox_leased_is_open
        CHECK (lease_id IS NULL OR (delivered_at IS NULL AND dead_at IS NULL));

COMMENT ON COLUMN outbox.lease_id IS 'the claim that works on the message until next_attempt_at';
COMMENT ON COLUMN outbox.next_attempt_at IS 'when the message is due, or its lease ends; by the database''s clock';
COMMENT ON COLUMN outbox.attempts IS 'deliveries that have ended, each of several tries';

CREATE INDEX idx_outbox_pending ON outbox (destination, next_attempt_at)
    WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX idx_outbox_dead ON outbox (destination, message_id)
    WHERE dead_at IS NOT NULL;
CREATE INDEX idx_outbox_delivered ON outbox (delivered_at)
    WHERE delivered_at IS NOT NULL;

-- A row is changed twice and then deleted: a queue must be vacuumed by its work, not by its size.
ALTER TABLE outbox SET (
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.05
);
