"""What layers need to know about a step, computed once per step."""
