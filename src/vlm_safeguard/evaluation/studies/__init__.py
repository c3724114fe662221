"""Studies of why and where a guard works."""
