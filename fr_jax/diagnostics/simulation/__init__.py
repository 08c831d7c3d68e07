"""Schedules as data and the timelines that they give."""
