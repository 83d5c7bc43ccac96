"""Where these were before `llmtune.testing` had them."""

from llmtune.testing.tiny import CHATML, CHATML_MARKED, tiny_config, tiny_model, tiny_model_folder, tiny_tokenizer

__all__ = ["CHATML", "CHATML_MARKED", "tiny_config", "tiny_model", "tiny_model_folder", "tiny_tokenizer"]
