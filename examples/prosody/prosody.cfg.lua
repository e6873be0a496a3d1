-- Prosody for a chat that moves here from chatd: docs/moving.md says how. Replace
-- chat.example.org by your domain. Pages reach it through your reverse proxy, at
-- wss://chat.example.org/xmpp-websocket.
plugin_paths = { "/usr/local/lib/prosody/modules" } -- mod_auth_chatd, mod_chatd_import
data_path = "/var/lib/prosody"
pidfile = "/run/prosody/prosody.pid"
log = { info = "*console" } -- systemd keeps it in the journal

modules_enabled = {
	"saslauth", "roster", "disco", "ping", "posix", "websocket", "smacks", "carbons",
	"pep", "bookmarks", "vcard",
}
modules_disabled = { "s2s" } -- no other servers

-- Everything is in one database, and what was answered is on disk. For more than one
-- machine's worth of archive, use PostgreSQL: sql = { driver = "PostgreSQL", ... }
default_storage = "sql"
sql = { driver = "SQLite3", database = "prosody.sqlite" }

-- Only the reverse proxy of this machine and to_prosody.py connect.
http_interfaces = { "127.0.0.1" }
http_ports = { 5280 }
https_ports = {}
consider_websocket_secure = true -- the reverse proxy speaks TLS
c2s_require_encryption = false   -- so Prosody need not, and nobody reaches it without
c2s_ports = {}
c2s_direct_tls_ports = {}
pep_max_items = 5000 -- the bookmarks of a user: one for each chat

VirtualHost "chat.example.org"
authentication = "chatd"
chatd_jwt_key = "/etc/prosody/backend.key" -- the shared secret of chatd --jwt-key
--chatd_issuer = "..."                     -- as chatd --issuer and --audience
--chatd_audience = "..."

Component "conference.chat.example.org" "muc"
modules_enabled = { "muc_mam", "chatd_import" }
chatd_import_secret = "/etc/prosody/import.secret"
http_host = "127.0.0.1" -- for http://127.0.0.1:5280/chatd_import
muc_log_expires_after = "never"     -- else Prosody drops what is older than a week
muc_log_all_rooms = true
enforce_registered_nickname = true  -- nobody takes another member's name
restrict_room_creation = true       -- nobody takes the name of a chat that comes later
-- Members of a group may add people, as in chatd without `--chats-by service`.
muc_room_default_allow_member_invites = true
-- More than there are chats: the import reads a room that is not in memory for each message.
muc_room_cache_size = 10000
