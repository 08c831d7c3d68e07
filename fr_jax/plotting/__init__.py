"""Pictures in one style: curves, comparisons, Gantt charts and memory."""
