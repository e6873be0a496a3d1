-- Prosody: rooms with an archive (mod_muc_mam) in SQLite, over plain TCP. run.py fills in
-- $PORT and $DATA. Only the modules that the workload needs are enabled, and the epoll
-- backend is used. Presence goes to moderators only, because a thousand joins would
-- otherwise make a million stanzas. The archive is as durable as SQLite's defaults.
run_as_root = true
pidfile = "$DATA/prosody.pid"
data_path = "$DATA"
log = { error = "*console" }
network_backend = "epoll"
network_settings = { nodelay = true, tcp_backlog = 4096 }
gc = { mode = "generational" }
modules_enabled = { "saslauth", "disco", "posix" }
modules_disabled = { "s2s" }
interfaces = { "127.0.0.1" }
c2s_ports = { $PORT }
c2s_direct_tls_ports = {}
s2s_ports = {}
c2s_require_encryption = false
allow_unencrypted_plain_auth = true
default_storage = "memory"
storage = { muc_log = "sql" }
sql = { driver = "SQLite3", database = "$DATA/archive.sqlite" }

VirtualHost "localhost"
authentication = "anonymous"
allow_anonymous_multiresourcing = true

Component "rooms.localhost" "muc"
modules_enabled = { "muc_mam" }
restrict_room_creation = false
muc_room_locking = false
muc_room_cache_size = 10000
muc_log_by_default = true
muc_log_all_rooms = true
muc_room_default_public_jids = false
muc_room_default_presence_broadcast = {
    visitor = false, participant = false, moderator = true
}
