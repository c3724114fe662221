"""A vision-language model as a guard needs it."""
