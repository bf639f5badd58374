#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "copy.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older kernels answer EINVAL and fault page by page */
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif
#ifndef PR_SET_PTRACER
#define PR_SET_PTRACER 0x59616d61
#endif

#define LEVELS 3
#define PAGE ((int64_t)4096)       /* only a rounding unit: real pages may be larger */
#define SCRATCH ((int64_t)1 << 18) /* fits a core's L2 cache */
#define DIRECT 512                 /* runs shorter than this go through scratch memory when read from elsewhere */
#define STREAM ((int64_t)1 << 20)  /* calls that move less leave their bytes in the cache */
#define IOVECS 1024                /* UIO_MAXIOV of the kernel */

/* One row of a batch, simplified: levels[0] is outermost, count > 1 everywhere, run as long as it gets. */
struct level {
    int64_t count, src_step, dst_step;
};

struct row {
    int64_t src, dst, run;
    int levels;
    struct level level[LEVELS];
};

struct columns {
    const int64_t *src, *dst, *run, *count, *src_step, *dst_step;
};

static inline char *at(int64_t address)
{
    return (char *)(intptr_t)address;
}

/* Row i without levels of count 1, and with innermost levels that only continue the run folded into it.
   A row that moves nothing gets run 0. */
static struct row row_of(const struct columns *c, int64_t i)
{
    struct row row = {.src = c->src[i], .dst = c->dst[i], .run = c->run[i] > 0 ? c->run[i] : 0, .levels = 0};
    for (int64_t k = LEVELS * i; k < LEVELS * (i + 1); k++) {
        if (c->count[k] < 1)
            row.run = 0;
        if (c->count[k] > 1)
            row.level[row.levels++] = (struct level){c->count[k], c->src_step[k], c->dst_step[k]};
    }
    while (row.levels > 0) {
        struct level inner = row.level[row.levels - 1];
        if (inner.src_step != row.run || inner.dst_step != row.run)
            break;
        row.run *= inner.count;
        row.levels--;
    }
    return row;
}

static int64_t row_bytes(const struct row *row)
{
    int64_t bytes = row->run;
    for (int k = 0; k < row->levels; k++)
        bytes *= row->level[k].count;
    return bytes;
}

enum side { SOURCE, DESTINATION };

/* Lowest byte, and one past the highest, on one side. */
static void row_extent(const struct row *row, enum side side, int64_t *low, int64_t *high)
{
    *low = side == SOURCE ? row->src : row->dst;
    *high = *low + row->run;
    for (int k = 0; k < row->levels; k++) {
        const struct level *l = &row->level[k];
        int64_t reach = (l->count - 1) * (side == SOURCE ? l->src_step : l->dst_step);
        if (reach < 0)
            *low += reach;
        else
            *high += reach;
    }
}



#ifdef __SSE2__
/* memcpy that doesn't read the destination's cache lines before overwriting them (a third less memory traffic).
   The caller issues the fence. */
static void stream(char *dst, const char *src, int64_t nbytes)
{
    int64_t head = -(intptr_t)dst & 63;
    memcpy(dst, src, (size_t)head);
    dst += head, src += head, nbytes -= head;
    for (; nbytes >= 64; nbytes -= 64, dst += 64, src += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)src), b = _mm_loadu_si128((const __m128i *)(src + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(src + 32)), d = _mm_loadu_si128((const __m128i *)(src + 48));
        _mm_stream_si128((__m128i *)dst, a), _mm_stream_si128((__m128i *)(dst + 16), b);
        _mm_stream_si128((__m128i *)(dst + 32), c), _mm_stream_si128((__m128i *)(dst + 48), d);
    }
    memcpy(dst, src, (size_t)nbytes);
}
#define FENCE() _mm_sfence()
#else
static void stream(char *dst, const char *src, int64_t nbytes)
{
    memcpy(dst, src, (size_t)nbytes);
}
#define FENCE() ((void)0)
#endif

static inline void move(char *dst, const char *src, int64_t run, int streaming)
{
    if (streaming && run >= 2048)
        stream(dst, src, run);
    else
        memcpy(dst, src, (size_t)run);
}

/* One level of elements of a size the compiler knows: loads and stores instead of calls. */
#define ELEMENTS(SIZE)                                                                                                 \
    static void elements_##SIZE(char *dst, const char *src, struct level l)                                            \
    {                                                                                                                  \
        for (int64_t i = 0; i < l.count; i++, dst += l.dst_step, src += l.src_step)                                    \
            memcpy(dst, src, SIZE);                                                                                    \
    }
ELEMENTS(1)
ELEMENTS(2)
ELEMENTS(4)
ELEMENTS(8)

static void line(char *dst, const char *src, int64_t run, struct level l, int streaming)
{
    switch (run) {
    case 1: elements_1(dst, src, l); return;
    case 2: elements_2(dst, src, l); return;
    case 4: elements_4(dst, src, l); return;
    case 8: elements_8(dst, src, l); return;
    }
    for (int64_t i = 0; i < l.count; i++, dst += l.dst_step, src += l.src_step)
        move(dst, src, run, streaming);
}

/* Two levels. Elements go in tiles of 64 x 64, so that a transpose uses each cache line it touches entirely. */
static void plane(char *dst, const char *src, int64_t run, struct level outer, struct level inner, int streaming)
{
    int64_t tile = run <= 8 && outer.count > 1 ? 64 : INT64_MAX;
    for (int64_t a = 0; a < outer.count; a += tile) {
        int64_t rows = outer.count - a < tile ? outer.count - a : tile;
        for (int64_t b = 0; b < inner.count; b += tile) {
            struct level part = {inner.count - b < tile ? inner.count - b : tile, inner.src_step, inner.dst_step};
            char *d = dst + a * outer.dst_step + b * inner.dst_step;
            const char *s = src + a * outer.src_step + b * inner.src_step;
            for (int64_t i = 0; i < rows; i++, d += outer.dst_step, s += outer.src_step)
                line(d, s, run, part, streaming);
            if (tile > inner.count)
                break;
        }
        if (tile > outer.count)
            break;
    }
}

static void copy_row(const struct row *row, int streaming)
{
    const struct level *l = row->level;
    if (row->run == 0)
        return;
    switch (row->levels) {
    case 0: move(at(row->dst), at(row->src), row->run, streaming); return;
    case 1: line(at(row->dst), at(row->src), row->run, l[0], streaming); return;
    case 2: plane(at(row->dst), at(row->src), row->run, l[0], l[1], streaming); return;
    }
    for (int64_t a = 0; a < l[0].count; a++)
        plane(at(row->dst + a * l[0].dst_step), at(row->src + a * l[0].src_step), row->run, l[1], l[2], streaming);
}

static int worth_streaming(const struct columns *c, int64_t n)
{
    int64_t bytes = 0;
    for (int64_t i = 0; i < n && bytes < STREAM; i++)
        bytes += c->run[i] * c->count[LEVELS * i] * c->count[LEVELS * i + 1] * c->count[LEVELS * i + 2];
    return bytes >= STREAM;
}

static void copy_all(int64_t n, const struct columns *c)
{
    int streaming = worth_streaming(c, n);
    for (int64_t i = 0; i < n; i++) {
        struct row row = row_of(c, i);
        copy_row(&row, streaming);
    }
    if (streaming)
        FENCE();
}

/* Whether the page at `address` has memory yet. */
static int resident(int64_t address)
{
    unsigned char answer = 1;
    (void)mincore(at(address & ~(PAGE - 1)), 1, &answer);
    return answer & 1;
}

/* Fill the page tables of one stretch in one system call: of a source instead of a fault for every 16 pages, of untouched
   destination memory instead of a fault for each (5.2 instead of 4.1 GB/s on two threads). Stretches that are short or
   thinly used are left to faults. */
static void populate(enum side side, int64_t low, int64_t high, int64_t used)
{
    if (high - low < 16 * PAGE || used * 8 < high - low)
        return;
    if (side == DESTINATION && resident(low) && resident(high - 1))
        return;
    low &= ~(PAGE - 1);
    (void)madvise(at(low), (size_t)(high - low), side == SOURCE ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
}

/* Populate one side of all rows, neighbours together. *low and *high become the extent of it all. */
static void prepare(int64_t n, const struct columns *c, enum side side, int64_t *low, int64_t *high)
{
    int64_t from = 0, to = 0, used = 0;
    *low = INT64_MAX, *high = INT64_MIN;
    for (int64_t i = 0; i < n; i++) {
        struct row row = row_of(c, i);
        int64_t a, b;
        row_extent(&row, side, &a, &b);
        *low = a < *low ? a : *low;
        *high = b > *high ? b : *high;
        if (a < from || a > to + PAGE) { /* not the continuation of the stretch so far */
            populate(side, from, to, used);
            from = a, to = b, used = 0;
        }
        to = b > to ? b : to;
        used += row_bytes(&row);
    }
    populate(side, from, to, used);
}

void peerload_copy(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                   const int64_t *count, const int64_t *src_step, const int64_t *dst_step)
{
    struct columns c = {src, dst, run, count, src_step, dst_step};
    int64_t low, high;
    prepare(n, &c, DESTINATION, &low, &high);
    copy_all(n, &c);
}

void peerload_copy_mapped(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                          const int64_t *count, const int64_t *src_step, const int64_t *dst_step)
{
    struct columns c = {src, dst, run, count, src_step, dst_step};
    int64_t low, high;
    prepare(n, &c, DESTINATION, &low, &high);
    prepare(n, &c, SOURCE, &low, &high);
    copy_all(n, &c);
    if (low < high) /* one call, for each costs an interrupt on every core that runs a thread of ours */
        (void)madvise(at(low & ~(PAGE - 1)), (size_t)(high - (low & ~(PAGE - 1))), MADV_DONTNEED);
}

struct reader {
    int (*fetch)(struct reader *);
    int handle; /* process id or file descriptor */
    int64_t done;
    char *scratch;
    int waiting; /* runs in local and remote */
    struct iovec local[IOVECS], remote[IOVECS];
};

/* Drop the first `moved` bytes from the waiting runs. */
static int advance(const struct reader *r, int first, int64_t moved, struct iovec *local, struct iovec *remote)
{
    while (first < r->waiting && moved >= (int64_t)local[first].iov_len)
        moved -= (int64_t)local[first++].iov_len;
    if (moved > 0) {
        local[first].iov_base = (char *)local[first].iov_base + moved;
        local[first].iov_len -= (size_t)moved;
        remote[first].iov_base = (char *)remote[first].iov_base + moved;
        remote[first].iov_len -= (size_t)moved;
    }
    return first;
}

static int fetch_process(struct reader *r)
{
    for (int first = 0; first < r->waiting;) {
        unsigned long left = (unsigned long)(r->waiting - first);
        ssize_t moved = process_vm_readv(r->handle, r->local + first, left, r->remote + first, left, 0);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? errno : EIO;
        r->done += moved;
        first = advance(r, first, moved, r->local, r->remote);
    }
    return 0;
}

static int fetch_file(struct reader *r)
{
    for (int first = 0; first < r->waiting;) {
        int next = first + 1; /* runs that follow each other in the file are one request */
        while (next < r->waiting &&
               (char *)r->remote[next - 1].iov_base + r->remote[next - 1].iov_len == (char *)r->remote[next].iov_base)
            next++;
        ssize_t moved = preadv(r->handle, r->local + first, next - first, (off_t)(intptr_t)r->remote[first].iov_base);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? errno : ENODATA;
        r->done += moved;
        first = advance(r, first, moved, r->local, r->remote);
    }
    return 0;
}

static int flush(struct reader *r)
{
    int error = r->fetch(r);
    r->waiting = 0;
    return error;
}

static int enqueue(struct reader *r, int64_t src, int64_t dst, int64_t nbytes)
{
    r->local[r->waiting] = (struct iovec){at(dst), (size_t)nbytes};
    r->remote[r->waiting++] = (struct iovec){at(src), (size_t)nbytes};
    return r->waiting == IOVECS ? flush(r) : 0;
}

/* Every run of a row by itself. */
static int read_runs(struct reader *r, const struct row *row)
{
    struct level l[LEVELS] = {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}};
    memcpy(l + LEVELS - row->levels, row->level, sizeof(struct level) * (size_t)row->levels);
    for (int64_t a = 0; a < l[0].count; a++)
        for (int64_t b = 0; b < l[1].count; b++)
            for (int64_t c = 0; c < l[2].count; c++) {
                int error = enqueue(r, row->src + a * l[0].src_step + b * l[1].src_step + c * l[2].src_step,
                                    row->dst + a * l[0].dst_step + b * l[1].dst_step + c * l[2].dst_step, row->run);
                if (error)
                    return error;
            }
    return 0;
}

/* Levels in descending order of source step, none negative. The same bytes go to the same places. */
static void order_by_source(struct row *row)
{
    for (int k = 0; k < row->levels; k++) {
        struct level *l = &row->level[k];
        if (l->src_step < 0) {
            row->src += (l->count - 1) * l->src_step;
            row->dst += (l->count - 1) * l->dst_step;
            l->src_step = -l->src_step;
            l->dst_step = -l->dst_step;
        }
        for (int j = k; j > 0 && row->level[j - 1].src_step < row->level[j].src_step; j--) {
            struct level swap = row->level[j];
            row->level[j] = row->level[j - 1];
            row->level[j - 1] = swap;
        }
    }
}

/* A row of short runs, ordered by source: fetch stretches that are at least half used into scratch memory, then copy
   from there. Rows whose stretches don't fit are halved. */
static int read_staged(struct reader *r, const struct row *row)
{
    int dense = row->levels; /* levels from here inward form one stretch */
    int64_t stretch = row->run, used = row->run;
    for (int k = row->levels - 1; k >= 0; k--) {
        int64_t wider = stretch + (row->level[k].count - 1) * row->level[k].src_step;
        if (wider > 2 * used * row->level[k].count)
            break;
        stretch = wider;
        used *= row->level[k].count;
        dense = k;
    }
    int64_t footprint = stretch;
    for (int k = 0; k < dense; k++)
        footprint *= row->level[k].count;
    if (footprint > SCRATCH) {
        struct row half = *row;
        int k = 0;
        while (half.level[k].count == 1)
            k++;
        half.level[k].count = row->level[k].count / 2;
        int error = read_staged(r, &half);
        if (error)
            return error;
        half.src += half.level[k].count * half.level[k].src_step;
        half.dst += half.level[k].count * half.level[k].dst_step;
        half.level[k].count = row->level[k].count - half.level[k].count;
        return read_staged(r, &half);
    }
    struct row stretches = {.src = row->src, .dst = (int64_t)(intptr_t)r->scratch, .run = stretch, .levels = dense};
    struct row local = *row;
    int64_t step = stretch;
    local.src = stretches.dst;
    for (int k = dense - 1; k >= 0; k--) {
        stretches.level[k] = (struct level){row->level[k].count, row->level[k].src_step, step};
        local.level[k].src_step = step;
        step *= row->level[k].count;
    }
    int64_t before = r->done;
    int error = read_runs(r, &stretches);
    if (!error)
        error = flush(r);
    r->done = before + (error ? 0 : row_bytes(row));
    if (!error)
        copy_row(&local, 0);
    return error;
}

static int read_all(struct reader *r, int64_t n, const struct columns *c, int64_t *done)
{
    int error = 0;
    int64_t low, high;
    prepare(n, c, DESTINATION, &low, &high);
    for (int64_t i = 0; i < n && !error; i++) {
        struct row row = row_of(c, i);
        if (row.run == 0)
            continue;
        if (row.run >= DIRECT || row.levels == 0) {
            error = read_runs(r, &row);
            continue;
        }
        if (r->scratch == NULL && (r->scratch = malloc((size_t)SCRATCH)) == NULL) {
            error = ENOMEM;
            break;
        }
        error = flush(r); /* what waits must not be counted among the staged bytes */
        order_by_source(&row);
        if (!error)
            error = read_staged(r, &row);
    }
    if (!error)
        error = flush(r);
    free(r->scratch);
    *done = r->done;
    return error;
}

int peerload_read_process(int32_t pid, int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                          const int64_t *count, const int64_t *src_step, const int64_t *dst_step, int64_t *done)
{
    struct columns c = {src, dst, run, count, src_step, dst_step};
    struct reader r;
    r.fetch = fetch_process, r.handle = pid, r.done = 0, r.scratch = NULL, r.waiting = 0;
    return read_all(&r, n, &c, done);
}

int peerload_read_file(int32_t fd, int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                       const int64_t *count, const int64_t *src_step, const int64_t *dst_step, int64_t *done)
{
    struct columns c = {src, dst, run, count, src_step, dst_step};
    struct reader r;
    r.fetch = fetch_file, r.handle = fd, r.done = 0, r.scratch = NULL, r.waiting = 0;
    return read_all(&r, n, &c, done);
}



void peerload_fill(int64_t dst, int32_t ndim, const int64_t *shape, const int64_t *stride,
                   const char *pattern, int64_t nbytes)
{
    if (ndim == 0) {
        memcpy(at(dst), pattern, (size_t)nbytes);
        return;
    }
    int64_t same = 1;
    while (same < nbytes && pattern[same] == pattern[0])
        same++;
    if (ndim == 1 && stride[0] == nbytes && same == nbytes) {
        memset(at(dst), pattern[0], (size_t)(shape[0] * nbytes));
        return;
    }
    for (int64_t i = 0; i < shape[0]; i++)
        peerload_fill(dst + i * stride[0], ndim - 1, shape + 1, stride + 1, pattern, nbytes);
}

int64_t peerload_reserve(int64_t nbytes)
{
    void *base = mmap(NULL, (size_t)nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? 0 : (int64_t)(intptr_t)base;
}

int peerload_map(int64_t address, int64_t nbytes, int32_t fd, int64_t offset, int32_t writable)
{
    void *base = mmap(at(address), (size_t)nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_FIXED, fd, (off_t)offset);
    return base == MAP_FAILED ? errno : 0;
}

int peerload_map_private(int64_t address, int64_t nbytes, int32_t fd, int64_t offset)
{
    void *base = mmap(at(address), (size_t)nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (off_t)offset);
    return base == MAP_FAILED ? errno : 0;
}

int peerload_collapse(int64_t address, int64_t nbytes)
{
    return madvise(at(address), (size_t)nbytes, MADV_COLLAPSE) ? errno : 0;
}

int peerload_unmap(int64_t address, int64_t nbytes)
{
    return munmap(at(address), (size_t)nbytes) ? errno : 0;
}

int peerload_permit_readers(void)
{
    return prctl(PR_SET_PTRACER, (unsigned long)-1, 0, 0, 0) ? errno : 0;
}
