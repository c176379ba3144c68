/* A disk that fails on order, and remembers in which order it was told what. Loaded by LD_PRELOAD.
 *
 * Below one folder every call that changes a file or makes it durable is counted, written to a log, and may fail:
 *   K  the process dies at this call            E  EIO         N  ENOSPC
 *   S  half of a write, then ENOSPC             F  EIO at the next sync
 * The log is what a power cut is made from: of calls after the last sync nobody knows which arrived.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FILES 1024
static char folder[512], names[FILES][128];
static int log_fd = -1, starved;
static long calls, fail_at;
static char kind;

void disk_watch(const char *path, int log) { snprintf(folder, sizeof folder, "%s", path); log_fd = log; calls = 0; }
void disk_arm(long at, char what) { fail_at = at; kind = what; starved = 0; }
long disk_calls(void) { return calls; }

static void say(char op, const char *name, long offset, const void *data, size_t size) {
    char line[256];
    if (log_fd < 0) return;
    int length = snprintf(line, sizeof line, "%c %s %ld %zu\n", op, name, offset, size);
    syscall(SYS_write, log_fd, line, (size_t)length);
    if (size) syscall(SYS_write, log_fd, data, size);
}
void disk_note(const char *text) { say('N', text, 0, 0, 0); }

/* The name of a file below the folder, "." of the folder itself; NULL of all others. */
static const char *inside(const char *path) {
    size_t length = strlen(folder);
    if (!length || !path || strncmp(path, folder, length)) return 0;
    return path[length] == '/' ? path + length + 1 : path[length] ? 0 : ".";
}
static const char *name_of(int fd) { return fd >= 0 && fd < FILES && names[fd][0] ? names[fd] : 0; }

/* Counts a call; returns the errno that it is to fail with, -1 for half a write, 0 to go ahead. */
static int verdict(char op) {
    calls++;
    if (!fail_at || calls < fail_at) return 0;
    if (kind == 'K') { kill(getpid(), SIGKILL); pause(); }
    if (kind == 'S' ? op != 'W' : kind == 'F' ? op != 'S' : kind == 'N' && (op == 'S' || op == 'U')) return 0;
    fail_at = 0;
    if (kind == 'S') { starved = 1; return -1; }
    return kind == 'N' ? ENOSPC : EIO;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define FAIL(op, result) do { int e = verdict(op); if (e > 0) { errno = e; return result; } } while (0)

static int opened(int fd, const char *name, int created) {
    if (fd >= 0 && fd < FILES) snprintf(names[fd], sizeof names[fd], "%s", name ? name : "");
    if (fd >= 0 && name && created) say('O', name, 0, 0, 0);
    return fd;
}
#define OPEN(symbol) int symbol(const char *path, int flags, ...) { \
    REAL(int, symbol, const char *, int, ...); \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
    const char *name = inside(path); struct stat seen; \
    int created = name && (flags & O_CREAT) && stat(path, &seen) != 0; \
    if (created) FAIL('O', -1); \
    return opened(real(path, flags, mode), name, created); }
OPEN(open)
OPEN(open64)

int close(int fd) { REAL(int, close, int); if (fd >= 0 && fd < FILES) names[fd][0] = 0; return real(fd); }

#define PWRITE(symbol) ssize_t symbol(int fd, const void *data, size_t size, off_t offset) { \
    REAL(ssize_t, symbol, int, const void *, size_t, off_t); \
    const char *name = name_of(fd); \
    if (!name) return real(fd, data, size, offset); \
    if (starved) { starved = 0; errno = ENOSPC; return -1; } \
    int e = verdict('W'); \
    if (e > 0) { errno = e; return -1; } \
    ssize_t done = real(fd, data, e < 0 && size > 1 ? size / 2 : size, offset); \
    if (done > 0) say('W', name, offset, data, (size_t)done); \
    return done; }
PWRITE(pwrite)
PWRITE(pwrite64)

#define TRUNCATE(symbol) int symbol(int fd, off_t size) { \
    REAL(int, symbol, int, off_t); \
    const char *name = name_of(fd); \
    if (name) FAIL('T', -1); \
    int done = real(fd, size); \
    if (name && !done) say('T', name, size, 0, 0); \
    return done; }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define SYNC(symbol) int symbol(int fd) { \
    REAL(int, symbol, int); \
    const char *name = name_of(fd); \
    if (name) FAIL('S', -1); \
    int done = real(fd); \
    if (name && !done) say('S', name, 0, 0, 0); \
    return done; }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    const char *name = inside(path);
    if (name) FAIL('U', -1);
    int done = real(path);
    if (name && !done) say('U', name, 0, 0, 0);
    return done;
}
