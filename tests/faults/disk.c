/* A disk that fails: preloaded, it takes the place of libc's read and pread.

   Of reads from files whose path contains FAULT_PATH, by other threads than the main one, the first
   FAULT_AFTER go well, and the next FAULT_COUNT never return (FAULT=hang) or fail with EIO
   (FAULT=error). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_int reads;

static int fails(int fd) {
    char link[64], path[4096];
    const char *where = getenv("FAULT_PATH");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = where && gettid() != getpid() ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, where)) return 0;
    int beyond = atomic_fetch_add(&reads, 1) - atoi(getenv("FAULT_AFTER"));
    if (beyond < 0 || beyond >= atoi(getenv("FAULT_COUNT"))) return 0;
    while (!strcmp(getenv("FAULT"), "hang")) pause();
    errno = EIO;
    return 1;
}

ssize_t pread(int fd, void *bytes, size_t count, off_t at) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    return fails(fd) ? -1 : real(fd, bytes, count, at);
}

ssize_t pread64(int fd, void *bytes, size_t count, off_t at) {
    return pread(fd, bytes, count, at);
}

ssize_t read(int fd, void *bytes, size_t count) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    return fails(fd) ? -1 : real(fd, bytes, count);
}
