-- What this server and session are like, for an examination.
SELECT current_setting('server_version_num')::integer / 10000 AS major, current_setting('server_version') AS version,
       clock_timestamp() AS now, pg_backend_pid() AS backend_pid, current_user AS role,
       current_setting('transaction_read_only') = 'on' AS is_read_only,
       current_setting('fsync') = 'on' AS has_fsync,
       current_setting('synchronous_commit') <> 'off' AS has_synchronous_commit
