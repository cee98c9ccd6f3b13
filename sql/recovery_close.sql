-- Ends what an operator has put right by hand.
UPDATE recoveries SET state = 'DONE', last_result = %(result)s::text, lease_id = NULL, ended_at = now()
WHERE recovery_id = %(recovery_id)s::bigint AND state = 'LATE'
RETURNING recovery_id
