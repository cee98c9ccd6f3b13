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
    payment_id bigint NOT NULL REFERENCES payments,
    refund_id bigint REFERENCES refunds
        CONSTRAINT idx_settlements_awaited_refund UNIQUE,
    booked_at timestamptz NOT NULL,
    run_id bigint NOT NULL REFERENCES reconciliation_runs,
    ended_run_id bigint REFERENCES reconciliation_runs
);

CREATE UNIQUE INDEX idx_settlements_awaited_charge ON settlements_awaited (payment_id) WHERE refund_id IS NULL;
CREATE INDEX idx_settlements_awaited_open ON settlements_awaited (booked_at) WHERE ended_run_id IS NULL;

COMMENT ON TABLE settlements_awaited IS
    'booked so shortly before the end of a reconciled period that the gateway may settle it in the next one';
COMMENT ON COLUMN settlements_awaited.ended_run_id IS 'the run that found it settled, or missing for good';

ALTER TABLE recoveries ADD COLUMN returned_reference varchar(100);

COMMENT ON COLUMN recoveries.returned_reference IS 'what the gateway calls the return of money that came too late';
