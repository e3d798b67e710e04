"""How the built-in model was made: tokenizer, packing, model, probes. Used by tools/train_reference.py only."""
