-- The audit trail: every change of state appends one row in the transaction of the change.
-- The database itself refuses to change what was written, by whatever way it is tried.

CREATE TABLE transactions (
    transaction_log_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id bigint NOT NULL REFERENCES payments,
    transaction_type varchar(20) NOT NULL
        CONSTRAINT transactions_type_known CHECK (transaction_type IN ('PAYMENT', 'REFUND')),
    amount numeric(10, 2) NOT NULL
        CONSTRAINT transactions_amount_positive CHECK (amount > 0 AND amount < 'NaN'),
    status varchar(20) NOT NULL,
    description varchar(500),
    created_at timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT transactions_status_known CHECK (
        CASE transaction_type
            WHEN 'PAYMENT' THEN
                status IN ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED', 'REFUNDED')
            ELSE status IN ('PROCESSING', 'REFUNDED', 'FAILED')
        END
    )
);

CREATE INDEX idx_transactions_payment_id ON transactions (payment_id);

CREATE FUNCTION refuse_change_of_audit_trail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit trail is append-only: % of transactions is refused', TG_OP
        USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER transactions_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_audit_trail();

-- ALWAYS: session_replication_role = replica does not switch it off.
ALTER TABLE transactions ENABLE ALWAYS TRIGGER transactions_append_only;

COMMENT ON COLUMN transactions.status IS
    'PAYMENT rows: the new status of the payment; REFUND rows: PROCESSING, then REFUNDED or FAILED';
