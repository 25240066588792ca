"""What the kernel and the code around it agree on: static sizes, the kernel's memory, and a step as numbers."""
