"""The bases of experiments of one kind: their fields, data and schedules."""
