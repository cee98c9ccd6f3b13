-- Books what a look came to and ends its lease, if that is still held.
UPDATE recoveries SET
    state = %(state)s::text,
    looks = looks + %(counts)s::bigint,
    looked_at = now(),
    next_look_at = now() + make_interval(secs => %(delay_seconds)s::double precision),
    lease_id = NULL,
    last_result = %(result)s::text,
    late_reference = coalesce(%(late_reference)s::text, late_reference),
    returned_reference = coalesce(%(returned_reference)s::text, returned_reference),
    ended_at = CASE WHEN %(state)s::text = 'DONE' THEN now() END
WHERE recovery_id = %(recovery_id)s::bigint AND lease_id = %(lease_id)s::uuid
RETURNING recovery_id
