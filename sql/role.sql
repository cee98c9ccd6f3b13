-- What a role may do beyond all privileges; no row where there is no such role.
SELECT r.rolsuper AS is_superuser, r.rolcreaterole AS makes_roles,
       EXISTS (
           SELECT
           FROM unnest(%(relations)s::text[]) AS n (name)
           JOIN pg_class c ON c.oid = to_regclass(n.name)
           WHERE pg_has_role(r.oid, c.relowner, 'MEMBER')
       ) AS is_owner,
       pg_has_role(r.oid, current_user, 'MEMBER') AS may_act_as_us
FROM pg_roles r
WHERE r.rolname = %(role)s::name
