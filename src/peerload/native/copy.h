/* Moving the columns of a batch (see peerload/batch.py for what they mean). count, src_step and dst_step are [n][3]. */

/* Copy all runs within this process. Runs must not overlap their destination. */
void peerload_copy(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                   const int64_t *count, const int64_t *src_step, const int64_t *dst_step);
