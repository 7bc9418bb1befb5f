"""Token ids of prompts: as given, from an engine, or by the model's own tokenizer."""
