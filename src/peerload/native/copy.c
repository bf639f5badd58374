#include <stdint.h>
#include <string.h>

#include "copy.h"

void peerload_copy(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                   const int64_t *count, const int64_t *src_step, const int64_t *dst_step)
{
    for (int64_t i = 0; i < n; i++, count += 3, src_step += 3, dst_step += 3)
        for (int64_t a = 0; a < count[0]; a++)
            for (int64_t b = 0; b < count[1]; b++)
                for (int64_t c = 0; c < count[2]; c++)
                    memcpy((void *)(intptr_t)(dst[i] + a * dst_step[0] + b * dst_step[1] + c * dst_step[2]),
                           (const void *)(intptr_t)(src[i] + a * src_step[0] + b * src_step[1] + c * src_step[2]),
                           (size_t)run[i]);
}
