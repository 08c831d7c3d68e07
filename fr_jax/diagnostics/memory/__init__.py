"""What a training method keeps in memory: counted from compiled steps, and by closed forms."""
