/* Tables of rows for the GPU's kernels (memory/cuda/kernels.cu, which says what the fields mean, has the same structures).
   `first` of a row is the number of tiles of the rows before it; every row has tiles. A table takes at most `room` rows and
   about `most` tiles; what no longer fits goes into the next one. */

struct copy_row {
    uint64_t src, dst;
    uint32_t total, shift, first, levels;
};

/* Behind the rows of a table. */
struct copy_levels {
    int64_t src_step[3], dst_step[3];
    uint32_t run, count1, count2, unused;
};

struct digest_row {
    uint64_t address, byte, key, run;
    int64_t memory[4], global[4];
    uint32_t extent[4];
    uint32_t slot, kind, parts, element, unit, tile_f, tile_y, tiles_f, first, unused;
};

/* Where a table ends: bytes and rows written, tiles of all of them, and the copy or box (with the part of it) that comes next. */
struct table_end {
    int64_t nbytes, rows, tiles, next, part;
};

/* Bytes of n copies; *largest: of the largest of them. */
int64_t peerload_total(int64_t n, const int64_t *run, const int64_t *count, int64_t *largest);

/* The columns of a batch, n copies of at most 2^30 bytes each, from copy end->next on. room is at least 3. The table has room
   for as many copy_levels as rows. */
void peerload_copy_rows(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run, const int64_t *count,
                        const int64_t *src_step, const int64_t *dst_step, int64_t room, int64_t most,
                        void *table, struct table_end *end);

/* The first of n boxes that is empty or lies outside its tensor, or -1; *largest: bytes of the largest box. */
int64_t peerload_check_boxes(int64_t n, int64_t dims, const int64_t *shape, const int64_t *itemsize, const int64_t *tensor,
                             const int64_t *start, const int64_t *stop, int64_t *largest);

/* n boxes of at most 2^30 bytes each, given as in digest.h, from box end->next on, its parts from end->part on. Box i is added
   to slot[i]. room is at least 3. */
void peerload_digest_rows(int64_t n, int64_t dims, const uint64_t *key, const int64_t *shape, const int64_t *itemsize,
                          const int64_t *slot, const int64_t *tensor, const int64_t *start, const int64_t *stop,
                          const int64_t *address, const int64_t *stride, int64_t room, int64_t most,
                          void *table, struct table_end *end);

/* The region that the bytes of each copy of one side (`at` and `step` are src and src_step, or dst and dst_step) lie in as a
   whole: row[i]. Regions are [regions] of ascending starts and ends. Returns the first copy that lies in none, or -1. */
int64_t peerload_locate(int64_t n, const int64_t *at, const int64_t *run, const int64_t *count, const int64_t *step,
                        int64_t regions, const int64_t *start, const int64_t *end, int64_t *row);
