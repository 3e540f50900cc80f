"""The backend made of our own C++ kernels."""
