-- The lines of a settlement file, until the end of the transaction. Our books hold the first 50 characters of a reference.
CREATE TEMPORARY TABLE settlement_lines (
    line bigint NOT NULL,
    gateway_reference text NOT NULL,
    transaction_id text NOT NULL,
    operation text NOT NULL,
    amount numeric NOT NULL,
    currency text NOT NULL,
    fee numeric,
    status text NOT NULL,
    settled_at timestamptz NOT NULL,
    reference text GENERATED ALWAYS AS (left(gateway_reference, 50)) STORED
) ON COMMIT DROP
