/* A disk that fails: preloaded, it takes the place of libc's reads, writes and mkdir.

   FAULT=hang    reads never return
   FAULT=error   reads fail with EIO
   FAULT=full    writes fail with ENOSPC
   FAULT=sealed  no directory can be made (EPERM)

   That is so of files whose path matches a pattern (fnmatch), FAULT_PATH_0 in the first process of
   a run, FAULT_PATH_1 in the second; where the variable is unset, all goes well. The first
   FAULT_AFTER calls go well too, and all after the next FAULT_COUNT. What the main thread reads
   always goes well. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

static int fault_is(const char *name) {
    const char *given = getenv("FAULT");
    return given && !strcmp(given, name);
}

static int at_fault(const char *path) {
    const char *process = getenv("JAX_PROCESS_ID");
    char variable[64];
    snprintf(variable, sizeof variable, "FAULT_PATH_%s", process ? process : "0");
    const char *pattern = getenv(variable);
    if (!pattern || fnmatch(pattern, path, 0)) return 0;
    int beyond = atomic_fetch_add(&calls, 1) - atoi(getenv("FAULT_AFTER"));
    return 0 <= beyond && beyond < atoi(getenv("FAULT_COUNT"));
}

static int open_file_at_fault(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return at_fault(path);
}

static int read_fails(int fd) {
    int hangs = fault_is("hang");
    if (!(hangs || fault_is("error")) || gettid() == getpid() || !open_file_at_fault(fd)) return 0;
    while (hangs) pause();
    errno = EIO;
    return 1;
}

static int write_fails(int fd) {
    if (!fault_is("full") || !open_file_at_fault(fd)) return 0;
    errno = ENOSPC;
    return 1;
}

static int mkdir_fails(const char *path) {
    if (!fault_is("sealed") || !at_fault(path)) return 0;
    errno = EPERM;
    return 1;
}

#define INSTEAD_OF(type, name, fails, parameters, arguments)                      \
    type name parameters {                                                        \
        type(*real) parameters = dlsym(RTLD_NEXT, #name);                         \
        return fails ? -1 : real arguments;                                       \
    }
#define READ(name, parameters, arguments) \
    INSTEAD_OF(ssize_t, name, read_fails(fd), parameters, arguments)
#define WRITE(name, parameters, arguments) \
    INSTEAD_OF(ssize_t, name, write_fails(fd), parameters, arguments)

READ(read, (int fd, void *bytes, size_t count), (fd, bytes, count))
READ(pread, (int fd, void *bytes, size_t count, off_t at), (fd, bytes, count, at))
READ(pread64, (int fd, void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
WRITE(write, (int fd, const void *bytes, size_t count), (fd, bytes, count))
WRITE(writev, (int fd, const struct iovec *bytes, int count), (fd, bytes, count))
WRITE(pwrite, (int fd, const void *bytes, size_t count, off_t at), (fd, bytes, count, at))
WRITE(pwrite64, (int fd, const void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
INSTEAD_OF(int, mkdir, mkdir_fails(path), (const char *path, mode_t mode), (path, mode))
INSTEAD_OF(int, mkdirat, mkdir_fails(path), (int fd, const char *path, mode_t mode),
           (fd, path, mode))
