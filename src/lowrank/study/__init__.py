"""Programs that train or load models to tell something: the demo, the doctor, intrinsic dimension, ranks."""
