"""The proof of the bytes: what target ranks measured against what the seeds announced.

A seed announces a digest for each box it holds (`Claims`); a target rank measures the boxes it copied (`Measured`). Ranks
exchange their measurements as bytes and each computes the same `Verdict` from the same arguments, without I/O. A claim is
checked wherever measured boxes, of whichever ranks, tile its box exactly: their digests must add up to it.
"""
