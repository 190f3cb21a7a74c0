"""A mixture-of-experts MLP, ignorant of images and text."""
