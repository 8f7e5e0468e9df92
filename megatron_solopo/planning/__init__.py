"""What a run would need, before there is a machine for it: memory, time, layouts. See docs/planning.md."""
