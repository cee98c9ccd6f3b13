-- Reconciliations with the gateway: each run, and what a run leaves to the next.
CREATE TABLE reconciliation_runs (
    run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    operator varchar(100) NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    file_name varchar(500),
    file_hash varchar(64),
    period_from timestamptz,
    period_to timestamptz,
    payments bigint NOT NULL,
    lines bigint NOT NULL,
    differences bigint NOT NULL,
    faults bigint NOT NULL,
    repaired bigint NOT NULL DEFAULT 0,
    counts jsonb NOT NULL
);

CREATE INDEX idx_reconciliation_runs_file_hash ON reconciliation_runs (file_hash) WHERE file_hash IS NOT NULL;

COMMENT ON COLUMN reconciliation_runs.file_hash IS 'SHA-256 of the settlement file; NULL where only our own books were checked';
COMMENT ON COLUMN reconciliation_runs.counts IS 'lines and operations by class and currency, faults of the books by check';

CREATE TABLE settlements_awaited (
    awaited_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    operation_key varchar(30) NOT NULL
        CONSTRAINT idx_settlements_awaited_key UNIQUE,
    payment_id bigint NOT NULL REFERENCES payments,
    refund_id bigint REFERENCES refunds,
    recovery_id bigint REFERENCES recoveries,
    booked_at timestamptz NOT NULL,
    run_id bigint NOT NULL REFERENCES reconciliation_runs,
    settled_run_id bigint REFERENCES reconciliation_runs,
    closed_at timestamptz,
    closed_by varchar(100)
);

CREATE INDEX idx_settlements_awaited_payment_id ON settlements_awaited (payment_id);
CREATE INDEX idx_settlements_awaited_open ON settlements_awaited (booked_at)
    WHERE settled_run_id IS NULL AND closed_at IS NULL;

COMMENT ON TABLE settlements_awaited IS
    'operations of ours that another file settles than the one of their day: still awaited, or seen there';
COMMENT ON COLUMN settlements_awaited.operation_key IS
    'P and a payment, R and a refund, L and the recovery of money that came late and was returned';
COMMENT ON COLUMN settlements_awaited.booked_at IS 'when our books say that it happened';
COMMENT ON COLUMN settlements_awaited.run_id IS 'the run that has noted it';
COMMENT ON COLUMN settlements_awaited.settled_run_id IS 'the run in whose file it was';

CREATE TABLE settlement_lines_pending (
    line_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id bigint NOT NULL REFERENCES reconciliation_runs,
    operation varchar(10) NOT NULL,
    transaction_id varchar(50) NOT NULL,
    gateway_reference varchar(100) NOT NULL,
    amount numeric NOT NULL,
    currency varchar(3) NOT NULL,
    status varchar(10) NOT NULL,
    settled_at timestamptz NOT NULL,
    ended_run_id bigint REFERENCES reconciliation_runs,
    closed_at timestamptz,
    closed_by varchar(100),
    CONSTRAINT idx_settlement_lines_pending UNIQUE (transaction_id, operation, gateway_reference, status)
);

COMMENT ON TABLE settlement_lines_pending IS 'lines of a file that were within their time limit: later runs judge them anew';
COMMENT ON COLUMN settlement_lines_pending.ended_run_id IS 'the run that found it to be what our books say';

ALTER TABLE recoveries ADD COLUMN returned_reference varchar(100);

COMMENT ON COLUMN recoveries.returned_reference IS 'what the gateway calls the return of money that came too late';

UPDATE recoveries SET returned_reference = substring(last_result FROM 'taken late, given back: (.*)')
WHERE last_result LIKE 'taken late, given back: %';
