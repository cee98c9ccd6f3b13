-- A refund reserves its amount on the payment while it is PROCESSING.

CREATE TABLE refunds (
    refund_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id bigint NOT NULL REFERENCES payments,
    amount numeric(10, 2) NOT NULL
        CONSTRAINT refunds_amount_positive CHECK (amount > 0 AND amount < 'NaN'),
    reason varchar(400) NOT NULL,
    status varchar(20) NOT NULL
        CONSTRAINT refunds_status_known CHECK (status IN ('PROCESSING', 'COMPLETED', 'FAILED')),
    gateway_reference varchar(100),
    gateway_response varchar(500),
    begin_id varchar(50)
        CONSTRAINT idx_refunds_begin_id UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz
);

CREATE INDEX idx_refunds_payment_id ON refunds (payment_id);

COMMENT ON COLUMN refunds.begin_id IS
    'made by the request that began this refund; after a lost connection it proves that begin was committed';
