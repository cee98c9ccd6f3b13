-- What each line, and each operation of ours that has none, is found to be, until the end of the transaction.
--
-- operation_key names the operation of ours whose money the line is; it is NULL where a line is over and above our
-- books. booked_at is when our books say that it happened.
CREATE TEMPORARY TABLE settlement_findings (
    class text NOT NULL,
    operation text NOT NULL,
    line bigint,
    payment_id bigint,
    order_id bigint,
    refund_id bigint,
    recovery_id bigint,
    transaction_id text NOT NULL,
    gateway_reference text,
    our_reference text,
    gateway_amount numeric,
    our_amount numeric,
    gateway_currency text,
    our_currency text,
    gateway_status text,
    our_status text,
    operation_key text,
    booked_at timestamptz,
    at timestamptz NOT NULL,
    detail text NOT NULL
) ON COMMIT DROP
