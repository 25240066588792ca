"""A step on the device: the parcel, the compiled programs, the sampler."""
