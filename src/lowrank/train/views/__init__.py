"""What is seen of a run beside its panel: its log read again, its curves, and the settings of one to come."""
