"""What a method does and what it costs: simulated timelines, measured times of stages, memory, direction."""
