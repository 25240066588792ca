"""What can be known of the GPU kernels with no GPU: they are compiled ahead of time, and the machine code is read."""
