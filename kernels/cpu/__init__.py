"""The C++ kernels of the ``cpu`` backend. Importing this builds and loads nothing; ``build.load`` does."""
