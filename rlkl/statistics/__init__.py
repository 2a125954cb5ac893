"""Statistics of a comparison: pure functions of numpy and scipy, one a formula. Torch-free."""
