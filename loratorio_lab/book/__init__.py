"""The picture book: a world of artists' drawings, 128 px, to train a toybox on. docs/lab/TOYBOX.md says how."""
