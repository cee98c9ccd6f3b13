-- Looks at the gateway for what became of charges and refunds that were left without an answer.

CREATE TABLE recoveries (
    recovery_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id bigint NOT NULL REFERENCES payments,
    attempt integer NOT NULL,
    refund_id bigint REFERENCES refunds
        CONSTRAINT idx_recoveries_refund_id UNIQUE,
    amount numeric(10, 2) NOT NULL,
    currency varchar(3) NOT NULL,
    payment_method varchar(20) NOT NULL,
    begun_at timestamptz NOT NULL,
    state varchar(20) NOT NULL DEFAULT 'OPEN'
        CONSTRAINT recoveries_state_known CHECK (state IN ('OPEN', 'CHECKING', 'LATE', 'DONE')),
    looks integer NOT NULL DEFAULT 0
        CONSTRAINT recoveries_looks_not_negative CHECK (looks >= 0),
    found_at timestamptz NOT NULL DEFAULT now(),
    looked_at timestamptz,
    next_look_at timestamptz NOT NULL DEFAULT now(),
    lease_id uuid,
    last_result varchar(500),
    late_reference varchar(100),
    ended_at timestamptz
);

CREATE UNIQUE INDEX idx_recoveries_charge ON recoveries (payment_id, attempt) WHERE refund_id IS NULL;
CREATE INDEX idx_recoveries_due ON recoveries (next_look_at) WHERE state <> 'DONE';
CREATE INDEX idx_refunds_processing ON refunds (created_at) WHERE status = 'PROCESSING';

COMMENT ON COLUMN recoveries.attempt IS 'of the payment: the charge that is looked up, or whose refund is';
COMMENT ON COLUMN recoveries.amount IS 'of the operation: another attempt may have replaced that of the payment';
COMMENT ON COLUMN recoveries.state IS
    'OPEN: no outcome yet; CHECKING: booked as never happened, looked at once more; LATE: the gateway acted after that';
COMMENT ON COLUMN recoveries.begun_at IS 'when the operation began, by the clock of whoever began it';
COMMENT ON COLUMN recoveries.looks IS 'those that were due; what requests ask for does not count';
COMMENT ON COLUMN recoveries.found_at IS 'by the database''s clock: the operation began before that';
COMMENT ON COLUMN recoveries.next_look_at IS 'when the next look is due, or its lease ends; by the database''s clock';
COMMENT ON COLUMN recoveries.late_reference IS 'what the gateway calls the money that came too late';
