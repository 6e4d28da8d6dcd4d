"""What the Triton kernels share. Importing a module of this package needs Triton; importing the kernels does not."""
