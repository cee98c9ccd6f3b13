-- The rights that the role lacks: all that some statement of ours needs. What does not exist is the schema's fault.
SELECT needed.relation, string_agg(privilege, ', ' ORDER BY n) AS lacking
FROM (VALUES
    ('bulk_runs', 'SELECT,INSERT,UPDATE'),
    ('idempotency_keys', 'SELECT,INSERT,UPDATE,DELETE'),
    ('outbox', 'SELECT,INSERT,UPDATE,DELETE'),
    ('payments', 'SELECT,INSERT,UPDATE'),
    ('reconciliation_runs', 'SELECT,INSERT,UPDATE'),
    ('recoveries', 'SELECT,INSERT,UPDATE'),
    ('refunds', 'SELECT,INSERT,UPDATE'),
    ('schema_migrations', 'SELECT'),
    ('settlement_lines_pending', 'SELECT,INSERT,UPDATE'),
    ('settlements_awaited', 'SELECT,INSERT,UPDATE'),
    ('total_changes', 'SELECT,INSERT,DELETE'),
    ('totals', 'SELECT,INSERT,UPDATE'),
    ('transactions', 'SELECT,INSERT'),
    ('transactions_transaction_log_id_seq', 'USAGE')
) AS needed (relation, privileges)
CROSS JOIN unnest(string_to_array(needed.privileges, ',')) WITH ORDINALITY AS p (privilege, n)
WHERE NOT CASE privilege WHEN 'USAGE' THEN has_sequence_privilege(to_regclass(needed.relation), privilege)
                         ELSE has_table_privilege(to_regclass(needed.relation), privilege) END
GROUP BY needed.relation
ORDER BY needed.relation
