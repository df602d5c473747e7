"""Time against the floor and against peers."""
