"""Data sets: image sets from official files, TFDS or scikit-learn, downloads, and input pipelines."""
