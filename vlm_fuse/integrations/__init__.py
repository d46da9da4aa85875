"""vlm_fuse inside the models that people train: each integration changes instances, never a library. Imported by name."""
