#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "digest.h"

typedef unsigned __int128 u128;
typedef uint32_t __attribute__((aligned(1), may_alias)) word; /* bytes of a tensor, little-endian, at any address */

#define PRIME ((UINT64_C(1) << 61) - 1)
/* The sums of `multiply` over one segment stay below 2^63: 2^10 words times 2^32 times 2^21. */
enum { SEGMENT_WORDS = 1024, SEGMENT_BYTES = 4 * SEGMENT_WORDS, LIMB_BITS = 21, MAX_DIMS = 8, FETCH_WORDS = 512 };
/* A tile of a transposed box: whole cache lines of each column, rows long enough for what `run` costs besides, and all of it
 * within the L2 cache. Smaller ones are slower: 64 x 512 by a third. */
enum { TILE_ROWS = 256, TILE_BYTES = 1024, PITCH = TILE_BYTES + 64 };

/* Three limbs of B, apart so that the compiler can turn `multiply` into 32 x 32 -> 64 bit vector instructions. */
static uint32_t limb[3][SEGMENT_WORDS] __attribute__((aligned(64)));

/* Finaliser of splitmix64 (https://prng.di.unimi.it/splitmix64.c), then a residue that isn't zero. */
static uint64_t residue(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    x = (x & PRIME) + 2 * (x >> 61); /* the same modulo PRIME - 1; a division would take longer than 100 bytes do */
    return (x >= PRIME - 1 ? x - (PRIME - 1) : x) + 1;
}

static const uint64_t STEP = UINT64_C(0x9e3779b97f4a7c15);

__attribute__((constructor)) static void fill_limbs(void)
{
    for (uint64_t j = 0; j < SEGMENT_WORDS; j++) {
        uint64_t b = residue((j + 1) * STEP);
        for (int i = 0; i < 3; i++)
            limb[i][j] = (b >> (i * LIMB_BITS)) & ((1u << LIMB_BITS) - 1);
    }
}

static uint64_t reduce(u128 x) /* x < 2^122 */
{
    uint64_t r = (uint64_t)(x & PRIME) + (uint64_t)(x >> 61);
    return r >= PRIME ? r - PRIME : r;
}

/* Add n words times the limbs of B that belong to them, limb by limb. */
typedef void multiplier(const word *w, const uint32_t *b0, const uint32_t *b1, const uint32_t *b2, int64_t n, uint64_t *sum);

static void multiply_anywhere(const word *w, const uint32_t *b0, const uint32_t *b1, const uint32_t *b2, int64_t n, uint64_t *sum)
{
    uint64_t s0 = 0, s1 = 0, s2 = 0;
    for (int64_t i = 0; i < n; i++) {
        s0 += (uint64_t)w[i] * b0[i];
        s1 += (uint64_t)w[i] * b1[i];
        s2 += (uint64_t)w[i] * b2[i];
    }
    sum[0] += s0;
    sum[1] += s1;
    sum[2] += s2;
}

static multiplier *multiply = multiply_anywhere;

/* Bring 64 bytes of each column by 32 bytes of each row into row-major order, rows PITCH bytes apart. Columns are `step` apart
 * and dense, of elements of `size` (1, 2 or 4) bytes. */
typedef void turner(uint8_t *to, const uint8_t *from, int64_t step, int64_t size);

static turner *turn = NULL; /* elements go one by one */

#ifdef __x86_64__
#include <immintrin.h>

/* The same with two words to a lane: even ones as they are, odd ones shifted down. Compilers don't find this by themselves.
 * AVX-512 is faster out of the cache and slower out of memory, where loads that straddle cache lines halve its rate. */
__attribute__((target("avx2"))) static void multiply_avx2(const word *w, const uint32_t *b0, const uint32_t *b1,
                                                          const uint32_t *b2, int64_t n, uint64_t *sum)
{
    const uint32_t *limbs[3] = {b0, b1, b2};
    __m256i total[3] = {{0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i even = _mm256_loadu_si256((const __m256i_u *)(w + i)), odd = _mm256_srli_epi64(even, 32);
        for (int k = 0; k < 3; k++) {
            __m256i b = _mm256_loadu_si256((const __m256i_u *)(limbs[k] + i));
            total[k] += _mm256_mul_epu32(even, b) + _mm256_mul_epu32(odd, _mm256_srli_epi64(b, 32));
        }
    }
    for (int k = 0; k < 3; k++)
        for (int lane = 0; lane < 4; lane++)
            sum[k] += (uint64_t)total[k][lane];
    multiply_anywhere(w + i, b0 + i, b1 + i, b2 + i, n - i, sum);
}

/* Word k of the rows that 32 bytes of memory belong to: elements of neighbouring columns joined to words. words[i] has those of
 * rows 4i .. 4i + 3, and of the four half of all rows later. */
__attribute__((target("avx2"), always_inline)) static inline void join(__m256i words[4][8], int k, const uint8_t *from,
                                                                       int64_t step, int64_t size)
{
    __m256i v[4];
    for (int i = 0; i < 4 / size; i++)
        v[i] = _mm256_loadu_si256((const __m256i_u *)(from + i * step));
    if (size == 1) {
        __m256i a = _mm256_unpacklo_epi8(v[0], v[1]), b = _mm256_unpackhi_epi8(v[0], v[1]);
        __m256i c = _mm256_unpacklo_epi8(v[2], v[3]), d = _mm256_unpackhi_epi8(v[2], v[3]);
        words[0][k] = _mm256_unpacklo_epi16(a, c), words[1][k] = _mm256_unpackhi_epi16(a, c);
        words[2][k] = _mm256_unpacklo_epi16(b, d), words[3][k] = _mm256_unpackhi_epi16(b, d);
    } else if (size == 2)
        words[0][k] = _mm256_unpacklo_epi16(v[0], v[1]), words[1][k] = _mm256_unpackhi_epi16(v[0], v[1]);
    else
        words[0][k] = v[0];
}

__attribute__((target("avx2"), always_inline)) static inline void turn_of(uint8_t *to, const uint8_t *from, int64_t step,
                                                                          int64_t size)
{
    __m256i words[2][4][8];
    for (int k = 0; k < 8; k++, from += 4 / size * step) {
        for (int i = 0; i < 4 / size; i++)
            __builtin_prefetch(from + i * step + TILE_ROWS * size, 0, 2); /* of the next tile */
        join(words[0], k, from, step, size);
        join(words[1], k, from + 32, step, size);
    }
    int64_t half = 16 / size;
    for (int side = 0; side < 2; side++, to += 2 * half * PITCH)
        for (int i = 0; i < 4 / size; i++)
            for (int k = 0; k < 8; k += 4) {
                const __m256i *w = &words[side][i][k];
                __m256i a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpackhi_epi32(w[0], w[1]);
                __m256i c = _mm256_unpacklo_epi32(w[2], w[3]), d = _mm256_unpackhi_epi32(w[2], w[3]);
                __m256i row[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                                  _mm256_unpackhi_epi64(b, d)};
                for (int r = 0; r < 4; r++) {
                    _mm_storeu_si128((__m128i_u *)(to + (4 * i + r) * PITCH + 4 * k), _mm256_castsi256_si128(row[r]));
                    _mm_storeu_si128((__m128i_u *)(to + (half + 4 * i + r) * PITCH + 4 * k), _mm256_extracti128_si256(row[r], 1));
                }
            }
}

__attribute__((target("avx2"))) static void turn_avx2(uint8_t *to, const uint8_t *from, int64_t step, int64_t size)
{
    switch (size) {
    case 1: turn_of(to, from, step, 1); break;
    case 2: turn_of(to, from, step, 2); break;
    default: turn_of(to, from, step, 4);
    }
}

__attribute__((constructor)) static void choose(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        multiply = multiply_avx2;
        turn = turn_avx2;
    }
}
#endif

/* A word of which only n < 4 bytes, from byte `skip` of it, belong to the box. */
static void multiply_part(const uint8_t *at, int64_t j, int64_t skip, int64_t n, uint64_t *sum)
{
    uint64_t w = 0;
    for (int64_t i = 0; i < n; i++)
        w |= (uint64_t)at[i] << (8 * (skip + i));
    for (int i = 0; i < 3; i++)
        sum[i] += w * limb[i][j];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Digest of n > 0 bytes at `at` that are bytes [byte, byte + n) of the tensor. `ahead`, unless 0, is how far away the bytes
 * lie that come next: the processor can't guess that, and fetching them now more than doubles the rate of strided rows. */
static uint64_t run(const uint8_t *at, int64_t byte, int64_t n, int64_t ahead, uint64_t key)
{
    u128 digest = 0;
    while (n > 0) {
        int64_t segment = byte / SEGMENT_BYTES, within = byte % SEGMENT_BYTES, j = within / 4, skip = within % 4;
        int64_t left = least(n, SEGMENT_BYTES - within);
        uint64_t sum[3] = {0, 0, 0};
        byte += left;
        n -= left;
        if (skip) {
            int64_t part = least(left, 4 - skip);
            multiply_part(at, j++, skip, part, sum);
            at += part;
            left -= part;
        }
        for (int64_t words; (words = least(left / 4, FETCH_WORDS)); j += words, at += 4 * words, left -= 4 * words) {
            if (ahead)
                for (int64_t i = 0; i < 4 * words; i += 64)
                    __builtin_prefetch((const void *)((intptr_t)at + ahead + i));
            multiply((const word *)at, &limb[0][j], &limb[1][j], &limb[2][j], words, sum);
        }
        if (left)
            multiply_part(at, j, 0, left, sum);
        at += left;
        uint64_t row = reduce(sum[0] + ((u128)sum[1] << LIMB_BITS) + ((u128)sum[2] << (2 * LIMB_BITS)));
        digest += reduce((u128)row * residue(key + (uint64_t)segment * STEP));
    }
    return reduce(digest);
}

/* One dimension of a box: extent, and distances of neighbours in the tensor and in memory, bytes. */
struct axis {
    int64_t extent, global, memory;
};

/* Bring rows x columns elements into row-major order, reading along the shorter step. Inlined for each itemsize. */
__attribute__((always_inline)) static inline void
gather(uint8_t *to, const uint8_t *from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, size_t itemsize)
{
    if (llabs(row_step) < llabs(column_step))
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = 0; r < rows; r++)
                memcpy(to + r * PITCH + c * (int64_t)itemsize, from + r * row_step + c * column_step, itemsize);
    else
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++)
                memcpy(to + r * PITCH + c * (int64_t)itemsize, from + r * row_step + c * column_step, itemsize);
}

static void gather_sized(uint8_t *to, const uint8_t *from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step,
                         int64_t itemsize)
{
    switch (itemsize) {
    case 1: gather(to, from, rows, columns, row_step, column_step, 1); break;
    case 2: gather(to, from, rows, columns, row_step, column_step, 2); break;
    case 4: gather(to, from, rows, columns, row_step, column_step, 4); break;
    default: gather(to, from, rows, columns, row_step, column_step, 8);
    }
}

/* As `gather`, 64 bytes of 32 bytes' columns at a time where columns are dense in memory. */
static void gather_tile(uint8_t *to, const uint8_t *from, int64_t rows, int64_t columns, int64_t row_step,
                        int64_t column_step, int64_t itemsize)
{
    int64_t side = 32 / itemsize, r = 0, c = 0;
    if (turn && row_step == itemsize && itemsize <= 4) {
        int64_t whole = rows - rows % (2 * side);
        for (; c + side <= columns; c += side)
            for (r = 0; r < whole; r += 2 * side)
                turn(to + r * PITCH + c * itemsize, from + r * row_step + c * column_step, column_step, itemsize);
        r = whole;
    }
    gather_sized(to + c * itemsize, from + c * column_step, r, columns - c, row_step, column_step, itemsize);
    gather_sized(to + r * PITCH, from + r * row_step, rows - r, columns, row_step, column_step, itemsize);
}

/* Digest of a plane whose columns neighbour each other in the tensor but not in memory. */
static uint64_t plane(const uint8_t *at, int64_t byte, struct axis row, struct axis column, int64_t itemsize, uint64_t key)
{
    uint8_t rectangle[TILE_ROWS * PITCH]; /* its gaps keep a column's rows in different cache sets */
    u128 digest = 0;
    for (int64_t c = 0, columns; c < column.extent; c += columns) {
        columns = least(column.extent - c, TILE_BYTES / itemsize);
        for (int64_t r = 0, rows; r < row.extent; r += rows) {
            rows = least(row.extent - r, TILE_ROWS);
            const uint8_t *corner = at + r * row.memory + c * column.memory;
            gather_tile(rectangle, corner, rows, columns, row.memory, column.memory, itemsize);
            for (int64_t k = 0; k < rows; k++)
                digest += run(rectangle + k * PITCH, byte + (r + k) * row.global + c * itemsize, columns * itemsize, 0, key);
        }
    }
    return reduce(digest);
}

static uint64_t box(const int64_t *shape, const int64_t *start, const int64_t *stop, const int64_t *stride, int64_t dims,
                    const uint8_t *at, int64_t itemsize, uint64_t key)
{
    struct axis axes[MAX_DIMS]; /* innermost first; extents of one and dimensions that continue each other vanish */
    int n = 0;
    int64_t byte = 0, global = itemsize;
    for (int64_t d = dims - 1; d >= 0; global *= shape[d--]) {
        struct axis next = {stop[d] - start[d], global, stride[d]};
        byte += start[d] * global;
        if (next.extent == 1)
            continue;
        struct axis *last = n ? &axes[n - 1] : NULL;
        if (last && next.global == last->extent * last->global && next.memory == last->extent * last->memory)
            last->extent *= next.extent;
        else
            axes[n++] = next;
    }

    /* Take out of the odometer what one call of `run` or `plane` covers. */
    struct axis column = {1, itemsize, itemsize}, row = {1, 0, 0};
    if (n && axes[0].global == itemsize) {
        column = axes[0];
        memmove(axes, axes + 1, (size_t)--n * sizeof *axes);
    }
    int scattered = column.memory != itemsize;
    if (scattered && n) {
        int best = 0;
        for (int d = 1; d < n; d++)
            if (llabs(axes[d].memory) < llabs(axes[best].memory))
                best = d;
        row = axes[best];
        memmove(axes + best, axes + best + 1, (size_t)(--n - best) * sizeof *axes);
    }

    u128 digest = 0;
    int64_t index[MAX_DIMS] = {0}, length = column.extent * itemsize, ahead = n && axes[0].memory != length ? axes[0].memory : 0;
    int d;
    do {
        digest += scattered ? plane(at, byte, row, column, itemsize, key) : run(at, byte, length, ahead, key);
        for (d = 0; d < n; d++) {
            at += axes[d].memory;
            byte += axes[d].global;
            if (++index[d] < axes[d].extent)
                break;
            at -= axes[d].memory * axes[d].extent;
            byte -= axes[d].global * axes[d].extent;
            index[d] = 0;
        }
    } while (d < n);
    return reduce(digest);
}

void peerload_digest(int64_t n, int64_t dims, const uint64_t *key, const int64_t *shape, const int64_t *itemsize,
                     const int64_t *tensor, const int64_t *start, const int64_t *stop,
                     const int64_t *address, const int64_t *stride, uint64_t *out)
{
    for (int64_t i = 0; i < n; i++, start += dims, stop += dims, stride += dims)
        out[i] = box(shape + tensor[i] * dims, start, stop, stride, dims, (const uint8_t *)(intptr_t)address[i],
                     itemsize[tensor[i]], key[tensor[i]]);
}
