"""The rooms behind the five stages: each holds one concept, and imports `common` and rooms below it only."""
