"""Pages outside of the device: the host tier, and the directory that outlives the process."""
