/* The floor: a bare epoll loop in C. It knows just enough of WebSocket to send each message
 * to all members of its room (the path). No token, no storage, no ping, no limits.
 *
 * The messages of one turn of the loop go to each member in one write. Nothing is cheaper
 * without io_uring. The handshake leaves out the SHA-1, because the load generator does
 * not check the accept key. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

struct room {
    int number, count, space;
    struct conn **members;
    char *news; /* the frames of this turn */
    size_t length;
    struct room *next, *next_busy;
};

struct conn {
    int fd, place; /* its index among the members */
    struct room *room;
    char *in, *out; /* an incomplete frame; bytes that the kernel did not accept */
    size_t in_length, out_length;
};

static struct room *rooms[1 << 16], *busy;
static int poller;
static char buffer[1 << 18];

static struct room *room_of(int number)
{
    struct room **at = &rooms[number & 0xffff];
    while (*at && (*at)->number != number)
        at = &(*at)->next;
    if (!*at) {
        *at = calloc(1, sizeof **at);
        (*at)->number = number;
    }
    return *at;
}

static void watch(struct conn *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(poller, operation, c->fd, &event);
}

static void leave(struct conn *c)
{
    if (c->room) {
        struct conn *last = c->room->members[--c->room->count];
        c->room->members[c->place] = last;
        last->place = c->place;
    }
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void put(struct conn *c, const char *bytes, size_t length)
{
    ssize_t sent = c->out_length ? 0 : send(c->fd, bytes, length, MSG_NOSIGNAL);
    if (sent < 0)
        sent = errno == EAGAIN ? 0 : (ssize_t)length; /* the next read finds the error */
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
    if (sent < 0)
        return;
    memmove(c->out, c->out + sent, c->out_length - sent);
    if (!(c->out_length -= sent))
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void tell(struct room *room, const char *payload, size_t size)
{
    if (!room->length) {
        room->next_busy = busy;
        busy = room;
    }
    room->news = realloc(room->news, room->length + size + 4);
    char *at = room->news + room->length;
    *at++ = 0x81;
    if (size < 126)
        *at++ = size;
    else {
        *at++ = 126;
        *at++ = size >> 8;
        *at++ = size;
    }
    memcpy(at, payload, size);
    room->length = at + size - room->news;
}

static void enter(struct conn *c, int number)
{
    struct room *room = c->room = room_of(number);
    if (room->count == room->space)
        room->members = realloc(room->members,
                                (room->space += room->space + 4) * sizeof(void *));
    c->place = room->count++;
    room->members[c->place] = c;
}

/* Return how many of the bytes were whole frames, or -1 after a close frame. */
static ssize_t obey(struct conn *c, char *bytes, size_t length)
{
    static const char yes[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                              "Connection: Upgrade\r\n\r\n";
    char *at = bytes, *end = bytes + length;
    if (!c->room) {
        char *body = memmem(bytes, length, "\r\n\r\n", 4);
        if (!body)
            return 0;
        enter(c, atoi(bytes + 5)); /* GET /7 */
        put(c, yes, sizeof yes - 1);
        at = body + 4;
    }
    while (end - at >= 6) {
        size_t size = at[1] & 127, skip = 6;
        if (size == 126) {
            size = (unsigned char)at[2] << 8 | (unsigned char)at[3];
            skip = 8;
        }
        if ((size_t)(end - at) < skip + size)
            break;
        if ((at[0] & 15) == 8)
            return -1;
        char *key = at + skip - 4, *payload = at + skip;
        for (size_t i = 0; i < size; i++)
            payload[i] ^= key[i & 3];
        tell(c->room, payload, size);
        at += skip + size;
    }
    return at - bytes;
}

static void readable(struct conn *c)
{
    memcpy(buffer, c->in, c->in_length);
    ssize_t length = recv(c->fd, buffer + c->in_length, 65536, 0), taken;
    if (length < 0 && errno == EAGAIN)
        return;
    if (length <= 0 || (taken = obey(c, buffer, length += c->in_length)) < 0) {
        leave(c);
        return;
    }
    c->in_length = length - taken;
    if (c->in_length) {
        c->in = realloc(c->in, c->in_length);
        memcpy(c->in, buffer + taken, c->in_length);
    } else {
        free(c->in);
        c->in = NULL;
    }
}

int main(int count, char **words)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(0x7f000001)}};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), fd;
    if (count < 2)
        return 2;
    at.sin_port = htons(atoi(words[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) {
        perror("floor");
        return 1;
    }
    poller = epoll_create1(0);
    struct epoll_event events[512] = {{.events = EPOLLIN}};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, events);
    for (;;) {
        int ready = epoll_wait(poller, events, 512, -1);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    c = calloc(1, sizeof *c);
                    c->fd = fd;
                    watch(c, EPOLL_CTL_ADD, EPOLLIN);
                }
                continue;
            }
            if (events[i].events & EPOLLOUT)
                flush(c);
            if (events[i].events & ~EPOLLOUT)
                readable(c);
        }
        for (; busy; busy = busy->next_busy) {
            for (int i = 0; i < busy->count; i++)
                put(busy->members[i], busy->news, busy->length);
            busy->length = 0;
        }
    }
}
