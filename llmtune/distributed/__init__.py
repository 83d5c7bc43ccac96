"""Who this process is and which piece of a tensor it holds: ranks, meshes, parallelisms, launching."""
