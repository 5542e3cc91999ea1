"""Data as people have it, made into what is trained: files → records → rows → tokens → batches. Never a model."""
