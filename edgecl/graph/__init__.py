"""Step graphs: capture, rules, passes, cost and memory."""
