"""How good a model is, in numbers: likelihood of texts, agreement with reference vectors, answers to tasks."""
