"""Other libraries' ways to load a checkpoint, taught to run ours."""
