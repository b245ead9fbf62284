"""A corpus that needs no download: rendered scenes of coloured shapes, with texts that are true of them.

`python -m data_pipelines.scenes --output=ROOT` writes the three sources, question sets with known answers and a
word-level tokenizer. scene.py says what can be in a picture, render.py draws it, language.py words it, stories.py
makes documents of it, corpus.py writes the datasets, preview.py shows them.
"""
