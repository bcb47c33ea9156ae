"""Data parallel and fully sharded training as chapters 11 and 12 build them: small enough to read in one sitting.

For real runs `gpt2course.train.parallel` uses torch's own; tests hold both equal.
"""
