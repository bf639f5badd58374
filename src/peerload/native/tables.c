#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tables.h"

enum { LEVELS = 3, AXES = 4, MAX_DIMS = 8, WIDEST = 16 };
/* As in kernels.cu. */
enum { COPY_TILE = 256, SEGMENT_NBYTES = 4096, DENSE_SEGMENTS = 8 };
enum kind { SCATTERED = 0, DENSE = 1, TRANSPOSED = 2 };
/* Plain runs of at least this are given whole units where their two ends are equally far from one. */
enum { PEELED_NBYTES = 256 };
/* Runs of at least this in whole units are dense: a segment at a time by one warp. */
enum { DENSE_NBYTES = 512 };
/* Tiles of short runs: units side by side. Of scattered elements: side by side in memory, and along the tensor's rows. Of
 * transposed ones: words of memory side by side, and bytes along the tensor's rows. */
enum { TILE_UNITS = 256, TILE_F = 32, TILE_Y = 64, TILE_ROW_NBYTES = 256 };

/* The exponent of the largest power of two, up to 16, that divides all that was or-ed into x. */
static uint32_t alignment(int64_t x) { return (uint32_t)__builtin_ctzll((uint64_t)x | WIDEST); }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- copies */

int64_t peerload_total(int64_t n, const int64_t *run, const int64_t *count, int64_t *largest)
{
    int64_t total = 0;
    *largest = 0;
    for (int64_t i = 0; i < n; i++, count += LEVELS) {
        int64_t nbytes = run[i] * count[0] * count[1] * count[2];
        total += nbytes;
        *largest = nbytes > *largest ? nbytes : *largest;
    }
    return total;
}

static void add_run(int64_t src, int64_t dst, int64_t run, struct copy_row *rows, struct table_end *end)
{
    if (run <= 0)
        return;
    uint32_t shift = alignment(src | dst | run), total = (uint32_t)(run >> shift);
    rows[end->rows++] = (struct copy_row){(uint64_t)src, (uint64_t)dst, total, shift, (uint32_t)end->tiles, 0};
    end->tiles += (total + COPY_TILE - 1) / COPY_TILE;
}

void peerload_copy_rows(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run, const int64_t *count,
                        const int64_t *src_step, const int64_t *dst_step, int64_t room, int64_t most,
                        void *table, struct table_end *end)
{
    struct copy_row *rows = table;
    struct copy_levels *levels = (struct copy_levels *)(rows + room);
    int64_t i = end->next, strided = 0;
    end->rows = end->tiles = 0;
    for (; i < n && end->rows + 3 <= room && end->tiles < most; i++) {
        const int64_t *c = count + LEVELS * i, *s = src_step + LEVELS * i, *d = dst_step + LEVELS * i;
        if (c[0] == 1 && c[1] == 1 && c[2] == 1) {
            int64_t head = -src[i] & (WIDEST - 1), body = (run[i] - head) & -WIDEST;
            if (run[i] < PEELED_NBYTES || (src[i] - dst[i]) % WIDEST || (head == 0 && body == run[i])) {
                add_run(src[i], dst[i], run[i], rows, end);
                continue;
            }
            add_run(src[i], dst[i], head, rows, end); /* so that the middle is whole units */
            add_run(src[i] + head, dst[i] + head, body, rows, end);
            add_run(src[i] + head + body, dst[i] + head + body, run[i] - head - body, rows, end);
        } else if (run[i] > 0 && c[0] > 0 && c[1] > 0 && c[2] > 0) {
            struct copy_levels *l = &levels[strided++];
            int64_t joined = src[i] | dst[i] | run[i];
            for (int k = 0; k < LEVELS; k++) {
                l->src_step[k] = c[k] > 1 ? s[k] : 0, l->dst_step[k] = c[k] > 1 ? d[k] : 0;
                joined |= l->src_step[k] | l->dst_step[k];
            }
            uint32_t shift = alignment(joined), total = (uint32_t)((run[i] >> shift) * c[0] * c[1] * c[2]);
            l->run = (uint32_t)(run[i] >> shift), l->count1 = (uint32_t)c[1], l->count2 = (uint32_t)c[2], l->unused = 0;
            rows[end->rows++] = (struct copy_row){(uint64_t)src[i], (uint64_t)dst[i], total, shift, (uint32_t)end->tiles,
                                                  (uint32_t)strided};
            end->tiles += (total + COPY_TILE - 1) / COPY_TILE;
        }
    }
    end->next = i;
    memmove(rows + end->rows, levels, (size_t)strided * sizeof *levels);
    end->nbytes = end->rows * (int64_t)sizeof *rows + strided * (int64_t)sizeof *levels;
}

/* ---- digests */

/* One dimension of a box: extent, and distances of neighbours in the tensor and in memory, bytes. */
struct axis {
    int64_t extent, global, memory;
};

static const struct axis unused = {1, 0, 0};

/* A box in as few dimensions as can be: bytes of its runs that are contiguous in the tensor and in memory, and what is around
 * them, as the kernel wants it: axes[0] is the run's own or, of scattered elements, the closest in memory, so that a warp's
 * loads meet; then axes[3] is the closest in the tensor, so that one lane's elements share a segment. Axes beyond the fourth
 * are counted here. */
struct form {
    int64_t address, byte, run, itemsize;
    int scattered, depth; /* axes in use, at least AXES; set up to there */
    struct axis axes[MAX_DIMS + AXES];
};

static void normal_form(struct form *f, int64_t dims, const int64_t *shape, const int64_t *start, const int64_t *stop,
                        const int64_t *stride)
{
    struct axis found[MAX_DIMS + 1];
    int n = 0;
    int64_t size = f->itemsize;
    f->run = f->itemsize, f->byte = 0;
    for (int64_t d = dims - 1; d >= 0; size *= shape[d--]) {
        struct axis next = {stop[d] - start[d], size, stride[d]};
        f->byte += start[d] * size;
        if (next.extent == 1)
            continue;
        struct axis *last = n ? &found[n - 1] : NULL;
        if (!n && next.global == f->run && next.memory == f->run)
            f->run *= next.extent;
        else if (last && next.global == last->extent * last->global && next.memory == last->extent * last->memory)
            last->extent *= next.extent;
        else
            found[n++] = next;
    }
    f->scattered = n > 0 && f->run == f->itemsize;
    for (int k = 0; k < AXES; k++)
        f->axes[k] = unused;
    found[n] = unused;
    f->depth = n + !f->scattered > AXES ? n + !f->scattered : AXES;
    if (!f->scattered) {
        f->axes[0] = unused;
        memcpy(f->axes + 1, found, (size_t)n * sizeof *found);
        return;
    }
    int near = 0;
    for (int k = 1; k < n; k++)
        if (llabs(found[k].memory) < llabs(found[near].memory))
            near = k;
    int row = near == 0; /* axes are in order of their steps in the tensor */
    f->axes[0] = found[near], f->axes[3] = found[row];
    for (int k = 0, to = 1; k < n; k++)
        if (k != near && k != row)
            f->axes[to] = found[k], to += to == 2 ? 2 : 1;
}

/* All that the kernel adds to places, or-ed, but for the run's own length. */
static int64_t places(const struct form *f)
{
    int64_t joined = f->address | f->byte;
    for (int k = 0; k < f->depth; k++)
        if (f->axes[k].extent > 1)
            joined |= f->axes[k].global | f->axes[k].memory;
    return joined;
}

/* Elements that neighbour each other in memory along axis 0 and in the tensor along axis 3, everything else in whole units:
 * the kernel then turns words of memory into words of the tensor. */
static int transposed(const struct form *f)
{
    const struct axis *a = f->axes;
    int64_t memory = f->address, global = a[0].global;
    for (int k = 1; k < f->depth; k++)
        if (a[k].extent > 1) {
            memory |= a[k].memory;
            global |= k == 3 ? 0 : a[k].global;
        }
    return f->scattered && f->itemsize <= 4 && a[0].memory == f->itemsize && a[3].global == f->itemsize && memory % 4 == 0 &&
           global % WIDEST == 0 && a[0].extent * f->itemsize % 4 == 0;
}

/* The row that was written last in `rows` is done, and has so many tiles. */
static void close_row(struct digest_row *rows, int64_t tiles, struct table_end *end)
{
    rows[end->rows++].first = (uint32_t)end->tiles;
    end->tiles += tiles;
}

/* What all rows of a box share. */
static struct digest_row *open_row(const struct form *f, uint64_t key, uint32_t slot, struct digest_row *rows,
                                   struct table_end *end)
{
    struct digest_row *row = &rows[end->rows];
    row->address = (uint64_t)f->address, row->byte = (uint64_t)f->byte, row->key = key, row->run = (uint64_t)f->run;
    for (int k = 0; k < AXES; k++) {
        row->extent[k] = (uint32_t)f->axes[k].extent;
        row->memory[k] = f->axes[k].memory, row->global[k] = f->axes[k].global;
    }
    row->slot = slot, row->unit = 1u << alignment(places(f) | f->run);
    row->kind = SCATTERED, row->element = row->unit, row->parts = row->tiles_f = row->tile_f = row->tile_y = 1, row->unused = 0;
    return row;
}

/* Indices y0 .. y1 of axis 3 of scattered elements. */
static void add_scattered(const struct form *f, uint64_t key, uint32_t slot, enum kind kind, int64_t y0, int64_t y1,
                          struct digest_row *rows, struct table_end *end)
{
    if (y0 >= y1)
        return;
    struct digest_row *row = open_row(f, key, slot, rows, end);
    row->kind = kind, row->element = (uint32_t)f->itemsize;
    row->address += (uint64_t)(y0 * f->axes[3].memory), row->byte += (uint64_t)(y0 * f->axes[3].global);
    row->extent[3] = (uint32_t)(y1 - y0);
    row->tile_f = TILE_F, row->tile_y = TILE_Y;
    if (kind == TRANSPOSED) {
        row->extent[0] = (uint32_t)(f->axes[0].extent * f->itemsize / 4); /* words */
        row->memory[0] = 4, row->global[0] *= 4 / f->itemsize;
        row->tile_y = (uint32_t)(TILE_ROW_NBYTES / f->itemsize);
    }
    row->tiles_f = (uint32_t)up((int64_t)row->extent[0] * row->extent[1] * row->extent[2], TILE_F);
    close_row(rows, row->tiles_f * up(y1 - y0, row->tile_y), end);
}

static void add_digest(const struct form *f, uint64_t key, uint32_t slot, struct digest_row *rows, struct table_end *end)
{
    if (f->scattered) {
        int64_t extent = f->axes[3].extent, head = 0, body = 0;
        if (transposed(f)) {
            head = least((-f->byte & (WIDEST - 1)) / f->itemsize, extent);
            body = (extent - head) * f->itemsize / WIDEST * WIDEST / f->itemsize;
        }
        add_scattered(f, key, slot, SCATTERED, 0, head, rows, end);
        add_scattered(f, key, slot, TRANSPOSED, head, head + body, rows, end);
        add_scattered(f, key, slot, SCATTERED, head + body, extent, rows, end);
        return;
    }
    struct digest_row *row = open_row(f, key, slot, rows, end);
    if (row->unit == WIDEST && f->run >= DENSE_NBYTES) {
        int64_t steps = 0; /* runs that all begin at the same place of a segment touch at most so many; others one more */
        for (int k = 1; k < AXES; k++)
            steps |= f->axes[k].extent > 1 ? f->axes[k].global : 0;
        int64_t ahead = steps % SEGMENT_NBYTES ? SEGMENT_NBYTES - 1 : f->byte % SEGMENT_NBYTES;
        row->kind = DENSE;
        row->parts = (uint32_t)up(up(ahead + f->run, SEGMENT_NBYTES), DENSE_SEGMENTS);
        close_row(rows, row->parts * f->axes[1].extent * f->axes[2].extent * f->axes[3].extent, end);
        return;
    }
    row->extent[0] = (uint32_t)((uint64_t)f->run / row->unit), row->memory[0] = row->global[0] = row->unit;
    row->tile_f = TILE_UNITS;
    row->tiles_f = (uint32_t)up((int64_t)row->extent[0] * f->axes[1].extent * f->axes[2].extent, TILE_UNITS);
    close_row(rows, row->tiles_f * f->axes[3].extent, end);
}

void peerload_digest_rows(int64_t n, int64_t dims, const uint64_t *key, const int64_t *shape, const int64_t *itemsize,
                          const int64_t *slot, const int64_t *tensor, const int64_t *start, const int64_t *stop,
                          const int64_t *address, const int64_t *stride, int64_t room, int64_t most,
                          void *table, struct table_end *end)
{
    struct digest_row *rows = table;
    end->rows = end->tiles = 0;
    for (; end->next < n; end->next++, end->part = 0) {
        int64_t i = end->next, t = tensor[i];
        struct form f;
        f.itemsize = itemsize[t];
        normal_form(&f, dims, shape + t * dims, start + i * dims, stop + i * dims, stride + i * dims);
        int64_t parts = 1, byte = f.byte;
        for (int k = AXES; k < f.depth; k++)
            parts *= f.axes[k].extent;
        for (; end->part < parts; end->part++) { /* once for each index of the axes that the kernel doesn't know */
            if (end->rows + 3 > room || end->tiles >= most)
                goto full;
            f.address = address[i], f.byte = byte;
            int64_t index = end->part;
            for (int k = AXES; k < f.depth; index /= f.axes[k++].extent) {
                f.address += index % f.axes[k].extent * f.axes[k].memory;
                f.byte += index % f.axes[k].extent * f.axes[k].global;
            }
            int depth = f.depth;
            f.depth = AXES;
            add_digest(&f, key[t], (uint32_t)slot[i], rows, end);
            f.depth = depth;
        }
    }
full:
    end->nbytes = end->rows * (int64_t)sizeof *rows;
}

int64_t peerload_check_boxes(int64_t n, int64_t dims, const int64_t *shape, const int64_t *itemsize, const int64_t *tensor,
                             const int64_t *start, const int64_t *stop, int64_t *largest)
{
    *largest = 0;
    for (int64_t i = 0; i < n; i++, start += dims, stop += dims) {
        const int64_t *all = shape + tensor[i] * dims;
        int64_t nbytes = itemsize[tensor[i]];
        for (int64_t d = 0; d < dims; nbytes *= stop[d] - start[d], d++)
            if (start[d] < 0 || stop[d] <= start[d] || stop[d] > all[d])
                return i;
        *largest = nbytes > *largest ? nbytes : *largest;
    }
    return -1;
}

/* ---- regions */

static int64_t sum(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); } /* wraps */

int64_t peerload_locate(int64_t n, const int64_t *at, const int64_t *run, const int64_t *count, const int64_t *step,
                        int64_t regions, const int64_t *start, const int64_t *end, int64_t *row)
{
    int64_t last = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t low = at[i], high = sum(at[i], run[i]); /* of numbers that a peer may have made up */
        for (int64_t k = LEVELS * i; k < LEVELS * (i + 1); k++) {
            if (count[k] == 1)
                continue;
            int64_t reach = (int64_t)((uint64_t)(count[k] - 1) * (uint64_t)step[k]);
            low = sum(low, reach < 0 ? reach : 0), high = sum(high, reach > 0 ? reach : 0);
        }
        if (regions == 0)
            return i;
        if (low < start[last] || (last + 1 < regions && low >= start[last + 1])) { /* neighbours share regions */
            int64_t above = regions;
            for (last = 0; above - last > 1;) {
                int64_t middle = last + (above - last) / 2;
                if (start[middle] <= low)
                    last = middle;
                else
                    above = middle;
            }
        }
        if (low < start[last] || low > high || high > end[last])
            return i;
        row[i] = last;
    }
    return -1;
}
