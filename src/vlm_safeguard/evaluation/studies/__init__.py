"""Studies: the modality gap, and forms of gate."""
