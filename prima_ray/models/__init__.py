"""Image tower, text tower, heads, dual encoder, classifier, fusion models, and how they are saved."""
