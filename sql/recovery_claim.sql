-- Leases looks that are due, or those that a request asks for by name, due or not, unless one has just been made.
-- Nobody else takes them meanwhile.
WITH due AS (
    SELECT r.recovery_id
    FROM recoveries r
    WHERE r.state <> 'DONE'
      AND CASE
          WHEN %(recovery_ids)s::bigint[] IS NULL THEN r.next_look_at <= now()
          ELSE r.recovery_id = ANY (%(recovery_ids)s::bigint[])
               AND (r.lease_id IS NULL OR r.next_look_at <= now())
               AND (r.looked_at IS NULL
                    OR r.looked_at <= now() - make_interval(secs => %(apart_seconds)s::double precision))
      END
    ORDER BY r.next_look_at
    LIMIT %(count_max)s::bigint
    FOR UPDATE SKIP LOCKED
)
UPDATE recoveries r SET
    next_look_at = now() + make_interval(secs => %(lease_seconds)s::double precision),
    lease_id = %(lease_id)s::uuid
FROM due, payments p
WHERE r.recovery_id = due.recovery_id AND p.payment_id = r.payment_id
RETURNING r.recovery_id, r.payment_id, r.attempt, r.refund_id, r.amount, r.currency, r.payment_method, r.begun_at,
          r.state, r.looks, r.lease_id, r.late_reference, p.transaction_id,
          coalesce(p.authorization_code, '') AS charge_reference,
          extract(epoch FROM now() - r.found_at)::double precision AS age_seconds
