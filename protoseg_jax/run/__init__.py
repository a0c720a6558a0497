"""What a run is: its phases, its folder, its checkpoints, its prototypes, what its config says."""
