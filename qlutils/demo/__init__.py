"""The bundled facts, text and models, made by `tests/demo_models`; see MODEL_CARD.md."""
