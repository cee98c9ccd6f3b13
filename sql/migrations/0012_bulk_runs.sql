-- Files of refunds and charges that were run: a file that was first run too long ago must not be run again.
CREATE TABLE bulk_runs (
    bulk_run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind varchar(20) NOT NULL
        CONSTRAINT bulk_runs_kind_known CHECK (kind IN ('refund', 'charge')),
    file_hash varchar(64) NOT NULL,
    file_name varchar(500) NOT NULL,
    operator varchar(100) NOT NULL,
    row_count integer NOT NULL
        CONSTRAINT bulk_runs_row_count_positive CHECK (row_count > 0),
    started_at timestamptz NOT NULL,
    last_operator varchar(100) NOT NULL,
    last_started_at timestamptz NOT NULL,
    runs integer NOT NULL DEFAULT 1
        CONSTRAINT bulk_runs_runs_positive CHECK (runs > 0),
    CONSTRAINT idx_bulk_runs_file UNIQUE (kind, file_hash)
);

COMMENT ON TABLE bulk_runs IS 'files of refunds and charges, each from its first run on';
COMMENT ON COLUMN bulk_runs.file_hash IS 'SHA-256 of the file: with the line, the idempotency key of each row';
COMMENT ON COLUMN bulk_runs.operator IS 'who ran it first';
COMMENT ON COLUMN bulk_runs.started_at IS 'when its first run began: no key of its rows is older';
COMMENT ON COLUMN bulk_runs.last_operator IS 'who ran it last';
COMMENT ON COLUMN bulk_runs.last_started_at IS 'when its last run began';
COMMENT ON COLUMN bulk_runs.runs IS 'how often it was run; a run that was refused does not count';
