"""What experiments of one kind share: their fields, data and schedules."""
