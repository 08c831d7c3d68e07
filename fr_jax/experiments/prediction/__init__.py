"""Predicts the speed of a step from measured stage times and compares it with the measured speed."""
