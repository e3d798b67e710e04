"""An answer about an image from a bundle, with nothing installed but onnxruntime-genai.

python answer.py BUNDLE IMAGE QUESTION [GRAPH]
"""

import json
import sys

import onnxruntime_genai as og

folder, image, question, *graph = sys.argv[1:]
config = og.Config(folder)
if graph:  # another point of the frontier: one of the folder's decoder-*.onnx
    config.overlay(json.dumps({"model": {"decoder": {"filename": graph[0]}}}))
model = og.Model(config)
processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)

chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
inputs = processor(prompt, images=og.Images.open(image))

generator = og.Generator(model, og.GeneratorParams(model))
generator.set_inputs(inputs)
words = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(words.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
