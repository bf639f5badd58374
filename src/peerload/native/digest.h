/* The digest of boxes of logical tensors; peerload/digest.py says what it is. */

/* out[i] = digest, in [0, 2^61 - 1), of box i: indices [start[i], stop[i]) of tensor[i], whose first element lies at
 * address[i] and whose elements are stride[i] bytes apart. start, stop, stride are [n][dims]; key[t], shape[t][dims] and
 * itemsize[t] (1, 2, 4 or 8 bytes) belong to tensor t. dims is at most 8. Boxes aren't empty; nothing is checked. */
void peerload_digest(int64_t n, int64_t dims, const uint64_t *key, const int64_t *shape, const int64_t *itemsize,
                     const int64_t *tensor, const int64_t *start, const int64_t *stop,
                     const int64_t *address, const int64_t *stride, uint64_t *out);
