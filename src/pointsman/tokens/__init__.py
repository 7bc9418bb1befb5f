"""Token ids of prompts: as given, by the model's own tokenizer, or from an engine.

What comes out equals what the engine computes, or nothing comes out: a wrong id hides every block behind it.
"""
