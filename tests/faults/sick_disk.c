/* A disk below the folder $SICK that fails while the file $SICK.fault stands, in every process that has this preloaded.
 *
 * The file names an errno and the calls that fail with it: O open for writing, W write, S sync, R rename and unlink.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether a call on a path fails now; sets errno. */
static int fails(const char *path, char call) {
    const char *folder = getenv("SICK");
    char file[512], text[64] = "";
    if (!folder || !path || strncmp(path, folder, strlen(folder)) || path[strlen(folder)] == '.') return 0;
    snprintf(file, sizeof file, "%s.fault", folder);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY);
    if (fd < 0) return 0;
    long size = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    if (size <= 0 || !strchr(text, call)) return 0;
    errno = atoi(text);
    return 1;
}
static int fd_fails(int fd, char call) {
    char link[64], path[512];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(path, call);
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define OPEN(symbol) int symbol(const char *path, int flags, ...) { \
    REAL(int, symbol, const char *, int, ...); \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path, 'O')) return -1; \
    return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    return fd > 2 && fd_fails(fd, 'W') ? -1 : real(fd, data, size);
}
#define PWRITE(symbol) ssize_t symbol(int fd, const void *data, size_t size, off_t offset) { \
    REAL(ssize_t, symbol, int, const void *, size_t, off_t); \
    return fd_fails(fd, 'W') ? -1 : real(fd, data, size, offset); }
PWRITE(pwrite)
PWRITE(pwrite64)
#define SYNC(symbol) int symbol(int fd) { \
    REAL(int, symbol, int); \
    return fd_fails(fd, 'S') ? -1 : real(fd); }
SYNC(fsync)
SYNC(fdatasync)
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return fails(to, 'R') ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    return fails(path, 'R') ? -1 : real(path);
}
