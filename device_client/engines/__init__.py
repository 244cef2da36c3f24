"""The engines that run the small network: ONNX Runtime and torch."""
