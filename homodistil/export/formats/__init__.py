"""A stock checkpoint in the formats of inference engines (ONNX, int8 ONNX, OpenVINO, GGUF), checked against torch."""
