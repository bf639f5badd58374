/* Strided copies and digests over tables of rows. Compiled by NVRTC for the GPU at hand (kernels.py); also by a C++ compiler,
 * with blocks of one thread and LANES 1, for tests without a GPU. The tables are written by native/tables.c.
 *
 * Work comes in tiles, each of which one warp takes. A row's tiles begin with its `first` and end with the next row's. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef LANES
#define LANES 32
#endif

/* The row of a tile; every row has tiles. */
template <typename Row> __device__ static u32 row_of(const Row *table, u32 rows, u32 tile)
{
    u32 low = 0, high = rows;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (table[middle].first <= tile)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ---- copies */

/* `total` units of 1 << shift bytes. levels: 0 if they are side by side, else one more than the number of the copy_levels, which
 * lie behind the rows. */
struct copy_row {
    u64 src, dst;
    u32 total, shift, first, levels;
};

/* run: units side by side; count of runs along three levels (the outermost needn't be told). */
struct copy_levels {
    i64 src_step[3], dst_step[3];
    u32 run, count1, count2, unused;
};

/* On an H100 95 % of the driver's copy; with tiles of 1024 and four loads at a time 85 %: less fits on a multiprocessor. */
enum { COPY_TILE = 256 /* units */, UNROLL = 2 };

template <typename T> __device__ static void copy_units(const copy_row *row, const copy_levels *levels, u32 unit, u32 end)
{
    const char *src = (const char *)row->src;
    char *dst = (char *)row->dst;
    bool plain = row->levels == 0;
    levels += plain ? 0 : row->levels - 1;
    u32 run = plain ? 1 : levels->run, count1 = plain ? 1 : levels->count1, count2 = plain ? 1 : levels->count2;
    for (; unit < end; unit += UNROLL * LANES) {
        T value[UNROLL];
        i64 to[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            u32 at = unit + k * LANES;
            if (at >= end)
                continue;
            i64 from = (i64)at * (i64)sizeof(T);
            to[k] = from;
            if (!plain) {
                u32 outer = at / run, inner = at - outer * run;
                u32 next = outer / count2, c = outer - next * count2, a = next / count1, b = next - a * count1;
                from = to[k] = (i64)inner * (i64)sizeof(T);
                from += a * levels->src_step[0] + b * levels->src_step[1] + c * levels->src_step[2];
                to[k] += a * levels->dst_step[0] + b * levels->dst_step[1] + c * levels->dst_step[2];
            }
            value[k] = *(const T *)(src + from);
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++)
            if (unit + k * LANES < end)
                *(T *)(dst + to[k]) = value[k];
    }
}

extern "C" __global__ void peerload_copy(const copy_row *table, u32 rows, u32 tiles)
{
    const copy_levels *levels = (const copy_levels *)(table + rows);
    u32 lane = threadIdx.x % LANES, warps = blockDim.x / LANES;
    for (u32 tile = blockIdx.x * warps + threadIdx.x / LANES; tile < tiles; tile += gridDim.x * warps) {
        const copy_row *row = table + row_of(table, rows, tile);
        u32 begin = (tile - row->first) * COPY_TILE, end = begin + COPY_TILE < row->total ? begin + COPY_TILE : row->total;
        switch (row->shift) {
        case 0: copy_units<u8>(row, levels, begin + lane, end); break;
        case 1: copy_units<u16>(row, levels, begin + lane, end); break;
        case 2: copy_units<u32>(row, levels, begin + lane, end); break;
        case 3: copy_units<u64>(row, levels, begin + lane, end); break;
        default: copy_units<uint4>(row, levels, begin + lane, end);
        }
    }
}

/* ---- digests. peerload.integrity.digest defines them, native/digest.c computes the same on a CPU. */

#define PRIME ((1ull << 61) - 1)
enum { SEGMENT_NBYTES = 4096, SEGMENT_WORDS = 1024, LIMB_BITS = 21, DENSE_SEGMENTS = 8 };

/* Element (f, y) lies at `address` + steps, and is at byte `byte` + steps of the tensor. f runs over axes 0, 1, 2 (0 fastest),
 * y over axis 3.
 * DENSE: a tile is DENSE_SEGMENTS segments of one run of `run` bytes; runs are counted along axes 1, 2, 3, `parts` tiles each.
 * SCATTERED: a tile is tile_f elements by tile_y; an element is `element` bytes, read `unit` bytes at a time.
 * TRANSPOSED: likewise, but f counts words of memory, of 4 / element elements each; y neighbours y + 1 in the tensor, and 16
 * bytes of it begin at a multiple of 16. */
enum { SCATTERED, DENSE, TRANSPOSED };

struct digest_row {
    u64 address, byte, key, run;
    i64 memory[4], global[4];
    u32 extent[4];
    u32 slot, kind, parts, element, unit, tile_f, tile_y, tiles_f, first, unused;
};

/* A lane's part of the digest of one row: sums of words times limbs of B within `segment`, and what earlier segments came to. */
struct partial {
    u64 sum[3], segment, digest;
};

__device__ static u64 reduce(u64 x)
{
    x = (x & PRIME) + (x >> 61);
    return x >= PRIME ? x - PRIME : x;
}

__device__ static u64 product(u64 a, u64 b) /* both below 2^61 */
{
    u64 low = a * b, high = __umul64hi(a, b);
    return reduce((low & PRIME) + (high << 3 | low >> 61));
}

__device__ static u64 shifted(u64 x, int bits) /* x * 2^bits */
{
    x = reduce(x);
    return (x << bits & PRIME) | x >> (61 - bits);
}

/* Finaliser of splitmix64, then a residue that isn't zero: x % (PRIME - 1) + 1. */
__device__ static u64 residue(u64 x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    x = (x & PRIME) + 2 * (x >> 61);
    return (x >= PRIME - 1 ? x - (PRIME - 1) : x) + 1;
}

#define STEP 0x9e3779b97f4a7c15ull

/* The digest of what has been summed up of one segment; the sums begin again. */
__device__ static u64 of_segment(u64 *sum, u64 segment, u64 key)
{
    u64 row = reduce(reduce(sum[0]) + shifted(sum[1], LIMB_BITS) + shifted(sum[2], 2 * LIMB_BITS));
    sum[0] = sum[1] = sum[2] = 0;
    return product(row, residue(key + segment * STEP));
}

__device__ static void close_segment(partial *p, u64 key)
{
    p->digest = reduce(p->digest + of_segment(p->sum, p->segment, key));
}

/* Four words are left out after every 32: words that are multiples of 32 apart, as rows of a transposed tensor are, would else
 * lie in the same bank of shared memory. */
typedef u32 limbs[3][SEGMENT_WORDS / 32 * 36];

__device__ static u32 padded(u32 j) { return j + j / 32 * 4; }

__device__ static void add_word(partial *p, const limbs &b, u32 word, u32 j)
{
#pragma unroll
    for (int i = 0; i < 3; i++)
        p->sum[i] += (u64)word * b[i][padded(j)];
}

__device__ static void add_four(u64 *sum, const limbs &b, uint4 w, u32 j) /* j a multiple of four */
{
    j = padded(j);
#pragma unroll
    for (int i = 0; i < 3; i++) {
        uint4 m = *(const uint4 *)&b[i][j];
        sum[i] += (u64)w.x * m.x + (u64)w.y * m.y + (u64)w.z * m.z + (u64)w.w * m.w;
    }
}

/* `size` bytes at an address that is a multiple of it, as is their place in the tensor. */
__device__ static void add_unit(partial *p, const limbs &b, u64 address, u64 byte, u32 size, u64 key)
{
    u64 segment = byte / SEGMENT_NBYTES;
    if (segment != p->segment) {
        close_segment(p, key);
        p->segment = segment;
    }
    u32 j = (u32)(byte % SEGMENT_NBYTES) / 4, shift = 8 * (u32)(byte % 4);
    switch (size) {
    case 1: add_word(p, b, (u32) * (const u8 *)address << shift, j); break;
    case 2: add_word(p, b, (u32) * (const u16 *)address << shift, j); break;
    case 4: add_word(p, b, *(const u32 *)address, j); break;
    case 8: {
        u64 two = *(const u64 *)address;
        add_word(p, b, (u32)two, j);
        add_word(p, b, (u32)(two >> 32), j + 1);
        break;
    }
    default: add_four(p->sum, b, *(const uint4 *)address, j);
    }
}

__device__ static void add_dense(partial *p, const limbs &b, const digest_row *row, u32 tile, u32 lane)
{
    u32 r = tile / row->parts, part = tile - r * row->parts;
    u32 r2 = r / row->extent[1], x = r - r2 * row->extent[1], z = r2 / row->extent[2], y = r2 - z * row->extent[2];
    u64 address = row->address + x * row->memory[1] + y * row->memory[2] + z * row->memory[3];
    u64 byte = row->byte + x * row->global[1] + y * row->global[2] + z * row->global[3], end = byte + row->run;
    u64 segment = byte / SEGMENT_NBYTES + (u64)part * DENSE_SEGMENTS;
    for (u32 s = 0; s < DENSE_SEGMENTS; s++, segment++) {
        u64 low = segment * SEGMENT_NBYTES, high = low + SEGMENT_NBYTES;
        low = low < byte ? byte : low;
        high = high < end ? high : end;
        if (low >= high)
            break;
        u32 from = (u32)(low % SEGMENT_NBYTES) / 16, to = from + (u32)(high - low) / 16;
        const uint4 *at = (const uint4 *)(address + (low - byte) - 16 * from);
        uint4 words[SEGMENT_NBYTES / 16 / LANES];
#pragma unroll
        for (u32 i = 0; i < SEGMENT_NBYTES / 16 / LANES; i++) {
            u32 u = i * LANES + lane;
            words[i] = u >= from && u < to ? at[u] : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (u32 i = 0; i < SEGMENT_NBYTES / 16 / LANES; i++)
            add_four(p->sum, b, words[i], 4 * (i * LANES + lane));
        p->segment = segment;
        close_segment(p, row->key);
    }
}

__device__ static void add_elements(partial *p, const limbs &b, const digest_row *row, u32 tile, u32 lane)
{
    u32 strip = tile / row->tiles_f, f = (tile - strip * row->tiles_f) * row->tile_f, y0 = strip * row->tile_y;
    u32 all = row->extent[0] * row->extent[1] * row->extent[2], end = f + row->tile_f < all ? f + row->tile_f : all;
    u32 y1 = y0 + row->tile_y < row->extent[3] ? y0 + row->tile_y : row->extent[3];
    for (f += lane; f < end; f += LANES) {
        u32 next = f / row->extent[0], a = f - next * row->extent[0], c = next / row->extent[1], d = next - c * row->extent[1];
        u64 address = row->address + a * row->memory[0] + d * row->memory[1] + c * row->memory[2] + y0 * row->memory[3];
        u64 byte = row->byte + a * row->global[0] + d * row->global[1] + c * row->global[2] + y0 * row->global[3];
        for (u32 y = y0; y < y1; y++, address += row->memory[3], byte += row->global[3])
            for (u32 part = 0; part < row->element; part += row->unit)
                add_unit(p, b, address + part, byte + part, row->unit, row->key);
    }
    close_segment(p, row->key);
}

/* N words of memory, one under the other, turned into N words of the tensor: word k gets element k of each. */
template <int N> __device__ static void turn(u32 *v)
{
    if constexpr (N == 2) {
        u32 a = v[0];
        v[0] = __byte_perm(a, v[1], 0x5410);
        v[1] = __byte_perm(a, v[1], 0x7632);
    } else if constexpr (N == 4) {
        u32 a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);
        u32 c = __byte_perm(v[0], v[1], 0x7362), d = __byte_perm(v[2], v[3], 0x7362);
        v[0] = __byte_perm(a, b, 0x5410);
        v[1] = __byte_perm(a, b, 0x7632);
        v[2] = __byte_perm(c, d, 0x5410);
        v[3] = __byte_perm(c, d, 0x7632);
    }
}

/* N elements to a word. A lane takes a word of memory, which is N rows of the tensor, and goes along them 16 bytes at a time. */
template <int N> __device__ static void add_transposed(partial *p, const limbs &b, const digest_row *row, u32 tile, u32 lane)
{
    u32 strip = tile / row->tiles_f, f = (tile - strip * row->tiles_f) * row->tile_f, y0 = strip * row->tile_y;
    u32 all = row->extent[0] * row->extent[1] * row->extent[2], end = f + row->tile_f < all ? f + row->tile_f : all;
    u32 y1 = y0 + row->tile_y < row->extent[3] ? y0 + row->tile_y : row->extent[3];
    i64 step = row->memory[3];
    for (f += lane; f < end; f += LANES) {
        u32 next = f / row->extent[0], a = f - next * row->extent[0], c = next / row->extent[1], d = next - c * row->extent[1];
        const char *at = (const char *)(row->address + a * row->memory[0] + d * row->memory[1] + c * row->memory[2] + y0 * step);
        u64 byte = row->byte + a * row->global[0] + d * row->global[1] + c * row->global[2] + y0 * row->global[3];
        u64 apart = row->global[0] / N, sum[N][3] = {};
        for (u32 y = y0; y < y1; y += 4 * N, byte += 16) {
            u32 v[4][N];
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int k = 0; k < N; k++, at += step)
                    v[j][k] = *(const u32 *)at;
#pragma unroll
            for (int j = 0; j < 4; j++)
                turn<N>(v[j]);
#pragma unroll
            for (int k = 0; k < N; k++) {
                u64 here = byte + k * apart;
                if (here % SEGMENT_NBYTES == 0 && y != y0)
                    p->digest = reduce(p->digest + of_segment(sum[k], here / SEGMENT_NBYTES - 1, row->key));
                add_four(sum[k], b, uint4{v[0][k], v[1][k], v[2][k], v[3][k]}, (u32)here % SEGMENT_NBYTES / 4);
            }
        }
#pragma unroll
        for (int k = 0; k < N; k++)
            p->digest = reduce(p->digest + of_segment(sum[k], (byte + k * apart - 16) / SEGMENT_NBYTES, row->key));
    }
}

/* Add the lanes' parts of a digest to sums. */
__device__ static void add_up(u64 *sums, u32 slot, u64 digest, u32 lane)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        digest = reduce(digest + __shfl_xor_sync(0xffffffffu, digest, step));
    if (lane == 0) {
        atomicAdd(sums + 2 * slot, digest & 0xffffffffu);
        atomicAdd(sums + 2 * slot + 1, digest >> 32);
    }
}

/* sums[2 * slot] and sums[2 * slot + 1] get the low and the high halves of the digests of all tiles of rows of that slot. */
extern "C" __global__ void __launch_bounds__(256, 2)
    peerload_digest(const digest_row *table, u32 rows, u32 tiles, u64 *sums)
{
    __shared__ __align__(16) limbs b;
    for (u32 j = threadIdx.x; j < SEGMENT_WORDS; j += blockDim.x) {
        u64 key = residue((j + 1) * STEP);
        for (int i = 0; i < 3; i++)
            b[i][padded(j)] = (u32)(key >> i * LIMB_BITS) & ((1u << LIMB_BITS) - 1);
    }
    __syncthreads();
    u32 lane = threadIdx.x % LANES, warps = blockDim.x / LANES, slot = 0;
    partial p = {{0, 0, 0}, 0, 0};
    for (u32 tile = blockIdx.x * warps + threadIdx.x / LANES; tile < tiles; tile += gridDim.x * warps) {
        const digest_row *row = table + row_of(table, rows, tile);
        u32 within = tile - row->first;
        if (row->slot != slot) { /* as seldom as can be: all warps add to the same place */
            add_up(sums, slot, p.digest, lane);
            slot = row->slot;
            p.digest = 0;
        }
        if (row->kind == DENSE)
            add_dense(&p, b, row, within, lane);
        else if (row->kind == SCATTERED)
            add_elements(&p, b, row, within, lane);
        else if (row->element == 1)
            add_transposed<4>(&p, b, row, within, lane);
        else if (row->element == 2)
            add_transposed<2>(&p, b, row, within, lane);
        else
            add_transposed<1>(&p, b, row, within, lane);
    }
    add_up(sums, slot, p.digest, lane);
}
