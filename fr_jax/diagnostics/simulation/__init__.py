"""Schedules as data, and the timelines that follow from them."""
