-- One row per order, for its whole life: later attempts take the same row over.

CREATE TABLE payments (
    payment_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint NOT NULL
        CONSTRAINT idx_payments_order_id UNIQUE
        CONSTRAINT payments_order_id_positive CHECK (order_id > 0),
    user_id bigint NOT NULL
        CONSTRAINT payments_user_id_positive CHECK (user_id > 0),
    amount numeric(10, 2) NOT NULL
        CONSTRAINT payments_amount_positive CHECK (amount > 0 AND amount < 'NaN'),
    currency varchar(3) NOT NULL DEFAULT 'INR',
    payment_method varchar(20) NOT NULL
        CONSTRAINT payments_method_known CHECK (
            payment_method IN ('CREDIT_CARD', 'DEBIT_CARD', 'UPI', 'NET_BANKING', 'WALLET', 'COD')
        ),
    status varchar(20) NOT NULL DEFAULT 'PENDING'
        CONSTRAINT payments_status_known CHECK (
            status IN ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED', 'REFUNDED')
        ),
    transaction_id varchar(50) NOT NULL
        CONSTRAINT idx_payments_transaction_id UNIQUE,
    reference varchar(100),
    authorization_code varchar(50),
    gateway_response varchar(500),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,
    captured_at timestamptz,
    attempt integer NOT NULL DEFAULT 1
        CONSTRAINT payments_attempt_positive CHECK (attempt > 0),
    begin_id varchar(50),
    refunded_amount numeric(10, 2) NOT NULL DEFAULT 0,
    refund_pending numeric(10, 2) NOT NULL DEFAULT 0,

    CONSTRAINT payments_refund_within_capture CHECK (refunded_amount BETWEEN 0 AND amount),
    CONSTRAINT payments_pending_within_refund CHECK (refund_pending BETWEEN 0 AND refunded_amount),
    CONSTRAINT payments_refund_of_completed CHECK (
        refunded_amount = 0 OR status IN ('COMPLETED', 'REFUNDED')
    ),
    CONSTRAINT payments_refunded_in_full CHECK (
        status <> 'REFUNDED' OR (refunded_amount = amount AND refund_pending = 0)
    )
);

CREATE INDEX idx_payments_user_id ON payments (user_id);
CREATE INDEX idx_payments_status ON payments (status);
CREATE INDEX idx_payments_reference ON payments (reference);

COMMENT ON COLUMN payments.transaction_id IS 'TXN and a ULID, made once per payment; kept by later attempts';
COMMENT ON COLUMN payments.attempt IS 'counts the charges of this order; part of the key the gateway is given';
COMMENT ON COLUMN payments.begin_id IS
    'made by the request that began this attempt; after a lost connection it proves that begin was committed';
COMMENT ON COLUMN payments.captured_at IS 'when the gateway took the money; NULL where no gateway was asked';
COMMENT ON COLUMN payments.refunded_amount IS 'completed refunds and those in flight';
COMMENT ON COLUMN payments.refund_pending IS 'the part of refunded_amount whose refunds are in flight';
