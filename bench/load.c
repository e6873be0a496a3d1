/* load.c: the load generator of bench/run.py, one epoll loop that is never the bottleneck.
 *
 *   load MODE key=value...      prints one JSON line for each thing it was asked to do
 *
 *   talk   members of rooms send messages: each of `senders` members of each room has one
 *          message in flight, and sends the next when all members, the sender included,
 *          have received it; or, with `rate`, all members send in turn, by the clock, each
 *          `stride` lines of the file behind the one before. To chatd they can also send
 *          `typing` signs a second, and read marks: `watching` is the share of the
 *          receivers of a message that mark it, up to `look` s later
 *   http   `conns` keep-alive connections, each with one request at a time
 *   shake  `conns` at a time: connect, handshake, wait for the greeting, close, again
 *   hold   reads commands from stdin: `open N`, `keep N`; answers pings; ends with stdin
 *
 * A room is a run of lines of the file with the same room. Every message carries a mark
 * #SENDER.SEQUENCE.NANOSECONDS#. With it each delivery is timed, and checked for its
 * room, its order and its number, without state shared with the sender. With `rate` the
 * time is when it was due, not when it was sent. Of read marks the load checks the order,
 * and that every member of a room receives as many as the others.
 *
 * The CPU of the server (`pids`) is read from the kernel's process clocks at both ends of
 * the window, so connecting and warming up are not in it. So are its instructions, where
 * the kernel lets us count them.
 *
 * Protocols: ws (a message goes to the whole room), chatd, xmpp, mqtt, http.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <linux/perf_event.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MARK "#00000.00000000.0000000000000000#"
#define MARK_LENGTH (sizeof MARK - 1)
#define BUFFER (1 << 18)
#define SOURCES 32 /* client addresses 127.0.0.2 and up: enough ports for all */

struct conn {
    int index, fd, step;
    bool ready, greeted, gone;
    char *kept; /* the beginning of an incomplete message */
    size_t kept_length;
    char *out; /* bytes that the kernel did not accept */
    size_t out_length;
    uint32_t sent;       /* messages */
    int heard;           /* members that have the message in flight */
    int caught;          /* marks received, for `expect` */
    uint64_t since;      /* when the request or the handshake began */
    int first, size;     /* the room: its first connection, and how many it has */
    uint64_t seq;        /* of the newest event, with chatd */
    uint64_t mark, due;  /* the message to mark as read, and when; 0: none */
    uint32_t reads;      /* read marks received */
};

struct protocol {
    const char *name;
    void (*hello)(struct conn *);
    /* Handle the complete messages; return how many bytes they have. */
    size_t (*parse)(struct conn *, char *, size_t);
    void (*say)(struct conn *, const char *content);
    const char *bye;
    size_t bye_length;
};

/* --- options ---------------------------------------------------------------------- */

static const char *host = "127.0.0.1", *file;
static int port, wanted = 1, senders = 1, stride = 1, parallel = 64, expect, pids[64];
static int pid_count, ok_status = 200, content_length = 64;
static double seconds = 1, warm_seconds = 0.2, rate, typing, watching, look = 1;
static const struct protocol *protocol;

/* --- state ------------------------------------------------------------------------ */

static struct conn *conns;
static char **lines;      /* of the file: a target or a request for each connection */
static char **room_names; /* the word behind a target */
static int line_count, next_line;
static int poller, open_count, connecting, places;
static uint32_t *expected; /* the next number, [receiver][one of the room's `places`] */
static bool running, closing;
static uint64_t received_at;
static uint64_t message_id, owed, acks, marks, reads, typed, signs, bytes_in;
static uint64_t sent_count, delivered, lost, repeated, strayed, refused, ended, done;
static char buffer[BUFFER + 1], content[4096], scratch[1 << 17];

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* CPU time of the server: all threads of its processes, also those that ended. */
static double server_cpu(void)
{
    double sum = 0;
    for (int i = 0; i < pid_count; i++) {
        clockid_t clock;
        struct timespec t;
        if (!clock_getcpuclockid(pids[i], &clock) && !clock_gettime(clock, &t))
            sum += t.tv_sec + t.tv_nsec / 1e9;
    }
    return sum;
}

static void die(const char *why)
{
    fprintf(stderr, "load: %s: %s\n", why, strerror(errno));
    exit(1);
}

/* --- instructions -----------------------------------------------------------------
 * The instructions of the server in user space, by a counter of the processor for each
 * thread of its processes; threads that start later inherit it. Most virtual machines
 * have no such counter, and the kernel refuses it when kernel.perf_event_paranoid is
 * above 2. A sum that lacks a thread would be wrong, so one refusal ends the counting. */

static int counters[1024], counter_count;
static bool uncounted;

static void count_thread(pid_t thread)
{
    struct perf_event_attr event = {
        .type = PERF_TYPE_HARDWARE,
        .size = sizeof event,
        .config = PERF_COUNT_HW_INSTRUCTIONS,
        .inherit = 1,
        .exclude_kernel = 1,
        .exclude_hv = 1,
    };
    int fd = syscall(SYS_perf_event_open, &event, thread, -1, -1, 0);
    if (fd >= 0 && counter_count < 1024)
        counters[counter_count++] = fd;
    else if (fd >= 0 || errno != ESRCH) /* a thread that has ended is no loss */
        uncounted = true;
}

static void count_threads(int pid)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return;
    for (struct dirent *task; (task = readdir(tasks));)
        if (atoi(task->d_name))
            count_thread(atoi(task->d_name));
    closedir(tasks);
}

static uint64_t server_instructions(void)
{
    uint64_t sum = 0, one;
    for (int i = 0; i < counter_count; i++)
        if (read(counters[i], &one, sizeof one) == sizeof one)
            sum += one;
    return sum;
}

/* Some virtual machines offer the counter, and it stays zero. */
static void report_instructions(uint64_t count)
{
    if (uncounted || !count)
        printf(",\"instructions\":null");
    else
        printf(",\"instructions\":%llu", (unsigned long long)count);
}

/* --- latencies -------------------------------------------------------------------- */

/* Latencies in classes 1/32 wide: exact enough for a percentile, and bounded. */
static uint64_t classes[64 * 32], timed, slowest;

static int class_of(uint64_t ns)
{
    if (ns < 64)
        return ns;
    int shift = 63 - __builtin_clzll(ns) - 5;
    return shift * 32 + (ns >> shift);
}

static void time_it(uint64_t ns)
{
    classes[class_of(ns)]++;
    timed++;
    if (ns > slowest)
        slowest = ns;
}

static double percentile_ms(double share)
{
    uint64_t seen = 0;
    for (int i = 0; i < 64 * 32; i++)
        if ((seen += classes[i]) >= share * timed && seen) {
            int shift = i < 64 ? 0 : i / 32 - 1;
            return ((uint64_t)(i - shift * 32) << shift) / 1e6;
        }
    return 0;
}

/* --- sockets ---------------------------------------------------------------------- */

static void watch(struct conn *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, operation, c->fd, &event))
        die("epoll_ctl");
}

static void drop(struct conn *c)
{
    if (c->fd < 0)
        return;
    close(c->fd);
    c->fd = -1;
    if (c->greeted)
        open_count--;
    else
        connecting--;
    c->gone = true;
    free(c->kept);
    free(c->out);
    c->kept = c->out = NULL;
    c->kept_length = c->out_length = 0;
}

static void put(struct conn *c, const char *bytes, size_t length)
{
    if (c->fd < 0)
        return;
    ssize_t sent = 0;
    if (!c->out_length && (sent = send(c->fd, bytes, length, MSG_NOSIGNAL)) < 0) {
        if (errno != EAGAIN) {
            ended++;
            drop(c);
            return;
        }
        sent = 0;
    }
    if ((size_t)sent == length)
        return;
    c->out = realloc(c->out, c->out_length + length - sent);
    memcpy(c->out + c->out_length, bytes + sent, length - sent);
    c->out_length += length - sent;
    watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

static void flush(struct conn *c)
{
    ssize_t sent = send(c->fd, c->out, c->out_length, MSG_NOSIGNAL);
    if (sent <= 0)
        return;
    memmove(c->out, c->out + sent, c->out_length - sent);
    if (!(c->out_length -= sent))
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void dial(struct conn *c, int index)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in from = {.sin_family = AF_INET};
    int one = 1;
    memset(c, 0, sizeof *c);
    c->index = index;
    inet_pton(AF_INET, host, &to.sin_addr);
    from.sin_addr.s_addr = htonl(0x7f000002 + index % SOURCES);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(c->fd, (struct sockaddr *)&from, sizeof from))
        die("bind");
    c->since = now();
    connecting++;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)
        die("connect");
    watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

/* --- sending and receiving messages ----------------------------------------------- */

static void mark(char *at, struct conn *c, uint64_t when)
{
    char text[MARK_LENGTH + 1];
    snprintf(text, sizeof text, "#%05d.%08u.%016llx#", c->index, c->sent++,
             (unsigned long long)when);
    memcpy(at, text, MARK_LENGTH);
    sent_count++;
}

static void speak(struct conn *c, uint64_t when)
{
    c->heard = 0;
    mark(content, c, when);
    owed += c->size;
    protocol->say(c, content);
}

static void hear(struct conn *c, const char *text)
{
    int from = atoi(text + 1);
    uint32_t number = strtoul(text + 7, NULL, 10);
    uint64_t when = strtoull(text + 16, NULL, 16);
    c->caught++;
    if (!expected)
        return;
    if (from < c->first || from >= c->first + (c->size < senders ? c->size : senders)) {
        strayed++;
        return;
    }
    uint32_t *next = &expected[(size_t)c->index * places + from - c->first];
    if (number < *next) {
        repeated++;
        return;
    }
    lost += number - *next;
    *next = number + 1;
    delivered++;
    if (from != c->index) {
        time_it(received_at - when);
        if (watching && drand48() < watching) {
            if (!c->mark)
                c->due = received_at + drand48() * look * 1e9;
            c->mark = message_id; /* a newer one takes the place of an older one */
        }
    }
    struct conn *sender = &conns[from];
    if (++sender->heard == sender->size && running && !rate)
        speak(sender, now());
}

static void scan(struct conn *c, char *bytes, size_t length)
{
    char *end = bytes + length, *at = bytes;
    while ((at = memchr(at, '#', end - at)) && at + MARK_LENGTH <= end) {
        if (at[6] == '.' && at[15] == '.' && at[MARK_LENGTH - 1] == '#') {
            hear(c, at);
            at += MARK_LENGTH;
        } else
            at++;
    }
}

static void greet(struct conn *c)
{
    c->ready = c->greeted = true;
    connecting--;
    open_count++;
}

/* --- what else the members of a chat do, with chatd ---------------------------------- */

/* Look at a server message. The events of a connection come in the order of their seq. */
static void notice(struct conn *c, const char *text)
{
    const char *kind = text + strlen("{\"type\":\""), *seq = strstr(text, "\"seq\":");
    if (!strncmp(kind, "ack", 3))
        acks++;
    else if (!strncmp(kind, "typing", 6))
        signs++;
    else if (!strncmp(kind, "error", 5))
        refused++;
    else if (seq) {
        uint64_t number = strtoull(seq + 6, NULL, 10);
        if (number <= c->seq)
            repeated++;
        c->seq = message_id = number; /* a message has the seq of its event */
        if (!strncmp(kind, "message_read", 12)) {
            c->reads++;
            reads++;
        }
    }
}

static void ws_frame(struct conn *c, int opcode, const char *payload, size_t length);

/* Send the typing signs that are due, and some of the read marks. A whole round of the
 * connections takes so many turns of the loop, a few milliseconds. */
static void behave(uint64_t begin, uint64_t t)
{
    static uint64_t looked;
    char command[128];
    for (; typing && begin + typed * (1e9 / typing) <= t; typed++) {
        struct conn *c = &conns[(typed * stride + wanted / 2) % wanted];
        snprintf(command, sizeof command,
                 "{\"type\":\"typing\",\"chat_id\":%s,\"is_typing\":true}",
                 room_names[c->index % line_count]);
        ws_frame(c, 1, command, strlen(command));
    }
    for (int i = 0; watching && i < 64; i++) {
        struct conn *c = &conns[looked++ % wanted];
        if (!c->mark || c->due > t)
            continue;
        snprintf(command, sizeof command, "{\"type\":\"mark_read\",\"message_id\":%llu}",
                 (unsigned long long)c->mark);
        ws_frame(c, 1, command, strlen(command));
        c->mark = 0;
        marks++;
    }
}

/* Return how many messages and marks have no ack yet, if acks are counted. */
static uint64_t unanswered(void)
{
    return watching || typing ? sent_count + marks - acks : 0;
}

/* Every member of a chat receives every read mark: return how many were not received. */
static uint64_t missed_reads(void)
{
    uint64_t missed = 0;
    for (int first = 0; first < wanted; first += conns[first].size) {
        uint32_t most = 0;
        for (int i = first; i < first + conns[first].size; i++)
            if (conns[i].reads > most)
                most = conns[i].reads;
        for (int i = first; i < first + conns[first].size; i++)
            missed += most - conns[i].reads;
    }
    return missed;
}

/* --- WebSocket (RFC 6455) --------------------------------------------------------- */

static void ws_frame(struct conn *c, int opcode, const char *payload, size_t length)
{
    static const unsigned char key[4] = {0x37, 0xfa, 0x21, 0x3d};
    unsigned char frame[8192], *at = frame;
    *at++ = 0x80 | opcode;
    *at++ = 0x80 | (length < 126 ? length : 126);
    if (length >= 126) {
        *at++ = length >> 8;
        *at++ = length;
    }
    memcpy(at, key, 4);
    at += 4;
    for (size_t i = 0; i < length; i++)
        at[i] = payload[i] ^ key[i % 4];
    put(c, (char *)frame, at - frame + length);
}

static void ws_hello(struct conn *c)
{
    int length = snprintf(scratch, sizeof scratch,
                          "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\n"
                          "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                          lines[c->index % line_count], host, port);
    put(c, scratch, length);
}

static void ws_say(struct conn *c, const char *text)
{
    ws_frame(c, 1, text, strlen(text));
}

/* Find the payload of a frame, or NULL if the frame is incomplete. */
static char *ws_payload(char *frame, char *end, size_t *size)
{
    if (end - frame < 2)
        return NULL;
    unsigned char *head = (unsigned char *)frame;
    size_t more = head[1] == 127 ? 8 : head[1] == 126 ? 2 : 0;
    if ((size_t)(end - frame) < 2 + more)
        return NULL;
    *size = more ? 0 : head[1];
    for (size_t i = 0; i < more; i++)
        *size = *size << 8 | head[2 + i];
    return (size_t)(end - frame) < 2 + more + *size ? NULL : frame + 2 + more;
}

static size_t ws_parse(struct conn *c, char *bytes, size_t length)
{
    char *at = bytes, *end = bytes + length;
    if (!c->step) {
        char *body = memmem(bytes, length, "\r\n\r\n", 4);
        if (!body)
            return 0;
        if (memcmp(bytes, "HTTP/1.1 101", 12)) {
            refused++;
            drop(c);
            return 0;
        }
        c->step = 1;
        at = body + 4;
        if (protocol->say == ws_say)
            greet(c);
    }
    while (c->fd >= 0) {
        /* A message may come in fragments. They are joined when the last one is there. */
        char *next = at, *text = NULL;
        size_t size, joined = 0;
        do
            if (!(text = ws_payload(next, end, &size)))
                return at - bytes;
        while (!(*next & 0x80) && (next = text + size));
        int opcode = *at & 15;
        for (char *frame = at, *to = NULL; frame <= next; frame = text + size) {
            text = ws_payload(frame, end, &size);
            if (!to)
                to = text;
            else
                memmove(to + joined, text, size);
            joined += size;
        }
        next = text + size;
        text = ws_payload(at, end, &size);
        if (opcode == 8) { /* answered, as every client does */
            ws_frame(c, 8, text, joined);
            ended++;
            drop(c);
            return 0;
        }
        if (opcode == 9)
            ws_frame(c, 10, text, joined);
        else if (opcode < 3 && !c->ready) /* chatd's first message: connected */
            greet(c);
        else if (opcode < 3) {
            if (watching || typing)
                notice(c, text);
            scan(c, text, joined);
        }
        at = next;
    }
    return at - bytes;
}

static void chatd_say(struct conn *c, const char *text)
{
    char command[4096];
    snprintf(command, sizeof command,
             "{\"type\":\"send_message\",\"chat_id\":%s,\"content\":\"%s\"}",
             room_names[c->index % line_count], text);
    ws_frame(c, 1, command, strlen(command));
}

/* --- XMPP: a room of Prosody (RFC 6120, XEP-0045), signed in anonymously ----------- */

static void xmpp_open(struct conn *c)
{
    const char *stream = "<stream:stream to='localhost' version='1.0' "
                         "xmlns='jabber:client' "
                         "xmlns:stream='http://etherx.jabber.org/streams'>";
    put(c, stream, strlen(stream));
}

static size_t xmpp_parse(struct conn *c, char *bytes, size_t length)
{
    static const char *const awaited[] = {"</stream:features>", "<success",
                                          "</stream:features>", "</iq>", "<subject"};
    const char *answer;
    char *at = bytes, *found;
    while (c->step < 5) {
        const char *word = awaited[c->step];
        if (!(found = memmem(at, bytes + length - at, word, strlen(word))))
            return at - bytes;
        at = found + strlen(word);
        answer = "";
        switch (c->step++) {
        case 0:
            answer = "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' "
                     "mechanism='ANONYMOUS'/>";
            break;
        case 1:
            xmpp_open(c);
            break;
        case 2:
            answer = "<iq type='set' id='b'>"
                     "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>";
            break;
        case 3:
            snprintf(scratch, sizeof scratch,
                     "<presence to='r%s@rooms.localhost/n%d'>"
                     "<x xmlns='http://jabber.org/protocol/muc'>"
                     "<history maxstanzas='0'/></x></presence>",
                     room_names[c->index % line_count], c->index);
            answer = scratch;
            break;
        default:
            greet(c);
        }
        put(c, answer, strlen(answer));
    }
    /* A mark stands between two tags, so whatever ends with one has whole marks. */
    char *end = memrchr(at, '>', bytes + length - at);
    if (!end)
        return at - bytes;
    scan(c, at, end - at);
    if (memmem(at, end + 1 - at, protocol->bye, protocol->bye_length)) {
        put(c, protocol->bye, protocol->bye_length); /* the server waits for it */
        shutdown(c->fd, SHUT_WR);
    }
    return end + 1 - bytes;
}

static void xmpp_say(struct conn *c, const char *text)
{
    int length = snprintf(scratch, sizeof scratch,
                          "<message type='groupchat' to='r%s@rooms.localhost' id='m%u'>"
                          "<body>%s</body></message>",
                          room_names[c->index % line_count], c->sent, text);
    put(c, scratch, length);
}

/* --- MQTT 3.1.1: a topic for each room, QoS 0 --------------------------------------- */

static void mqtt_put(struct conn *c, int type, const char *head, size_t head_length,
                     const char *body)
{
    char packet[4096], *at = packet;
    size_t length = head_length + strlen(body);
    *at++ = type;
    if (length >= 128)
        *at++ = 0x80 | (length & 127);
    *at++ = length >= 128 ? length >> 7 : length;
    memcpy(at, head, head_length);
    memcpy(at + head_length, body, strlen(body));
    put(c, packet, at - packet + length);
}

static size_t mqtt_topic(struct conn *c, char *to, bool subscribe)
{
    int length = sprintf(to + 2, "room/%s", room_names[c->index % line_count]);
    to[0] = 0;
    to[1] = length;
    to[2 + length] = 0; /* the wanted QoS */
    return 2 + length + subscribe;
}

static void mqtt_hello(struct conn *c)
{
    char name[32];
    /* Protocol MQTT, level 4, clean session, no keep-alive, an identifier. */
    char head[] = "\0\4MQTT\4\2\0\0\0\0";
    head[11] = sprintf(name, "c%d-%d", c->index, (int)getpid());
    mqtt_put(c, 0x10, head, 12, name);
}

static size_t mqtt_parse(struct conn *c, char *bytes, size_t length)
{
    char *at = bytes, *end = bytes + length, head[64];
    while (end - at >= 2) {
        size_t size = at[1] & 127, skip = 2;
        if (at[1] & 0x80) {
            if (end - at < 3)
                break;
            size |= (size_t)at[2] << 7; /* no packet here needs a third digit */
            skip = 3;
        }
        if ((size_t)(end - at) < skip + size)
            break;
        int type = (unsigned char)at[0] >> 4;
        if (type == 2) {
            head[0] = 0;
            head[1] = 1;
            mqtt_put(c, 0x82, head, 2 + mqtt_topic(c, head + 2, true), "");
        } else if (type == 9)
            greet(c);
        else if (type == 3)
            scan(c, at + skip, size);
        at += skip + size;
    }
    return at - bytes;
}

static void mqtt_say(struct conn *c, const char *text)
{
    char head[64];
    mqtt_put(c, 0x30, head, mqtt_topic(c, head, false), text);
}

/* --- HTTP: the requests are the file's lines ---------------------------------------- */

static void http_ask(struct conn *c)
{
    char *place;
    snprintf(scratch, sizeof scratch, "%s", lines[c->index % line_count]);
    c->since = now();
    if ((place = strstr(scratch, MARK)))
        mark(place, c, c->since);
    else
        sent_count++;
    put(c, scratch, strlen(scratch));
}

static void http_hello(struct conn *c)
{
    greet(c);
}

static size_t http_parse(struct conn *c, char *bytes, size_t length)
{
    char *body = memmem(bytes, length, "\r\n\r\n", 4);
    if (!body)
        return 0;
    *body = 0; /* the head is a string now */
    char *field = strcasestr(bytes, "\r\ncontent-length:");
    size_t size = field ? strtoul(field + 17, NULL, 10) : 0;
    *body = '\r';
    if ((size_t)(bytes + length - body) < 4 + size)
        return 0;
    if (atoi(bytes + 9) == ok_status) {
        done++;
        time_it(received_at - c->since);
    } else
        refused++;
    if (running)
        http_ask(c);
    return length; /* one request at a time: nothing follows it */
}

static const struct protocol protocols[] = {
    {"ws", ws_hello, ws_parse, ws_say, "\x88\x82\0\0\0\0\x03\xe8", 8},
    {"chatd", ws_hello, ws_parse, chatd_say, "\x88\x82\0\0\0\0\x03\xe8", 8},
    {"xmpp", xmpp_open, xmpp_parse, xmpp_say, "</stream:stream>", 16},
    {"mqtt", mqtt_hello, mqtt_parse, mqtt_say, "\xe0\0", 2},
    {"http", http_hello, http_parse, NULL, "", 0},
};

/* --- the loop ---------------------------------------------------------------------- */

static void readable(struct conn *c)
{
    size_t had = c->kept_length;
    if (had)
        memcpy(buffer, c->kept, had);
    ssize_t length = recv(c->fd, buffer + had, BUFFER - had, 0);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (length <= 0) {
        ended += !closing && c->step < 100;
        drop(c);
        return;
    }
    received_at = now();
    bytes_in += length;
    length += had;
    buffer[length] = 0;
    size_t taken = c->step < 100 ? protocol->parse(c, buffer, length) : (size_t)length;
    if (c->fd < 0)
        return;
    size_t rest = length - taken;
    if (rest == BUFFER)
        die("a message larger than the buffer");
    if (rest) {
        c->kept = realloc(c->kept, rest);
        memcpy(c->kept, buffer + taken, rest);
    } else if (had) {
        free(c->kept); /* an idle connection needs no buffer */
        c->kept = NULL;
    }
    c->kept_length = rest;
}

/* Handle what is ready, or wait for it this long. Return false when stdin is ready. */
static bool turn(int timeout_ms)
{
    struct epoll_event events[512];
    int count = epoll_wait(poller, events, 512, timeout_ms);
    bool quiet = true;
    for (int i = 0; i < count; i++) {
        struct conn *c = events[i].data.ptr;
        if (!c) {
            quiet = false;
            continue;
        }
        if (c->fd >= 0 && events[i].events & EPOLLOUT) {
            if (c->out_length)
                flush(c);
            else if (events[i].events & (EPOLLERR | EPOLLHUP)) {
                refused++;
                drop(c);
            } else {
                watch(c, EPOLL_CTL_MOD, EPOLLIN);
                protocol->hello(c);
            }
        }
        if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
            readable(c);
    }
    return quiet;
}

static void connect_all(int to)
{
    static int started;
    uint64_t limit = now() + 60000000000ull;
    while (open_count < to) {
        while (connecting < parallel && started < to) {
            dial(&conns[started], started);
            started++;
        }
        turn(1000);
        if (now() > limit || refused || ended) {
            printf("{\"error\":\"%d of %d connected, %d refused, %d ended\"}\n",
                   open_count, to, (int)refused, (int)ended);
            exit(1);
        }
    }
}

static void report(double window, double cpu, double own, uint64_t count)
{
    printf("{\"count\":%llu,\"seconds\":%.6f,\"cpu\":%.6f,\"load_cpu\":%.6f,"
           "\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"max_ms\":%.4f,\"sent\":%llu,"
           "\"lost\":%llu,\"repeated\":%llu,\"strayed\":%llu,\"refused\":%llu,"
           "\"ended\":%llu",
           (unsigned long long)count, window, cpu, own, percentile_ms(0.5),
           percentile_ms(0.99), slowest / 1e6, (unsigned long long)sent_count,
           (unsigned long long)lost, (unsigned long long)repeated,
           (unsigned long long)strayed, (unsigned long long)refused,
           (unsigned long long)ended);
}

static double own_cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* Run until `until`, without sleeping. To wake a sleeping process on the same machine
 * costs the server more than its write. Over a network no server pays for this. */
static void drive(uint64_t begin, uint64_t until, uint64_t *due)
{
    for (uint64_t t; (t = now()) < until;) {
        if (rate && running)
            for (uint64_t at; (at = begin + *due * (1e9 / rate)) <= t; ++*due)
                speak(&conns[*due * stride % wanted], at);
        if (running)
            behave(begin, t);
        turn(0);
    }
}

/* Give each connection its room. Returns the size of the largest. */
static int find_rooms(void)
{
    int largest = 0;
    for (int first = 0, end; first < wanted; first = end) {
        for (end = first + 1; end < wanted; end++)
            if (strcmp(room_names[end % line_count], room_names[first % line_count]))
                break;
        for (int i = first; i < end; i++) {
            conns[i].first = first;
            conns[i].size = end - first;
        }
        if (end - first > largest)
            largest = end - first;
    }
    return largest;
}

static void talk(void)
{
    double opened = server_cpu();
    uint64_t from = now();
    connect_all(wanted);
    opened = server_cpu() - opened;
    double opening = (now() - from) / 1e9;
    places = find_rooms();
    if (rate)
        senders = places;
    else
        places = senders;
    expected = calloc((size_t)wanted * places, sizeof *expected);
    for (int i = 0; i < content_length; i++)
        content[i] = i < (int)MARK_LENGTH ? MARK[i] : 'x';
    /* A client that connected a moment ago may not be in its room yet. */
    drive(0, now() + 200000000, NULL);
    running = true;
    uint64_t begin = now(), due = 0;
    for (int i = 0; i < wanted && !rate; i++)
        if (i - conns[i].first < senders)
            speak(&conns[i], begin);
    drive(begin, begin + warm_seconds * 1e9, &due);
    memset(classes, 0, sizeof classes);
    timed = slowest = 0;
    uint64_t before[] = {delivered, sent_count, marks, reads, typed, signs, bytes_in};
    uint64_t executed = server_instructions();
    double cpu = server_cpu(), own = own_cpu();
    from = now();
    drive(begin, from + seconds * 1e9, &due);
    double window = (now() - from) / 1e9;
    cpu = server_cpu() - cpu;
    own = own_cpu() - own;
    executed = server_instructions() - executed;
    uint64_t after[] = {delivered, sent_count, marks, reads, typed, signs, bytes_in};
    running = false;
    /* Messages in flight have ten seconds to arrive. After that they are late. */
    uint64_t limit = now() + 10000000000ull;
    while ((delivered + lost < owed || unanswered() || missed_reads()) &&
           now() < limit && open_count == wanted)
        turn(100);
    turn(50); /* repeated deliveries arrive now */
    uint64_t late = owed - delivered - lost + unanswered();
    lost += missed_reads();
    report(window, cpu, own, after[0] - before[0]);
    report_instructions(executed);
    static const char *const names[] = {"messages", "marks", "reads", "typed", "signs",
                                        "bytes"};
    for (int i = 1; i < 7; i++)
        printf(",\"%s\":%llu", names[i - 1], (unsigned long long)(after[i] - before[i]));
    printf(",\"all_marks\":%llu,\"open_seconds\":%.6f,\"open_cpu\":%.6f,\"late\":%llu}\n",
           (unsigned long long)marks, opening, opened, (unsigned long long)late);
}

static void http(void)
{
    connect_all(wanted);
    running = true;
    for (int i = 0; i < wanted; i++)
        http_ask(&conns[i]);
    uint64_t due = 0, begin = now();
    rate = 0;
    drive(begin, begin + warm_seconds * 1e9, &due);
    memset(classes, 0, sizeof classes);
    timed = slowest = 0;
    uint64_t executed = server_instructions();
    double cpu = server_cpu(), own = own_cpu();
    uint64_t from = now(), count = done;
    drive(begin, from + seconds * 1e9, &due);
    double window = (now() - from) / 1e9;
    cpu = server_cpu() - cpu;
    own = own_cpu() - own;
    executed = server_instructions() - executed;
    count = done - count;
    running = false;
    for (uint64_t limit = now() + 10000000000ull; done + refused < sent_count;)
        if (turn(100), now() > limit)
            break;
    lost = sent_count - done - refused;
    report(window, cpu, own, count);
    report_instructions(executed);
    printf(",\"done\":%llu}\n", (unsigned long long)done);
}

static void shake(void)
{
    uint64_t from = now(), until = from + seconds * 1e9, count = 0;
    uint64_t executed = server_instructions();
    double cpu = server_cpu(), own = own_cpu();
    for (int i = 0; i < wanted; i++)
        dial(&conns[i], next_line++);
    for (uint64_t t; (t = now()) < until;) {
        turn(10);
        for (int i = 0; i < wanted; i++) {
            struct conn *c = &conns[i];
            if (c->ready) { /* we close; the server ends the connection */
                c->ready = false;
                c->step = 100;
                time_it(now() - c->since);
                count++;
                put(c, protocol->bye, protocol->bye_length);
            }
            if (c->fd < 0)
                dial(c, next_line++);
        }
    }
    double window = (now() - from) / 1e9;
    report(window, server_cpu() - cpu, own_cpu() - own, count);
    report_instructions(server_instructions() - executed);
    printf("}\n");
}

static void hold(void)
{
    char word[64];
    int number;
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &event);
    setvbuf(stdin, NULL, _IONBF, 0);
    for (;;) {
        while (turn(1000))
            continue;
        if (scanf("%63s %d", word, &number) != 2)
            return;
        double cpu = server_cpu();
        uint64_t executed = server_instructions();
        uint64_t from = now(), until = from + 60000000000ull;
        if (!strcmp(word, "keep")) {
            closing = true;
            for (int i = number; i < wanted; i++)
                drop(&conns[i]);
            closing = false;
        } else {
            epoll_ctl(poller, EPOLL_CTL_DEL, 0, NULL);
            connect_all(number);
            int served = expect ? 0 : number; /* clients that have all they missed */
            while (served < number && now() < until) {
                turn(1000);
                for (served = 0; served < number; served++)
                    if (conns[served].caught < expect)
                        break;
            }
            if (served < number) {
                printf("{\"error\":\"not all clients got what they missed in 60 s\"}\n");
                exit(1);
            }
            epoll_ctl(poller, EPOLL_CTL_ADD, 0, &event);
        }
        /* The clocks stop here: the last client has its last message. */
        double took = (now() - from) / 1e9;
        cpu = server_cpu() - cpu;
        executed = server_instructions() - executed;
        uint64_t caught = 0;
        for (int i = 0; i < number; i++)
            caught += conns[i].caught;
        printf("{\"open\":%d,\"seconds\":%.6f,\"cpu\":%.6f,\"caught\":%llu,"
               "\"ended\":%llu",
               open_count, took, cpu, (unsigned long long)caught,
               (unsigned long long)ended);
        report_instructions(executed);
        printf("}\n");
    }
}

/* Read the file: lines "target room", or for http whole requests that end with NUL. */
static void read_lines(void)
{
    char *line = NULL;
    size_t size = 0;
    bool whole = !strcmp(protocol->name, "http");
    FILE *from = fopen(file, "r");
    if (!from)
        die(file);
    while (getdelim(&line, &size, whole ? 0 : '\n', from) > 0) {
        lines = realloc(lines, (line_count + 1) * sizeof *lines);
        room_names = realloc(room_names, (line_count + 1) * sizeof *room_names);
        lines[line_count] = strdup(line);
        if (!whole) {
            strtok(lines[line_count], " \n");
            room_names[line_count] = strtok(NULL, " \n");
        }
        line_count++;
    }
    fclose(from);
}

static void option(const char *key, char *value)
{
    if (!strcmp(key, "proto")) {
        for (size_t i = 0; i < sizeof protocols / sizeof *protocols; i++)
            if (!strcmp(protocols[i].name, value))
                protocol = &protocols[i];
    } else if (!strcmp(key, "pids")) {
        for (char *pid = strtok(value, ","); pid; pid = strtok(NULL, ","))
            if (pid_count < 64)
                pids[pid_count++] = atoi(pid);
    } else if (!strcmp(key, "file"))
        file = value;
    else if (!strcmp(key, "port"))
        port = atoi(value);
    else if (!strcmp(key, "conns"))
        wanted = atoi(value);
    else if (!strcmp(key, "senders"))
        senders = atoi(value);
    else if (!strcmp(key, "parallel"))
        parallel = atoi(value);
    else if (!strcmp(key, "expect"))
        expect = atoi(value);
    else if (!strcmp(key, "status"))
        ok_status = atoi(value);
    else if (!strcmp(key, "content"))
        content_length = atoi(value);
    else if (!strcmp(key, "seconds"))
        seconds = atof(value);
    else if (!strcmp(key, "warm"))
        warm_seconds = atof(value);
    else if (!strcmp(key, "rate"))
        rate = atof(value);
    else if (!strcmp(key, "stride"))
        stride = atoi(value);
    else if (!strcmp(key, "typing"))
        typing = atof(value);
    else if (!strcmp(key, "watching"))
        watching = atof(value);
    else if (!strcmp(key, "look"))
        look = atof(value);
    else {
        fprintf(stderr, "load: no such option: %s\n", key);
        exit(2);
    }
}

int main(int count, char **words)
{
    for (int i = 2; i < count; i++) {
        char *value = strchr(words[i], '=');
        if (!value)
            return 2;
        *value = 0;
        option(words[i], value + 1);
    }
    if (count < 2 || !protocol || !file)
        return 2;
    read_lines();
    for (int i = 0; i < pid_count; i++)
        count_threads(pids[i]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    poller = epoll_create1(0);
    conns = calloc(wanted, sizeof *conns);
    for (int i = 0; i < wanted; i++)
        conns[i].fd = -1;
    if (!strcmp(words[1], "talk"))
        talk();
    else if (!strcmp(words[1], "http"))
        http();
    else if (!strcmp(words[1], "shake"))
        shake();
    else if (!strcmp(words[1], "hold"))
        hold();
    else
        return 2;
    return 0;
}
