"""Native CPU kernels behind XLA's foreign function interface: attention, and the write of K and V into the pool.

XLA's own CPU compiler runs attention at less than half the speed and may copy a whole buffer to write a few rows
(docs/adr/0001). Without a C++ compiler plain XLA does the work.

It never chooses: the rooms above ask ``library`` whether there are kernels, and call them.

    compiler       compiles the C++ sources beside it, once per machine and user
    library        loads the library and registers its kernels with XLA
    attention.cc   paged attention (decode.h and extend.h; for decode.h dots.h, values.h, codes.h and prefetch.h; below
                   them problem.h, softmax.h, matmul.h, vectors.h, workers.h)
    scatter.cc     the write of new rows, quantised where the buffer is narrow
"""
