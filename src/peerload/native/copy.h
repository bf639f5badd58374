/* Moving the columns of a batch; peerload/batch.py says what they mean. src, dst and run are [n]; count, src_step and
   dst_step are [n][3]. Destinations never overlap each other. Nothing here allocates memory that outlives a call. */

/* Copy all rows within this process. Large calls write around the cache: 2 threads reach 31 GB/s instead of 23. */
void peerload_copy(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                   const int64_t *count, const int64_t *src_step, const int64_t *dst_step);

/* The same when all sources lie in one file mapping that only we use: its page tables are filled ahead of the copy and
   dropped after it, so that what was read doesn't stay in this process's resident set. */
void peerload_copy_mapped(int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                          const int64_t *count, const int64_t *src_step, const int64_t *dst_step);

/* Copy all rows out of another process (process_vm_readv): src are addresses there. Returns 0, or the errno of the run
   that failed; EIO when the kernel moved nothing and gave no reason. *done: bytes landed in any case. Runs of elements
   are read in longer stretches through 256 KiB of scratch memory. */
int peerload_read_process(int32_t pid, int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                          const int64_t *count, const int64_t *src_step, const int64_t *dst_step, int64_t *done);

/* Copy all rows out of a file: src are byte offsets in it. As above; ENODATA when the file ends too early. */
int peerload_read_file(int32_t fd, int64_t n, const int64_t *src, const int64_t *dst, const int64_t *run,
                       const int64_t *count, const int64_t *src_step, const int64_t *dst_step, int64_t *done);

/* Write the `nbytes` of `pattern` at every index of `shape` (ndim <= 8), dimension k stepping stride[k] bytes. */
void peerload_fill(int64_t dst, int32_t ndim, const int64_t *shape, const int64_t *stride,
                   const char *pattern, int64_t nbytes);

/* Reserve address space that holds nothing yet; 0 with errno set on failure. */
int64_t peerload_reserve(int64_t nbytes);

/* Map `nbytes` of a file from `offset`, shared, at `address` inside a reservation. Returns 0 or errno. */
int peerload_map(int64_t address, int64_t nbytes, int32_t fd, int64_t offset, int32_t writable);

/* Map a file as above, but copy-on-write: what is written here stays here. In place of what is mapped there now. */
int peerload_map_private(int64_t address, int64_t nbytes, int32_t fd, int64_t offset);

/* Replace small pages by huge ones (2 MiB), contents kept, whatever the host's settings for huge pages. Returns 0 or errno. */
int peerload_collapse(int64_t address, int64_t nbytes);

/* Give a reservation and everything mapped into it back. Returns 0 or errno. */
int peerload_unmap(int64_t address, int64_t nbytes);

/* Yama's ptrace_scope=1 lets only ancestors read a process; this permits any process of the same user to read this one.
   Returns 0 or errno (EINVAL where Yama isn't there, and nothing is needed). */
int peerload_permit_readers(void);
