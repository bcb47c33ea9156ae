"""One module a chapter: what an exercise must satisfy, and what to say when it does not."""
