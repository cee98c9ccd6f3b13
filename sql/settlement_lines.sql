-- The lines of a settlement file, until the end of the transaction.
CREATE TEMPORARY TABLE settlement_lines (
    line bigint NOT NULL,
    gateway_reference text NOT NULL,
    transaction_id text NOT NULL,
    operation text NOT NULL,
    amount numeric NOT NULL,
    currency text NOT NULL,
    fee numeric,
    status text NOT NULL,
    settled_at timestamptz NOT NULL
) ON COMMIT DROP
