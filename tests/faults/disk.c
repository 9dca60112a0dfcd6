/* A disk that fails: preloaded, it takes the place of libc's reads and writes.

   Of reads (FAULT=hang, error) or writes (FAULT=full) of files whose path contains FAULT_PATH, the
   first FAULT_AFTER go well, and the next FAULT_COUNT never return or fail with EIO or ENOSPC. What
   the main thread reads, and all of other processes than FAULT_PROCESS, always goes well. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

static int is(const char *name, const char *value) {
    const char *given = getenv(name);
    return given && !strcmp(given, value);
}

static int fails(int fd, int writes) {
    char link[64], path[4096];
    const char *where = getenv("FAULT_PATH"), *process = getenv("FAULT_PROCESS");
    if (!where || is("FAULT", "full") != writes || (!writes && gettid() == getpid())) return 0;
    if (process && !is("JAX_PROCESS_ID", process)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, where)) return 0;
    int beyond = atomic_fetch_add(&calls, 1) - atoi(getenv("FAULT_AFTER"));
    if (beyond < 0 || beyond >= atoi(getenv("FAULT_COUNT"))) return 0;
    while (is("FAULT", "hang")) pause();
    errno = writes ? ENOSPC : EIO;
    return 1;
}

#define INSTEAD_OF(name, writes, parameters, arguments)                           \
    ssize_t name parameters {                                                     \
        ssize_t(*real) parameters = dlsym(RTLD_NEXT, #name);                      \
        return fails(fd, writes) ? -1 : real arguments;                           \
    }

INSTEAD_OF(read, 0, (int fd, void *bytes, size_t count), (fd, bytes, count))
INSTEAD_OF(pread, 0, (int fd, void *bytes, size_t count, off_t at), (fd, bytes, count, at))
INSTEAD_OF(pread64, 0, (int fd, void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
INSTEAD_OF(write, 1, (int fd, const void *bytes, size_t count), (fd, bytes, count))
INSTEAD_OF(writev, 1, (int fd, const struct iovec *bytes, int count), (fd, bytes, count))
INSTEAD_OF(pwrite, 1, (int fd, const void *bytes, size_t count, off_t at), (fd, bytes, count, at))
INSTEAD_OF(pwrite64, 1, (int fd, const void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
