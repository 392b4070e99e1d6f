"""Many workers from one configs.yaml."""
