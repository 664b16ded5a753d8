"""What people write: recipes, and YAML and JSON files, read so that every mistake is named with its place.

recipe           the recipe; sections.py every field of it with its meaning and range
recipe_files     where recipes lie; overrides.py a.b=value on top of them
lr_schedule      the learning rate of every step
architectures    the models that a recipe may name; sparsity_keys.py what the sparse library refuses, by recipe keys
documents        YAML 1.2 and JSON, with the line of everything
complaints       what is wrong, all at once
"""
