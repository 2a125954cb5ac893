"""A comparison: its plan, its processes, what the terminal shows of it, and what its runs came to."""
