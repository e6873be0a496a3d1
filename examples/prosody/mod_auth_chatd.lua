-- Signs users in with the tokens that they have already. The site's backend signs a JWT
-- for user 6; with chatd the page opened a socket with it, and now it is the password of
-- u6@chat.example.org (SASL PLAIN, over TLS). No password is stored here.
--
-- A token counts as it does for chatd --jwt-key: HS256, `exp` in the future, and `user_id`
-- or else `sub` names the user. The first sign-in makes the account.
local jwt = require "util.jwt";
local new_sasl = require "util.sasl".new;

local accounts = module:open_store("accounts");
local clocks_differ = 5; -- seconds
local required = {
	iss = module:get_option_string("chatd_issuer");
	aud = module:get_option_string("chatd_audience");
};

local key_file = assert(module:get_option_string("chatd_jwt_key"), "set chatd_jwt_key to a file");
local file = assert(io.open(key_file));
local key = file:read("a"):match("^%s*(.-)%s*$");
file:close();
-- A public key is no secret: anyone could sign with it. Prosody 0.12 knows HS256 only.
assert(#key >= 32 and not key:find("-----BEGIN", 1, true), key_file .. ": not a shared secret");

local function has(claim, wanted)
	if type(claim) ~= "table" then return claim == wanted; end
	for _, value in ipairs(claim) do
		if value == wanted then return true; end
	end
end

local function is_token_of(username, token)
	local ok, claims = jwt.verify(key, token);
	if not ok or type(claims) ~= "table" then return false; end
	local now = os.time();
	local starts = math.max(tonumber(claims.nbf) or 0, tonumber(claims.iat) or 0);
	if (tonumber(claims.exp) or 0) <= now - clocks_differ or starts > now + clocks_differ then
		return false;
	end
	for name, wanted in pairs(required) do
		if not has(claims[name], wanted) then return false; end
	end
	return "u" .. tostring(claims.user_id or claims.sub) == username;
end

local provider = {};

function provider.user_exists(username)
	return accounts:get(username) ~= nil;
end

function provider.create_user(username) -- the password that it comes with is not needed
	return accounts:set(username, { created = os.time() });
end

function provider.delete_user(username)
	return accounts:set(username, nil);
end

function provider.users()
	return accounts:users();
end

function provider.test_password(username, token)
	if not is_token_of(username, token) then return nil, "not a token of this user"; end
	return provider.user_exists(username) or provider.create_user(username);
end

function provider.set_password()
	return nil, "the site's backend signs tokens instead";
end

function provider.get_sasl_handler()
	return new_sasl(module.host, {
		plain_test = function (_, username, token)
			return provider.test_password(username, token), true;
		end;
	});
end

module:provides("auth", provider);
