"""Causal language models of every family, as the study sees them. From the ground up:

`trace`: hooks that keep or change what passes through modules.
`attention`: attention written out, to be watched and changed, and for rows that share a prefix.
`architecture`: everything that differs between model families.
`passes`: one clean pass, and rows that go on from it.
`answer`: logits, the answer's probability and its gradient.
`verify`: what is compared at load, and by how much it may differ.
`language_model`: the model with its tokenizer; prompts and answers as tokens.
`pretrained`, `loading`: models by name.
"""
