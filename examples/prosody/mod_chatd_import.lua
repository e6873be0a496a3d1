-- Brings what a chatd has into this Prosody: POST /chatd_import with lines of JSON as
-- `chatd export` prints them. to_prosody.py sends them; your backend may do so, too.
--
--     {"user":...}     the account u6@chat.example.org, and its name (vCard)
--     {"chat":...}     the room c3@conference.chat.example.org: its title, exactly these
--                      members, each with a nickname of its own and a bookmark
--     {"message":...}  the entry chatd-5121 in the archive of its room
--
-- Each line says how things are, not what happened. What is so already is left alone, so
-- any request may be repeated. The answer is sent when all is on disk; what is new in an
-- archive goes to the clients that are in the room after that.
local json = require "util.json";
local st = require "util.stanza";
local datetime = require "util.datetime";
local usermanager = require "core.usermanager";
local jid_split = require "util.jid".split;
local random_id = require "util.id".long;
local equals = require "util.hashes".equals;
local resourceprep = require "util.encodings".stringprep.resourceprep;
local parse_xml = require "util.xml".parse;

local bookmarks = "urn:xmpp:bookmarks:1";

module:depends("http");
module:depends("muc_mam");
local muc = module:depends("muc");

local users_host = module:get_option_string("chatd_users_host", (module.host:gsub("^[^.]+%.", "")));
local names = module:open_store("chatd_names");

local secret_file = assert(module:get_option_string("chatd_import_secret"),
	"set chatd_import_secret to a file");
local file = assert(io.open(secret_file));
local secret = file:read("a"):match("^%s*(.-)%s*$");
file:close();
assert(#secret >= 32, secret_file .. ": at least 32 characters, please");
assert(module:get_option_string("muc_log_expires_after") == "never",
	'without muc_log_expires_after = "never" Prosody drops all that is older than a week');
-- The connection of mod_storage_sql. Through it all messages of a request are one
-- transaction, and a text is replaced in its place: archive:append would move it to the end.
local _, sql = next(module:shared("/*/sql/connections"));
assert(sql, 'the archive has to be in SQL: default_storage = "sql"');

-- XML has no U+FFFE, U+FFFF and control characters, and one kind of line end.
local function xml_text(text)
	return (text:gsub("\r\n?", "\n"):gsub("[\0-\8\11\12\14-\31]", "\239\191\189")
		:gsub("\239\191[\190\191]", "\239\191\189"));
end

-- Users

local function node_of(user_id)
	return ("u%d"):format(user_id);
end

local function jid_of(node)
	return node .. "@" .. users_host;
end

local function name_of(node)
	return (names:get(node) or {}).name;
end

local known = {}; -- names, or false, by node: what put_user has seen to already

local function put_user(user)
	local node, name = node_of(user.user_id), user.name ~= json.null and user.name or nil;
	if known[node] == (name or false) then return; end
	if not usermanager.user_exists(node, users_host) then
		assert(usermanager.create_user(node, random_id(), users_host));
	end
	if name ~= name_of(node) then
		local vcard = name and st.stanza("vCard", { xmlns = "vcard-temp" })
			:text_tag("FN", xml_text(name)):text_tag("NICKNAME", xml_text(name));
		local vcards = module:context(users_host):open_store("vcard"); -- that host starts later
		assert(vcards:set(node, vcard and st.preserialize(vcard)));
		assert(names:set(node, name and { name = name }));
	end
	known[node] = name or false;
end

-- Rooms

-- The name that a member has in the room: no other member has it.
local function nick_of(room, node)
	local jid = jid_of(node);
	local nick = resourceprep(xml_text(name_of(node) or node)) or node;
	while (room:get_registered_jid(nick) or jid) ~= jid do
		nick = nick .. " (" .. node .. ")";
	end
	return nick;
end

-- By its bookmarks (XEP-0402) a client knows its rooms, and learns of a new one at once.
local function pep_of(node)
	return prosody.hosts[users_host].modules.pep.get_pep_service(node);
end

local function set_bookmark(node, room, title, nick)
	local item = st.stanza("item", { xmlns = "http://jabber.org/protocol/pubsub", id = room.jid })
		:tag("conference", { xmlns = bookmarks, name = title, autojoin = "true" }):text_tag("nick", nick):up();
	assert(pep_of(node):publish(bookmarks, true, room.jid, item, {
		persist_items = true; max_items = "max";
		send_last_published_item = "never"; access_model = "whitelist";
	}));
end

-- Owners and outcasts are made by the operator of Prosody, and stay what they are.
local kept = { owner = true, outcast = true };

local function set_members(room, chat, title)
	local is_member = {};
	for _, member in ipairs(chat.members) do
		put_user(member);
		is_member[jid_of(node_of(member.user_id))] = true;
	end
	for jid, affiliation in room:each_affiliation() do
		if not is_member[jid] and not kept[affiliation] then
			pep_of(jid:match("^[^@]+")):retract(bookmarks, true, room.jid, st.stanza("retract", { id = room.jid }));
			assert(room:set_affiliation(true, jid, "none"));
		end
	end
	for _, member in ipairs(chat.members) do
		local node = node_of(member.user_id);
		local jid, nick = jid_of(node), nick_of(room, node);
		local now, same_nick = room:get_affiliation(jid), room:get_registered_nick(jid) == nick;
		local creator = not chat.direct and member.user_id == chat.created_by;
		local affiliation = kept[now] and now or creator and "admin" or "member";
		if not now or not same_nick or title ~= room:get_name() then
			set_bookmark(node, room, title, nick);
		end
		if now ~= affiliation or not same_nick then
			assert(room:set_affiliation(true, jid, affiliation, nil, { reserved_nickname = nick }));
		end
	end
end

local function put_chat(chat)
	local address = ("c%d@%s"):format(chat.id, module.host);
	local room = muc.get_room_from_jid(address) or assert(muc.create_room(address));
	local title = chat.title ~= json.null and xml_text(chat.title) or nil;
	room:set_persistent(true);
	room:set_members_only(true);
	room:set_public(false);
	room:set_whois("anyone"); -- members see who wrote what, whatever the nickname
	room:set_allow_member_invites(not chat.direct
		and module:get_option_boolean("muc_room_default_allow_member_invites", false));
	-- It saves the room for each member, and there may be 5,000: once is enough.
	local save = room.save;
	room.save = function () end;
	local ok, why = pcall(set_members, room, chat, title);
	room.save = save;
	assert(ok, why);
	room:set_name(title);
	assert(room:save(true));
end

-- Messages

local function stanza_of(message, room)
	local node = node_of(message.sender_id);
	local jid = jid_of(node);
	local nick = room:get_registered_nick(jid) or nick_of(room, node);
	local stanza = st.message({ type = "groupchat", id = ("chatd-%d"):format(message.id),
		from = room.jid .. "/" .. (message.deleted and node or nick) });
	if message.deleted then -- a tombstone (XEP-0424): no text, and no name
		stanza:tag("retracted", { xmlns = "urn:xmpp:message-retract:1", stamp = datetime.datetime() }):up();
	else
		stanza:body(xml_text(message.content));
	end
	return stanza:tag("x", { xmlns = "http://jabber.org/protocol/muc#user" })
		:tag("item", { jid = jid, affiliation = "member", role = "participant" }):reset();
end

-- What clients receive that have the message in another state already: a correction
-- (XEP-0308) or a retraction (XEP-0424).
local function change_of(stanza, key)
	local change = st.clone(stanza);
	change.attr.id = random_id();
	if change:get_child("body") then
		return change:tag("replace", { xmlns = "urn:xmpp:message-correct:0", id = key }):up();
	end
	change:remove_children("retracted", "urn:xmpp:message-retract:1");
	return change:tag("retract", { xmlns = "urn:xmpp:message-retract:1", id = key }):up();
end

-- Within a transaction: store the message. Returns what to send to its room, or nothing
-- if the archive has the message as it is.
local function put_message(message, room, stanza)
	local node, key = jid_split(room.jid), stanza.attr.id;
	local where = [[WHERE "host"=? AND "user"=? AND "store"='muc_log' AND "key"=?]];
	local old;
	for row in sql:select([[SELECT "value" FROM "prosodyarchive" ]] .. where, module.host, node, key) do
		old = row[1];
	end
	if not old then
		local at = datetime.parse(message.created_at);
		sql:insert([[INSERT INTO "prosodyarchive"
			("host", "user", "store", "when", "with", "key", "type", "value")
			VALUES (?, ?, 'muc_log', ?, 'message<groupchat', ?, 'xml', ?)]],
			module.host, node, at, key, tostring(stanza));
		if message.deleted then return; end
		local live = st.clone(stanza)
			:tag("stanza-id", { xmlns = "urn:xmpp:sid:0", by = room.jid, id = key }):up();
		if at < os.time() - 60 then -- clients take it for history, and do not ring
			live:tag("delay", { xmlns = "urn:xmpp:delay", from = room.jid, stamp = message.created_at }):up();
		end
		return live;
	end
	-- Only the text counts: a new name changes no history.
	if parse_xml(old):get_child_text("body") ~= stanza:get_child_text("body") then
		sql:update([[UPDATE "prosodyarchive" SET "value"=? ]] .. where,
			tostring(stanza), module.host, node, key);
		return change_of(stanza, key);
	end
end

-- The request

local function import(body)
	local messages, news = {}, {};
	for line in body:gmatch("[^\n]+") do
		local record = assert(json.decode(line));
		local message = record.message;
		if record.user then put_user(record.user);
		elseif record.chat then put_chat(record.chat);
		else
			assert(message, "neither user, chat nor message");
			local node = ("c%d"):format(message.chat_id);
			local room = assert(muc.get_room_from_jid(node .. "@" .. module.host), "no room " .. node);
			messages[#messages + 1] = { message, room, stanza_of(message, room) };
		end
	end
	-- Nothing in here may use a store: its commit would end this transaction.
	assert(#messages == 0 or sql:transaction(function ()
		news = {}; -- it is called again after a lost connection
		for _, new in ipairs(messages) do
			local stanza = put_message(table.unpack(new));
			if stanza then news[#news + 1] = { new[2], stanza }; end
		end
	end));
	-- Not broadcast_message: that would put it into the archive once more.
	for _, new in ipairs(news) do new[1]:broadcast(new[2]); end
	return ("%d messages are new or changed\n"):format(#news);
end

module:provides("http", {
	name = "chatd_import";
	route = {
		POST = function (event)
			if not equals(event.request.headers.authorization or "", "Bearer " .. secret) then
				return 401;
			end
			local ok, answer = pcall(import, event.request.body);
			if not ok then
				module:log("error", "a request failed: %s", answer);
				event.response.status_code = 422;
			end
			return tostring(answer);
		end;
	};
});
