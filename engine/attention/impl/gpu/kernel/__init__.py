"""The kernels: what runs on a streaming multiprocessor; imports only ``work`` from outside this folder."""
