/* A disk that can lose its power and can fail, for one folder and one process.
 *
 * It is a library for LD_PRELOAD. It intercepts the system calls of the process on files
 * in $SHIM_FOLDER, and does two things. faults.py controls both.
 *
 * The shadow: $SHIM_SHADOW/INODE has each file as of its last fsync or fdatasync, and
 * $SHIM_SHADOW/entries has the names in the folder as of the folder's last fsync. A
 * power cut leaves at least that. As on Linux, a failed sync marks its pages clean: a
 * later sync writes such a page only if it was written again. $SHIM_SHADOW/dirty tells
 * a process what an earlier one, which was killed, left unsynced.
 *
 * A file with $SHIM_LIE in its name is never synced. The messages that are lost then show
 * that the model can fail. A sync takes $SHIM_SYNC_US microseconds.
 *
 * Faults: $SHIM_CONTROL is a file with a `struct control`, shared with faults.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FDS = 65536, PAGE = 4096 };
enum { OP_WRITE = 1, OP_SYNC = 2, OP_TRUNCATE = 4, OP_OPEN = 8, OP_READ = 16 };
enum { IS_DB = 1, IS_WAL = 2, IS_SHM = 4, IS_OTHER = 8, IS_FOLDER = 16 };

struct control {
    volatile int32_t ops;   /* the operations that fail; 0: none */
    volatile int32_t files; /* the kinds of files on which they fail */
    volatile int32_t error; /* the errno of a failure */
    volatile int32_t after; /* how many operations succeed first */
    volatile int32_t times; /* how many fail then; -1: all */
    volatile int32_t fired; /* how many have failed */
    volatile int32_t partly; /* a failing write writes half its bytes */
};

struct range { off_t from, to; struct range *next; };
struct file { ino_t inode; struct range *dirty; struct file *next; };

static struct control nothing, *control = &nothing;
static char folder[PATH_MAX], shadow[PATH_MAX];
static size_t folder_length;
static const char *lie;
static useconds_t sync_us;
static uint8_t kinds[FDS]; /* of each descriptor; 0: outside of the folder */
static uint8_t lying[FDS]; /* 1: never synced */
static struct file *files;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define NEXT(name) \
    static __typeof__(&name) real; \
    if (!real) real = REAL(name)

static ssize_t plain_pwrite(int fd, const void *data, size_t size, off_t at) {
    NEXT(pwrite64);
    return real(fd, data, size, at);
}

static ssize_t plain_pread(int fd, void *data, size_t size, off_t at) {
    NEXT(pread64);
    return real(fd, data, size, at);
}

static int plain_open(const char *path, int flags, mode_t mode) {
    NEXT(open64);
    return real(path, flags, mode);
}

/* --- the kind of a file --- */

static int kind_of(const char *path) {
    char full[PATH_MAX], where[PATH_MAX];
    const char *name = strrchr(path, '/');
    if (!folder_length) return 0;
    if (realpath(path, full) && !strcmp(full, folder)) return IS_FOLDER;
    snprintf(where, sizeof where, "%.*s", name ? (int)(name - path) + 1 : 1,
             name ? path : ".");
    if (!realpath(where, full) || strcmp(full, folder)) return 0;
    name = name ? name + 1 : path;
    size_t length = strlen(name);
    if (strstr(name, ".lock") || strstr(name, "secret")) return 0;
    if (length > 3 && !strcmp(name + length - 3, ".db")) return IS_DB;
    if (length > 4 && !strcmp(name + length - 4, "-wal")) return IS_WAL;
    if (length > 4 && !strcmp(name + length - 4, "-shm")) return IS_SHM;
    return IS_OTHER;
}

static int fails(int op, int kind) {
    int failed = 0;
    if (!kind || !(control->ops & op) || !(control->files & kind)) return 0;
    pthread_mutex_lock(&lock);
    if (control->after > 0) control->after--;
    else if (control->times) {
        if (control->times > 0) control->times--;
        control->fired++;
        failed = 1;
    }
    pthread_mutex_unlock(&lock);
    if (failed) errno = control->error;
    return failed;
}

static int kind(int fd) { return fd >= 0 && fd < FDS ? kinds[fd] : 0; }

static int opened(int fd, const char *path, int flags) {
    if (fd < 0 || fd >= FDS) return fd;
    /* open() gets the folder's path for a temporary file without a name. */
    int found = kind_of(path);
    int nameless = (flags & O_TMPFILE) == O_TMPFILE;
    kinds[fd] = found == IS_FOLDER && nameless ? IS_OTHER : found;
    lying[fd] = lie && strstr(path, lie) != NULL;
    return fd;
}

/* --- the shadow --- */

static struct file *file_of(ino_t inode) {
    struct file *file;
    for (file = files; file; file = file->next)
        if (file->inode == inode) return file;
    if (!(file = calloc(1, sizeof *file))) abort();
    file->inode = inode;
    file->next = files;
    return files = file;
}

/* The kernel writes whole pages. */
static void add_range(struct file *file, off_t from, off_t to) {
    struct range *range = file->dirty;
    from &= -PAGE;
    to = (to + PAGE - 1) & -PAGE;
    if (range && range->from <= from && from <= range->to) { /* usual: it continues */
        if (range->to < to) range->to = to;
        return;
    }
    if (!(range = malloc(sizeof *range))) abort();
    *range = (struct range){from, to, file->dirty};
    file->dirty = range;
}

static void mark_dirty(int fd, off_t from, size_t size) {
    struct stat about;
    if (!*shadow || kind(fd) == IS_FOLDER || fstat(fd, &about)) return;
    pthread_mutex_lock(&lock);
    add_range(file_of(about.st_ino), from, from + size);
    pthread_mutex_unlock(&lock);
}

/* After a failed sync: the pages are clean, and nothing writes them later. */
static void mark_clean(int fd) {
    char path[PATH_MAX + 32];
    struct stat about;
    struct range *range;
    int error = errno;
    if (!*shadow || fstat(fd, &about)) return;
    pthread_mutex_lock(&lock);
    struct file *file = file_of(about.st_ino);
    snprintf(path, sizeof path, "%s/forgotten", shadow);
    FILE *list = fopen(path, "a");
    if (!list) abort();
    while ((range = file->dirty)) {
        fprintf(list, "%lu %ld %ld\n", (unsigned long)file->inode, (long)range->from,
                (long)range->to);
        file->dirty = range->next;
        free(range);
    }
    fclose(list);
    pthread_mutex_unlock(&lock);
    errno = error;
}

/* Read the pages that an earlier process left unsynced. */
static void read_dirty(void) {
    char path[PATH_MAX + 32];
    unsigned long inode;
    long from, to;
    snprintf(path, sizeof path, "%s/dirty", shadow);
    FILE *list = fopen(path, "r");
    if (!list) return;
    while (fscanf(list, "%lu %ld %ld", &inode, &from, &to) == 3)
        add_range(file_of(inode), from, to);
    fclose(list);
}

static void copy_entries(void) {
    char path[PATH_MAX + 16], final[PATH_MAX + 16];
    struct dirent *entry;
    DIR *dir = opendir(folder);
    snprintf(path, sizeof path, "%s/entries.new", shadow);
    snprintf(final, sizeof final, "%s/entries", shadow);
    FILE *list = fopen(path, "w");
    if (!dir || !list) abort();
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.')
            fprintf(list, "%lu %s\n", (unsigned long)entry->d_ino, entry->d_name);
    closedir(dir);
    if (fclose(list) || rename(path, final)) abort();
}

/* After a good sync: copy the dirty pages to the shadow. */
static void update_shadow(int fd) {
    char path[PATH_MAX + 32];
    static char block[1 << 16];
    struct stat about;
    struct file *file;
    struct range *range;
    if (!*shadow || lying[fd]) return;
    pthread_mutex_lock(&lock);
    if (kind(fd) == IS_FOLDER) copy_entries();
    else if (!fstat(fd, &about)) {
        file = file_of(about.st_ino);
        snprintf(path, sizeof path, "%s/%lu", shadow, (unsigned long)file->inode);
        int to = plain_open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (to < 0 || ftruncate(to, about.st_size)) abort();
        while ((range = file->dirty)) {
            off_t at = range->from;
            while (at < range->to) {
                size_t left = range->to - at;
                size_t most = left < sizeof block ? left : sizeof block;
                ssize_t got = plain_pread(fd, block, most, at);
                if (got <= 0) break; /* the file was truncated since */
                if (plain_pwrite(to, block, got, at) != got) abort();
                at += got;
            }
            file->dirty = range->next;
            free(range);
        }
        close(to);
    }
    pthread_mutex_unlock(&lock);
}

/* A new file with the inode number of a removed one would get the old shadow. An open
 * descriptor keeps the number in use. */
static void keep_inode(const char *path) {
    if (*shadow && kind_of(path)) plain_open(path, O_RDONLY | O_CLOEXEC, 0);
}

/* --- the intercepted calls --- */

static mode_t mode_of(int flags, va_list more) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        NEXT(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = mode_of(flags, more); \
        va_end(more); \
        if (control->ops & OP_OPEN && fails(OP_OPEN, kind_of(path))) return -1; \
        return opened(real(path, flags, mode), path, flags); \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    NEXT(close);
    if (fd >= 0 && fd < FDS) kinds[fd] = lying[fd] = 0;
    return real(fd);
}

static ssize_t do_pwrite(int fd, const void *data, size_t size, off_t at) {
    int failed = fails(OP_WRITE, kind(fd)), error = errno;
    if (failed) size = control->partly ? size / 2 : 0;
    ssize_t written = failed && !size ? 0 : plain_pwrite(fd, data, size, at);
    if (written > 0 && kind(fd)) mark_dirty(fd, at, written);
    if (!failed) return written;
    errno = error;
    return -1;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return do_pwrite(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return do_pwrite(fd, data, size, at);
}

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    if (fails(OP_WRITE, kind(fd))) return -1;
    ssize_t written = real(fd, data, size);
    if (written > 0 && kind(fd))
        mark_dirty(fd, lseek(fd, 0, SEEK_CUR) - written, written);
    return written;
}

#define PREAD(name) \
    ssize_t name(int fd, void *data, size_t size, off_t at) { \
        NEXT(name); \
        if (fails(OP_READ, kind(fd))) return -1; \
        return real(fd, data, size, at); \
    }
PREAD(pread)
PREAD(pread64)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        NEXT(name); \
        struct stat about; \
        if (fails(OP_TRUNCATE, kind(fd))) return -1; \
        if (kind(fd) && !fstat(fd, &about) && about.st_size > size) \
            mark_dirty(fd, size, about.st_size - size); \
        return real(fd, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define SYNC(name) \
    int name(int fd) { \
        NEXT(name); \
        if (!kind(fd)) return real(fd); \
        if (fails(OP_SYNC, kind(fd))) { \
            mark_clean(fd); \
            return -1; \
        } \
        usleep(sync_us / 2); \
        update_shadow(fd); \
        usleep(sync_us / 2); \
        return 0; \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    NEXT(unlink);
    keep_inode(path);
    return real(path);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    keep_inode(to);
    return real(from, to);
}

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("SHIM_FOLDER");
    if (!name || !realpath(name, folder)) return;
    folder_length = strlen(folder);
    if ((name = getenv("SHIM_SHADOW")) && !realpath(name, shadow)) abort();
    lie = getenv("SHIM_LIE");
    if ((name = getenv("SHIM_SYNC_US"))) sync_us = atoi(name);
    if ((name = getenv("SHIM_CONTROL"))) {
        int fd = plain_open(name, O_RDWR | O_CLOEXEC, 0);
        if (fd < 0) abort();
        control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (control == MAP_FAILED) abort();
        close(fd);
    }
    if (*shadow) read_dirty();
}
