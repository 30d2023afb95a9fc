"""Where the values of a run are sent as they are logged: TensorBoard, Weights & Biases, MLflow; one file for each."""
