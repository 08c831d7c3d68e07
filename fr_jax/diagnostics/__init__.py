"""What a method does and what it costs: schedules and their timelines, measured times of stages."""
