"""What operators ask of a running cluster."""
