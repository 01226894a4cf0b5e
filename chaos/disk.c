/* A disk, and a clock, that fail at a chosen moment. Loaded by LD_PRELOAD into every process of one try.

   Counted are the calls that change files below CHAOS_ROOT, made by the process that was started as
   `python -m CHAOS_MODULE`; with CHAOS_WITHIN only on paths that hold this text.

     CHAOS_MODE=trace   a line a call goes to CHAOS_LOG: module, number, call, path
     CHAOS_MODE=kill    SIGKILL in the middle of call CHAOS_AT: half of a write is written
     CHAOS_MODE=full    from call CHAOS_AT on nothing that takes space succeeds (ENOSPC)
     CHAOS_MODE=error   call CHAOS_AT fails with EIO
     CHAOS_MODE=short   from call CHAOS_AT on every write takes only half of what it is given

   What struck goes to CHAOS_LOG as well. CHAOS_CLOCK_S shifts the wall clock of all processes, by seconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum mode { OFF, TRACE, KILL, FULL, ERROR, SHORT };
enum answer { GO_ON, FAIL, HALF, DIE };

static enum mode mode;
static long at, clock_s;
static const char *root, *within, *log_file;
static char module[100];
static atomic_long calls;
static atomic_int told;

#define REAL(name)                                                                                                     \
    static __typeof__(&name) real;                                                                                     \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
    static const char *const names[] = {"off", "trace", "kill", "full", "error", "short"};
    const char *wanted = getenv("CHAOS_MODE"), *only = getenv("CHAOS_MODULE");
    if (getenv("CHAOS_CLOCK_S")) clock_s = atol(getenv("CHAOS_CLOCK_S"));
    root = getenv("CHAOS_ROOT"), within = getenv("CHAOS_WITHIN"), log_file = getenv("CHAOS_LOG");
    if (!wanted || !root || !log_file) return;
    if (getenv("CHAOS_AT")) at = atol(getenv("CHAOS_AT"));
    char line[4096];
    int file = open("/proc/self/cmdline", O_RDONLY);
    ssize_t size = file < 0 ? 0 : read(file, line, sizeof line - 1);
    if (file >= 0) close(file);
    line[size > 0 ? size : 0] = 0;
    for (char *word = line; word < line + size; word += strlen(word) + 1)
        if (!strcmp(word, "-m") && word + 3 < line + size) {
            snprintf(module, sizeof module, "%s", word + 3);
            break;
        }
    if (!*module || (only && strcmp(only, module))) return;
    for (int i = TRACE; i <= SHORT; i++)
        if (!strcmp(wanted, names[i])) mode = i;
}

static void tell(long number, const char *call, const char *path) {
    char line[PATH_MAX + 200];
    int size = snprintf(line, sizeof line, "%s %ld %s %s\n", module, number, call, path);
    int file = syscall(SYS_openat, AT_FDCWD, log_file, O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (syscall(SYS_write, file, line, size) < 0) abort();
    syscall(SYS_close, file);
}

/* What happens to this call; `takes_space`: whether it needs room on the disk; `divisible`: whether it can end halfway. */
static enum answer judge(const char *call, const char *path, int takes_space, int divisible) {
    if (mode == OFF || strncmp(path, root, strlen(root)) || (within && !strstr(path, within))) return GO_ON;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (mode == TRACE) tell(number, call, path);
    if (mode == TRACE || number < at || (number > at && (mode == KILL || mode == ERROR))) return GO_ON;
    if ((mode == FULL && !takes_space) || (mode == SHORT && !divisible)) return GO_ON;
    if (!atomic_exchange(&told, 1)) tell(number, call, path);
    if (mode == KILL && divisible) return DIE;
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == SHORT) return HALF;
    errno = mode == FULL ? ENOSPC : EIO;
    return FAIL;
}

static enum answer judge_fd(const char *call, int fd, int takes_space, int divisible) {
    if (mode == OFF) return GO_ON;
    int before = errno;
    char link[40], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size > 0 ? size : 0] = 0;
    errno = before;
    return judge(call, path, takes_space, divisible);
}

static enum answer judge_at(const char *call, int folder, const char *name, int takes_space) {
    if (mode == OFF || !name) return GO_ON;
    int before = errno;
    char link[40], path[2 * PATH_MAX] = "";
    if (*name != '/') {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, path, PATH_MAX - 1);
        path[size > 0 ? size : 0] = 0;
        strcat(path, "/");
    }
    strncat(path, name, PATH_MAX - 1);
    errno = before;
    return judge(call, path, takes_space, 0);
}

/* Calls that move bytes: with HALF and DIE they move half of them. */
#define MOVES(result, name, arguments, fd, size, real_half, real_whole)                                                \
    result name arguments {                                                                                            \
        REAL(name);                                                                                                    \
        enum answer answer = judge_fd(#name, fd, 1, (size) > 1);                                                       \
        if (answer == FAIL) return -1;                                                                                 \
        result moved = answer == GO_ON ? real_whole : real_half;                                                       \
        if (answer == DIE) kill(getpid(), SIGKILL);                                                                    \
        return moved;                                                                                                  \
    }
MOVES(ssize_t, write, (int fd, const void *from, size_t n), fd, n, real(fd, from, n / 2), real(fd, from, n))
MOVES(ssize_t, pwrite, (int fd, const void *from, size_t n, off_t o), fd, n, real(fd, from, n / 2, o), real(fd, from, n, o))
MOVES(ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t o), fd, n, real(fd, from, n / 2, o), real(fd, from, n, o))
MOVES(ssize_t, sendfile, (int to, int fd, off_t *o, size_t n), to, n, real(to, fd, o, n / 2), real(to, fd, o, n))
MOVES(ssize_t, sendfile64, (int to, int fd, off64_t *o, size_t n), to, n, real(to, fd, o, n / 2), real(to, fd, o, n))
MOVES(ssize_t, writev, (int fd, const struct iovec *v, int n), fd, n, real(fd, v, n / 2), real(fd, v, n))
MOVES(ssize_t, copy_file_range, (int fd, off64_t *o, int to, off64_t *p, size_t n, unsigned f), to, n,
      real(fd, o, to, p, n / 2, f), real(fd, o, to, p, n, f))

#define ON_FD(name, arguments, fd, takes_space, call)                                                                  \
    int name arguments {                                                                                               \
        REAL(name);                                                                                                    \
        return judge_fd(#name, fd, takes_space, 0) == FAIL ? -1 : real call;                                           \
    }
ON_FD(fsync, (int fd), fd, 0, (fd))
ON_FD(fdatasync, (int fd), fd, 0, (fd))
ON_FD(ftruncate, (int fd, off_t n), fd, 0, (fd, n))
ON_FD(ftruncate64, (int fd, off64_t n), fd, 0, (fd, n))

#define ON_PATH(name, arguments, folder, path, takes_space, call)                                                      \
    int name arguments {                                                                                               \
        REAL(name);                                                                                                    \
        return judge_at(#name, folder, path, takes_space) == FAIL ? -1 : real call;                                    \
    }
ON_PATH(rename, (const char *a, const char *b), AT_FDCWD, b, 0, (a, b))
ON_PATH(renameat, (int d, const char *a, int e, const char *b), e, b, 0, (d, a, e, b))
ON_PATH(renameat2, (int d, const char *a, int e, const char *b, unsigned f), e, b, 0, (d, a, e, b, f))
ON_PATH(link, (const char *a, const char *b), AT_FDCWD, b, 1, (a, b))
ON_PATH(linkat, (int d, const char *a, int e, const char *b, int f), e, b, 1, (d, a, e, b, f))
ON_PATH(unlink, (const char *a), AT_FDCWD, a, 0, (a))
ON_PATH(unlinkat, (int d, const char *a, int f), d, a, 0, (d, a, f))
ON_PATH(rmdir, (const char *a), AT_FDCWD, a, 0, (a))
ON_PATH(mkdir, (const char *a, mode_t m), AT_FDCWD, a, 1, (a, m))
ON_PATH(mkdirat, (int d, const char *a, mode_t m), d, a, 1, (d, a, m))

/* Opening counts when it may create a file. */
#define OPENS(name, arguments, folder, path, call)                                                                     \
    int name arguments {                                                                                               \
        REAL(name);                                                                                                    \
        mode_t m = 0;                                                                                                  \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                                         \
            va_list more;                                                                                              \
            va_start(more, flags);                                                                                     \
            m = va_arg(more, mode_t);                                                                                  \
            va_end(more);                                                                                              \
        }                                                                                                              \
        return flags & O_CREAT && judge_at(#name, folder, path, 1) == FAIL ? -1 : real call;                           \
    }
OPENS(open, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, m))
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, m))
OPENS(openat, (int folder, const char *path, int flags, ...), folder, path, (folder, path, flags, m))
OPENS(openat64, (int folder, const char *path, int flags, ...), folder, path, (folder, path, flags, m))

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict into, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec, into->tv_usec = now.tv_nsec / 1000;
    return 0;
}

int clock_gettime(clockid_t which, struct timespec *into) {
    REAL(clock_gettime);
    int done = real(which, into);
    if (!done && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) into->tv_sec += clock_s;
    return done;
}
