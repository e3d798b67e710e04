"""The token that follows a prompt of text, from a bundle in plain ONNX Runtime, with one threshold for all groups.

python next_token.py BUNDLE TAU ID...
"""

import sys

import numpy as np
import onnxruntime as ort

folder, threshold, *ids = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
options.register_custom_ops_library(f"{folder}/libmodes_cpu.so")  # 1: the operator
embedding = ort.InferenceSession(f"{folder}/embedding.onnx", options, ["CPUExecutionProvider"])
decoder = ort.InferenceSession(f"{folder}/decoder.onnx", options, ["CPUExecutionProvider"])  # 2: weights lie beside the graph

tokens = np.array([ids], np.int64)
features = np.zeros((0, embedding.get_outputs()[0].shape[2]), np.float32)  # of images, from vision.onnx
feeds = {
    "inputs_embeds": embedding.run(None, {"input_ids": tokens, "image_features": features})[0],
    "attention_mask": np.ones_like(tokens),
    "position_ids": np.tile(np.arange(tokens.size), (3, 1, 1)),
    "input_ids": tokens,
    "tau": np.array([*[threshold] * 3, 0, 0], np.float32),  # text, vision, decode, audio, special; left out: the bundle's own
}
for value in decoder.get_inputs():
    if value.name.startswith("past_key_values."):
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
logits, kept_pairs, *cache = decoder.run(None, feeds)  # 3: the cache is the next call's past_key_values
print(logits[0, -1].argmax(), f"{logits[0, -1].max():.4f}", f"{kept_pairs.sum()} pairs kept")
