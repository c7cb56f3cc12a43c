"""From predictions to figures, and to a report that can be read without them."""
