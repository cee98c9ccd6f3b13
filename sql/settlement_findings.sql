-- What each line, and each operation of ours that has none, is found to be, until the end of the transaction.
--
-- books is whether the line is the one of the operation that our books hold: the others are over and above it.
CREATE TEMPORARY TABLE settlement_findings (
    class text NOT NULL,
    operation text NOT NULL,
    line bigint,
    payment_id bigint,
    order_id bigint,
    refund_id bigint,
    transaction_id text NOT NULL,
    gateway_reference text,
    our_reference text,
    gateway_amount numeric,
    our_amount numeric,
    gateway_currency text,
    our_currency text,
    gateway_status text,
    our_status text,
    our_money boolean NOT NULL,
    at timestamptz NOT NULL,
    detail text NOT NULL
) ON COMMIT DROP
