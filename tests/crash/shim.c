/* Between a process and the C library: counts what it asks of the file system below one folder, and at one call kills
 * the process, tears the write, fails, falls short or waits. Everything that changes can be written to a log.
 *
 * Loaded with LD_PRELOAD and asleep until it is given a plan (`shim_arm`, or CRASH_PLAN in the environment, for what the
 * process starts): a file that is mapped into all processes that take part, which count together, so that whoever made
 * it sees the counts when they are dead.
 *
 * Flushing is never carried out below the folder. No process can tell whether it was; what a loss of power would
 * leave is worked out from the log, which has every flush.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MAKE = 1, DATA = 2, FLUSH = 4, READ = 8, LOOK = 16, CLOSE = 32, REMOVE = 64 }; /* classes of calls; plan.py has them too */
enum { PASS = 0, KILL = 1, TEAR = 2, FAIL = 3, SHORT = 4, EOF_ = 5, WAIT = 6, PAUSE = 7, NODE = 8, ORPHAN = 9 };
enum { CREATE = 1, WRITE, TRUNCATE, LINK, RENAME, UNLINK, MKDIR, RMDIR, SYMLINK, SYNC, TIMES };

struct plan {
    char root[1024]; /* calls on paths below it count */
    char log[1024];  /* the file that changes are written to; none if empty */
    char where[512]; /* out: the call that it happened to */
    uint32_t classes;
    int32_t action;
    int32_t error;        /* what FAIL returns */
    int32_t lasting;      /* 1: to every later call as well */
    int64_t at;           /* the call that it happens to, from 1; 0 for none */
    int64_t microseconds; /* how long WAIT waits */
    int64_t calls;        /* out: how many there were */
    int64_t hits;         /* out: how often it happened */
    int64_t go;           /* set by others: a process that paused goes on */
};

static struct plan *plan;
static int log_file = -1;
static size_t root_length;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* The plan -------------------------------------------------------------------------------------------------------- */

void shim_disarm(void) {
    plan = NULL;
    if (log_file >= 0) syscall(SYS_close, log_file);
    log_file = -1;
}

int shim_arm(const char *path) {
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return -1;
    struct plan *mapped = mmap(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (mapped == MAP_FAILED) return -1;
    root_length = strlen(mapped->root);
    if (mapped->log[0])
        log_file = (int)syscall(SYS_openat, AT_FDCWD, mapped->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    plan = mapped;
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CRASH_PLAN");
    if (path) shim_arm(path);
}

/* Paths ----------------------------------------------------------------------------------------------------------- */

static int under(const char *path) {
    return path && !strncmp(path, plan->root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void of_descriptor(int file, char *out) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
}

/* Make a path absolute, without `.` and `..`; links are left as they are. */
static void resolve(int folder, const char *path, char *out) {
    char whole[2 * PATH_MAX];
    if (!path || !plan) {
        out[0] = 0;
        return;
    }
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        char start[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, start, sizeof start) < 0) start[0] = 0;
        } else {
            of_descriptor(folder, start);
        }
        snprintf(whole, sizeof whole, "%s/%s", start, path);
    }
    char *end = out, *rest = whole, *part;
    while ((part = strsep(&rest, "/"))) {
        if (!*part || !strcmp(part, ".")) continue;
        if (!strcmp(part, "..")) {
            while (end > out && *--end != '/') {}
            continue;
        }
        size_t length = strlen(part);
        if (end + length + 2 > out + PATH_MAX) break;
        *end++ = '/';
        memcpy(end, part, length);
        end += length;
    }
    *end = 0;
}

/* What happens ---------------------------------------------------------------------------------------------------- */

static void kill_for_good(pid_t whom) {
    for (;;) {
        syscall(SYS_kill, whom, SIGKILL);
        syscall(SYS_sched_yield);
    }
}

static void die(void) { kill_for_good(getpid()); }

/* The rank leads the process group, of itself and of what it has started. */
static void die_together(void) { kill_for_good(0); }

static void bereave(void) {
    if (getpgrp() == getpid()) die();
    syscall(SYS_kill, getpgrp(), SIGKILL);
}

/* Count a call; return what shall happen to it, with errno set where it shall fail. */
static int met(uint32_t class, const char *call, const char *path, const char *other) {
    if (!plan || !(plan->classes & class) || !(under(path) || under(other))) return PASS;
    int64_t number = __atomic_add_fetch(&plan->calls, 1, __ATOMIC_SEQ_CST);
    if (!plan->at || !(number == plan->at || (plan->lasting && number > plan->at))) return PASS;
    if (__atomic_add_fetch(&plan->hits, 1, __ATOMIC_SEQ_CST) == 1)
        snprintf(plan->where, sizeof plan->where, "%s %s", call, under(path) ? path : other);
    switch (plan->action) {
    case KILL: die(); break;
    case NODE: die_together(); break;
    case ORPHAN: bereave(); return PASS;
    case TEAR:
        if (class != DATA) die();
        break;
    case FAIL: errno = plan->error; break;
    case PAUSE:
        while (!__atomic_load_n(&plan->go, __ATOMIC_SEQ_CST)) usleep(500);
        return PASS;
    case WAIT: {
        struct timespec time = {plan->microseconds / 1000000, plan->microseconds % 1000000 * 1000};
        nanosleep(&time, NULL);
        return PASS;
    }
    }
    return plan->action;
}

/* The log --------------------------------------------------------------------------------------------------------- */

static void enter(void) {
    if (log_file < 0) return;
    pthread_mutex_lock(&lock);
    syscall(SYS_flock, log_file, LOCK_EX);
}

static void leave(void) {
    if (log_file < 0) return;
    int kept = errno;
    syscall(SYS_flock, log_file, LOCK_UN);
    pthread_mutex_unlock(&lock);
    errno = kept;
}

struct __attribute__((packed)) record {
    uint8_t op;
    uint64_t inode;
    int64_t offset, length;
    uint16_t path, other;
};

static void append(const void *data, size_t length) {
    while (length) {
        ssize_t done = syscall(SYS_write, log_file, data, length);
        if (done <= 0) abort();
        data = (const char *)data + done;
        length -= (size_t)done;
    }
}

static void note(uint8_t op, uint64_t inode, int64_t offset, const void *data, int64_t length, const char *path,
                 const char *other) {
    if (log_file < 0 || !(under(path) || under(other))) return;
    int kept = errno;
    struct record record = {op,     inode, offset, length, (uint16_t)strlen(path ? path : ""),
                            (uint16_t)strlen(other ? other : "")};
    append(&record, sizeof record);
    append(path, record.path);
    append(other, record.other);
    if (data) append(data, (size_t)length);
    errno = kept;
}

/* What the kernel says of a file; asking the C library would be a call that counts. */
static int state_of(int file, struct stat *status) { return (int)syscall(SYS_fstat, file, status); }

static uint64_t inode_of(int file) {
    struct stat status;
    return state_of(file, &status) ? 0 : (uint64_t)status.st_ino;
}

static uint64_t inode_at(const char *path) {
    struct stat status;
    return syscall(SYS_newfstatat, AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) ? 0 : (uint64_t)status.st_ino;
}

/* Note a stretch of a file that has just been written, read back from there. */
static void note_data(int file, const char *path, int64_t offset, int64_t length) {
    if (log_file < 0 || length <= 0 || !under(path)) return;
    int kept = errno;
    char name[64], *data = malloc((size_t)length);
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    int again = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
    int64_t done = 0;
    while (again >= 0 && done < length) {
        ssize_t part = syscall(SYS_pread64, again, data + done, length - done, offset + done);
        if (part <= 0) break;
        done += part;
    }
    syscall(SYS_close, again);
    note(WRITE, inode_of(file), offset, data, done, path, NULL);
    free(data);
    errno = kept;
}

/* Opening --------------------------------------------------------------------------------------------------------- */

static uint32_t class_of(int flags) {
    return flags & (O_CREAT | O_TRUNC) && (flags & O_TMPFILE) != O_TMPFILE ? MAKE : READ;
}

static int opened(int folder, const char *path, int flags, mode_t mode, const char *call) {
    char whole[PATH_MAX];
    if (!plan) return (int)syscall(SYS_openat, folder, path, flags, mode);
    resolve(folder, path, whole);
    if (met(class_of(flags), call, whole, NULL) == FAIL) return -1;
    enter();
    uint64_t before = log_file >= 0 && flags & O_CREAT ? inode_at(whole) : 0;
    int file = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (file >= 0 && log_file >= 0 && under(whole)) {
        if (flags & O_CREAT && !before) note(CREATE, inode_of(file), 0, NULL, 0, whole, NULL);
        else if (flags & O_TRUNC) note(TRUNCATE, inode_of(file), 0, NULL, 0, whole, NULL);
    }
    leave();
    return file;
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {                                                     \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode, "open"); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode, "open"); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode, "open"); }
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags) return opened(folder, path, flags, mode, "open");
}
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0, "open"); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0, "open"); }
int __openat_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0, "open"); }
int __openat64_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0, "open"); }
int creat(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode, "creat");
}
int creat64(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode, "creat");
}

/* The C library opens a stream's file by itself: it is opened here, and the stream is made of that. */
static FILE *stream(const char *path, const char *mode) {
    int flags = mode[0] == 'r' ? O_RDONLY : O_WRONLY | O_CREAT | (mode[0] == 'w' ? O_TRUNC : O_APPEND);
    if (strchr(mode, '+')) flags = (flags & ~O_ACCMODE) | O_RDWR;
    if (strchr(mode, 'e')) flags |= O_CLOEXEC;
    if (strchr(mode, 'x')) flags |= O_EXCL;
    int file = opened(AT_FDCWD, path, flags, 0666, "fopen");
    return file < 0 ? NULL : fdopen(file, mode);
}
FILE *fopen(const char *path, const char *mode) {
    NEXT(fopen);
    return plan ? stream(path, mode) : next(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    NEXT(fopen64);
    return plan ? stream(path, mode) : next(path, mode);
}

int close(int file) {
    if (!plan || !(plan->classes & CLOSE)) return (int)syscall(SYS_close, file);
    char path[PATH_MAX];
    int flags = (int)syscall(SYS_fcntl, file, F_GETFL);
    of_descriptor(file, path);
    int what = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY ? met(CLOSE, "close", path, NULL) : PASS;
    int done = (int)syscall(SYS_close, file);
    if (what != FAIL) return done;
    errno = plan->error;
    return -1;
}

/* Writing --------------------------------------------------------------------------------------------------------- */

/* Begin a write of so many bytes; return how many of them it may write, -1 if it fails. */
static int64_t granted(int file, int64_t length, const char *call, char *path, int *deadly) {
    *deadly = 0;
    path[0] = 0;
    if (!plan) return length;
    of_descriptor(file, path);
    int what = met(DATA, call, path, NULL);
    if (what == FAIL) return -1;
    enter();
    *deadly = what == TEAR;
    return (what == TEAR || what == SHORT) && length > 1 ? length / 2 : length;
}

/* End a write that was granted: `at` is where it began, -1 for where the file's position was. */
static ssize_t wrote(int file, ssize_t done, int64_t at, const char *path, int deadly) {
    if (deadly) die();
    if (!plan) return done;
    if (done > 0 && log_file >= 0) {
        int64_t start = at >= 0 ? at : (int64_t)syscall(SYS_lseek, file, 0, SEEK_CUR) - done;
        note_data(file, path, start, done);
    }
    leave();
    return done;
}

#define WRITING(call, at, do, length)                                                                                  \
    char path[PATH_MAX];                                                                                               \
    int deadly;                                                                                                        \
    int64_t may = granted(file, (int64_t)(length), call, path, &deadly);                                               \
    if (may < 0) return -1;                                                                                            \
    return wrote(file, (do), at, path, deadly)

ssize_t write(int file, const void *data, size_t length) {
    WRITING("write", -1, syscall(SYS_write, file, data, may), length);
}
ssize_t pwrite(int file, const void *data, size_t length, off_t at) {
    WRITING("pwrite", at, syscall(SYS_pwrite64, file, data, may, at), length);
}
ssize_t pwrite64(int file, const void *data, size_t length, off_t at) { return pwrite(file, data, length, at); }

static int64_t total(const struct iovec *parts, int count) {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) sum += (int64_t)parts[i].iov_len;
    return sum;
}
/* Of several parts a write that falls short writes the first one alone, or half of a single one. */
static int fewer(struct iovec *kept, const struct iovec *parts, int count, int64_t may) {
    int used = 0;
    for (; used < count && may > 0; used++) {
        kept[used] = parts[used];
        if ((int64_t)kept[used].iov_len > may) kept[used].iov_len = (size_t)may;
        may -= (int64_t)kept[used].iov_len;
    }
    return used;
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    struct iovec kept[count > 0 ? count : 1];
    WRITING("writev", -1, syscall(SYS_writev, file, kept, fewer(kept, parts, count, may)), total(parts, count));
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    struct iovec kept[count > 0 ? count : 1];
    WRITING("pwritev", at, syscall(SYS_pwritev, file, kept, fewer(kept, parts, count, may), at, 0L), total(parts, count));
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off_t at) { return pwritev(file, parts, count, at); }
ssize_t pwritev2(int file, const struct iovec *parts, int count, off_t at, int flags) {
    struct iovec kept[count > 0 ? count : 1];
    WRITING("pwritev2", at, syscall(SYS_pwritev2, file, kept, fewer(kept, parts, count, may), at, 0L, flags),
            total(parts, count));
}
ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off_t at, int flags) {
    return pwritev2(file, parts, count, at, flags);
}
ssize_t copy_file_range(int from, off_t *start, int file, off_t *at, size_t length, unsigned flags) {
    int64_t there = at ? *at : -1;
    WRITING("copy_file_range", there, syscall(SYS_copy_file_range, from, start, file, at, may, flags), length);
}
ssize_t sendfile(int file, int from, off_t *start, size_t length) {
    WRITING("sendfile", -1, syscall(SYS_sendfile, file, from, start, may), length);
}
ssize_t sendfile64(int file, int from, off_t *start, size_t length) { return sendfile(file, from, start, length); }

int ioctl(int file, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    long argument = va_arg(rest, long);
    va_end(rest);
    if (!plan || (request != FICLONE && request != FICLONERANGE)) return (int)syscall(SYS_ioctl, file, request, argument);
    char path[PATH_MAX];
    of_descriptor(file, path);
    int what = met(DATA, "ioctl(FICLONE)", path, NULL);
    if (what == FAIL) return -1;
    if (what == TEAR) die();
    enter();
    int done = (int)syscall(SYS_ioctl, file, request, argument);
    struct stat status;
    if (!done && log_file >= 0 && !state_of(file, &status)) note_data(file, path, 0, status.st_size);
    leave();
    return done;
}

static int resized(int file, int64_t size, const char *call, long done_by, long mode, long at) {
    char path[PATH_MAX];
    if (plan) {
        of_descriptor(file, path);
        int what = met(DATA, call, path, NULL);
        if (what == FAIL) return -1;
        if (what == TEAR) die();
        enter();
    }
    int done = (int)(done_by == SYS_ftruncate ? syscall(SYS_ftruncate, file, size)
                                              : syscall(SYS_fallocate, file, mode, at, size));
    struct stat status;
    if (!done && plan && log_file >= 0 && !state_of(file, &status))
        note(TRUNCATE, (uint64_t)status.st_ino, status.st_size, NULL, 0, path, NULL);
    if (plan) leave();
    return done;
}
int ftruncate(int file, off_t size) { return resized(file, size, "ftruncate", SYS_ftruncate, 0, 0); }
int ftruncate64(int file, off_t size) { return resized(file, size, "ftruncate", SYS_ftruncate, 0, 0); }
int fallocate(int file, int mode, off_t at, off_t size) {
    return resized(file, size, "fallocate", SYS_fallocate, mode, at);
}
int fallocate64(int file, int mode, off_t at, off_t size) { return fallocate(file, mode, at, size); }
int posix_fallocate(int file, off_t at, off_t size) { return fallocate(file, 0, at, size) ? errno : 0; }
int posix_fallocate64(int file, off_t at, off_t size) { return posix_fallocate(file, at, size); }
int truncate(const char *path, off_t size) {
    int file = opened(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0, "open");
    if (file < 0) return -1;
    int done = ftruncate(file, size);
    syscall(SYS_close, file);
    return done;
}
int truncate64(const char *path, off_t size) { return truncate(path, size); }

/* Flushing -------------------------------------------------------------------------------------------------------- */

static int flushed(int file, const char *call, int (*next)(int)) {
    char path[PATH_MAX];
    if (!plan) return next(file);
    of_descriptor(file, path);
    if (met(FLUSH, call, path, NULL) == FAIL) return -1;
    if (!under(path)) return next(file);
    enter();
    note(SYNC, inode_of(file), 0, NULL, 0, path, NULL);
    leave();
    return 0;
}
int fsync(int file) {
    NEXT(fsync);
    return flushed(file, "fsync", next);
}
int fdatasync(int file) {
    NEXT(fdatasync);
    return flushed(file, "fdatasync", next);
}
static void flush_all(void) {
    if (!plan || met(FLUSH, "sync", plan->root, NULL) != PASS) return;
    enter();
    note(SYNC, 0, 0, NULL, 0, plan->root, NULL);
    leave();
}
void sync(void) { flush_all(); }
int syncfs(int file) {
    (void)file;
    flush_all();
    return 0;
}

/* Names ----------------------------------------------------------------------------------------------------------- */

static int named(const char *call, uint8_t op, int folder, const char *path, int other_folder, const char *other,
                 long number, long a, long b, long c, long d, long e) {
    if (!plan) return (int)syscall(number, a, b, c, d, e);
    char one[PATH_MAX], two[PATH_MAX];
    if (op == SYMLINK) snprintf(one, sizeof one, "%s", path);
    else resolve(folder, path, one);
    resolve(other_folder, other, two);
    uint32_t class = op == UNLINK || op == RMDIR ? REMOVE : MAKE;
    if (met(class, call, op == SYMLINK ? two : one, two) == FAIL) return -1;
    enter();
    int done = (int)syscall(number, a, b, c, d, e);
    if (!done) note(op, op == MKDIR || op == LINK ? inode_at(op == LINK ? two : one) : 0, 0, NULL, 0, one, two);
    leave();
    return done;
}
#define P(pointer) ((long)(pointer))

int rename(const char *a, const char *b) {
    return named("rename", RENAME, AT_FDCWD, a, AT_FDCWD, b, SYS_renameat2, AT_FDCWD, P(a), AT_FDCWD, P(b), 0);
}
int renameat(int fa, const char *a, int fb, const char *b) {
    return named("rename", RENAME, fa, a, fb, b, SYS_renameat2, fa, P(a), fb, P(b), 0);
}
int renameat2(int fa, const char *a, int fb, const char *b, unsigned flags) {
    return named("rename", RENAME, fa, a, fb, b, SYS_renameat2, fa, P(a), fb, P(b), (long)flags);
}
int link(const char *a, const char *b) {
    return named("link", LINK, AT_FDCWD, a, AT_FDCWD, b, SYS_linkat, AT_FDCWD, P(a), AT_FDCWD, P(b), 0);
}
int linkat(int fa, const char *a, int fb, const char *b, int flags) {
    return named("link", LINK, fa, a, fb, b, SYS_linkat, fa, P(a), fb, P(b), flags);
}
int symlink(const char *a, const char *b) {
    return named("symlink", SYMLINK, AT_FDCWD, a, AT_FDCWD, b, SYS_symlinkat, P(a), AT_FDCWD, P(b), 0, 0);
}
int symlinkat(const char *a, int fb, const char *b) {
    return named("symlink", SYMLINK, AT_FDCWD, a, fb, b, SYS_symlinkat, P(a), fb, P(b), 0, 0);
}
int unlink(const char *a) {
    return named("unlink", UNLINK, AT_FDCWD, a, AT_FDCWD, NULL, SYS_unlinkat, AT_FDCWD, P(a), 0, 0, 0);
}
int unlinkat(int fa, const char *a, int flags) {
    return named(flags & AT_REMOVEDIR ? "rmdir" : "unlink", flags & AT_REMOVEDIR ? RMDIR : UNLINK, fa, a, AT_FDCWD,
                 NULL, SYS_unlinkat, fa, P(a), flags, 0, 0);
}
int rmdir(const char *a) {
    return named("rmdir", RMDIR, AT_FDCWD, a, AT_FDCWD, NULL, SYS_unlinkat, AT_FDCWD, P(a), AT_REMOVEDIR, 0, 0);
}
int remove(const char *a) {
    struct stat status;
    int found = !syscall(SYS_newfstatat, AT_FDCWD, a, &status, AT_SYMLINK_NOFOLLOW);
    return found && S_ISDIR(status.st_mode) ? rmdir(a) : unlink(a);
}
int mkdir(const char *a, mode_t mode) {
    return named("mkdir", MKDIR, AT_FDCWD, a, AT_FDCWD, NULL, SYS_mkdirat, AT_FDCWD, P(a), (long)mode, 0, 0);
}
int mkdirat(int fa, const char *a, mode_t mode) {
    return named("mkdir", MKDIR, fa, a, AT_FDCWD, NULL, SYS_mkdirat, fa, P(a), (long)mode, 0, 0);
}

/* Reading and looking --------------------------------------------------------------------------------------------- */

static int64_t readable(int file, int64_t length, const char *call) {
    char path[PATH_MAX];
    if (!plan || !(plan->classes & READ)) return length;
    of_descriptor(file, path);
    switch (met(READ, call, path, NULL)) {
    case FAIL: return -1;
    case SHORT: return length > 1 ? length / 2 : length;
    case EOF_: return 0;
    }
    return length;
}
#define READING(call, do, length)                                                                                      \
    int64_t may = readable(file, (int64_t)(length), call);                                                             \
    if (may < 0) return -1;                                                                                            \
    return (do)

ssize_t read(int file, void *data, size_t length) { READING("read", syscall(SYS_read, file, data, may), length); }
ssize_t pread(int file, void *data, size_t length, off_t at) {
    READING("pread", syscall(SYS_pread64, file, data, may, at), length);
}
ssize_t pread64(int file, void *data, size_t length, off_t at) { return pread(file, data, length, at); }
ssize_t readv(int file, const struct iovec *parts, int count) {
    struct iovec kept[count > 0 ? count : 1];
    READING("readv", syscall(SYS_readv, file, kept, fewer(kept, parts, count, may)), total(parts, count));
}
ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) {
    struct iovec kept[count > 0 ? count : 1];
    READING("preadv", syscall(SYS_preadv, file, kept, fewer(kept, parts, count, may), at, 0L), total(parts, count));
}
ssize_t preadv64(int file, const struct iovec *parts, int count, off_t at) { return preadv(file, parts, count, at); }
ssize_t preadv2(int file, const struct iovec *parts, int count, off_t at, int flags) {
    struct iovec kept[count > 0 ? count : 1];
    READING("preadv2", syscall(SYS_preadv2, file, kept, fewer(kept, parts, count, may), at, 0L, flags),
            total(parts, count));
}
ssize_t preadv64v2(int file, const struct iovec *parts, int count, off_t at, int flags) {
    return preadv2(file, parts, count, at, flags);
}
void *mmap(void *start, size_t length, int protection, int flags, int file, off_t at) {
    if (plan && file >= 0) {
        char path[PATH_MAX];
        of_descriptor(file, path);
        uint32_t class = protection & PROT_WRITE && flags & MAP_SHARED ? DATA : READ;
        if (met(class, "mmap", path, NULL) == FAIL) return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, start, length, protection, flags, file, at);
}
void *mmap64(void *start, size_t length, int protection, int flags, int file, off_t at) {
    return mmap(start, length, protection, flags, file, at);
}

static int looked(const char *call, int folder, const char *path, int flags, struct stat *status) {
    char whole[PATH_MAX];
    if (plan && plan->classes & LOOK) {
        if (path && *path) resolve(folder, path, whole);
        else of_descriptor(folder, whole);
        if (met(LOOK, call, whole, NULL) == FAIL) return -1;
    }
    return (int)syscall(SYS_newfstatat, folder, path ? path : "", status, path ? flags : flags | AT_EMPTY_PATH);
}
#define S(status) ((struct stat *)(status))
int stat(const char *path, struct stat *status) { return looked("stat", AT_FDCWD, path, 0, status); }
int stat64(const char *path, struct stat64 *status) { return looked("stat", AT_FDCWD, path, 0, S(status)); }
int lstat(const char *path, struct stat *s) { return looked("lstat", AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, s); }
int lstat64(const char *path, struct stat64 *s) { return looked("lstat", AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, S(s)); }
int fstat(int file, struct stat *status) { return looked("fstat", file, NULL, 0, status); }
int fstat64(int file, struct stat64 *status) { return looked("fstat", file, NULL, 0, S(status)); }
int fstatat(int folder, const char *path, struct stat *s, int flags) { return looked("stat", folder, path, flags, s); }
int fstatat64(int folder, const char *path, struct stat64 *s, int flags) {
    return looked("stat", folder, path, flags, S(s));
}
/* What programs call that were built for a C library before 2.33. */
int __xstat(int v, const char *path, struct stat *s) { (void)v; return stat(path, s); }
int __xstat64(int v, const char *path, struct stat64 *s) { (void)v; return stat64(path, s); }
int __lxstat(int v, const char *path, struct stat *s) { (void)v; return lstat(path, s); }
int __lxstat64(int v, const char *path, struct stat64 *s) { (void)v; return lstat64(path, s); }
int __fxstat(int v, int file, struct stat *s) { (void)v; return fstat(file, s); }
int __fxstat64(int v, int file, struct stat64 *s) { (void)v; return fstat64(file, s); }
int __fxstatat(int v, int f, const char *path, struct stat *s, int flags) { (void)v; return fstatat(f, path, s, flags); }
int __fxstatat64(int v, int f, const char *path, struct stat64 *s, int flags) {
    (void)v;
    return fstatat64(f, path, s, flags);
}
int statx(int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict status) {
    char whole[PATH_MAX];
    if (plan && plan->classes & LOOK) {
        resolve(folder, path, whole);
        if (met(LOOK, "statx", whole, NULL) == FAIL) return -1;
    }
    return (int)syscall(SYS_statx, folder, path, flags, mask, status);
}
int faccessat(int folder, const char *path, int mode, int flags) {
    char whole[PATH_MAX];
    NEXT(faccessat);
    resolve(folder, path, whole);
    return met(LOOK, "access", whole, NULL) == FAIL ? -1 : next(folder, path, mode, flags);
}
int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }
DIR *opendir(const char *path) {
    char whole[PATH_MAX];
    NEXT(opendir);
    resolve(AT_FDCWD, path, whole);
    return met(LOOK, "opendir", whole, NULL) == FAIL ? NULL : next(path);
}

/* What else changes a file, without changing what is in it. */
static int touched(const char *call, int folder, const char *path) {
    char whole[PATH_MAX];
    if (!plan) return PASS;
    if (path) resolve(folder, path, whole);
    else of_descriptor(folder, whole);
    return met(MAKE, call, whole, NULL);
}
static int timed(int folder, const char *path, const struct timespec times[2], int flags) {
    if (touched("utimens", folder, path) == FAIL) return -1;
    enter();
    int done = (int)syscall(SYS_utimensat, folder, path, times, flags);
    struct stat status;
    if (!done && log_file >= 0 && !syscall(SYS_newfstatat, folder, path ? path : "", &status, path ? flags : AT_EMPTY_PATH)) {
        char whole[PATH_MAX];
        if (path) resolve(folder, path, whole);
        else of_descriptor(folder, whole);
        int64_t time = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
        note(TIMES, (uint64_t)status.st_ino, time, NULL, 0, whole, NULL);
    }
    leave();
    return done;
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    return timed(folder, path, times, flags);
}
int futimens(int file, const struct timespec times[2]) { return timed(file, NULL, times, 0); }
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    (void)flags;
    return touched("chmod", folder, path) == FAIL ? -1 : (int)syscall(SYS_fchmodat, folder, path, mode);
}
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
int fchmod(int file, mode_t mode) {
    return touched("chmod", file, NULL) == FAIL ? -1 : (int)syscall(SYS_fchmod, file, mode);
}
